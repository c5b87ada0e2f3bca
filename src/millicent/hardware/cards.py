"""The cards of this machine, through NVIDIA's management library: no CUDA context, nothing allocated. The one home of pynvml.

Any call may be refused, by a virtual card, under WSL, or for a MIG slice; what it would have told is None then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from millicent.hardware.machine import MIB, Card, Process
from millicent.hardware.memory import Memory

# bits of nvml.h's nvmlClocksEventReason... that slow a card down under load; an idle card is none of them
THROTTLES = {
    0x08: "a hardware slowdown",
    0x20: "heat, by software",
    0x40: "heat, by hardware",
    0x80: "the power supply's brake",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the driver told. none_because: in words, where there are no cards."""

    cards: tuple[Card, ...] = ()
    driver: str | None = None
    cuda_driver: tuple[int, int] | None = None
    none_because: str | None = None


def read_cards(host: Memory, visible: str | None = None) -> Seen:
    """The cards, in the driver's order. visible: as CUDA_VISIBLE_DEVICES has it, None where it is not set.

    host: the memory of a card that has none of its own, as GB10, for which the driver tells no size.
    """
    try:
        import pynvml as nvml  # type: ignore[import-untyped]
    except ImportError:
        return Seen(none_because="the package nvidia-ml-py is not installed, so the driver cannot be asked")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Seen(none_because=f"NVIDIA's driver does not answer: {error}")
    try:
        return _read_all(nvml, host, visible)
    finally:
        _ask(nvml, nvml.nvmlShutdown)


def _read_all(nvml: Any, host: Memory, visible: str | None) -> Seen:
    driver, cuda = _ask(nvml, nvml.nvmlSystemGetDriverVersion), _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    cuda_driver = (cuda // 1000, cuda % 1000 // 10) if cuda else None
    cards = tuple(
        card
        for index in range(_ask(nvml, nvml.nvmlDeviceGetCount) or 0)
        if (handle := _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)) is not None
        for card in _read_device(nvml, host, handle, index)
    )
    shown = choose_visible(cards, visible)
    because = None
    if not cards:
        because = "NVIDIA's driver runs, and shows no card that can be used; one in MIG mode wants a slice (nvidia-smi mig -cgi)"
    elif not shown:
        because = f"CUDA_VISIBLE_DEVICES={visible} hides {'the card' if len(cards) == 1 else f'all {len(cards)} cards'}"
    return Seen(shown, driver, cuda_driver, because)


def choose_visible(cards: tuple[Card, ...], visible: str | None) -> tuple[Card, ...]:
    """Those that CUDA_VISIBLE_DEVICES names, by number or the beginning of a UUID, in its order, up to the first unknown one."""
    if visible is None:
        return cards
    chosen: list[Card] = []
    for asked in visible.split(","):
        name = asked.strip()
        found = [
            card
            for card in cards
            if (name.isdigit() and card.index == int(name)) or (name and card.uuid and card.uuid.startswith(name))
        ]
        if not found:
            break
        chosen.extend(card for card in found if card not in chosen)
    return tuple(chosen)


def _read_device(nvml: Any, host: Memory, handle: Any, index: int) -> Iterator[Card]:
    """The card, or its slices where it is cut into some; nothing where it is to be cut and is not, as CUDA refuses it then."""
    slices = [
        part
        for number in range(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
        if (part := _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)) is not None
    ]
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    is_uncut = mode is not None and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE and not slices
    for part in [] if is_uncut else slices or [handle]:
        yield _read_card(nvml, host, handle, part, index)


def _read_card(nvml: Any, host: Memory, handle: Any, part: Any, index: int) -> Card:
    """part: what memory, name and processes are those of: a slice, or the whole card, which tells all else."""

    def ask(call: Callable[..., Any], of: Any = handle) -> Any:
        return _ask(nvml, call, of)

    memory = ask(nvml.nvmlDeviceGetMemoryInfo, part)
    total, free = (memory.total, memory.free) if memory else (host.total_bytes, host.available_bytes)
    # asked for the part first: a container that has a slice alone may not ask for the card
    name = ask(nvml.nvmlDeviceGetName, part) or ask(nvml.nvmlDeviceGetName)
    capability = ask(nvml.nvmlDeviceGetCudaComputeCapability) or ask(nvml.nvmlDeviceGetCudaComputeCapability, part)
    limit, default = ask(nvml.nvmlDeviceGetPowerManagementLimit), ask(nvml.nvmlDeviceGetPowerManagementDefaultLimit)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
    return Card(
        index=index,
        name=_text(name) or "an NVIDIA card without a name",
        uuid=_text(ask(nvml.nvmlDeviceGetUUID, part)),
        capability=(int(capability[0]), int(capability[1])) if capability else None,
        memory_mib=total // MIB,
        free_mib=free // MIB,
        mig=part is not handle or bool(ask(nvml.nvmlDeviceIsMigDeviceHandle)),
        power_limit_w=None if limit is None else limit / 1000,
        power_default_w=None if default is None else default / 1000,
        pcie_generation=ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration),
        pcie_lanes=ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
        pcie_max_generation=ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_max_lanes=ask(nvml.nvmlDeviceGetMaxPcieLinkWidth),
        processes=_read_processes(nvml, part),
        clocks_throttled=tuple(words for bit, words in THROTTLES.items() if reasons & bit),
    )


def _read_processes(nvml: Any, part: Any) -> tuple[Process, ...]:
    """Those that compute, and those that draw, a desktop's for instance; each once."""
    running = [
        process
        for call in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses)
        for process in _ask(nvml, call, part) or ()
    ]
    found = {process.pid: process for process in reversed(running)}
    return tuple(
        Process(
            pid=pid,
            used_mib=None if process.usedGpuMemory is None else process.usedGpuMemory // MIB,
            name=_text(_ask(nvml, nvml.nvmlSystemGetProcessName, pid)),
        )
        for pid, process in sorted(found.items())
    )


def _ask(nvml: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where the driver does not give it: not supported, not permitted, not known to an old driver."""
    try:
        return call(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
