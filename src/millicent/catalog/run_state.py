"""The state of one run: what is in flight, what waits for its time or for the same work, what was counted and what is told."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal

from millicent.catalog.attempts import Candidate
from millicent.catalog.events import Event, EventKind
from millicent.catalog.finish import link_output
from millicent.catalog.items import Item
from millicent.catalog.ledger import Known, Ledger
from millicent.catalog.manifest import BadRow
from millicent.catalog.pictures import Pictures
from millicent.catalog.recipes import Recipe
from millicent.catalog.stopping import RunLimits
from millicent.errors import MillicentError

OnEvent = Callable[[Event], None]


@dataclass(slots=True)
class RunState:
    """What requests on their way in and outcomes on their way out share; all of it in the caller's thread.

    later: a heap, by when each is due. same: by key, work that this run has begun, and who waits for the same.
    mark_s: when the last attempt came out; waited_s: since then, in which there was nothing to draw.
    """

    recipe: Recipe
    ledger: Ledger
    out: str
    limits: RunLimits
    on_event: OnEvent
    pictures: Pictures
    elapsed_s: Callable[[], float]
    backoff_base_s: float
    counts: Counter[str] = field(default_factory=Counter)
    stopped: str = ""
    error: MillicentError | None = None
    later: list[tuple[float, int, Candidate]] = field(default_factory=list)
    in_flight: deque[Candidate] = field(default_factory=deque)
    same: dict[str, list[Candidate]] = field(default_factory=dict)
    mark_s: float = 0.0
    waited_s: float = 0.0
    order: Iterator[int] = field(default_factory=itertools.count)

    def restart_clock(self) -> None:
        """From here on the time is the next attempt's."""
        self.mark_s, self.waited_s = self.elapsed_s(), 0.0

    def take_seconds(self) -> float:
        """An attempt has come out; it is billed the time since the one before it, less what the editor had nothing to do in."""
        now_s = self.elapsed_s()
        seconds = max(0.0, now_s - self.mark_s - self.waited_s)
        self.mark_s, self.waited_s = now_s, 0.0
        return seconds

    def count_waiting(self) -> int:
        return len(self.later) + sum(len(waiting) for waiting in self.same.values())

    def must_hold(self) -> bool:
        """Whether no image is to be begun now. The run is over if it was asked to stop, or if nothing is in flight.

        Else what is in flight comes out first, which says better what fits into money and time.
        """
        why = self.limits.why_stop(len(self.in_flight))
        if why is not None and (not self.in_flight or self.limits.stop.is_set()):
            self.stop(why)
        return why is not None

    def stop(self, why: str) -> None:
        if not self.stopped:
            self.stopped = why
            self.on_event(Event(kind="stopped", elapsed_s=self.elapsed_s(), why=why))

    def wait_until(self, due_s: float) -> None:
        """Until a retry is due or the run is to stop; the pause is the run's, not an image's."""
        while (left_s := due_s - self.elapsed_s()) > 0 and not self.must_hold():
            time.sleep(min(left_s, 0.2))

    def put_off(self, candidate: Candidate, pause_s: float) -> None:
        heapq.heappush(self.later, (self.elapsed_s() + pause_s, next(self.order), candidate))

    def release(self, key: str) -> None:
        """Whoever waits for this work is to try it by itself."""
        for waiting in self.same.pop(key, []):
            waiting.key = None
            self.put_off(waiting, 0.0)

    def link(self, candidate: Candidate, original: str, sha256: str) -> None:
        link_output(self.out, original, candidate.item.output)
        self.ledger.link(candidate.work, original, sha256)
        self.tell("linked", candidate, attempt=0, why=f"The same work as {original}.")

    def tell(
        self,
        kind: EventKind,
        candidate: Candidate,
        *,
        attempt: int | None = None,
        seconds: float = 0.0,
        usd: Decimal | None = None,
        why: str = "",
        set_aside: str | None = None,
    ) -> None:
        if kind != "started":
            self.counts[kind] += 1
        item = candidate.item
        self.on_event(
            Event(
                kind=kind,
                elapsed_s=self.elapsed_s(),
                row_line=item.row_line,
                row_id=item.row_id,
                variant=item.variant,
                output=item.output,
                attempt=candidate.attempt if attempt is None else attempt,
                seed=candidate.seed if kind in ("started", "done", "rejected") else None,
                seconds=seconds,
                usd=usd,
                why=why,
                set_aside=set_aside,
            )
        )

    def tell_bad_row(self, row: BadRow) -> None:
        self.counts["bad row"] += 1
        self.on_event(Event(kind="bad row", elapsed_s=self.elapsed_s(), row_line=row.line, why=row.why))

    def tell_passed(self, item: Item, known: Known) -> None:
        self.counts["given up" if known.state == "quarantined" else "already"] += 1
