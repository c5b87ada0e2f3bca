"""A Ray cluster as one editor: a worker for each GPU, requests in, results out in their order. The only home of ray.

    driver   run_catalog -> Cluster.edit_many -> requests to whichever worker is free
    worker   Worker.edit (a thread for each call) -> a queue -> one thread, in which the editor draws them as in a local run

Ray's own actors and not Ray Data: Ray Data repeats what a dead worker had in hand by itself, and the ledger, which counts attempts
and dollars, would not learn of it. Here the requests that a dead worker had in hand come back as MachineErrors, the others go on,
and a new worker takes its place. Each request says all that decides its picture, seed included, so that any worker draws the same.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

from millicent.edits import EditRequest, EditResult, OnProgress, SupportsEdit
from millicent.errors import InputError, MachineError, MillicentError, MissingExtraError

OpenEditor = Callable[[], SupportsEdit]
Outcome = EditResult | MillicentError

CONNECT_S = 10.0
LINGER_S = 0.05  # how long a worker's stream of edits waits for the next request before it is drained
WAVE_LINGER_S = 1.0  # the same where it draws in waves: an exchange of weights takes about as long
THREADS = 64  # of a worker, for all that is in hand and for `open`; so no wave here is longer, which an exchange hardly shows in
OPEN_S = 1800.0  # for the first worker to have its weights in memory
REPLACE_S = 600.0  # how long a run waits where no worker is left
MOST_DEATHS = 3  # of one worker, with no picture between them


@dataclass(frozen=True, slots=True)
class Opened:
    """What a worker says of itself once its model is in memory. streams: whether its editor has edit_many; wave: as Model's."""

    name: str
    weights_sha256: str
    warnings: tuple[str, ...]
    streams: bool
    wave: int
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A MillicentError on its way between processes: pickle would build the exception from one argument, and it takes two."""

    kind: type[MillicentError]
    message: str
    fix: str

    @classmethod
    def of(cls, error: MillicentError) -> Self:
        return cls(type(error), error.message, error.fix)

    def to_error(self) -> MillicentError:
        return self.kind(self.message, self.fix)


class Worker:
    """One model on one GPU, or on a CPU. Runs in a process of its own; the calls of `edit` come in threads."""

    def __init__(self, open_editor: OpenEditor) -> None:
        self._open_editor = open_editor
        self._asked: queue.SimpleQueue[tuple[EditRequest, Future[EditResult | Failure]]] = queue.SimpleQueue()

    def open(self) -> Opened | Failure:
        # Ray gives a worker as many threads as it has CPUs; but on a CPU, pictures depend on how many share a sum
        os.environ.pop("OMP_NUM_THREADS", None)
        try:
            editor: Any = self._open_editor()
        except MillicentError as error:
            return Failure.of(error)
        threading.Thread(target=self._serve, args=(editor,), daemon=True).start()
        return Opened(
            name=editor.name,
            weights_sha256=editor.weights_sha256,
            warnings=tuple(getattr(editor, "warnings", ())),
            streams=hasattr(editor, "edit_many"),
            wave=_wave_of(editor),
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def edit(self, request: EditRequest) -> EditResult | Failure:
        answer: Future[EditResult | Failure] = Future()
        self._asked.put((request, answer))
        return answer.result()

    def _serve(self, editor: Any) -> None:
        """Draw what is asked for, as one stream of edits for as long as requests follow each other."""
        linger_s = LINGER_S if _wave_of(editor) == 1 else WAVE_LINGER_S
        while True:
            first, waiting = self._asked.get(), deque[Future[EditResult | Failure]]()
            try:
                for outcome in _edit_many(editor, self._take(first, waiting, linger_s)):
                    answer = Failure.of(outcome) if isinstance(outcome, MillicentError) else outcome
                    waiting.popleft().set_result(answer)
            except Exception as error:  # a bug: the run is told, and ends
                for left in waiting:
                    left.set_exception(error)

    def _take(
        self,
        first: tuple[EditRequest, Future[EditResult | Failure]],
        waiting: deque[Future[EditResult | Failure]],
        linger_s: float,
    ) -> Iterator[EditRequest]:
        """Requests until none comes for a while; whoever asked stands in `waiting`, in the same order."""
        asked = first
        while True:
            waiting.append(asked[1])
            yield asked[0]
            try:
                asked = self._asked.get(timeout=linger_s)
            except queue.Empty:
                return


def _edit_many(editor: Any, requests: Iterable[EditRequest]) -> Iterator[Outcome]:
    if hasattr(editor, "edit_many"):
        yield from editor.edit_many(requests)
        return
    for request in requests:
        try:
            outcome: Outcome = editor.edit(request)
        except MillicentError as error:
            outcome = error
        yield outcome


def _wave_of(editor: Any) -> int:
    """How many edits share an exchange of weights; 1 where none are exchanged."""
    return int(getattr(editor, "wave", 1))


@dataclass(eq=False, slots=True)
class Hand:
    """A worker as the driver sees it. opening: the answer to come, while its model is not in memory.

    deaths: in this place, since its last picture.
    """

    actor: Any
    opening: Any
    opened: Opened | None = None
    deaths: int = 0
    in_hand: dict[Any, Place] = field(default_factory=dict)

    def awaited(self) -> Iterator[Any]:
        """Ray's references to all answers that are still to come."""
        yield from self.in_hand
        if self.opening is not None:
            yield self.opening

    @property
    def title(self) -> str:
        return "A worker" if self.opened is None else f"The worker on {self.opened.host} (process {self.opened.pid})"


