"""A run's sign of life in the ledger, also while one image takes long: every few seconds, over a connection of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from millicent.catalog.ledger import connect, renew_lease
from millicent.errors import MillicentError

EVERY_S = 5.0


class Heartbeat:
    """A context manager: a thread that says how far a run's clock is. elapsed_s: that clock."""

    def __init__(self, url: str, run_id: str, elapsed_s: Callable[[], float]) -> None:
        self._url, self._run_id, self._elapsed_s = url, run_id, elapsed_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def _beat(self) -> None:
        while not self._over.wait(EVERY_S):
            try:
                database = connect(self._url)
                try:
                    renew_lease(database, self._run_id, self._elapsed_s())
                finally:
                    database.close()
            except MillicentError:
                # the run itself meets the same trouble at its next image, and tells it; a beat missed costs nothing before that
                continue

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
