"""One image's way through a run: which seed it is drawn with, when it is tried again, and when it is given up."""

from __future__ import annotations

import random
from concurrent.futures import Future
from dataclasses import dataclass

from PIL import Image

from millicent.catalog.items import Item, derive_seed
from millicent.catalog.ledger import Known, Work
from millicent.errors import InputError, MillicentError

MOST_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class Read:
    """An item's pictures, opened. sha256s: of their files. found_sha256: of an output that stands there already, with this key.

    mask: in the last picture's size.
    """

    key: str
    sha256s: tuple[str, ...]
    images: tuple[Image.Image, ...]
    found_sha256: str | None
    mask: Image.Image | None = None


@dataclass(slots=True)
class Candidate:
    """An image that is to be made.

    failures, rejects: so far, in earlier runs too; `forgiven` of the rejects count no more. alone: nothing else is to be in flight
    beside it, as one of those it was in flight with broke the editor. key: None until its pictures are read.
    """

    item: Item
    asked: str
    known: Known | None
    read: Future[Read] | None = None
    failures: int = 0
    rejects: int = 0
    forgiven: int = 0
    alone: bool = False
    key: str | None = None
    attempt: int = 0
    seed: int = 0

    @property
    def work(self) -> Work:
        item = self.item
        return Work(
            output=item.output,
            row_line=item.row_line,
            row_id=item.row_id,
            variant=item.variant,
            pictures=item.pictures,
            prompt=item.prompt,
            asked=self.asked,
            key=self.key,
        )

    def remember(self, key: str) -> None:
        """The pictures have been read. What earlier runs met counts only where they met it with the same work."""
        if self.key is None and self.known is not None and self.known.key == key:
            self.failures, self.rejects = self.known.failures, self.known.rejects
            self.forgiven = self.known.rejects_forgiven
        elif self.key not in (None, key):
            self.failures = self.rejects = self.forgiven = 0
        self.key = key
        self.seed = seed_of(self.item, self.rejects)


def seed_of(item: Item, rejects: int) -> int:
    """The item's own seed, and after each reject another, the same in every run."""
    return item.seed if rejects == 0 else derive_seed(item.row_id, item.variant, rejects)


def backoff_s(failures: int, base_s: float) -> float:
    """Doubled with each failure, up to a minute, give or take half: so that many who failed together do not come back together."""
    return min(MOST_BACKOFF_S, base_s * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.5)


def is_remote(location: str) -> bool:
    return "://" in location


def can_retry(error: Exception) -> bool:
    """Whether trying again may help: what was asked for stays wrong."""
    return not isinstance(error, InputError)


def told(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, MillicentError):
        return f"{error.message} {error.fix}"
    return " ".join(f"{type(error).__name__}: {error}".split())