@dataclass(eq=False, slots=True)
class Place:
    """A request's place in the row of results."""

    outcome: Outcome | None = None


class Cluster:
    """An editor whose work is done by the workers of a Ray cluster. `open` makes one; `close` gives the workers back.

    cards: how many workers there are when all are up. name, weights_sha256, warnings: as an Editor's.
    """

    def __init__(self, ray: Any, make_actor: Callable[[], Any], cards: int) -> None:
        self._ray = ray
        self._make_actor = make_actor
        self._last_death = ""
        self.cards = cards
        self._hands = [self._start() for _ in range(cards)]
        self._first = self._wait_for_first()
        self.name, self.weights_sha256, self.warnings = self._first.name, self._first.weights_sha256, self._first.warnings

    @classmethod
    def open(cls, address: str, open_editor: OpenEditor, actors: int | None = None) -> Self:
        """Connect, start the workers, and wait until the first of them has its model in memory.

        address: "auto" (the cluster that runs on this machine), HOST:PORT, ray://HOST:PORT, or "local", which starts one here, of
        all its GPUs, and ends it with the run.
        open_editor: opens the model; runs in each worker, so every machine must have the weights at the same place.
        actors: how many workers. Default: one for each GPU. On a cluster without GPUs it must be given, and each takes a CPU.
        Raises MissingExtraError, MachineError for no cluster or no GPU, and what opening the model raises.
        """
        ray = _connect(address)
        try:
            on_gpus, cards = _count_workers(ray.cluster_resources(), actors)
            per_worker: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if on_gpus else {"num_cpus": 1}
            actor = ray.remote(Worker).options(**per_worker, max_restarts=0, max_task_retries=0, max_concurrency=THREADS)
            return cls(ray, lambda: actor.remote(open_editor), cards)
        except BaseException:
            ray.shutdown()
            raise

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> EditResult:
        """Draw one request on some worker. Raises as Editor.edit; MachineError where the worker dies. Tells no progress."""
        outcome = next(self.edit_many([request]))
        if isinstance(outcome, MillicentError):
            raise outcome
        return outcome

    def edit_many(
        self, requests: Iterable[EditRequest], ahead: int = 1, cancelled: threading.Event | None = None
    ) -> Iterator[Outcome]:
        """Draw requests on all workers at once, and hand their results out in order; as Editor.edit_many.

        A request is taken whenever a worker has room. Those in the hands of a worker that dies come to a MachineError each.
        cancelled: once set, which is looked at with each answer of a worker, no request is taken. What is in hand is finished, but
        where workers draw in waves: there only what has come in order is handed out, and they draw on until `close`.
        Raises InputError for ahead below 1; MachineError where no worker is left or where one has loaded other weights.
        """
        if ahead < 1:
            raise InputError(f"ahead is {ahead}.", "Use 1 or more, or edit().")
        return self._run(iter(requests), ahead, cancelled or threading.Event())

    def _run(self, requests: Iterator[EditRequest], ahead: int, cancelled: threading.Event) -> Iterator[Outcome]:
        row: deque[Place] = deque()
        is_ended = False
        try:
            while True:
                if row and row[0].outcome is not None:
                    yield row.popleft().outcome  # type: ignore[misc]  # just checked
                    continue
                if cancelled.is_set():
                    if self._wave > 1:
                        return
                    is_ended = True
                # a slow picture at the head of the row must not let finished ones behind it fill the memory
                most = 2 * self.cards * _room(ahead, streams=True, wave=self._wave)
                hand = self._find_free(ahead) if len(row) < most else None
                if hand is not None and not is_ended:
                    request = next(requests, None)
                    if request is None:
                        is_ended = True
                    else:
                        row.append(self._give(hand, request))
                    self._collect(wait_s=0)
                elif is_ended and not row:
                    return
                else:
                    self._collect(wait_s=REPLACE_S)
        finally:
            self._forget_all()

    def _find_free(self, ahead: int) -> Hand | None:
        """The open worker with the least in hand, where that leaves room."""
        ready = [hand for hand in self._hands if hand.opened is not None]
        least = min(ready, key=lambda hand: len(hand.in_hand), default=None)
        if least is None or least.opened is None or len(least.in_hand) >= _room(ahead, least.opened.streams, least.opened.wave):
            return None
        return least

    @property
    def _wave(self) -> int:
        """The longest of the workers' waves."""
        return max((hand.opened.wave for hand in self._hands if hand.opened is not None), default=self._first.wave)

    def _give(self, hand: Hand, request: EditRequest) -> Place:
        place = Place()
        hand.in_hand[hand.actor.edit.remote(request)] = place
        return place

    def _collect(self, wait_s: float) -> None:
        """Take what workers have answered, waiting for the first answer. Raises MachineError where there are no workers to ask."""
        owner = {reference: hand for hand in self._hands for reference in hand.awaited()}
        if not owner:
            raise MachineError(f"No worker is left. {self._last_death}", "See the workers' logs; then run the same command again.")
        # a picture may take long, so without limit; a worker that does not come up must not keep the run forever
        is_drawing = any(hand.in_hand for hand in self._hands)
        timeout = None if wait_s and is_drawing else wait_s
        ready, _ = self._ray.wait(list(owner), num_returns=1, timeout=timeout, fetch_local=True)
        if not ready and wait_s:
            raise MachineError(f"No worker of the Ray cluster has come up within {wait_s:g} s.", "See `ray status`.")
        for reference in ready:
            hand = owner[reference]
            if reference == hand.opening:
                self._welcome(hand)
            elif reference in hand.in_hand:  # else its worker was found dead by another answer of this round
                self._receive(hand, reference)

    def _receive(self, hand: Hand, reference: Any) -> None:
        try:
            answer = self._ray.get(reference)
        except _deaths(self._ray) as error:
            self._replace(hand, error)
            return
        hand.in_hand.pop(reference).outcome = answer.to_error() if isinstance(answer, Failure) else answer
        hand.deaths = 0

    def _welcome(self, hand: Hand) -> None:
        """A worker has opened its model, or could not. Raises what it could not for."""
        try:
            answer = self._ray.get(hand.opening)
        except _deaths(self._ray) as error:
            self._replace(hand, error)
            return
        if isinstance(answer, Failure):
            raise answer.to_error()
        if hasattr(self, "weights_sha256") and answer.weights_sha256 != self.weights_sha256:
            raise MachineError(
                f"The worker on {answer.host} has loaded other weights than the first one.", "Put the same files on every machine."
            )
        hand.opening, hand.opened = None, answer

    def _replace(self, hand: Hand, error: Exception) -> None:
        """A worker is dead: give its requests back, and start another in its place unless it has died often."""
        title, why = hand.title, " ".join(str(error).split())[:200]
        for place in hand.in_hand.values():
            place.outcome = MachineError(f"{title} died while the picture was in its hands: {why}", "It is tried again.")
        hand.in_hand.clear()
        self._ray.kill(hand.actor)
        number = self._hands.index(hand)
        self._hands[number : number + 1] = [self._start(hand.deaths + 1)] if hand.deaths + 1 < MOST_DEATHS else []
        self._last_death = f"{title} died: {why}"

    def _start(self, deaths: int = 0) -> Hand:
        actor = self._make_actor()
        return Hand(actor, actor.open.remote(), deaths=deaths)

    def _wait_for_first(self) -> Opened:
        deadline_s = time.monotonic() + OPEN_S
        while True:
            for hand in self._hands:
                if hand.opened is not None:
                    return hand.opened
            self._collect(wait_s=max(1.0, deadline_s - time.monotonic()))

    def _forget_all(self) -> None:
        """Drop what is still in hand when a run ends early: its answers come, and nobody waits for them."""
        for hand in self._hands:
            hand.in_hand.clear()

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        if self._ray.is_initialized():
            for hand in self._hands:
                self._ray.kill(hand.actor)
            self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _room(ahead: int, streams: bool, wave: int) -> int:
    """Requests in a worker's hands: as many as its stream of edits holds (engine/stream.py), one on its way, and `ahead`.

    In waves that is a wave, which is the next one's by the time that all of one are drawn.
    """
    if not streams:
        return 1 + ahead
    return 4 + ahead if wave == 1 else min(wave + 1 + ahead, THREADS - 1)


