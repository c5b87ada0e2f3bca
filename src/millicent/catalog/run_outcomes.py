"""What becomes of an outcome: a drawn picture is checked and written in threads, then accepted, drawn again or given up."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from millicent.catalog.attempts import Candidate, backoff_s, can_retry, told
from millicent.catalog.finish import Check, Finished, check_root, finish
from millicent.catalog.ledger import AttemptState, Ended, State
from millicent.catalog.run_state import RunState
from millicent.edits import EditResult
from millicent.errors import MachineError, MillicentError, OutputError

FINISH_WAITING = 8  # drawn pictures that may wait for the disk before drawing does


class Outcomes:
    """finishing: the threads that check and write; the caller shuts them down."""

    def __init__(self, run: RunState, finishing: ThreadPoolExecutor, check: Check) -> None:
        self._run, self._finishing, self._check = run, finishing, check
        self._drawn: deque[tuple[Candidate, EditResult, float, Future[Finished]]] = deque()

    def settle(self, candidate: Candidate, outcome: EditResult | MillicentError) -> None:
        """An attempt has come out: a picture goes to the finishing threads."""
        seconds = self._run.take_seconds()
        self._run.limits.note(seconds)
        if isinstance(outcome, MillicentError):
            self._fail(candidate, outcome, seconds)
            return
        assert candidate.read is not None
        read, attempt = candidate.read.result(), candidate.attempt
        future = self._finishing.submit(
            finish, candidate.item, read, outcome, attempt, self._run.out, self._run.recipe.checks, self._check
        )
        candidate.read = None  # the pictures go once they are checked against
        self._drawn.append((candidate, outcome, seconds, future))
        self.collect(keep=FINISH_WAITING)

    def collect(self, keep: int) -> None:
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
        for waiting in self._run.same.pop(candidate.key):
            try:
                self._run.link(waiting, candidate.item.output, finished.sha256)
            except MillicentError:  # it is asked for once more, and finds out why
                waiting.key = None
                self._run.put_off(waiting, 0.0)

    def _reject(self, candidate: Candidate, finished: Finished, seconds: float, stages: dict[str, float]) -> None:
        candidate.rejects += 1
        why = "; ".join(finished.verdict.reasons)
        if candidate.rejects - candidate.forgiven > self._run.recipe.redo_rejects:
            self._end(candidate, "quarantined", "rejected", seconds, stages, why, set_aside=finished.place)
        else:
            self._end(candidate, "rejected", "rejected", seconds, stages, why, set_aside=finished.place)
            self._run.put_off(candidate, 0.0)

    def _fail(self, candidate: Candidate, error: Exception, seconds: float) -> None:
        candidate.failures += 1
        candidate.read = None
        if can_retry(error) and candidate.failures <= self._run.recipe.retries:
            self._end(candidate, "failed", "failed", seconds, {}, told(error))
            self._run.put_off(candidate, backoff_s(candidate.failures, self._run.backoff_base_s))
        else:
            self._end(candidate, "quarantined", "failed", seconds, {}, told(error))

    def _fail_to_write(self, candidate: Candidate, error: MillicentError, seconds: float, stages: dict[str, float]) -> None:
        """One name that cannot be written is that image's trouble; where nothing can be, drawing on would be money lost."""
        try:
            check_root(self._run.out, 1_000_000)
        except (OutputError, MachineError):
            self._run.error = error
            candidate.failures += 1
            self._end(candidate, "failed", "failed", seconds, stages, told(error))
            self._run.put_off(candidate, 0.0)
            self._run.stop(error.message)
        else:
            self._end(candidate, "quarantined", "failed", seconds, stages, told(error))

    def break_off(self, error: Exception) -> None:
        """The editor's stream ended in the midst: the first in flight has failed, the others were not drawn. Each goes on alone."""
        seconds = self._run.take_seconds()
        first, *others = self._run.in_flight
        self._run.in_flight.clear()
        for candidate in others:
            candidate.read, candidate.alone = None, True
            self._end(candidate, "planned", "lost", 0.0, {}, f"An edit beside it broke the editor: {told(error)}")
            self._run.put_off(candidate, 0.0)
        first.alone = True
        self._fail(first, error, seconds)

    def give_back(self) -> None:
        """What is still in flight will not be drawn in this run: it was no attempt, and the next run finds it as it was.

        What one of them took that was cut short is the run's idle time.
        """
        for candidate in self._run.in_flight:
            assert candidate.key is not None
            self._run.ledger.release(candidate.work, candidate.attempt)
            self._run.release(candidate.key)
            candidate.read = None
            self._run.put_off(candidate, 0.0)
        self._run.in_flight.clear()

    def _end(
        self,
        candidate: Candidate,
        state: State,
        attempt_state: AttemptState,
        seconds: float,
        stages: dict[str, float],
        why: str,
        sha256: str | None = None,
        set_aside: str | None = None,
    ) -> None:
        """Write an attempt's end into the ledger, tell it, and let go of its key where nothing more is tried."""
        ended = Ended(
            state=state,
            attempt_state=attempt_state,
            seconds=seconds,
            elapsed_s=self._run.elapsed_s(),
            stages=stages,
            why=why,
            sha256=sha256,
            set_aside=set_aside,
        )
        usd = self._run.ledger.end(candidate.work, candidate.attempt, ended)
        if attempt_state in ("done", "rejected", "failed"):
            self._run.tell(attempt_state, candidate, seconds=seconds, usd=usd, why=why, set_aside=set_aside)
        if state == "quarantined":
            self._run.tell("quarantined", candidate, why=why, set_aside=set_aside)
            self._quarantine_same(candidate, why, set_aside)

    def _quarantine_same(self, candidate: Candidate, why: str, set_aside: str | None) -> None:
        assert candidate.key is not None
        for waiting in self._run.same.pop(candidate.key, []):
            told_why = f"It is the same work as {candidate.item.output}, which was given up: {why}"
            self._run.ledger.quarantine(waiting.work, told_why, set_aside)
            self._run.tell("quarantined", waiting, attempt=0, why=told_why, set_aside=set_aside)
