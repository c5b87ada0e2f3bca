"""What the ledger asks of a database, whichever it is: a connection, the tables as they are now, and the lease of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from millicent.catalog import ledger_sqlite
from millicent.catalog.migrations import MIGRATIONS
from millicent.errors import InputError

LEASE_S = 120.0  # a writer that is not heard of for so long has lost what it was drawing
POSTGRES = ("postgresql://", "postgres://")


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


def connect(url: str, *, create: bool = False) -> Database:
    """One more connection to a ledger. Raises as `Ledger.open`."""
    if not url.startswith(POSTGRES):
        return ledger_sqlite.SqliteDatabase(Path(url), create=create)
    from millicent.catalog.ledger_postgres import PostgresDatabase  # an extra

    return PostgresDatabase(url)


def renew_lease(database: Database, run_id: str, elapsed_s: float) -> None:
    """A run lives, and has come so far. Where another has taken it for dead, it says that it is not."""
    database.execute(
        f"UPDATE runs SET elapsed_s = CASE WHEN elapsed_s < ? THEN ? ELSE elapsed_s END, lease_until = {lease_until(database)},"
        " ended_at = NULL, stopped = '' WHERE id = ?",
        (elapsed_s, elapsed_s, run_id),
    )


def lease_until(database: Database) -> str:
    """SQL: until when a run that is heard of now holds what it has claimed; without other writers it is over at once."""
    return f"{database.now} + {LEASE_S if database.shared else -1.0}"


def migrate(url: str, database: Database, write: bool) -> None:
    """Take the steps that a ledger lacks. Raises InputError where it is a later version's, or lacks steps and is only read."""
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
            database.execute("INSERT INTO migrations (number, applied_at) VALUES (?, ?)", (number, utc_now()))


def _name(url: str) -> str:
    """Without what follows a PostgreSQL URL's user, which may be a password."""
    return f"{url.partition('://')[0]}://{url.rpartition('@')[2]}" if url.startswith(POSTGRES) else url


def utc_now() -> str:
    """ISO 8601, to the millisecond."""
    return datetime.now(tz=UTC).isoformat(timespec="milliseconds")
