"""PyTorch's allocator of a card's memory, for the whole life of the process: how much it may take, and how it takes it."""

from __future__ import annotations

import functools
import logging
import os
import platform
import sys

import torch

from millicent.engine.weighing import CONTEXT_BYTES

_LOG = logging.getLogger("millicent")
_USERS_OWN = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def limit_memory(device: torch.device, limit_bytes: int) -> None:
    """Let this process take no more of a card than that, CUDA's own memory included."""
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    number = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(1, limit_bytes - CONTEXT_BYTES) / total_bytes), number)


@functools.cache
def let_segments_grow(device: torch.device) -> None:
    """Have it map pages where it needs them, so that little is lost between its pieces: PyTorch's expandable segments.

    Settings of the user's own stay. Pieces stay of fixed sizes where the driver maps no pages, as for some virtual cards, which the
    log tells of; on Windows, for which PyTorch has none; under WSL, whose driver fails when many are mapped; and where this process
    sees several cards, as emptying the allocator then takes pages from work that is still under way (pytorch issue 196258).
    """
    if sys.platform == "win32" or _is_wsl() or any(os.environ.get(name) for name in _USERS_OWN):
        return
    if torch.cuda.device_count() > 1:
        _LOG.warning("Several cards are visible, so that more of their memory may lie idle. Let CUDA_VISIBLE_DEVICES name one.")
        return
    _set("expandable_segments:True")
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)):  # of which it has no piece yet, so that it asks the driver for one
            torch.empty(1, device=device)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):  # of another call of the driver's
            raise
        _set("expandable_segments:False")
        _LOG.warning("The card's driver maps no pages (%s), so that more of its memory may lie idle.", str(error).split("\n")[0])


def _is_wsl() -> bool:
    """pytorch issue 192330, of NVIDIA's driver before R615; and "device not ready" once gigabytes are mapped, as others report."""
    return "microsoft" in platform.release().lower()


def _set(settings: str) -> None:
    """PyTorch reads the environment too early for this, and has no public name for it; the newer one is not in all versions."""
    put = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    put(settings)
