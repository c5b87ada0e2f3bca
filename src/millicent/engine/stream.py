"""Many edits, one after another, so that the card never waits for the host.

One thread gives the card its work, and waits for none of it. On one stream pictures are drawn, on the other they are encoded
and decoded, so that the next picture is read and the last one finished beside the one that is drawn:

    thread "prepare"   ... prepare 3 | prepare 4 | ...
    stream of edges    ... encode 2, decode 0 | encode 3, decode 1 | ...
    stream of drawing  ... draw 1             | draw 2             | ...
    thread "finish"    ... fetch 0            | fetch 1            | ...

All encoding and decoding is on one stream, in order, and so is all drawing: what graphs read from and write to is never
written to by two edits at once. Tensors that go from one stream to the other are recorded there, so that their memory is not
given away while that stream may read it.

Where memory is so short that text encoder and transformer lie on the card in turn, both are the one stream that is current, as
what lies beside each other would add up (waves.py).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from millicent.edits import EditRequest, EditResult, Timings
from millicent.engine import drawing, failures, pipeline
from millicent.engine.drawing import Conditioning, Latents, Told
from millicent.engine.loading import Model
from millicent.engine.output import Sent
from millicent.engine.pipeline import Course, Prepared
from millicent.engine.pressure import once_more
from millicent.engine.watch import Mark, mark, seconds_between
from millicent.errors import MillicentError

MakeResult = Callable[[Course, Sequence[Image.Image], Timings], EditResult]
Outcome = EditResult | MillicentError
_LOG = logging.getLogger("millicent")


@dataclass(frozen=True, slots=True)
class Ready:
    """What the preparing thread has made of a request. seconds: what that took."""

    prepared: Prepared
    course: Course
    seconds: float


@dataclass(slots=True)
class Edit:
    """One edit under way.

    ready: until it is encoded; course, prepare_s: from then on. was_cut: the run was cancelled in the midst of it.
    error: why it has none of the later stages. spans: the begin and end of each stage on the card. abreast: how many edits share
    its drawing's.
    """

    request: EditRequest
    ready: Future[Ready] | None
    course: Course | None = None
    prepare_s: float = 0.0
    conditioning: Conditioning | None = None
    latents: Latents | None = None
    finished: Future[tuple[EditResult, float]] | None = None
    error: MillicentError | None = None
    was_cut: bool = False
    abreast: int = 1
    spans: dict[str, tuple[Mark, Mark]] = field(default_factory=dict)


class _Cancelled(Exception):  # noqa: N818  (no error: the edit was told to stop)
    """Raised before a step, and caught where the stage was begun."""


class Stages:
    """The stages of many edits on one model, for one run: each gives the card its work and waits for none of it.

    cancelled: once set, no request is taken, and a drawing stops before its next step.
    Where weights lie on the card in turn, little of its memory is left: what an edit is told waits for its drawing on the host. If
    `cancelled` is given too, the host is at most one step ahead of the card there, so that a step's end is one on the card.
    """

    def __init__(self, model: Model, make_result: MakeResult, cancelled: threading.Event | None = None) -> None:
        self._model = model
        self._make_result = make_result
        self._cancelled = cancelled
        self._ended = 0.0  # when the last edit did that came to pictures
        self._drawing: torch.cuda.Stream | None = None
        self._edges: torch.cuda.Stream | None = None
        self._before: torch.cuda.Event | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """The streams and threads, for as long as edits are under way."""
        self._open_streams()
        self._ended = time.perf_counter()
        self._preparing, self._finishing = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("prepare", "finish"))
        try:
            yield
        finally:
            self._preparing.shutdown(cancel_futures=True)
            self._finishing.shutdown()
            self.join_streams()

    @property
    def in_turn(self) -> bool:
        """Whether text encoder and transformer lie on the card in turn, from the start or since memory was found to be short."""
        return self._model.residency is not None and self._model.residency.in_turn

    @property
    def wave(self) -> int:
        """How many edits share one exchange of them."""
        return self._model.wave

    @property
    def abreast(self) -> int:
        """How many edits are drawn together, as blocks that are streamed come once for all of them."""
        return 1 if self._model.fast is None else self._model.fast.network.abreast

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled is not None and self._cancelled.is_set()

    def begin(self, requests: Iterable[EditRequest], ahead: int) -> Iterator[Edit]:
        """An edit for each request, once the `ahead` that follow it are being prepared; no more of them once cancelled."""
        source, begun = iter(requests), deque[Edit]()
        while not self.is_cancelled:
            while len(begun) <= ahead and not self.is_cancelled and (request := next(source, None)) is not None:
                begun.append(Edit(request, self._preparing.submit(self._prepare, request)))
            if not begun:
                return
            yield begun.popleft()

    def _prepare(self, request: EditRequest) -> Ready:
        begin = time.perf_counter()
        prepared = pipeline.prepare(request, self._model)
        course = pipeline.settle(request, self._model, prepared.height, prepared.width)
        return Ready(prepared, course, time.perf_counter() - begin)

    def attempt(self, edit: Edit, work: Callable[[Edit], None]) -> None:
        """A stage of an edit, unless one before has failed.

        What does not fit beside other edits is tried once more alone, and then with less of the model on the card.
        """
        if edit.error is not None or edit.was_cut:
            return

        def work_guarded() -> None:
            with failures.guarded(self._model):
                work(edit)

        handled = sys.exception()  # whoever takes the results may be handling something
        try:
            try:
                work_guarded()
            except MillicentError as error:
                if not failures.is_out_of_memory(error, handled):
                    raise
                # recovery has waited for all other work on the card
                once_more(self._model, edit.request, work_guarded)
        except MillicentError as error:
            edit.error = error
        except _Cancelled:
            edit.was_cut = True

    def attempt_together(self, edits: Sequence[Edit]) -> None:
        """Draw several at once. Where that fails none has been drawn; attempted by itself, each tells whether it was the cause.

        As many as do not fit together are not tried again; one fewer may be.
        """
        ready = [edit for edit in edits if edit.error is None and not edit.was_cut]
        if len(ready) < 2:
            return
        handled = sys.exception()
        try:
            with failures.guarded(self._model):
                self._draw(ready)
        except MillicentError as error:
            told = "These pictures are drawn one at a time"
            if failures.is_out_of_memory(error, handled):
                _LOG.debug("%s", error.__cause__)  # PyTorch's own numbers
                told = self._draw_fewer_than(ready)
            _LOG.warning("%s %s, and not %d.", error.message, told, len(ready))
        except _Cancelled:
            for edit in ready:
                edit.was_cut = True

    def _draw_fewer_than(self, edits: Sequence[Edit]) -> str:
        """From now on; in words."""
        assert self._model.fast is not None
        network = self._model.fast.network
        passes = max(1 if edit.course is None or edit.course.negative_prompt is None else 2 for edit in edits)
        fewer = min(len(edits), network.abreast // passes) - 1
        network.abreast = max(1, fewer * passes)
        return f"From now on pictures are drawn {'one' if fewer <= 1 else fewer} at a time"

    def encode(self, edit: Edit) -> None:
        self._go_on()
        assert edit.ready is not None
        ready = edit.ready.result()
        # a table of modulation is read by drawings, so it is made where they are
        with torch.inference_mode(), torch.cuda.stream(self._drawing):
            pipeline.check_sigmas(ready.course, self._model)
        with self._on(self._edges, [edit], "encode"):
            told = pipeline.encode(ready.prepared, self._model, edit.request.prompt, ready.course.negative_prompt)
            edit.conditioning = _move(told, _to_host) if self.in_turn else told
        # the pictures in the encoders' sizes are let go
        edit.ready, edit.course, edit.prepare_s = None, ready.course, ready.seconds

    def draw(self, edit: Edit) -> None:
        """Unless it has been drawn with others."""
        if edit.latents is None:
            self._draw([edit])

    def _draw(self, edits: Sequence[Edit]) -> None:
        self._go_on()
        on_step = None if self._cancelled is None else self._go_on
        with self._on(self._drawing, edits, "denoise", after="encode"):
            told = [self._tell(edit) for edit in edits]
            if len(told) == 1:
                (of,) = told
                drawn = [drawing.draw(of.conditioning, self._model, of.sigmas, of.seeds, of.true_cfg, on_step)]
            else:
                drawn = drawing.draw_together(told, self._model, on_step)
        for edit, latents in zip(edits, drawn, strict=True):
            edit.latents, edit.conditioning, edit.abreast = latents, None, len(edits)

    def _tell(self, edit: Edit) -> Told:
        """What its drawing is told, on the card."""
        assert edit.conditioning is not None
        assert edit.course is not None
        told = _move(edit.conditioning, lambda tensor: tensor.to(self._model.device, non_blocking=True))
        self._take(told.positive, told.references, *([] if told.negative is None else [told.negative]))
        return Told(told, edit.course.sigmas, edit.course.seeds, edit.course.true_cfg)

    def decode(self, edit: Edit) -> None:
        """To the finishing thread."""
        assert edit.latents is not None
        with self._on(self._edges, [edit], "decode", after="denoise"):
            self._take(edit.latents.tensor)
            sent = [pipeline.send(row, self._model) for row in edit.latents.tensor.split(1)]
        edit.latents = None
        edit.finished = self._finishing.submit(self._finish, edit, sent)

    def _finish(self, edit: Edit, sent: Sequence[Sent]) -> tuple[EditResult, float]:
        assert edit.course is not None
        images = [pipeline.receive(one, edit.request) for one in sent]
        seconds = {stage: seconds_between(*span) for stage, span in edit.spans.items()}
        timings = Timings(edit.prepare_s, seconds["encode"], seconds["denoise"] / edit.abreast, seconds["decode"])
        return self._make_result(edit.course, images, timings), time.perf_counter()

    def _go_on(self, *_step: int) -> None:
        """Called before each step. Raises _Cancelled."""
        if self._cancelled is None:
            return
        if self.in_turn and self._model.device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(self._model.device))
            before, self._before = self._before, event
            if before is not None:  # the begin of the last step, and so the end of the one before it
                before.synchronize()
        if self._cancelled.is_set():
            raise _Cancelled

    @contextmanager
    def _on(self, stream: torch.cuda.Stream | None, edits: Sequence[Edit], stage: str, after: str | None = None) -> Iterator[None]:
        """Work that goes to a stream, once the edits' stage `after` has ended on the other."""
        with torch.inference_mode(), torch.cuda.stream(stream):
            if stream is not None and after is not None:
                for edit in edits:
                    event = edit.spans[after][1]
                    assert isinstance(event, torch.cuda.Event)
                    stream.wait_event(event)
            begin = mark(stream)
            yield
            end = mark(stream)
            for edit in edits:
                edit.spans[stage] = (begin, end)

    def _take(self, *tensors: Tensor) -> None:
        """What the other stream has made is read by the current one."""
        for tensor in tensors:
            if tensor.device.type == "cuda":
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def _open_streams(self) -> None:
        device = self._model.device
        if device.type == "cuda":
            self._drawing = torch.cuda.current_stream(device)
            self._edges = _stream_of_edges(device)
            self._edges.wait_stream(self._drawing)

    def join_streams(self) -> None:
        """From here on there is one stream, the current one."""
        if self._drawing is not None and self._edges is not None:
            self._drawing.wait_stream(self._edges)
            self._edges = self._drawing

    def collect(self, edit: Edit) -> Outcome:
        """Wait for what an edit came to; in order."""
        if edit.error is not None:
            return edit.error
        assert edit.finished is not None
        try:
            result, now = edit.finished.result()
        except MillicentError as error:
            return error
        before, self._ended = self._ended, now
        return dataclasses.replace(result, elapsed_s=now - before)


