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
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Self

from millicent.catalog import ledger_sqlite
from millicent.catalog.ledger_database import POSTGRES, Database, connect, lease_until, migrate, renew_lease, utc_now
from millicent.catalog.ledger_paying import HOUR_S, as_text, bury, pay, price_of
from millicent.catalog.ledger_reading import LedgerReader
from millicent.catalog.ledger_rows import STAGES, AttemptState, Claim, Ended, Image, Known, Run, Spent, State, Work

__all__ = [
    "POSTGRES",
    "STAGES",
    "AttemptState",
    "Claim",
    "Database",
    "Ended",
    "Image",
    "Known",
    "Ledger",
    "Run",
    "Spent",
    "State",
    "Work",
    "connect",
    "renew_lease",
]


class Ledger(LedgerReader):
    """Opened by `open`, closed by `close` or as a context manager."""

    def __init__(self, url: str, database: Database, lock: IO[str] | None) -> None:
        super().__init__(url, database, lock)
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
            migrate(url, database, write)
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
        self._usd_per_second = None if usd_per_hour is None else usd_per_hour * cards / HOUR_S
        who = (socket.gethostname(), os.getpid(), utc_now(), loading_s, cards, as_text(usd_per_hour))
        database = self._database
        with database.transaction():
            database.lock("begin_run")
            bury(database)
            database.execute(
                "INSERT INTO runs (id, host, pid, started_at, loading_s, elapsed_s, busy_until_s, cards, usd_per_hour, lease_until)"
                f" VALUES (?, ?, ?, ?, ?, 0, 0, ?, ?, {lease_until(database)})",
                (self._run_id, *who),
            )

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
            "set_aside": None,
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
        usd = None if self._usd_per_second is None else price_of(ended.seconds, self._usd_per_second)
        assert ended.stages.keys() <= set(STAGES), f"unknown stage among {', '.join(ended.stages)}"
        with self._database.transaction():
            pay(self._database, work.output, attempt, ended.attempt_state, ended.seconds, usd, ended.why)
            if ended.stages:
                self._database.execute(
                    f"UPDATE attempts SET {', '.join(f'{name} = ?' for name in ended.stages)} WHERE output = ? AND number = ?",
                    (*ended.stages.values(), work.output, attempt),
                )
            self._database.execute(
                "UPDATE images SET state = ?, why = ?, sha256 = ?, set_aside = ?, failures = failures + ?, rejects = rejects + ?"
                " WHERE output = ? AND run_id = ?",
                (
                    *(ended.state, ended.why, ended.sha256, ended.set_aside),
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

    def release(self, work: Work, attempt: int) -> None:
        """Give a claim back whose image was not drawn: there was no attempt. What another run has taken over stays that run's."""
        with self._database.transaction():
            mine = self._database.execute(
                "DELETE FROM attempts WHERE output = ? AND number = ? AND run_id = ? AND state = 'running' RETURNING number",
                (work.output, attempt, self._run_id),
            )
            if mine:
                self._database.execute(
                    "UPDATE images SET state = 'planned', attempts = attempts - 1 WHERE output = ? AND run_id = ?",
                    (work.output, self._run_id),
                )

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

    def quarantine(self, work: Work, why: str, set_aside: str | None = None) -> None:
        """Without an attempt: the pictures cannot be read, or the same work was quarantined, and its picture set aside."""
        with self._database.transaction():
            self._put(work, "quarantined", why=why, set_aside=set_aside)

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
            bury(self._database)
            self._database.execute("UPDATE runs SET ended_at = ?, stopped = ? WHERE id = ?", (utc_now(), stopped, self._run_id))
