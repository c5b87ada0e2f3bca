"""Input pictures on their way in: fetched, hashed and opened in threads, each once for all variants of its row."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from PIL import Image

from millicent.catalog import storage
from millicent.catalog.attempts import Read, is_remote
from millicent.catalog.items import Item, item_key
from millicent.catalog.rows import hide_query
from millicent.errors import InputError, MillicentError
from millicent.images import flatten, open_image, read_metadata

KEPT = 4  # pictures that stay open beside those in use: the variants of one row follow each other

ReadBytes = Callable[[str], bytes]


class Pictures:
    """A context manager over the reading threads. out: the output root, where finished work may stand already."""

    def __init__(self, read_bytes: ReadBytes, out: str, weights_sha256: str, threads: int) -> None:
        self._read_bytes, self._out, self._weights_sha256 = read_bytes, out, weights_sha256
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Future[tuple[str, Image.Image]]] = OrderedDict()

    def submit(self, item: Item) -> Future[Read]:
        return self._pool.submit(self._read, item)

    def _read(self, item: Item) -> Read:
        opened = [self._open(location) for location in item.pictures]
        sha256s = tuple(sha256 for sha256, _ in opened)
        images = tuple(image for _, image in opened)
        mask, mask_sha256s = self._open_mask(item.mask, images[-1]) if item.mask is not None else (None, ())
        # a picture that was accepted under one mask may not be under another
        key = item_key((*sha256s, *mask_sha256s), item, self._weights_sha256)
        return Read(key, sha256s, images, find_finished(self._out, item.output, key), mask)

    def _open_mask(self, location: str, picture: Image.Image) -> tuple[Image.Image, tuple[str]]:
        """The mask, and what stands for it in the key. Raises InputError for one of another size, or without black."""
        sha256, mask = self._open(location)
        if mask.size != picture.size:
            raise InputError(
                f"The mask {hide_query(location)} has {mask.width}x{mask.height} pixels, and its picture "
                f"{picture.width}x{picture.height}.",
                "Give a mask in the picture's own size.",
            )
        levels = mask.convert("L")
        if levels.getextrema()[0] != 0:  # as a white shape on a transparent ground is, once that is laid on white
            raise InputError(
                f"The mask {hide_query(location)} is black nowhere, so that nothing would be checked by it.",
                "Paint what must stay black, without transparency, or leave the mask out.",
            )
        return levels, (f"mask {sha256}",)

    def _open(self, location: str) -> tuple[str, Image.Image]:
        with self._lock:
            kept = self._kept.get(location)
            mine: Future[tuple[str, Image.Image]] = Future()
            if kept is None:
                self._kept[location] = mine
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        if kept is not None:
            return kept.result()
        try:
            data = self._read_bytes(location)
            mine.set_result((hashlib.sha256(data).hexdigest(), flatten(open_image(data, name=location))))
        except Exception as error:  # whoever waits for it is told too
            with self._lock:  # the next one tries anew
                if self._kept.get(location) is mine:
                    del self._kept[location]
            mine.set_exception(error)
        return mine.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)


def find_finished(out: str, name: str, key: str) -> str | None:
    """The SHA-256 of an output that holds this key: it was written whole, by a run that could not say so. None for any other."""
    if not storage.exists(out, name):
        return None
    data = storage.read_output(out, name)
    try:
        metadata = read_metadata(data)
    except (MillicentError, ValueError, KeyError):  # a picture of someone else's; writing replaces it
        return None
    return hashlib.sha256(data).hexdigest() if metadata is not None and metadata.get("key") == key else None


def asked_digest(item: Item, weights_sha256: str) -> str:
    """What is known of an item without reading its pictures: where they lie, and of a local file its size and time of change."""
    seen = [[location, *_stat(location)] for location in item.pictures]
    if item.mask is not None:
        seen.append(["mask", item.mask, *_stat(item.mask)])  # named: as a further reference it would be other work
    return hashlib.sha256(json.dumps([weights_sha256, item.settings_json(), seen]).encode()).hexdigest()


def _stat(location: str) -> tuple[int, int]:
    if is_remote(location):
        return (0, 0)
    try:
        found = Path(location).stat()
    except (OSError, ValueError):  # reading it says why
        return (0, 0)
    return (found.st_size, found.st_mtime_ns)
