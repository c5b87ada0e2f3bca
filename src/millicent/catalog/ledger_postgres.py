"""The ledger in PostgreSQL, for several writers. The only home of psycopg."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from millicent.errors import MachineError, MissingExtraError

try:
    import psycopg
except ModuleNotFoundError as error:
    if error.name != "psycopg":
        raise
    raise MissingExtraError(
        "The package psycopg is not installed, and a PostgreSQL ledger needs it.", 'Run: pip install "millicent[postgres]"'
    ) from None


class PostgresDatabase:
    """One connection. Raises MachineError where the server cannot be reached or refuses."""

    shared = True
    now = "extract(epoch FROM clock_timestamp())"  # the server's clock: writers' own may differ

    def __init__(self, url: str) -> None:
        self._name = without_password(url)
        with self._told():
            self._connection = psycopg.connect(url, autocommit=True)
            # a commit need not wait for the disk, for the same reason as in SQLite: what a crash of the server takes back has been
            # written to its output already, and is recognized there
            self._connection.execute("SET synchronous_commit = off")

    def execute(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._told():
            cursor = self._connection.execute(sql.replace("?", "%s").encode(), values)
            return cursor.fetchall() if cursor.description else []

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing."""
        with self._told(), self._connection.transaction():
            yield

    def lock(self, name: str) -> None:
        """Until the transaction ends, no other writer passes here with the same name."""
        self.execute("SELECT pg_advisory_xact_lock(hashtextextended(?, 0))", (name,))

    def has_table(self, name: str) -> bool:
        return bool(self.execute("SELECT 1 WHERE to_regclass(?) IS NOT NULL", (name,)))

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            said = str(error).strip().splitlines()
            raise MachineError(
                f"The ledger {self._name} cannot be used: {said[0] if said else type(error).__name__}.",
                "Check the URL, and that the server runs and lets you in.",
            ) from error


def without_password(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host, query=""))