@functools.cache
def _stream_of_edges(device: torch.device) -> torch.cuda.Stream:
    """One for all runs on a card: of each stream that ever was PyTorch's allocator keeps memory, and cuBLAS a workspace."""
    return torch.cuda.Stream(device, priority=-1)  # short work before long: the next drawing must not wait for it


def draw_stream(stages: Stages, edits: Iterator[Edit]) -> Generator[Outcome, None, Edit | None]:
    """In order. Returns an edit that is encoded and not drawn, where weights are on the card in turn from now on."""
    last: Edit | None = None
    drawn = _encode_next(stages, edits)
    while drawn is not None and not stages.in_turn:
        stages.attempt(drawn, stages.draw)
        if drawn.was_cut:
            drawn = None
            break
        following = None if stages.in_turn else _encode_next(stages, edits)
        stages.attempt(drawn, stages.decode)
        if last is not None:
            yield stages.collect(last)
        last, drawn = drawn, following
    if last is not None:
        yield stages.collect(last)
    return drawn


def _encode_next(stages: Stages, edits: Iterator[Edit]) -> Edit | None:
    edit = next(edits, None)
    if edit is not None:
        stages.attempt(edit, stages.encode)
    return edit


def _move(told: Conditioning, move: Callable[[Tensor], Tensor]) -> Conditioning:
    """The same with its tensors elsewhere."""
    return dataclasses.replace(
        told,
        positive=move(told.positive),
        negative=None if told.negative is None else move(told.negative),
        references=move(told.references),
    )


def _to_host(tensor: Tensor) -> Tensor:
    """On its way to the host, for whom works on the current stream; the host itself has not waited for it."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
