"""From rows to the images that still need making, in the manifest's order, with their pictures already on their way in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from millicent.catalog.attempts import Candidate, is_remote
from millicent.catalog.items import Item
from millicent.catalog.ledger import Known, Ledger
from millicent.catalog.manifest import BadRow, Row
from millicent.catalog.pictures import Pictures, asked_digest
from millicent.catalog.recipes import Recipe, expand_all

CHUNK = 256  # items that the ledger is asked about at once

OnBadRow = Callable[[BadRow], None]
OnPassed = Callable[[Item, Known], None]


def expand_rows(rows: Iterable[Row | BadRow], recipe: Recipe, on_bad_row: OnBadRow) -> Iterator[Item]:
    """Each row's variants; what is none goes to `on_bad_row`."""
    for item in expand_all(rows, recipe):
        if isinstance(item, BadRow):
            on_bad_row(item)
        else:
            yield item


def choose(items: Iterator[Item], ledger: Ledger, weights_sha256: str, out: str, on_passed: OnPassed) -> Iterator[Candidate]:
    """Those that are not finished or given up, as far as can be told without reading a picture; `on_passed` gets the others."""
    while chunk := list(islice(items, CHUNK)):
        known = ledger.known([item.output for item in chunk])
        for item in chunk:
            asked, found = asked_digest(item, weights_sha256), known.get(item.output)
            if found is not None and found.asked == asked:
                if is_finished(found, item, out) or found.state == "quarantined":
                    on_passed(item, found)
                    continue
                if found.state in ("done", "linked"):
                    ledger.forget(item.output)
            yield Candidate(item, asked, found)


def is_finished(known: Known, item: Item, out: str) -> bool:
    """Marked done, and its file still there; what lies in the cloud is taken at the ledger's word."""
    return known.state in ("done", "linked") and (is_remote(out) or (Path(out) / item.output).exists())


def read_ahead(candidates: Iterator[Candidate], pictures: Pictures, ahead: int) -> Iterator[Candidate]:
    """The same, each once the `ahead` that follow it are being read."""
    begun: deque[Candidate] = deque()
    for candidate in candidates:
        candidate.read = pictures.submit(candidate.item)
        begun.append(candidate)
        if len(begun) > ahead:
            yield begun.popleft()
    yield from begun
