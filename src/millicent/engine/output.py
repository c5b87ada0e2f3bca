"""Pictures off the card and onto disk, while the next one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor

from millicent.images import save_image

T = TypeVar("T")


def to_uint8(pixels: Tensor) -> Tensor:
    """pixels (3, H, W) in [-1, 1] -> levels (H, W, 3) uint8 on the same device, rounded to the nearest of 256.

    The pixels' own dtype holds until the scaling, as in diffusers, so that the same pixels give the same levels.
    """
    levels = ((pixels * 0.5 + 0.5).clamp(0, 1).float() * 255).round()
    return levels.permute(1, 2, 0).to(torch.uint8, memory_format=torch.contiguous_format)


class Sent:
    """Tensors on their way off a card: the copies are in the current stream's queue, and the host has not waited for them.

    `wait` may be called from another thread than the one that drew.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensors
        device = tensors[0].device
        if device.type == "cuda":
            # torch keeps pinned blocks: cheap but at first
            self._host = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            # waiting for it lets other threads run, and does not spin
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> tuple[Tensor, ...]:
        """The same tensors on the host, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Writer:
    """Saves pictures in threads, so that drawing goes on meanwhile.

    A context manager: leaving it waits for all that was submitted and raises the first error, by order of submission. An
    error of the body goes first; what was submitted is still finished.
    """

    def __init__(self, threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="writer")
        self._pending: list[Future[Any]] = []

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Call `work` in one of the threads."""
        # those done are let go, or their results would pile up; those that failed are kept to be raised
        self._pending = [future for future in self._pending if not future.done() or future.exception() is not None]
        future = self._pool.submit(work)
        self._pending.append(future)
        return future

    def save(self, image: Image.Image, path: Path, metadata: Mapping[str, Any] | None = None) -> Future[None]:
        """Encode and write a picture, as `images.save_image` does; the future, or leaving, raises its OutputError."""
        return self.submit(lambda: save_image(image, path, metadata))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        wait(self._pending)
        self._pool.shutdown()
        if error is not None:
            return
        for future in self._pending:
            future.result()
