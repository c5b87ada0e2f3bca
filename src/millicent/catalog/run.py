"""A catalog run: rows in, pictures and a ledger out, and a process that may be killed anywhere.

    rows -> items -> the ledger: done already? -> pictures read and hashed -> key -> claimed in the ledger -> editor -> checked
    -> written beside, synced, renamed -> marked done

Reading and finishing are in threads; the ledger, the editor and all decisions are in the caller's. A claim is on the disk before
the drawing begins, and a picture before it is marked done. What a kill leaves between those two is a whole picture that holds its
key, which the next run recognizes and does not pay for again.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from decimal import Decimal
from typing import Any

from millicent.catalog import storage
from millicent.catalog.attempts import Candidate, backoff_s, can_retry, told
from millicent.catalog.bill import bill_of
from millicent.catalog.choose import choose, expand_rows, is_finished, read_ahead
from millicent.catalog.events import Event, EventKind, Summary
from millicent.catalog.finish import Check, Finished, check_root, finish, link_output
from millicent.catalog.heartbeat import Heartbeat
from millicent.catalog.items import Item
from millicent.catalog.ledger import AttemptState, Claim, Ended, Known, Ledger, State
from millicent.catalog.manifest import BadRow, Row
from millicent.catalog.pictures import Pictures
from millicent.catalog.recipes import Recipe
from millicent.catalog.stopping import RunLimits
from millicent.edits import EditRequest, EditResult, SupportsEdit
from millicent.errors import InputNotFoundError, MachineError, MillicentError, MissingExtraError, OutputError

OnEvent = Callable[[Event], None]

READ_THREADS = 4
READ_AHEAD = 8  # pictures that are fetched before their turn
FINISH_THREADS = 2
SUSPECT_LOSSES = 3  # an image that was under way in so many runs that were killed comes last, and alone
FINISH_WAITING = 8  # drawn pictures that may wait for the disk before drawing does
_HOUR_S = Decimal(3600)
_NANO = Decimal("1e-9")


def run_catalog(
    editor: SupportsEdit,
    rows: Iterable[Row | BadRow],
    recipe: Recipe,
    ledger: Ledger,
    out: str,
    *,
    weights_sha256: str,
    check: Check,
    price: Decimal | None = None,
    cards: int = 1,
    loading_s: float = 0.0,
    budget_usd: Decimal | None = None,
    deadline: datetime | None = None,
    retry_failed: bool = False,
    on_event: OnEvent = lambda event: None,
    stop: threading.Event | None = None,
    fetch_limits: storage.FetchLimits | None = None,
    allowed_hosts: frozenset[str] = frozenset(),
    ahead: int = 1,
    expected_s: float | None = None,
    backoff_base_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """Make what is not made yet. The same call goes on wherever an earlier one ended or was killed.

    editor: where it has `edit_many(requests, ahead)`, that is used. out: a folder, or s3:// or gs://.
    price: dollars for an hour of one card; cards: how many are rented. loading_s: rented seconds before this call.
    budget_usd: for the whole ledger, earlier runs, loading and idle time too; needs a price. deadline: with its time zone.
    retry_failed: what was quarantined is tried again. stop: once set, no more images are begun; those in flight are finished.
    check: whether a picture is accepted, from its inputs, itself and the recipe's limits; called in threads.
    on_event: called in this thread. expected_s: seconds of an image, for budget and deadline before the first is measured.
    backoff_base_s: the pause before the first retry; it doubles.
    Raises OutputError where outputs cannot be written (before anything is drawn, or once what is in flight has ended), and what the
    ledger raises. A failed image raises nothing: it is in the ledger, the events and the summary.
    """
    assert budget_usd is None or price is not None, "a budget needs a price"
    assert deadline is None or deadline.tzinfo is not None, "a deadline needs a time zone"
    check_root(out)
    began = clock()
    if retry_failed:
        ledger.retry_quarantined()
    ledger.begin_run(loading_s=loading_s, cards=cards, usd_per_hour=price)
    rate = None if price is None else price * cards / _HOUR_S
    bill = bill_of(ledger)
    limits = RunLimits(
        lambda: clock() - began,
        stop or threading.Event(),
        budget_usd=budget_usd,
        spent_usd=Decimal(0) if bill is None else bill.total_usd,
        usd_per_s=rate,
        deadline=deadline,
        expected_s=expected_s,
    )
    fetch = fetch_limits or storage.FetchLimits()
    reading = Pictures(lambda location: storage.read_bytes(location, fetch, allowed_hosts), out, weights_sha256, READ_THREADS)
    finishing = ThreadPoolExecutor(FINISH_THREADS, thread_name_prefix="finish")
    run = _Run(
        editor, recipe, ledger, out, check, limits, on_event, reading, finishing, ahead, backoff_base_s, lambda: clock() - began
    )
    try:
        with Heartbeat(ledger.url, ledger.run_id, run.elapsed_s), reading:
            run.go(rows, weights_sha256)
    finally:
        finishing.shutdown(cancel_futures=True)
        ledger.end_run(run.elapsed_s(), run.stopped)
    if run.error is not None:
        raise run.error
    return _summarize(run, ledger, None if rate is None else rate * Decimal(str(run.elapsed_s() + loading_s)))


def _summarize(run: _Run, ledger: Ledger, usd: Decimal | None) -> Summary:
    elapsed_s, count = run.elapsed_s(), run.counts
    return Summary(
        done=count["done"],
        linked=count["linked"],
        quarantined=count["quarantined"],
        already=count["already"],
        given_up=count["given up"],
        recovered=count["recovered"],
        rejected=count["rejected"],
        failed=count["failed"],
        bad_rows=count["bad row"],
        elsewhere=count["elsewhere"],
        waiting=run.count_waiting(),
        elapsed_s=elapsed_s,
        usd=None if usd is None else usd.quantize(_NANO),
        images_per_hour=count["done"] * 3600 / elapsed_s if count["done"] and elapsed_s else None,
        bill=bill_of(ledger),
        stopped=run.stopped,
    )


class _Run:
    """The state of one run: what is in flight, what waits, and what was counted."""

    def __init__(
        self,
        editor: SupportsEdit,
        recipe: Recipe,
        ledger: Ledger,
        out: str,
        check: Check,
        limits: RunLimits,
        on_event: OnEvent,
        pictures: Pictures,
        finishing: ThreadPoolExecutor,
        ahead: int,
        backoff_base_s: float,
        elapsed_s: Callable[[], float],
    ) -> None:
        self._editor: Any = editor
        self._recipe, self._ledger, self._out, self._check = recipe, ledger, out, check
        self._limits, self._on_event, self._pictures, self._finishing = limits, on_event, pictures, finishing
        self._ahead, self._backoff_base_s = ahead, backoff_base_s
        self.elapsed_s = elapsed_s
        self.counts: Counter[str] = Counter()
        self.stopped = ""
        self.error: MillicentError | None = None
        self._fresh: Iterator[Candidate] = iter(())
        self._all_read = False
        self._suspects: deque[Candidate] = deque()
        self._later: list[tuple[float, int, Candidate]] = []  # a heap, by when each is due
        self._order = itertools.count()
        self._in_flight: deque[Candidate] = deque()
        self._drawn: deque[tuple[Candidate, EditResult, float, Future[Finished]]] = deque()
        self._same: dict[str, list[Candidate]] = {}  # by key: work that this run has begun, and who waits for the same
        self._mark_s = 0.0  # when the last attempt came out
        self._waited_s = 0.0  # since then, in which there was nothing to draw

    def go(self, rows: Iterable[Row | BadRow], weights_sha256: str) -> None:
        """Streams of edits, one after another, until nothing is left to do or the run is to stop."""
        items = expand_rows(rows, self._recipe, self._tell_bad_row)
        candidates = choose(items, self._ledger, weights_sha256, self._out, self._tell_passed)
        self._fresh = read_ahead(candidates, self._pictures, READ_AHEAD)
        while True:
            try:
                self._edit_stream()
            except Exception:
                with contextlib.suppress(
                    MillicentError
                ):  # what is drawn is paid for; where it cannot be kept, the first error says it
                    self._collect(keep=0)
                raise
            self._collect(keep=0)
            if self.stopped or (self._all_read and not self._later):
                return
            if self._all_read:
                self._wait_until(self._later[0][0])

    def count_waiting(self) -> int:
        return len(self._later) + sum(len(waiting) for waiting in self._same.values())

    # requests, on their way in

    def _edit_stream(self) -> None:
        """Edit what is ready, as one stream; it ends where nothing is ready, so that what is in flight can come out."""
        self._mark_s, self._waited_s = self.elapsed_s(), 0.0
        outcomes = self._outcomes()
        try:
            while True:
                try:
                    outcome = next(outcomes, None)
                except MillicentError:
                    raise
                except Exception as error:  # the edge of one edit: a bug that one picture brings out is not the others' end
                    if not self._in_flight:
                        raise
                    self._break_off(error)
                    return
                if outcome is None:
                    return
                self._settle(self._in_flight.popleft(), outcome)
        finally:
            outcomes.close()

    def _outcomes(self) -> Generator[EditResult | MillicentError, None, None]:
        if hasattr(self._editor, "edit_many"):
            with contextlib.closing(self._editor.edit_many(self._requests(), self._ahead)) as outcomes:
                yield from outcomes
            return
        for request in self._requests():
            try:
                yield self._editor.edit(request)
            except MillicentError as error:
                yield error

    def _requests(self) -> Iterator[EditRequest]:
        while (candidate := self._next()) is not None:
            if candidate.alone and self._in_flight:
                self._put_off(candidate, 0.0)  # the stream ends first, and this one has the next to itself
                return
            request = self._begin(candidate)
            if request is None:
                continue
            self._in_flight.append(candidate)
            yield request
            if candidate.alone:
                return

    def _next(self) -> Candidate | None:
        """The next image to try, a retry that is due before a new one; None where the run stops, or nothing is ready."""
        self._collect(keep=FINISH_WAITING)
        if self.stopped or self._must_stop():
            return None
        if self._later and self._later[0][0] <= self.elapsed_s():
            again = heapq.heappop(self._later)[2]
            if again.read is None:
                again.read = self._pictures.submit(again.item)
            return again
        while (candidate := next(self._fresh, None)) is not None:
            if candidate.known is None or candidate.known.lost < SUSPECT_LOSSES:
                return candidate
            candidate.read, candidate.alone = None, True  # it may be what kills the process: the others first
            self._suspects.append(candidate)
        self._all_read = not self._suspects
        if self._all_read:
            return None
        last = self._suspects.popleft()
        last.read = self._pictures.submit(last.item)
        return last

    def _must_stop(self) -> bool:
        why = self._limits.why_stop(len(self._in_flight))
        if why is not None:
            self._stop(why)
        return why is not None

    def _stop(self, why: str) -> None:
        if not self.stopped:
            self.stopped = why
            self._on_event(Event(kind="stopped", elapsed_s=self.elapsed_s(), why=why))

    def _wait_until(self, due_s: float) -> None:
        """Until a retry is due or the run is to stop; the pause is the run's, not an image's."""
        while (left_s := due_s - self.elapsed_s()) > 0 and not self._must_stop():
            time.sleep(min(left_s, 0.2))

    def _begin(self, candidate: Candidate) -> EditRequest | None:
        """Claim an image and say how to draw it; None for one that needs no drawing, or cannot be drawn now."""
        assert candidate.read is not None
        asked_s = self.elapsed_s()
        try:
            read = candidate.read.result()
        except Exception as error:  # the edge of one item
            self._tell_unread(candidate, error)
            return None
        finally:
            self._waited_s += self.elapsed_s() - asked_s
        if candidate.key != read.key and candidate.key is not None:
            self._release(candidate.key)  # the pictures are others than at the last try
        held = candidate.key == read.key
        candidate.remember(read.key)
        if not held and self._is_settled(candidate, read.found_sha256):
            return None
        if not held and read.key in self._same:
            candidate.read = None
            self._same[read.key].append(candidate)
            return None
        claim = self._ledger.claim(candidate.work, candidate.seed, self.elapsed_s())
        while claim.kind != "mine":
            if self._follow(candidate, claim):
                return None
            claim = self._ledger.claim(candidate.work, candidate.seed, self.elapsed_s())
        candidate.attempt = claim.attempt
        self._same.setdefault(read.key, [])
        self._tell("started", candidate)
        return _request(candidate)

    def _is_settled(self, candidate: Candidate, found_sha256: str | None) -> bool:
        """Whether the ledger or the output folder has it finished, now that the key is known."""
        known = candidate.known
        is_same = known is not None and known.key == candidate.key
        if known is not None and is_same and (known.state == "quarantined" or is_finished(known, candidate.item, self._out)):
            self._ledger.note_asked([candidate.work])
            self._tell_passed(candidate.item, known)
            return True
        if found_sha256 is None:
            return False
        self._ledger.adopt(candidate.work, found_sha256)
        self.counts["recovered"] += 1
        self._tell("done", candidate, attempt=0, why="It was found finished.")
        return True

    def _follow(self, candidate: Candidate, claim: Claim) -> bool:
        """Do what a claim that was not granted asks for; False where its original is gone, and it is to be claimed again."""
        if claim.kind == "link":
            try:
                self._link(candidate, claim.original, claim.sha256)
            except InputNotFoundError:
                self._ledger.forget(claim.original)
                return False
            except OutputError as error:
                self._ledger.quarantine(candidate.work, told(error))
                self._tell("quarantined", candidate, attempt=0, why=told(error))
        else:
            self.counts["already" if claim.kind == "done" else "elsewhere"] += 1
        return True

    # outcomes, on their way out

    def _settle(self, candidate: Candidate, outcome: EditResult | MillicentError) -> None:
        """An attempt has come out; it is billed the time since the one before it, less what the editor had nothing to do in."""
        now_s = self.elapsed_s()
        seconds = max(0.0, now_s - self._mark_s - self._waited_s)
        self._mark_s, self._waited_s = now_s, 0.0
        self._limits.note(seconds)
        if isinstance(outcome, MillicentError):
            self._fail(candidate, outcome, seconds)
            return
        assert candidate.read is not None
        read, attempt = candidate.read.result(), candidate.attempt
        future = self._finishing.submit(finish, candidate.item, read, outcome, attempt, self._out, self._recipe.checks, self._check)
        candidate.read = None  # the pictures go once they are checked against
        self._drawn.append((candidate, outcome, seconds, future))
        self._collect(keep=FINISH_WAITING)

    def _collect(self, keep: int) -> None:
        """Take in what the finishing threads have done, and wait for it while more than `keep` are under way."""
        while self._drawn and (len(self._drawn) > keep or self._drawn[0][3].done()):
            candidate, result, seconds, future = self._drawn.popleft()
            stages = {f"{stage}_s": getattr(result.timings, f"{stage}_s") for stage in ("prepare", "encode", "denoise", "decode")}
            try:
                finished = future.result()
            except (OutputError, MachineError) as error:
                self._fail_to_write(candidate, error, seconds, stages)
                continue
            except Exception as error:  # the edge of one item: drawing it again would not help
                self._end(candidate, "quarantined", "failed", seconds, stages, told(error))
                continue
            stages |= {"check_s": finished.check_s, "write_s": finished.write_s}
            if finished.verdict.accepted:
                self._accept(candidate, finished, seconds, stages)
            else:
                self._reject(candidate, finished, seconds, stages)

    def _accept(self, candidate: Candidate, finished: Finished, seconds: float, stages: dict[str, float]) -> None:
        self._end(candidate, "done", "done", seconds, stages, "", finished.sha256)
        assert candidate.key is not None
        for waiting in self._same.pop(candidate.key):
            try:
                self._link(waiting, candidate.item.output, finished.sha256)
            except MillicentError:  # it is asked for once more, and finds out why
                waiting.key = None
                self._put_off(waiting, 0.0)

    def _reject(self, candidate: Candidate, finished: Finished, seconds: float, stages: dict[str, float]) -> None:
        candidate.rejects += 1
        why = f"{'; '.join(finished.verdict.reasons)} (kept as {finished.place})"
        if candidate.rejects - candidate.forgiven > self._recipe.redo_rejects:
            self.counts["rejected"] += 1
            self._end(candidate, "quarantined", "rejected", seconds, stages, why)
        else:
            self._end(candidate, "rejected", "rejected", seconds, stages, why)
            self._put_off(candidate, 0.0)

    def _fail(self, candidate: Candidate, error: Exception, seconds: float) -> None:
        candidate.failures += 1
        candidate.read = None
        if can_retry(error) and candidate.failures <= self._recipe.retries:
            self._end(candidate, "failed", "failed", seconds, {}, told(error))
            self._put_off(candidate, backoff_s(candidate.failures, self._backoff_base_s))
        else:
            self._end(candidate, "quarantined", "failed", seconds, {}, told(error))

    def _fail_to_write(self, candidate: Candidate, error: MillicentError, seconds: float, stages: dict[str, float]) -> None:
        """One name that cannot be written is that image's trouble; where nothing can be, drawing on would be money lost."""
        try:
            check_root(self._out, 1_000_000)
        except (OutputError, MachineError):
            self.error = error
            candidate.failures += 1
            self._end(candidate, "failed", "failed", seconds, stages, told(error))
            self._put_off(candidate, 0.0)
            self._stop(error.message)
        else:
            self._end(candidate, "quarantined", "failed", seconds, stages, told(error))

    def _break_off(self, error: Exception) -> None:
        """The editor's stream ended in the midst: the first in flight has failed, the others were not drawn. Each goes on alone."""
        now_s = self.elapsed_s()
        seconds, self._waited_s = max(0.0, now_s - self._mark_s - self._waited_s), 0.0
        first, *others = self._in_flight
        self._in_flight.clear()
        for candidate in others:
            candidate.read, candidate.alone = None, True
            self._end(candidate, "planned", "lost", 0.0, {}, f"An edit beside it broke the editor: {told(error)}")
            self._put_off(candidate, 0.0)
        first.alone = True
        self._fail(first, error, seconds)

    def _end(
        self,
        candidate: Candidate,
        state: State,
        attempt_state: AttemptState,
        seconds: float,
        stages: dict[str, float],
        why: str,
        sha256: str | None = None,
    ) -> None:
        """Write an attempt's end into the ledger, tell it, and let go of its key where nothing more is tried."""
        ended = Ended(
            state=state,
            attempt_state=attempt_state,
            seconds=seconds,
            elapsed_s=self.elapsed_s(),
            stages=stages,
            why=why,
            sha256=sha256,
        )
        usd = self._ledger.end(candidate.work, candidate.attempt, ended)
        if state == "quarantined" and attempt_state == "failed":
            self.counts["failed"] += 1
        if state in ("done", "rejected", "failed", "quarantined"):
            self._tell(state, candidate, seconds=seconds, usd=usd, why=why)
        if state == "quarantined":
            self._quarantine_same(candidate, why)

    def _quarantine_same(self, candidate: Candidate, why: str) -> None:
        assert candidate.key is not None
        for waiting in self._same.pop(candidate.key, []):
            told_why = f"It is the same work as {candidate.item.output}, which was given up: {why}"
            self._ledger.quarantine(waiting.work, told_why)
            self._tell("quarantined", waiting, attempt=0, why=told_why)

    def _release(self, key: str) -> None:
        """Whoever waits for this work is to try it by itself."""
        for waiting in self._same.pop(key, []):
            waiting.key = None
            self._put_off(waiting, 0.0)

    def _link(self, candidate: Candidate, original: str, sha256: str) -> None:
        link_output(self._out, original, candidate.item.output)
        self._ledger.link(candidate.work, original, sha256)
        self._tell("linked", candidate, attempt=0, why=f"The same work as {original}.")

    def _put_off(self, candidate: Candidate, pause_s: float) -> None:
        heapq.heappush(self._later, (self.elapsed_s() + pause_s, next(self._order), candidate))

    # what is told

    def _tell(
        self,
        kind: EventKind,
        candidate: Candidate,
        *,
        attempt: int | None = None,
        seconds: float = 0.0,
        usd: Decimal | None = None,
        why: str = "",
    ) -> None:
        if kind != "started":
            self.counts[kind] += 1
        item = candidate.item
        self._on_event(
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
            )
        )

    def _tell_bad_row(self, row: BadRow) -> None:
        self.counts["bad row"] += 1
        self._on_event(Event(kind="bad row", elapsed_s=self.elapsed_s(), row_line=row.line, why=row.why))

    def _tell_passed(self, item: Item, known: Known) -> None:
        self.counts["given up" if known.state == "quarantined" else "already"] += 1

    def _tell_unread(self, candidate: Candidate, error: Exception) -> None:
        """The pictures could not be read: nothing was drawn, so nothing is billed."""
        if isinstance(error, MissingExtraError):
            raise error  # of every picture in that place, and no image's fault
        why, candidate.read = told(error), None
        if candidate.key is not None:
            self._release(candidate.key)
            candidate.key = None
        candidate.failures += 1
        if can_retry(error) and candidate.failures <= self._recipe.retries:
            self._ledger.postpone(candidate.work, why)
            self._put_off(candidate, backoff_s(candidate.failures, self._backoff_base_s))
            self._tell("failed", candidate, attempt=0, why=why)
        else:
            self._ledger.quarantine(candidate.work, why)
            self._tell("quarantined", candidate, attempt=0, why=why)


def _request(candidate: Candidate) -> EditRequest:
    assert candidate.read is not None
    item = candidate.item
    return EditRequest(
        images=candidate.read.result().images,
        prompt=item.prompt,
        negative_prompt=item.negative_prompt,
        steps=item.steps,
        schedule=item.schedule,
        seed=candidate.seed,
        true_cfg=item.true_cfg,
        height=item.height,
        width=item.width,
        fit=item.fit,
    )
