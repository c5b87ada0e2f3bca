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
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from millicent.edits import EditRequest, EditResult, Timings
from millicent.engine import failures, pipeline
from millicent.engine.loading import Model
from millicent.engine.output import Sent
from millicent.engine.pipeline import Conditioning, Course, Latents, Prepared
from millicent.engine.watch import Mark, mark, seconds_between
from millicent.errors import MillicentError

MakeResult = Callable[[Course, Sequence[Image.Image], Timings], EditResult]
Outcome = EditResult | MillicentError


@dataclass(frozen=True, slots=True)
class Ready:
    """What the preparing thread has made of a request. seconds: what that took."""

    prepared: Prepared
    course: Course
    seconds: float


@dataclass(slots=True)
class Edit:
    """One edit under way. error: why it has none of the later stages. spans: the begin and end of each stage on the card."""

    request: EditRequest
    ready: Future[Ready]
    conditioning: Conditioning | None = None
    latents: Latents | None = None
    finished: Future[tuple[EditResult, float]] | None = None
    error: MillicentError | None = None
    spans: dict[str, tuple[Mark, Mark]] = field(default_factory=dict)


class Stream:
    """One run of many edits on a model; Editor.edit_many says what it does."""

    def __init__(self, model: Model, make_result: MakeResult) -> None:
        self._model = model
        self._make_result = make_result
        self._drawing: torch.cuda.Stream | None = None
        self._edges: torch.cuda.Stream | None = None

    def run(self, requests: Iterable[EditRequest], ahead: int) -> Iterator[Outcome]:
        """In order; ahead: how many requests are being prepared beside the one that is encoded next."""
        self._open_streams()
        preparing, finishing = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("prepare", "finish"))
        edits = _read_ahead((Edit(request, preparing.submit(self._prepare, request)) for request in requests), ahead)
        ended = time.perf_counter()
        last: Edit | None = None
        try:
            drawn = self._encode_next(edits)
            while drawn is not None:
                self._attempt(drawn, "denoise", self._draw)
                following = self._encode_next(edits)
                self._attempt(drawn, "decode", lambda edit: self._decode(edit, finishing))
                if last is not None:
                    outcome, ended = _wait_for(last, ended)
                    yield outcome
                last, drawn = drawn, following
            if last is not None:
                yield _wait_for(last, ended)[0]
        finally:
            preparing.shutdown(cancel_futures=True)
            finishing.shutdown()
            self._join_streams()

    def _prepare(self, request: EditRequest) -> Ready:
        begin = time.perf_counter()
        prepared = pipeline.prepare(request, self._model)
        course = pipeline.settle(request, self._model, prepared.height, prepared.width)
        return Ready(prepared, course, time.perf_counter() - begin)

    def _encode_next(self, edits: Iterator[Edit]) -> Edit | None:
        edit = next(edits, None)
        if edit is not None:
            self._attempt(edit, "encode", self._encode)
        return edit

    def _encode(self, edit: Edit) -> None:
        ready = edit.ready.result()
        # a table of modulation is read by drawings, so it is made where they are
        with torch.inference_mode(), torch.cuda.stream(self._drawing):
            pipeline.check_sigmas(ready.course, self._model)
        with self._on(self._edges, edit, "encode"):
            edit.conditioning = pipeline.encode(ready.prepared, self._model, edit.request.prompt, ready.course.negative_prompt)

    def _draw(self, edit: Edit) -> None:
        told, course = edit.conditioning, edit.ready.result().course
        assert told is not None
        with self._on(self._drawing, edit, "denoise", after="encode"):
            self._take(told.positive, told.references, *([] if told.negative is None else [told.negative]))
            edit.latents = pipeline.draw(told, self._model, course.sigmas, course.seeds, course.true_cfg)
        edit.conditioning = None

    def _decode(self, edit: Edit, finishing: ThreadPoolExecutor) -> None:
        assert edit.latents is not None
        with self._on(self._edges, edit, "decode", after="denoise"):
            self._take(edit.latents.tensor)
            sent = [pipeline.send(row, self._model) for row in edit.latents.tensor.split(1)]
        edit.latents = None
        edit.finished = finishing.submit(self._finish, edit, sent)

    def _finish(self, edit: Edit, sent: Sequence[Sent]) -> tuple[EditResult, float]:
        images = [pipeline.receive(one, edit.request) for one in sent]
        ready = edit.ready.result()
        seconds = {stage: seconds_between(*span) for stage, span in edit.spans.items()}
        timings = Timings(ready.seconds, seconds["encode"], seconds["denoise"], seconds["decode"])
        return self._make_result(ready.course, images, timings), time.perf_counter()

    def _attempt(self, edit: Edit, stage: str, work: Callable[[Edit], None]) -> None:
        """A stage of an edit, unless one before has failed. What does not fit beside other edits is tried once more alone."""
        if edit.error is not None:
            return
        try:
            try:
                with failures.guarded(self._model):
                    work(edit)
            except MillicentError as error:
                if not failures.is_out_of_memory(error):
                    raise
                # recovery has waited for all other work on the card
                with failures.guarded(self._model):
                    work(edit)
        except MillicentError as error:
            edit.error = error

    @contextmanager
    def _on(self, stream: torch.cuda.Stream | None, edit: Edit, stage: str, after: str | None = None) -> Iterator[None]:
        """Work that goes to a stream, once the edit's stage `after` has ended on the other."""
        with torch.inference_mode(), torch.cuda.stream(stream):
            if stream is not None and after is not None:
                event = edit.spans[after][1]
                assert isinstance(event, torch.cuda.Event)
                stream.wait_event(event)
            begin = mark(stream)
            yield
            edit.spans[stage] = (begin, mark(stream))

    def _take(self, *tensors: Tensor) -> None:
        """What the other stream has made is read by the current one."""
        for tensor in tensors:
            if tensor.device.type == "cuda":
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def _open_streams(self) -> None:
        device = self._model.device
        if device.type == "cuda":
            self._drawing = torch.cuda.current_stream(device)
            # short work before long: the next drawing must not wait for it
            self._edges = torch.cuda.Stream(device, priority=-1)
            self._edges.wait_stream(self._drawing)

    def _join_streams(self) -> None:
        if self._drawing is not None and self._edges is not None:
            self._drawing.wait_stream(self._edges)


def _read_ahead(edits: Iterator[Edit], ahead: int) -> Iterator[Edit]:
    """The same, each after the `ahead` that follow it have been begun."""
    begun: deque[Edit] = deque(islice(edits, ahead))
    while begun:
        begun.extend(islice(edits, 1))
        yield begun.popleft()


def _wait_for(edit: Edit, ended: float) -> tuple[Outcome, float]:
    """What an edit came to, and when that ended. ended: when the last one before it did that came to pictures."""
    if edit.error is not None:
        return edit.error, ended
    assert edit.finished is not None
    try:
        result, now = edit.finished.result()
    except MillicentError as error:
        return error, ended
    return dataclasses.replace(result, elapsed_s=now - ended), now
