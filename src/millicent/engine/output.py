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

    The pixels' own dtype holds until the scaling, as in pipeline.to_image, so that the same pixels give the same levels.
    """
    levels = ((pixels * 0.5 + 0.5).clamp(0, 1).float() * 255).round()
    return levels.permute(1, 2, 0).to(torch.uint8, memory_format=torch.contiguous_format)


def fetch(levels: Tensor) -> Image.Image:
    """levels (H, W, 3) uint8 -> a picture, by one copy into pinned memory; waits for that copy and what comes before it."""
    assert levels.dtype == torch.uint8
    if levels.device.type != "cuda":
        return Image.fromarray(levels.numpy())
    host = torch.empty(levels.shape, dtype=torch.uint8, pin_memory=True)  # torch keeps pinned blocks: cheap but at first
    host.copy_(levels, non_blocking=True)
    torch.cuda.current_stream(levels.device).synchronize()
    return Image.fromarray(host.numpy())  # copies: Pillow's RGB takes four bytes a pixel


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
