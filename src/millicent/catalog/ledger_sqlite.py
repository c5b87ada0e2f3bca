"""The ledger in one SQLite file, with one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from millicent.errors import InputError, InputNotFoundError, OutputError

BUSY_TIMEOUT_MS = 30_000


class SqliteDatabase:
    """One connection. Raises OutputError where the file cannot be written, InputError where it is no SQLite file."""

    shared = False
    now = "0"  # one writer at a time: whoever wrote before has ended, so no lease is needed

    def __init__(self, path: Path, *, create: bool) -> None:
        self._path = path
        if not create and not path.is_file():
            raise InputNotFoundError(f"There is no ledger {path}.", "Check the path; a run makes one.")
        with self._told():
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            if create:
                self._connection.execute("PRAGMA journal_mode = WAL")
            # a killed process loses nothing with NORMAL. A machine that loses its power may lose the last commits, never the file;
            # those images were written and synced before they were marked done, and are recognized by the key that they hold. So
            # FULL, which waits for the disk at each commit (3.4 ms against 0.1 ms on a cloud disk), would buy nothing.
            self._connection.execute("PRAGMA synchronous = NORMAL")

    def execute(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._told():
            return self._connection.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing."""
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        with self._told():
            self._connection.execute("COMMIT")

    def lock(self, name: str) -> None:
        """The transaction itself keeps all others out."""

    def has_table(self, name: str) -> bool:
        return bool(self.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,)))

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OutputError(f"The ledger {self._path} cannot be used: {error}.", "Make room there, or choose another.") from error
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self._path} is no ledger: {error}.", "Give another path, or move the file away.") from error


def hold(path: Path) -> IO[str]:
    """Keep other runs from a ledger for as long as the file that is returned stays open; a process that dies lets it go.

    Raises InputError that says who holds it, OutputError where the lock's file cannot be made.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        file = lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{lock} cannot be written: {error.strerror}.", "Put the ledger in a folder that can be written."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = _read_holder(file.read())
        file.close()
        raise InputError(
            f"Another run is using the ledger {path}{holder}.", "Wait for it or stop it; for several writers use PostgreSQL."
        ) from error
    file.truncate(0)
    since = datetime.now(tz=UTC).isoformat(timespec="seconds")
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
    file.flush()
    return file


def _read_holder(text: str) -> str:
    """Who holds the lock, as words; nothing where it has not said so yet."""
    try:
        holder = json.loads(text)
        return f": process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return ""
