"""Host memory as a container has it: /proc/meminfo shows the host's, the control groups (cgroup v1 and v2) the container's.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# version 1 writes the largest multiple of a page for "no limit", version 2 the word max
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Memory:
    """total_bytes: the host's. limit_bytes: the tightest of our control groups, None for none. available_bytes: within both."""

    total_bytes: int
    limit_bytes: int | None
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """One control group's limit, and what is left of it: page cache that the kernel would give back counts as free."""

    limit_bytes: int
    left_bytes: int


def read_memory(root: Path = Path("/")) -> Memory:
    """root: of the file system, for tests. Where there is no /proc, as on macOS, all is 0."""
    total, available = _read_meminfo(root / "proc/meminfo")
    groups = list(_read_groups(root))
    limits = [group.limit_bytes for group in groups if group.limit_bytes < total]
    return Memory(total, min(limits, default=None), min([available, *(max(0, group.left_bytes) for group in groups)]))


def free_host_bytes() -> int:
    """What can be had without swapping, within the container's limit; as much as can be on systems that do not say."""
    memory = read_memory()
    return memory.available_bytes if memory.total_bytes else sys.maxsize


def _read_meminfo(path: Path) -> tuple[int, int]:
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB", _read_text(path) or "", re.MULTILINE)}
    total = kib.get("MemTotal", 0)
    # a microVM's kernel may leave out MemAvailable
    return total * 1024, kib.get("MemAvailable", kib.get("MemFree", total)) * 1024


def _read_groups(root: Path) -> Iterator[Group]:
    """The limits of our group and of those above it."""
    for line in (_read_text(root / "proc/self/cgroup") or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _read_upwards(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            folder = root / "sys/fs/cgroup/memory"
            yield from _read_upwards(folder, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _read_upwards(folder: Path, path: str, limit_file: str, used_file: str, prefix: str) -> Iterator[Group]:
    below = folder / path.lstrip("/")
    # in a container the path may be the host's, of which the container sees the root alone
    for group in (below, *(each for each in below.parents if each.is_relative_to(folder))):
        limit, used = _read_number(group / limit_file), _read_number(group / used_file)
        if limit is not None and used is not None:
            # files that are mapped, as weights are, count as active once they have been read; memory without a file is in neither
            cache = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", _read_text(group / "memory.stat") or "", re.MULTILINE)
            yield Group(limit, limit - used + sum(map(int, cache)))


def _read_number(path: Path) -> int | None:
    text = (_read_text(path) or "").strip()
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT_BYTES else None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
