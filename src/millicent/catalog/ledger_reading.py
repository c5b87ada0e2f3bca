"""The ledger's reading half: what has become of images, runs and attempts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from types import TracebackType
from typing import IO, Self

from millicent.catalog.ledger_database import Database
from millicent.catalog.ledger_rows import Image, Known, Run, Spent, State

PAGE = 1000


class LedgerReader:
    """The questions that a ledger answers. A context manager that closes it."""

    def __init__(self, url: str, database: Database, lock: IO[str] | None) -> None:
        self.url = url
        self._database = database
        self._lock = lock

    def known(self, outputs: Sequence[str]) -> dict[str, Known]:
        """What is known of these, by output; those that are not are left out."""
        if not outputs:
            return {}
        rows = self._database.execute(
            "SELECT output, state, asked, key, failures, rejects, rejects_forgiven,"
            " (SELECT count(*) FROM attempts WHERE attempts.output = images.output AND attempts.state = 'lost') FROM images"
            f" WHERE output IN ({', '.join('?' * len(outputs))})",
            outputs,
        )
        names = ("state", "asked", "key", "failures", "rejects", "rejects_forgiven", "lost")
        return {output: Known(**dict(zip(names, rest, strict=True))) for output, *rest in rows}

    def lost(self) -> list[tuple[str, int]]:
        """Attempts that were under way when their run was killed, as output and number; not of images that are being drawn now."""
        rows = self._database.execute(
            "SELECT a.output, a.number FROM attempts a JOIN images i ON i.output = a.output"
            " WHERE a.state = 'lost' AND i.state <> 'running'"
        )
        return [(output, number) for output, number in rows]

    def counts(self) -> dict[State, int]:
        """Images by state."""
        return dict(self._database.execute("SELECT state, count(*) FROM images GROUP BY state"))

    def images(self, state: State | None = None) -> Iterator[Image]:
        """All images, or those of one state, in the order of the manifest; a page at a time, so that memory stays flat."""
        names = tuple(Image.__dataclass_fields__)
        last: tuple[int, str] = (-1, "")
        only, values = ("", ()) if state is None else (" AND state = ?", (state,))
        while True:
            page = self._database.execute(
                f"SELECT {', '.join(names)} FROM images WHERE (row_line, output) > (?, ?){only}"
                f" ORDER BY row_line, output LIMIT {PAGE}",
                (*last, *values),
            )
            for row in page:
                fields = dict(zip(names, row, strict=True))
                usd = fields["usd"]
                fields |= {"pictures": tuple(json.loads(fields["pictures"])), "usd": None if usd is None else Decimal(usd)}
                image = Image(**fields)
                last = (image.row_line, image.output)
                yield image
            if len(page) < PAGE:
                return

    def runs(self) -> list[Run]:
        """All runs, the oldest first."""
        names = tuple(Run.__dataclass_fields__)
        rows = self._database.execute(f"SELECT {', '.join(names)} FROM runs ORDER BY started_at, id")
        made = [dict(zip(names, row, strict=True)) for row in rows]
        return [Run(**{**row, "usd_per_hour": None if (usd := row["usd_per_hour"]) is None else Decimal(usd)}) for row in made]

    def spent(self) -> list[Spent]:
        """The attempts that have ended, by run and outcome."""
        rows = self._database.execute(
            "SELECT run_id, state, count(*), sum(seconds) FROM attempts WHERE state <> 'running' GROUP BY run_id, state"
        )
        return [Spent(*row) for row in rows]

    def close(self) -> None:
        self._database.close()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
