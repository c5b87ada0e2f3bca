"""When work is recorded, and what is kept; the recordings themselves are tests/gpu's."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from millicent.engine.capture import Replay, Replays, Tensors, Work, recording


class Recorder:
    """Keeps places for the inputs, as a graph does, and counts."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def record(self, work: Work, inputs: Tensors) -> Replay:
        self.recorded += 1
        fed = [torch.empty_like(value) for value in inputs]

        def replay(*values: Tensor) -> Tensors:
            self.replayed += 1
            for place, value in zip(fed, values, strict=True):
                place.copy_(value)
            return work(*fed)

        return replay


def double(x: Tensor) -> Tensors:
    return (2 * x,)


def ask(replays: Replays, *lengths: int, key: str = "double") -> None:
    for length in lengths:
        x = torch.arange(length, dtype=torch.float32) + 1
        assert torch.equal(replays.run(key, double, x)[0], 2 * x)


def test_the_second_time_is_recorded() -> None:
    recorder = Recorder()
    replays = Replays(recorder.record, kept=4)
    ask(replays, 3, 4, 5)
    assert (recorder.recorded, recorder.replayed) == (0, 0)
    ask(replays, 3, 3, 4)
    assert (recorder.recorded, recorder.replayed, len(replays)) == (2, 3, 2)


def test_key_shape_and_dtype_tell_recordings_apart() -> None:
    recorder = Recorder()
    replays = Replays(recorder.record, kept=4)
    for x in (torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)):
        replays.run("double", double, x)
    ask(replays, 6, key="another")
    assert recorder.recorded == 0


def test_the_least_recently_used_goes_first() -> None:
    recorder = Recorder()
    replays = Replays(recorder.record, kept=2)
    ask(replays, 3, 3, 4, 4, 3, 5, 5)  # 4 has to go
    assert (recorder.recorded, len(replays)) == (3, 2)
    ask(replays, 3, 5)
    assert recorder.recorded == 3
    ask(replays, 4)
    assert (recorder.recorded, len(replays)) == (4, 2)


def test_nothing_is_known_after_clear() -> None:
    recorder = Recorder()
    replays = Replays(recorder.record, kept=2)
    ask(replays, 3, 3)
    replays.clear()
    assert len(replays) == 0
    ask(replays, 3)
    assert recorder.recorded == 1


def test_a_recording_that_fails_is_not_kept() -> None:
    def fail(_work: Work, _inputs: Tensors) -> Replay:
        raise RuntimeError("no memory")

    replays = Replays(fail, kept=2)
    ask(replays, 3)
    with pytest.raises(RuntimeError, match="no memory"):
        ask(replays, 3)
    assert len(replays) == 0


def test_a_recording_that_fails_takes_the_others_along() -> None:
    recorder, fails = Recorder(), [False]

    def record(work: Work, inputs: Tensors) -> Replay:
        if fails[0]:
            raise RuntimeError("for want of memory")
        return recorder.record(work, inputs)

    replays = Replays(record, 4)
    ask(replays, 3, 3, 3, 5)
    assert (len(replays), recorder.replayed) == (1, 2)
    fails[0] = True
    with pytest.raises(RuntimeError, match="want of memory"):
        ask(replays, 5)
    assert len(replays) == 0
    fails[0] = False
    ask(replays, 3, 3, 5, 5)
    assert len(replays) == 2


class CannotBeEndedError(RuntimeError):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_while_something_is_recorded(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Nor is the recording's stream left current, or its pool open, by one that fails."""

    @contextlib.contextmanager
    def graph(*_: object, **named: Any) -> Iterator[None]:
        assert named["capture_error_mode"] == "thread_local"
        yield
        if fails:
            raise CannotBeEndedError

    before, back, ended = object(), Mock(), Mock(side_effect=RuntimeError("not currently recording"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: before)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_stream", back)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    made: Any = object()
    with pytest.raises(CannotBeEndedError) if fails else contextlib.nullcontext(), recording(made, (0, 7), None):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert [one.call_args for one in (back, ended)] == ([((before,),), ((1, (0, 7)),)] if fails else [None, None])
