"""Findings as Markdown, to be pasted into a bug report: what the machine is, and nothing that names its user."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from millicent.hardware.findings import Finding, show_capability, show_gib
from millicent.hardware.machine import MIB, Machine
from millicent.hardware.needs import Needs


def write_report(machine: Machine, needs: Needs, findings: Iterable[Finding], version: str) -> str:
    """version: of millicent. The home folder is written as ~, and a card's UUID is left out."""
    rows = [
        "| "
        + " | ".join(cell.replace("|", "\\|") for cell in (each.level, each.name, each.found, each.wanted, each.command or ""))
        + " |"
        for each in findings
    ]
    lines = [
        f"## millicent preflight, {machine.checked}",
        "",
        *(f"- {name}: {value}" for name, value in _facts(machine, needs, version).items()),
        "",
        "| level | check | found | wanted | to do |",
        "|---|---|---|---|---|",
        *(_hide_home(row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _facts(machine: Machine, needs: Needs, version: str) -> dict[str, str]:
    limit = "" if machine.ram_limit_bytes is None else f", {show_gib(machine.ram_limit_bytes)} for the container"
    cuda = f" (CUDA {machine.cuda_driver[0]}.{machine.cuda_driver[1]})" if machine.cuda_driver else ""
    packages = {"torch": machine.torch, "Triton": machine.triton, "torchao": machine.torchao, "cuDNN": machine.cudnn_package}
    python = f"Python {machine.python}, {machine.cpu_count} processors{', container' if machine.container else ''}"
    facts = {
        "millicent": f"{version}, {needs.model} in {needs.format}",
        "system": f"{machine.platform} {machine.arch}, {python}",
        "memory": f"{show_gib(machine.ram_bytes)}{limit}, {show_gib(machine.ram_available_bytes)} free",
        "driver": f"{machine.driver or 'none'}{cuda}",
        "packages": ", ".join(f"{name} {found or 'none'}" for name, found in packages.items()),
    }
    for card in machine.cards:
        capability = show_capability(card.capability) if card.capability else "unknown"
        memory = f"{show_gib(card.free_mib * MIB)} free of {card.memory_mib} MiB"
        facts[f"card {card.index}"] = f"{card.name}, compute capability {capability}, {memory}"
    return facts


def _hide_home(row: str) -> str:
    home = str(Path.home())
    hidden = row if home == "/" else re.sub(rf"{re.escape(home)}(?=[/\s]|$)", "~", row)
    return hidden.replace("\n", " ")
