"""Pre-flight's first stage: every check on a machine, none of which needs torch, a card or the network."""

from __future__ import annotations

from collections.abc import Callable

from millicent.hardware import card_checks, host_checks, software_checks
from millicent.hardware.findings import Finding
from millicent.hardware.machine import Machine
from millicent.hardware.needs import Needs

Check = Callable[[Machine, Needs], Finding | None]

CHECKS: tuple[Check, ...] = (
    host_checks.check_system,
    card_checks.check_card,
    card_checks.check_name,
    card_checks.check_mig,
    card_checks.check_format,
    software_checks.check_driver,
    software_checks.check_torch,
    software_checks.check_wheel,
    software_checks.check_cudnn,
    software_checks.check_triton,
    software_checks.check_compiler,
    software_checks.check_recipe,
    software_checks.check_torchao,
    card_checks.check_memory,
    card_checks.check_processes,
    card_checks.check_pcie,
    card_checks.check_power,
    card_checks.check_clocks,
    host_checks.check_ram,
    host_checks.check_pinned,
    host_checks.check_models_disk,
    host_checks.check_hub_cache,
    host_checks.check_temporary_disk,
    host_checks.check_kernel_cache,
    host_checks.check_shm,
)


def check_machine(machine: Machine, needs: Needs) -> tuple[Finding, ...]:
    """What each check finds, in their order; those that do not apply say nothing. The same machine gives the same findings."""
    return tuple(finding for check in CHECKS if (finding := check(machine, needs)) is not None)
