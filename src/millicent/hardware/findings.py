"""Findings: what one check found, what is wanted, and the command that mends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """level: "error" where an edit will not work, "warning" where it will be slow, dear or may fail.

    name: of the check. found, wanted: in words. command: to be typed, or to be done; None where all is well or nothing helps.
    """

    level: Level
    name: str
    found: str
    wanted: str = ""
    command: str | None = None


def exit_code(findings: Iterable[Finding]) -> int:
    """0 where all is well, 1 with warnings, 2 where an edit will not work."""
    levels = {finding.level for finding in findings}
    return 2 if "error" in levels else 1 if "warning" in levels else 0


def ok(name: str, found: str, wanted: str = "") -> Finding:
    return Finding(level="ok", name=name, found=found, wanted=wanted)


def warning(name: str, found: str, wanted: str, command: str | None = None) -> Finding:
    return Finding(level="warning", name=name, found=found, wanted=wanted, command=command)


def error(name: str, found: str, wanted: str, command: str | None = None) -> Finding:
    return Finding(level="error", name=name, found=found, wanted=wanted, command=command)


def show_gb(size_bytes: float) -> str:
    """As disks and downloads are counted, in powers of ten."""
    return f"{size_bytes / 1e9:.1f} GB"


def show_gib(size_bytes: float) -> str:
    """As memory is counted, in powers of two."""
    return f"{size_bytes / (1 << 30):.1f} GiB"


def show_capability(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
