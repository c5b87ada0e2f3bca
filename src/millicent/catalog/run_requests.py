"""What is asked of the editor: streams of edits, each image claimed before it is drawn, until nothing is left to do."""

from __future__ import annotations

import contextlib
import heapq
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

from millicent.catalog.attempts import Candidate, backoff_s, can_retry, told
from millicent.catalog.choose import is_finished
from millicent.catalog.ledger import Claim
from millicent.catalog.run_outcomes import FINISH_WAITING, Outcomes
from millicent.catalog.run_state import RunState
from millicent.edits import EditRequest, EditResult, SupportsEdit
from millicent.errors import InputNotFoundError, MillicentError, MissingExtraError, OutputError

SUSPECT_LOSSES = 3  # an image that was under way in so many runs that were killed comes last, and alone


class Requests:
    """fresh: the images to make, in the manifest's order, with their pictures on their way in. ahead: as for Editor.edit_many."""

    def __init__(self, editor: SupportsEdit, fresh: Iterator[Candidate], ahead: int, run: RunState, outcomes: Outcomes) -> None:
        self._editor: Any = editor
        self._fresh, self._ahead, self._run, self._results = fresh, ahead, run, outcomes
        self._all_read = False
        self._suspects: deque[Candidate] = deque()

    def go(self) -> None:
        """Streams of edits, one after another, until nothing is left to do or the run is to stop."""
        while True:
            try:
                self._edit_stream()
            except Exception:
                # what is drawn is paid for; where it cannot be kept, the first error says it
                with contextlib.suppress(MillicentError):
                    self._results.collect(keep=0)
                raise
            self._results.collect(keep=0)
            if self._run.stopped or (self._all_read and not self._run.later) or self._run.must_hold():
                return
            if self._all_read:
                self._run.wait_until(self._run.later[0][0])

    def _edit_stream(self) -> None:
        """Edit what is ready, as one stream; it ends where nothing is ready, so that what is in flight can come out.

        Asked to stop, it ends before that, and so it does where nothing can be written: what was not drawn is given back.
        """
        self._run.restart_clock()
        outcomes = self._outcomes()
        try:
            while True:
                try:
                    outcome = next(outcomes, None)
                except MillicentError:
                    raise
                except Exception as error:  # the edge of one edit: a bug that one picture brings out is not the others' end
                    if not self._run.in_flight:
                        raise
                    self._results.break_off(error)
                    return
                if outcome is not None:
                    self._results.settle(self._run.in_flight.popleft(), outcome)
                if outcome is None or self._run.error is not None:
                    self._results.give_back()
                    return
        finally:
            outcomes.close()

    def _outcomes(self) -> Generator[EditResult | MillicentError, None, None]:
        if hasattr(self._editor, "edit_many"):
            drawing = self._editor.edit_many(self._requests(), self._ahead, self._run.limits.stop)
            with contextlib.closing(drawing) as outcomes:
                yield from outcomes
            return
        for request in self._requests():
            try:
                yield self._editor.edit(request)
            except MillicentError as error:
                yield error

    def _requests(self) -> Iterator[EditRequest]:
        while (candidate := self._next()) is not None:
            if candidate.alone and self._run.in_flight:
                self._run.put_off(candidate, 0.0)  # the stream ends first, and this one has the next to itself
                return
            request = self._begin(candidate)
            if request is None:
                continue
            self._run.in_flight.append(candidate)
            yield request
            if candidate.alone:
                return

    def _next(self) -> Candidate | None:
        """The next image to try, a retry that is due before a new one; None where the run stops, or nothing is ready."""
        self._results.collect(keep=FINISH_WAITING)
        if self._run.stopped or self._run.must_hold():
            return None
        if self._run.later and self._run.later[0][0] <= self._run.elapsed_s():
            again = heapq.heappop(self._run.later)[2]
            if again.read is None:
                again.read = self._run.pictures.submit(again.item)
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
        last.read = self._run.pictures.submit(last.item)
        return last

    def _begin(self, candidate: Candidate) -> EditRequest | None:
        """Claim an image and say how to draw it; None for one that needs no drawing, or cannot be drawn now."""
        assert candidate.read is not None
        asked_s = self._run.elapsed_s()
        try:
            read = candidate.read.result()
        except Exception as error:  # the edge of one item
            self._tell_unread(candidate, error)
            return None
        finally:
            self._run.waited_s += self._run.elapsed_s() - asked_s
        if candidate.key != read.key and candidate.key is not None:
            self._run.release(candidate.key)  # the pictures are others than at the last try
        held = candidate.key == read.key
        candidate.remember(read.key)
        if not held and self._is_settled(candidate, read.found_sha256):
            return None
        if not held and read.key in self._run.same:
            candidate.read = None
            self._run.same[read.key].append(candidate)
            return None
        claim = self._run.ledger.claim(candidate.work, candidate.seed, self._run.elapsed_s())
        while claim.kind != "mine":
            if self._follow(candidate, claim):
                return None
            claim = self._run.ledger.claim(candidate.work, candidate.seed, self._run.elapsed_s())
        candidate.attempt = claim.attempt
        self._run.same.setdefault(read.key, [])
        self._run.tell("started", candidate)
        return _request(candidate)

    def _is_settled(self, candidate: Candidate, found_sha256: str | None) -> bool:
        """Whether the ledger or the output folder has it finished, now that the key is known."""
        known = candidate.known
        is_same = known is not None and known.key == candidate.key
        if known is not None and is_same and (known.state == "quarantined" or is_finished(known, candidate.item, self._run.out)):
            self._run.ledger.note_asked([candidate.work])
            self._run.tell_passed(candidate.item, known)
            return True
        if found_sha256 is None:
            return False
        self._run.ledger.adopt(candidate.work, found_sha256)
        self._run.counts["recovered"] += 1
        self._run.tell("done", candidate, attempt=0, why="It was found finished.")
        return True

    def _follow(self, candidate: Candidate, claim: Claim) -> bool:
        """Do what a claim that was not granted asks for; False where its original is gone, and it is to be claimed again."""
        if claim.kind == "link":
            try:
                self._run.link(candidate, claim.original, claim.sha256)
            except InputNotFoundError:
                self._run.ledger.forget(claim.original)
                return False
            except OutputError as error:
                self._run.ledger.quarantine(candidate.work, told(error))
                self._run.tell("quarantined", candidate, attempt=0, why=told(error))
        else:
            self._run.counts["already" if claim.kind == "done" else "elsewhere"] += 1
        return True

    def _tell_unread(self, candidate: Candidate, error: Exception) -> None:
        """The pictures could not be read: nothing was drawn, so nothing is billed."""
        if isinstance(error, MissingExtraError):
            raise error  # of every picture in that place, and no image's fault
        why, candidate.read = told(error), None
        if candidate.key is not None:
            self._run.release(candidate.key)
            candidate.key = None
        candidate.failures += 1
        if can_retry(error) and candidate.failures <= self._run.recipe.retries:
            self._run.ledger.postpone(candidate.work, why)
            self._run.put_off(candidate, backoff_s(candidate.failures, self._run.backoff_base_s))
            self._run.tell("failed", candidate, attempt=0, why=why)
        else:
            self._run.ledger.quarantine(candidate.work, why)
            self._run.tell("quarantined", candidate, attempt=0, why=why)


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