def _count_workers(resources: Mapping[str, float], actors: int | None) -> tuple[bool, int]:
    """Whether each takes a GPU, and how many. Raises MachineError where the cluster has no room for so many."""
    gpus, cpus = (int(resources.get(kind, 0)) for kind in ("GPU", "CPU"))
    if actors is None and gpus == 0:
        raise MachineError("The Ray cluster has no GPU.", "Add machines that have one, or say how many workers: --ray-actors 2.")
    wanted, found, kind = gpus if actors is None else actors, gpus or cpus, "GPU" if gpus else "CPU"
    if not 1 <= wanted <= found:
        raise MachineError(f"{wanted} workers were asked for, and the cluster has {found} {kind}s.", f"Ask for 1 to {found}.")
    return gpus > 0, wanted


def _connect(address: str) -> Any:
    # before ray is imported: it must not report usage to its makers
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtraError("Ray is not installed, and --ray needs it.", 'Run: pip install "millicent[ray]"') from error
    _check_reachable(address)
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise MachineError(
            f"There is no Ray cluster at {address}: {told}", "Start one (ray start --head), or use --ray local."
        ) from error
    return ray


def _check_reachable(address: str) -> None:
    """Raises MachineError where nothing listens at a HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise MachineError(f"There is no Ray cluster at {address}: {error}.", "Check the address and the firewall.") from error


def _deaths(ray: Any) -> tuple[type[Exception], ...]:
    """What Ray raises for a worker, or its node, that is gone, and for what was lost with it."""
    told = ray.exceptions
    return (told.RayActorError, told.WorkerCrashedError, told.ObjectLostError, told.OutOfMemoryError, told.NodeDiedError)
