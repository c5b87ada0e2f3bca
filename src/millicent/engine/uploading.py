"""Weights from mapped files to a card at the speed of its link.

A copy straight from memory that is not page-locked goes through a small buffer of the driver's, filled by one thread. Here
all of PyTorch's threads fill large page-locked buffers in turn, and while one is filled the card fetches another by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from millicent.checkpoint.folder import FETCH_AGAIN
from millicent.engine.host_memory import HostMemory, allocate
from millicent.errors import CheckpointError

# a tensor and where it goes -> the same values there
Upload = Callable[[Tensor, torch.device], Tensor]

BUFFERS = 3  # one is filled, one is on its way, and one may be late
BUFFER_BYTES = 64 << 20  # the largest of a block's matrices in one piece, in 8 bits: 38 MB
LEAST_BYTES = 1 << 20  # below, the driver's own way costs no more than a few microseconds


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor itself where it is there already."""
    return tensor.to(device)


class SpecialCodesError(CheckpointError):
    """A card has found FP8 codes that are no numbers; which layer's, it cannot say."""


@contextmanager
def uploading(device: torch.device) -> Iterator[Upload]:
    """While it is open: a function that copies tensors to devices, to a CUDA device by way of page-locked buffers.

    They are allocated at the first tensor that they are for, and given back at the end, when all copies are done. What the function
    returns is ready for work on the device's current stream. For one thread. FP8 codes are looked through on the card, which reads
    them anyway, and much faster.
    The function raises MachineError where the host has no memory for the buffers; SpecialCodesError at the end, for a code that is
    no number.
    """
    if device.type != "cuda":
        yield move
        return
    staging = _Staging(device)
    try:
        yield staging.upload
        staging.check()
    finally:
        staging.close()


@dataclass(slots=True)
class _Buffer:
    """A page-locked piece of memory. sent: an event after the last copy from it."""

    memory: Tensor
    sent: torch.cuda.Event | None = None


class _Staging:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: HostMemory | None = None
        self._buffers: list[_Buffer] = []
        self._found: list[Tensor] = []

    def upload(self, tensor: Tensor, device: torch.device) -> Tensor:
        uploaded = self._bring(tensor, device)
        if tensor.dtype == torch.float8_e4m3fn and uploaded.device.type == self._device.type:
            self._found.append(((uploaded.view(torch.uint8) & 0x7F) == 0x7F).any())
        return uploaded

    def check(self) -> None:
        if self._found and bool(torch.stack(self._found).any()):
            raise SpecialCodesError("The weights hold FP8 codes that are no numbers.", FETCH_AGAIN)

    def _bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        if device.type != self._device.type or tensor.device.type != "cpu" or tensor.nbytes < LEAST_BYTES or tensor.is_pinned():
            return move(tensor, device)
        if self._memory is None:
            self._memory = allocate(BUFFERS * BUFFER_BYTES, None, self._device)
            self._buffers = [_Buffer(memory) for memory in self._memory.tensor.split(BUFFER_BYTES)]
        uploaded = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        pieces = (_bytes_of(each).split(BUFFER_BYTES) for each in (tensor.detach().contiguous(), uploaded))
        for source, target in zip(*pieces, strict=True):
            self._send(source, target)
        return uploaded

    def _send(self, source: Tensor, target: Tensor) -> None:
        """Both (bytes,) uint8, of at most a buffer's size."""
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        if buffer.sent is not None:
            buffer.sent.synchronize()
        staged = buffer.memory[: len(source)]
        staged.copy_(source)  # a share for each of PyTorch's threads
        target.copy_(staged, non_blocking=True)
        buffer.sent = _mark(target.device)

    def close(self) -> None:
        self._buffers.clear()
        if self._memory is not None:
            self._memory.close()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _mark(device: torch.device) -> torch.cuda.Event:
    """An event after all that the device's current stream was given so far."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
