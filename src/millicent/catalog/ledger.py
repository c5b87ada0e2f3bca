"""The ledger: what has become of each image, what each attempt took, and what every run cost.

One class speaks to SQLite (one writer, others are refused) and to PostgreSQL (several). Every method that writes is one
transaction: a process killed anywhere leaves a ledger that says what was so. A run that ended without saying so is buried by the
next one: its attempts under way become "lost", and share what it had spent since its last image.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self

from millicent.catalog import ledger_sqlite
from millicent.catalog.migrations import MIGRATIONS
from millicent.errors import InputError

State = Literal["planned", "running", "done", "linked", "rejected", "failed", "quarantined"]
AttemptState = Literal["running", "done", "rejected", "failed", "lost"]

LEASE_S = 120.0  # a writer that is not heard of for so long has lost what it was drawing
PAGE = 1000
STAGES = ("prepare_s", "encode_s", "denoise_s", "decode_s", "check_s", "write_s")
POSTGRES = ("postgresql://", "postgres://")

_HOUR_S = Decimal(3600)
_NANO = Decimal("1e-9")


class Database(Protocol):
    """What the ledger asks of a dialect. now: SQL for seconds on the clock that all writers share."""

    @property
    def shared(self) -> bool: ...
    @property
    def now(self) -> str: ...
    def execute(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]: ...
    def transaction(self) -> AbstractContextManager[None]: ...
    def lock(self, name: str) -> None: ...
    def has_table(self, name: str) -> bool: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One image to make. pictures: locations. asked: see migrations.py. key: None where the pictures cannot be read."""

    output: str
    row_line: int
    row_id: str
    variant: str
    pictures: tuple[str, ...]
    prompt: str
    asked: str
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the ledger says of an image. lost: attempts at it that were under way when their run was killed."""

    state: State
    asked: str
    key: str | None
    failures: int
    rejects: int
    rejects_forgiven: int
    lost: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What came of asking for an image.

    "mine": draw it; attempt is its number. "link": `original` is the same work, and done. "done": another run has finished it.
    "held": another run is drawing it, or the same work.
    """

    kind: Literal["mine", "link", "done", "held"]
    attempt: int = 0
    original: str = ""
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The end of an attempt. state: of the image from now on. seconds: of the run, that this attempt is billed.

    stages: seconds of each stage that was reached, by the names in STAGES. elapsed_s: of the run, when the attempt came out.
    """

    state: State
    attempt_state: AttemptState
    seconds: float
    elapsed_s: float
    stages: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A row of the ledger, for status, export and gallery. usd: of all attempts; None where no run that drew it had a price."""

    output: str
    row_line: int
    row_id: str
    variant: str
    pictures: tuple[str, ...]
    prompt: str
    key: str | None
    state: State
    attempts: int
    seed: int | None
    seconds: float
    usd: Decimal | None
    linked_to: str | None
    sha256: str | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A row of the ledger: one process that drew. started_at, ended_at: UTC, ISO 8601; ended_at is None while it runs."""

    id: str
    host: str
    pid: int
    started_at: str
    loading_s: float
    elapsed_s: float
    cards: int
    usd_per_hour: Decimal | None
    ended_at: str | None
    stopped: str


@dataclass(frozen=True, slots=True)
class Spent:
    """Attempts of one run and of one outcome: how many, and their seconds."""

    run_id: str
    state: AttemptState
    attempts: int
    seconds: float


class Ledger:
    """Opened by `open`, closed by `close` or as a context manager."""

    def __init__(self, url: str, database: Database, lock: IO[str] | None) -> None:
        self.url = url
        self._database = database
        self._lock = lock
        self._run_id = ""
        self._usd_per_second: Decimal | None = None

    @classmethod
    def open(cls, url: str, *, write: bool = True) -> Self:
        """A path, made where there is none, or postgresql://...; `write=False` reads beside a run.

        Raises InputError where another run holds the file, it is no ledger, or it was made by a later version; OutputError and
        MachineError where it cannot be used; MissingExtraError without psycopg.
        """
        if url.startswith(POSTGRES):
            return cls._opened(url, None, write)
        lock = ledger_sqlite.hold(Path(url)) if write else None
        try:
            return cls._opened(url, lock, write)
        except BaseException:
            if lock is not None:
                lock.close()
            raise

    @classmethod
    def _opened(cls, url: str, lock: IO[str] | None, write: bool) -> Self:
        database = connect(url, create=write)
        try:
            _migrate(url, database, write)
        except BaseException:
            database.close()
            raise
        return cls(url, database, lock)

    @property
    def run_id(self) -> str:
        return self._run_id

    def begin_run(self, *, loading_s: float, cards: int, usd_per_hour: Decimal | None) -> None:
        """Bury the dead, and begin. loading_s: rented seconds before, in which weights were fetched and loaded."""
        self._run_id = secrets.token_hex(8)
        self._usd_per_second = None if usd_per_hour is None else usd_per_hour * cards / _HOUR_S
        who = (socket.gethostname(), os.getpid(), _utc_now(), loading_s, cards, _text(usd_per_hour))
        database = self._database
        with database.transaction():
            database.lock("begin_run")
            self._bury()
            database.execute(
                "INSERT INTO runs (id, host, pid, started_at, loading_s, elapsed_s, busy_until_s, cards, usd_per_hour, lease_until)"
                f" VALUES (?, ?, ?, ?, ?, 0, 0, ?, ?, {_lease(database)})",
                (self._run_id, *who),
            )

    def _bury(self) -> None:
        database = self._database
        dead = database.execute(
            "SELECT id, elapsed_s, busy_until_s, cards, usd_per_hour FROM runs"
            f" WHERE ended_at IS NULL AND lease_until < {database.now}"
        )
        for run_id, elapsed_s, busy_until_s, cards, usd_per_hour in dead:
            lost = database.execute("SELECT output, number FROM attempts WHERE run_id = ? AND state = 'running'", (run_id,))
            share_s = max(0.0, elapsed_s - busy_until_s) / max(1, len(lost))
            usd = None if usd_per_hour is None else _usd(share_s, Decimal(usd_per_hour) * cards / _HOUR_S)
            for output, number in lost:
                why = "The run was killed while this was under way."
                self._pay(output, number, "lost", share_s, usd, why)
                database.execute(
                    "UPDATE images SET state = 'planned', why = ? WHERE output = ? AND run_id = ? AND state = 'running'",
                    (why, output, run_id),
                )
            stopped = "The run was killed."
            database.execute("UPDATE runs SET ended_at = ?, stopped = ? WHERE id = ?", (_utc_now(), stopped, run_id))

    def _pay(self, output: str, number: int, state: AttemptState, seconds: float, usd: Decimal | None, why: str) -> None:
        """Close an attempt; its image costs what all its attempts do."""
        self._database.execute(
            "UPDATE attempts SET state = ?, seconds = ?, usd = ?, why = ? WHERE output = ? AND number = ?",
            (state, seconds, _text(usd), why, output, number),
        )
        paid = self._database.execute("SELECT seconds, usd FROM attempts WHERE output = ?", (output,))
        priced = [Decimal(each) for _, each in paid if each is not None]
        self._database.execute(
            "UPDATE images SET seconds = ?, usd = ? WHERE output = ?",
            (sum(each for each, _ in paid), _text(sum(priced, Decimal(0))) if priced else None, output),
        )

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

    def claim(self, work: Work, seed: int, elapsed_s: float) -> Claim:
        """Ask for an image before it is drawn. What is granted is "running" on the disk when this returns."""
        assert work.key is not None
        database = self._database
        with database.transaction():
            database.lock(work.key)
            others = database.execute(
                "SELECT i.output, i.key, i.state, i.run_id, i.sha256, r.ended_at IS NULL AND r.lease_until > "
                f"{database.now} FROM images i JOIN runs r ON r.id = i.run_id"
                " WHERE i.output = ? OR (i.key = ? AND i.state IN ('running', 'done'))",
                (work.output, work.key),
            )
            for output, key, state, run_id, sha256, alive in others:
                if state == "done" and key == work.key:
                    same = output == work.output
                    return Claim("done" if same else "link", original=output, sha256=sha256)
                if state == "running" and alive and run_id != self._run_id:
                    return Claim("held")
            self._put(work, "running", seed=seed)
            ((attempt,),) = database.execute(
                "UPDATE images SET attempts = attempts + 1 WHERE output = ? RETURNING attempts", (work.output,)
            )
            database.execute(
                "INSERT INTO attempts (output, number, run_id, seed, state, started_s) VALUES (?, ?, ?, ?, 'running', ?)",
                (work.output, attempt, self._run_id, seed, elapsed_s),
            )
            self._beat(elapsed_s)
            return Claim("mine", attempt)

    def _put(self, work: Work, state: State, *, seed: int | None = None, **more: object) -> None:
        """A row as it is from now on. Other work under the same output begins its failures and rejects anew."""
        row = {
            "output": work.output,
            "row_line": work.row_line,
            "row_id": work.row_id,
            "variant": work.variant,
            "pictures": json.dumps(work.pictures),
            "prompt": work.prompt,
            "asked": work.asked,
            "key": work.key,
            "state": state,
            "run_id": self._run_id,
            "seed": seed,
            "linked_to": None,
            "sha256": None,
            "why": "",
            **more,
        }
        anew = ", ".join(
            f"{column} = CASE WHEN images.key = excluded.key THEN images.{column} ELSE 0 END"
            for column in ("failures", "rejects", "rejects_forgiven")
        )
        columns = list(row)
        self._database.execute(
            f"INSERT INTO images ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
            " ON CONFLICT (output) DO UPDATE SET "
            + ", ".join(f"{column} = excluded.{column}" for column in columns[1:])
            + f", {anew}",
            list(row.values()),
        )

    def end(self, work: Work, attempt: int, ended: Ended) -> Decimal | None:
        """Close an attempt that this run has claimed; what it cost, or None without a price.

        An image that another run has taken over in the meantime, as this one was not heard of, keeps that run's state.
        """
        usd = None if self._usd_per_second is None else _usd(ended.seconds, self._usd_per_second)
        assert ended.stages.keys() <= set(STAGES), f"unknown stage among {', '.join(ended.stages)}"
        with self._database.transaction():
            self._pay(work.output, attempt, ended.attempt_state, ended.seconds, usd, ended.why)
            if ended.stages:
                self._database.execute(
                    f"UPDATE attempts SET {', '.join(f'{name} = ?' for name in ended.stages)} WHERE output = ? AND number = ?",
                    (*ended.stages.values(), work.output, attempt),
                )
            self._database.execute(
                "UPDATE images SET state = ?, why = ?, sha256 = ?, failures = failures + ?, rejects = rejects + ?"
                " WHERE output = ? AND run_id = ?",
                (
                    *(ended.state, ended.why, ended.sha256),
                    *(int(ended.attempt_state == "failed"), int(ended.attempt_state == "rejected")),
                    *(work.output, self._run_id),
                ),
            )
            self._database.execute(
                "UPDATE runs SET busy_until_s = CASE WHEN busy_until_s < ? THEN ? ELSE busy_until_s END WHERE id = ?",
                (ended.elapsed_s, ended.elapsed_s, self._run_id),
            )
            self._beat(ended.elapsed_s)
        return usd

    def adopt(self, work: Work, sha256: str) -> None:
        """An output was found written, whose run died before it could say so: its lost attempt was none."""
        with self._database.transaction():
            self._put(work, "done", sha256=sha256)
            self._database.execute(
                "UPDATE attempts SET state = 'done', why = '' WHERE output = ? AND state = 'lost'"
                " AND number = (SELECT max(number) FROM attempts WHERE output = ?)",
                (work.output, work.output),
            )

    def link(self, work: Work, original: str, sha256: str) -> None:
        """The output stands under its own name, and is the file of `original`."""
        with self._database.transaction():
            self._put(work, "linked", linked_to=original, sha256=sha256)

    def quarantine(self, work: Work, why: str) -> None:
        """Without an attempt: the pictures cannot be read, or the same work was quarantined."""
        with self._database.transaction():
            self._put(work, "quarantined", why=why)

    def postpone(self, work: Work, why: str) -> None:
        """Reading failed, and is to be tried again."""
        with self._database.transaction():
            self._put(work, "failed", why=why)
            self._database.execute("UPDATE images SET failures = failures + 1 WHERE output = ?", (work.output,))

    def note_asked(self, works: Sequence[Work]) -> None:
        """Images that are done as they should be, although they are asked for in another way than before (a touched file)."""
        with self._database.transaction():
            for work in works:
                self._database.execute("UPDATE images SET asked = ? WHERE output = ?", (work.asked, work.output))

    def forget(self, output: str) -> None:
        """A finished output is gone: it is to be made again."""
        with self._database.transaction():
            self._database.execute(
                "UPDATE images SET state = 'planned', sha256 = NULL, linked_to = NULL, why = ? WHERE output = ?",
                ("The finished picture is gone from the output folder.", output),
            )

    def retry_quarantined(self) -> int:
        """Put what was quarantined back, with all its tries; how many. New seeds go on where the old ones ended."""
        rows = self._database.execute(
            "UPDATE images SET state = 'planned', failures = 0, rejects_forgiven = rejects"
            " WHERE state = 'quarantined' RETURNING output"
        )
        return len(rows)

    def beat(self, elapsed_s: float) -> None:
        """The run still lives."""
        with self._database.transaction():
            self._beat(elapsed_s)

    def _beat(self, elapsed_s: float) -> None:
        renew_lease(self._database, self._run_id, elapsed_s)

    def end_run(self, elapsed_s: float, stopped: str) -> None:
        """The run has ended by itself. Whatever it left under way is lost, and paid for."""
        with self._database.transaction():
            self._beat(elapsed_s)
            self._database.execute("UPDATE runs SET lease_until = -1 WHERE id = ?", (self._run_id,))
            self._bury()
            self._database.execute("UPDATE runs SET ended_at = ?, stopped = ? WHERE id = ?", (_utc_now(), stopped, self._run_id))

    def counts(self) -> dict[State, int]:
        """Images by state."""
        return dict(self._database.execute("SELECT state, count(*) FROM images GROUP BY state"))  # type: ignore[arg-type]

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


def connect(url: str, *, create: bool = False) -> Database:
    """One more connection to a ledger. Raises as `Ledger.open`."""
    if not url.startswith(POSTGRES):
        return ledger_sqlite.SqliteDatabase(Path(url), create=create)
    from millicent.catalog.ledger_postgres import PostgresDatabase  # an extra

    return PostgresDatabase(url)


def renew_lease(database: Database, run_id: str, elapsed_s: float) -> None:
    """A run lives, and has come so far. Where another has taken it for dead, it says that it is not."""
    database.execute(
        f"UPDATE runs SET elapsed_s = CASE WHEN elapsed_s < ? THEN ? ELSE elapsed_s END, lease_until = {_lease(database)},"
        " ended_at = NULL, stopped = '' WHERE id = ?",
        (elapsed_s, elapsed_s, run_id),
    )


def _lease(database: Database) -> str:
    """SQL: until when a run that is heard of now holds what it has claimed; without other writers it is over at once."""
    return f"{database.now} + {LEASE_S if database.shared else -1.0}"


def _migrate(url: str, database: Database, write: bool) -> None:
    taken = 0
    if database.has_table("migrations"):
        ((taken,),) = database.execute("SELECT count(*) FROM migrations")
    if taken > len(MIGRATIONS):
        raise InputError(
            f"The ledger {_name(url)} was made by a later version of millicent.", "Update millicent, or use another ledger."
        )
    if taken == len(MIGRATIONS):
        return
    if not write:
        raise InputError(
            f"The ledger {_name(url)} was made by an earlier version of millicent, or is none.", "Run the catalog with it once."
        )
    with database.transaction():
        database.lock("migrate")
        database.execute("CREATE TABLE IF NOT EXISTS migrations (number BIGINT PRIMARY KEY, applied_at TEXT NOT NULL)")
        ((taken,),) = database.execute("SELECT count(*) FROM migrations")  # another writer may have been first
        for number, steps in list(enumerate(MIGRATIONS, 1))[taken:]:
            for step in steps:
                database.execute(step)
            database.execute("INSERT INTO migrations (number, applied_at) VALUES (?, ?)", (number, _utc_now()))


def _name(url: str) -> str:
    """Without what follows a PostgreSQL URL's user, which may be a password."""
    return f"{url.partition('://')[0]}://{url.rpartition('@')[2]}" if url.startswith(POSTGRES) else url


def _usd(seconds: float, usd_per_second: Decimal) -> Decimal:
    return (Decimal(str(seconds)) * usd_per_second).quantize(_NANO)


def _text(usd: Decimal | None) -> str | None:
    return None if usd is None else f"{usd:f}"


def _utc_now() -> str:
    return datetime.now(tz=UTC).isoformat(timespec="milliseconds")
