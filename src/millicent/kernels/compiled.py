"""Where compiled kernels are kept from one process to the next.

Triton compiles a kernel when it is first launched, for tens of seconds in all, and keeps the code in a folder of files. Each card,
torch, Triton and version of our kernels has a folder of its own here, so that what is outdated can be told by its name and removed.
None of our kernels tries several settings on a card and chooses: those choices would have to be kept too.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import tempfile
from pathlib import Path

import torch

from millicent.errors import MachineError, OutputError

_KERNELS = Path(__file__).parent
_CODE_DIGITS = 12


def keep_compiled(root: Path, device: torch.device) -> Path:
    """Have Triton keep what it compiles in a folder below `root`, and find there what it kept before; returns the folder.

    device: a CUDA device. Called before the first kernel is launched, and so once in a process; holds for the processes that it
    starts as well, as Triton sets TRITON_CACHE_DIR. Triton looks for what it kept by full paths: a moved root is compiled anew.
    Raises OutputError for a folder that cannot be written, MachineError for a card without Triton.
    """
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError as error:
        raise MachineError(
            f"The fast kernels need Triton, and {error.name} is not installed.",
            "Install torch's CUDA build, which brings Triton along, or draw with --plain.",
        ) from error
    name = torch.cuda.get_device_name(device)
    folder = root.absolute() / folder_name(name, torch.cuda.get_device_capability(device), torch.__version__, triton.__version__)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"Compiled kernels cannot be kept in {folder}: {error.strerror}.",
            "Make it writable, or name another folder in TRITON_CACHE_DIR.",
        ) from error
    triton.knobs.cache.dir = str(folder)
    return folder


def folder_name(card: str, capability: tuple[int, int], torch_version: str, triton_version: str) -> str:
    """Of all that compiled code depends on: "NVIDIA-H200-sm90-torch2.11.0+cu130-triton3.6.0-0123456789ab"."""
    parts = (card, f"sm{capability[0]}{capability[1]}", f"torch{torch_version}", f"triton{triton_version}", _code_digest())
    return re.sub(r"[^\w.+-]+", "-", "-".join(parts))


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(_KERNELS.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:_CODE_DIGITS]
