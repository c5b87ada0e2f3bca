"""Read this machine: its packages without importing them, its folders, and, through cards.py, its cards."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from millicent.hardware.cards import read_cards
from millicent.hardware.machine import Disk, Machine
from millicent.hardware.memory import read_memory

# one wheel has more than one name: on the index of PyTorch's nightly builds, and on Windows
TRITON = ("triton", "pytorch-triton", "triton-windows")
CUDNN = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu11")
_CONTAINER = re.compile(r"docker|kubepods|containerd|lxc|libpod|podman")


def probe(folders: Mapping[str, Path], visible: str | None = None, compiler: str | None = None) -> Machine:
    """This machine, read in some tenths of a second; nothing is allocated on a card.

    folders: those that a download or an edit fills, by purpose; they need not exist yet.
    visible: as CUDA_VISIBLE_DEVICES has it, None where it is not set: which cards there are for us, and in which order.
    compiler: as CC has it, None where it is not set.
    """
    memory = read_memory()
    seen = read_cards(memory, visible)
    torch, torch_cuda = read_torch()
    return Machine(
        checked=datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        platform=platform.system(),
        arch=platform.machine(),
        ram_bytes=memory.total_bytes,
        ram_limit_bytes=memory.limit_bytes,
        ram_available_bytes=memory.available_bytes,
        pinned_limit_bytes=read_pinned_limit(),
        cpu_count=count_cpus(),
        container=is_container(),
        cards=seen.cards,
        no_cards_because=seen.none_because,
        driver=seen.driver,
        cuda_driver=seen.cuda_driver,
        torch=torch,
        torch_cuda=torch_cuda,
        cudnn_package=next((f"{name} {found}" for name in CUDNN if (found := installed(name))), None),
        triton=next((found for name in TRITON if (found := installed(name))), None),
        torchao=installed("torchao"),
        c_compiler=find_compiler(compiler),
        shm_bytes=read_shm(),
        disks=tuple(read_disk(purpose, path) for purpose, path in folders.items()),
    )


def installed(package: str) -> str | None:
    """The version of a package that is installed, from its metadata; it is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_torch() -> tuple[str | None, str | None]:
    """The version of torch with its suffix, and its CUDA, from torch/version.py as a text; None and None without torch.

    The wheel's metadata leaves out the suffix on PyPI, where the file has it.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return installed("torch"), None
    found = re.search(r"^__version__\s*(?::[^=\n]*)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda\s*(?::[^=\n]*)?=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else installed("torch"), cuda[1] if cuda else None


def find_compiler(asked: str | None) -> str | None:
    """The C compiler that Triton would take (triton/runtime/build.py): CC's and no other, or gcc, or clang."""
    return next((name for name in ((asked,) if asked else ("gcc", "clang")) if shutil.which(name)), None)


def read_disk(purpose: str, path: Path) -> Disk:
    """The free room where `path` would be made: in the first of its parents that exists."""
    whole = path.absolute()
    standing = next(each for each in (whole, *whole.parents) if _is_there(each))
    return Disk(
        path=str(path), purpose=purpose, free_bytes=shutil.disk_usage(standing).free, filesystem=str(standing.stat().st_dev)
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # below a folder that is another user's
        return False


def read_shm(path: Path = Path("/dev/shm")) -> int | None:
    """The size of the memory that processes share; None where there is none."""
    return shutil.disk_usage(path).total if path.is_dir() else None


def read_pinned_limit() -> int | None:
    """RLIMIT_MEMLOCK. NVIDIA's driver on Linux locks memory beyond it; under WSL, and in some containers, it counts."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def count_cpus() -> int:
    """Those that this process may run on, rather than the host's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_container(root: Path = Path("/")) -> bool:
    """By the marks that Docker, Podman and Kubernetes leave. root: of the file system, for tests."""
    if (root / ".dockerenv").exists() or (root / "run/.containerenv").exists():
        return True
    try:
        return bool(_CONTAINER.search((root / "proc/1/cgroup").read_text(encoding="utf-8")))
    except OSError:
        return False
