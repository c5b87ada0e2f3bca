"""What is kept between edits: by content, up to a number of bytes, the least recently used going first."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from PIL import Image
from torch import Tensor

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteBudgetCache(Generic[K, V]):
    """Least-recently-used cache of values that nobody changes, within a byte budget. For one thread at a time.

    budget_bytes: what the values may take together; with 0 nothing is kept.
    hits, misses: how many times `get` found a value, and how many times not. bytes: what the kept values take now.
    """

    def __init__(self, budget_bytes: int) -> None:
        assert budget_bytes >= 0
        self.budget_bytes = budget_bytes
        self.hits = 0
        self.misses = 0
        self.bytes = 0
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K) -> V | None:
        """The value, now the most recently used, or None."""
        if key not in self._kept:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: K, value: V, size_bytes: int) -> None:
        """Keep a value as the most recently used, in place of the key's old one. One larger than the budget is not kept."""
        assert size_bytes >= 0
        self._drop(key)
        if size_bytes > self.budget_bytes or self.budget_bytes == 0:
            return
        while self.bytes + size_bytes > self.budget_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[key] = (value, size_bytes)
        self.bytes += size_bytes

    def clear(self) -> None:
        """Let go of all values; the counts of hits and misses stay."""
        self._kept.clear()
        self.bytes = 0

    def _drop(self, key: K) -> None:
        if key in self._kept:
            self.bytes -= self._kept.pop(key)[1]


def image_key(image: Image.Image) -> str:
    """SHA-256 of a picture's mode, size and pixels, and its palette if it has one: the same picture from any file."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    if image.mode in ("P", "PA"):
        digest.update(bytes(image.getpalette("RGBA") or ()))
    digest.update(image.tobytes())
    return digest.hexdigest()


def size_bytes(*tensors: Tensor) -> int:
    """What the tensors' values take; a view counts its own values, not the memory that it keeps alive."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
