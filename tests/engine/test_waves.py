"""Edits in waves against the same edits one by one: the pictures to the bit, what is done in which order, and stopping."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_stream import REQUESTS, SETTINGS, make_request, same

from millicent.edits import EditRequest, EditResult
from millicent.engine import drawing, pipeline, pressure, waves
from millicent.engine.editor import Editor
from millicent.engine.stream import Stages
from millicent.errors import CheckpointError, MachineError, MillicentError, PromptTooLongError, SizeError


@pytest.fixture(scope="module", params=list(SETTINGS))
def single(request: pytest.FixtureRequest, tiny_folder: Path) -> Editor:
    """Draws one by one."""
    return Editor.open(tiny_folder, device="cpu", settings=SETTINGS[request.param])


@pytest.fixture(scope="module")
def expected(single: Editor) -> list[EditResult]:
    return [single.edit(request) for request in REQUESTS]


def in_waves(editor: Editor, wave: int) -> Editor:
    """The same networks, whose weights are taken for such as lie on the card in turn."""
    residency: Any = SimpleNamespace(in_turn=True, wave=wave)
    return Editor(editor.name, dataclasses.replace(editor._model, residency=residency))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done, in its order: e for an edit's encoding, d for its drawing, s for its decoding, with its number."""
    done, encode, draw, send = list[str](), pipeline.encode, drawing.draw, pipeline.send

    def encode_and_tell(prepared: Any, model: Any, prompt: str, negative: str | None) -> Any:
        done.append(f"e{prompt.rpartition(' ')[2]}")
        return encode(prepared, model, prompt, negative)

    def draw_and_tell(told: Any, model: Any, sigmas: Any, seeds: Any, *rest: Any) -> Any:
        done.append(f"d{seeds[0]}")
        return draw(told, model, sigmas, seeds, *rest)

    def send_and_tell(latents: Any, model: Any) -> Any:
        done.append("s")
        return send(latents, model)

    monkeypatch.setattr(pipeline, "encode", encode_and_tell)
    monkeypatch.setattr(drawing, "draw", draw_and_tell)
    monkeypatch.setattr(pipeline, "send", send_and_tell)
    return done


@pytest.mark.parametrize(("wave", "ahead"), [(1, 1), (2, 1), (5, 3), (5, 20)])
def test_the_pictures_are_those_of_edit(single: Editor, expected: list[EditResult], wave: int, ahead: int) -> None:
    found = list(in_waves(single, wave).edit_many(REQUESTS, ahead))
    assert len(found) == len(expected)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_no_request_gives_no_result(single: Editor) -> None:
    assert list(in_waves(single, 3).edit_many([])) == []


def test_a_wave_is_encoded_whole_and_then_drawn_one_by_one(single: Editor, work: list[str]) -> None:
    found = list(in_waves(single, 2).edit_many(map(make_request, range(5)), ahead=4))
    assert len(found) == 5
    assert " ".join(work) == "e0 e1 d0 s d1 s e2 e3 d2 s d3 s e4 d4 s"


def test_requests_are_taken_when_they_are_needed_and_results_handed_out_within_a_wave(single: Editor, work: list[str]) -> None:
    taken: list[int] = []

    def source() -> Iterator[EditRequest]:
        for number in range(9):
            taken.append(number)
            yield make_request(number)

    results = in_waves(single, 3).edit_many(source())
    assert taken == []
    next(results)
    assert taken == [0, 1, 2, 3], "a wave, and one that is prepared meanwhile"
    assert " ".join(work) == "e0 e1 e2 d0 s d1 s"
    next(results)
    next(results)
    assert taken == [0, 1, 2, 3]
    assert len(list(results)) == 6


@pytest.mark.parametrize(("pictures", "order"), [(0.0, "e0 d0 s e1 d1 s e2 d2 s"), (2.5, "e0 e1 d0 s d1 s e2 d2 s")])
def test_a_wave_is_bounded_by_the_hosts_memory(
    single: Editor, work: list[str], monkeypatch: pytest.MonkeyPatch, pictures: float, order: str
) -> None:
    request = dataclasses.replace(make_request(0), images=(make_request(0).images[0].resize((1000, 1000)),))
    free = int(pictures * 3_000_000 / waves.WAVE_HOST_SHARE)
    monkeypatch.setattr(waves, "free_host_bytes", lambda: free)
    requests = [dataclasses.replace(request, prompt=f"make it {number}", seed=number) for number in range(3)]
    assert len(list(in_waves(single, 9).edit_many(requests))) == 3
    assert " ".join(work) == order


@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_error_comes_at_its_turn_and_the_others_go_on(single: Editor, expected: list[EditResult], place: int) -> None:
    broken = {
        PromptTooLongError: make_request(1, prompt="navy" * 65),
        SizeError: make_request(1, images=(make_request(0).images[0].resize((4000, 2)),)),
    }
    for kind, request in broken.items():
        found = list(in_waves(single, 3).edit_many([*REQUESTS[:place], request, *REQUESTS[place:3]]))
        assert isinstance(found.pop(place), kind)
        assert all(same(one, other) for one, other in zip(found, expected[:3], strict=True))


def test_values_that_are_not_finite_are_told_at_their_turn(single: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = single._model.vae.decode, iter(range(9))
    monkeypatch.setattr(single._model.vae, "decode", lambda z: decode(z) * (torch.nan if next(calls) == 1 else 1))
    found = list(in_waves(single, 3).edit_many(map(make_request, range(3))))
    assert [type(one) for one in found] == [EditResult, CheckpointError, EditResult]


@pytest.mark.parametrize("stage", ["encode", "draw"])
def test_what_fails_for_memory_once_is_done_again_and_what_always_does_is_told(
    single: Editor, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    expected = [single.edit(make_request(number)) for number in range(4)]
    home = drawing if stage == "draw" else pipeline
    right, calls = getattr(home, stage), []

    def fails(first: Any, model: Any, third: Any, fourth: Any, *rest: Any) -> Any:
        number = fourth[0] if stage == "draw" else int(third[-1])
        calls.append(number)
        if number == 2 or (number == 1 and calls.count(1) == 1):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(first, model, third, fourth, *rest)

    def nothing_can_go(model: Any, request: EditRequest, error: MillicentError, work: Any) -> None:
        raise error

    monkeypatch.setattr(home, stage, fails)
    monkeypatch.setattr(pressure, "once_more_with_less", nothing_can_go)
    found = list(in_waves(single, 3).edit_many(map(make_request, range(4))))
    assert calls == [0, 1, 1, 2, 2, 3]
    assert isinstance(found.pop(2), MachineError)
    del expected[2]
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("stage", ["encode", "draw"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_run_that_finds_memory_short_goes_on_in_waves(
    single: Editor, work: list[str], monkeypatch: pytest.MonkeyPatch, stage: str, at: int
) -> None:
    """It fails beside others and alone, and then weights are exchanged from there on."""
    editor, asked = in_waves(single, 3), [0, 1, 2, 3, 4, 5]
    residency: Any = editor._model.residency
    residency.in_turn = False
    home = drawing if stage == "draw" else pipeline
    right = getattr(home, stage)

    def fails(first: Any, model: Any, third: Any, fourth: Any, *rest: Any) -> Any:
        number = fourth[0] if stage == "draw" else int(third[-1])
        if number == at and not residency.in_turn:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(first, model, third, fourth, *rest)

    def go_lower(model: Any, request: EditRequest, error: MillicentError, work: Callable[[], None]) -> None:
        residency.in_turn = True
        work()

    monkeypatch.setattr(home, stage, fails)
    monkeypatch.setattr(pressure, "once_more_with_less", go_lower)
    found = list(editor.edit_many(map(make_request, asked)))
    monkeypatch.undo()
    assert all(same(one, single.edit(make_request(number))) for one, number in zip(found, asked, strict=True))
    told = {
        ("encode", 0): "e0 e1 e2 d0 s d1 s d2 s e3 e4 e5 d3 s d4 s d5 s",
        ("encode", 2): "e0 d0 e1 s d1 e2 s e3 e4 d2 s d3 s d4 s e5 d5 s",
        ("draw", 0): "e0 d0 s e1 e2 e3 d1 s d2 s d3 s e4 e5 d4 s d5 s",
        ("draw", 2): "e0 d0 e1 s d1 e2 s d2 s e3 e4 e5 d3 s d4 s d5 s",
    }
    assert " ".join(work) == told[stage, at]


def test_it_can_be_left_in_the_midst_of_a_wave_and_edits_made_between(single: Editor, expected: list[EditResult]) -> None:
    results = in_waves(single, 4).edit_many(REQUESTS)
    assert same(next(results), expected[0])
    assert not torch.is_inference_mode_enabled()
    assert same(single.edit(REQUESTS[2]), expected[2])
    assert same(next(results), expected[1])
    results.close()  # type: ignore[attr-defined]
    names = {thread.name.partition("_")[0] for thread in threading.enumerate()}
    assert not names & {"prepare", "finish"}


def test_what_the_edits_add_is_the_run_and_all_stages_are_timed(single: Editor) -> None:
    results = list(in_waves(single, 2).edit_many(map(make_request, range(4))))
    for one in results:
        assert isinstance(one, EditResult)
        assert one.elapsed_s is not None
        assert one.elapsed_s > 0
        times = one.timings
        assert min(times.prepare_s, times.encode_s, times.denoise_s, times.decode_s) > 0


def test_cancelled_in_a_drawing_it_stops_before_the_next_step(single: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled, steps, go_on = threading.Event(), list[int](), Stages._go_on
    taken: list[int] = []

    def stop_at_step(self: Stages, *step: int) -> None:
        go_on(self, *step)
        steps.extend(step[:1])
        if len(steps) == 5:  # in the first step of the third edit
            cancelled.set()

    def source() -> Iterator[EditRequest]:
        for number in range(9):
            taken.append(number)
            yield make_request(number)

    monkeypatch.setattr(Stages, "_go_on", stop_at_step)
    found = list(in_waves(single, 4).edit_many(source(), cancelled=cancelled))
    assert [one.seed for one in found if isinstance(one, EditResult)] == [0, 1]
    assert steps == [0, 1, 0, 1, 0]
    assert taken == [0, 1, 2, 3, 4]


def test_cancelled_while_a_wave_is_encoded_nothing_is_drawn(
    single: Editor, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled, encode = threading.Event(), pipeline.encode

    def encode_and_stop(prepared: Any, model: Any, prompt: str, negative: str | None) -> Any:
        if prompt == "make it 1":
            cancelled.set()
        return encode(prepared, model, prompt, negative)

    monkeypatch.setattr(pipeline, "encode", encode_and_stop)
    assert list(in_waves(single, 4).edit_many(map(make_request, range(9)), cancelled=cancelled)) == []
    assert work == ["e0", "e1"]


def test_cancelled_before_it_begins_no_request_is_taken(single: Editor) -> None:
    cancelled, source = threading.Event(), map(make_request, range(3))
    cancelled.set()
    assert list(in_waves(single, 2).edit_many(source, cancelled=cancelled)) == []
    assert next(source).seed == 0


def test_on_a_card_the_host_is_one_step_ahead_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each step it waits for the begin of the step before, which is the end of the one before that."""
    done: list[str] = []

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking
            self.number = sum(each[0] == "r" for each in done)

        def record(self, stream: object) -> None:
            done.append(f"r{self.number}")

        def synchronize(self) -> None:
            done.append(f"w{self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    for in_turn, cancelled, expected in (
        (True, threading.Event(), "r0 r1 w0 r2 w1 r3 w2"),
        (True, None, ""),
        (False, threading.Event(), ""),
    ):
        model: Any = SimpleNamespace(device=torch.device("cuda"), residency=SimpleNamespace(in_turn=in_turn))
        make_result: Any = None
        stages = Stages(model, make_result, cancelled)
        done.clear()
        for step in range(4):
            stages._go_on(step, 4)
        assert " ".join(done) == expected


@pytest.fixture(scope="module")
def fast(tiny_folder: Path) -> Editor:
    return Editor.open(tiny_folder, device="cpu", settings=SETTINGS["fast"])


@pytest.fixture
def abreast(fast: Editor, monkeypatch: pytest.MonkeyPatch) -> Editor:
    """In waves of five, with three passes through streamed blocks together."""
    assert fast._model.fast is not None
    monkeypatch.setattr(fast._model.fast.network, "abreast", 3)
    return in_waves(fast, 5)


def test_a_few_are_drawn_together(abreast: Editor, work: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    together, right = list[int](), drawing.draw_together

    def draw_and_tell(told: Any, model: Any, *rest: Any) -> Any:
        together.append(len(told))
        return right(told, model, *rest)

    monkeypatch.setattr(drawing, "draw_together", draw_and_tell)
    found = list(abreast.edit_many(map(make_request, range(4))))
    assert together == [3, 1]
    assert " ".join(work) == "e0 e1 e2 e3 s s s d3 s"
    times = [one.timings.denoise_s for one in found if isinstance(one, EditResult)]
    # each has its share of what they took together
    assert times[0] == times[1] == times[2] > 0


def test_what_fails_together_is_drawn_one_by_one_and_told_of_the_one_that_fails(
    abreast: Editor, fast: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, right = [fast.edit(make_request(number)) for number in range(4)], drawing.draw
    right_together = drawing.draw_together

    def fails(told: Any, model: Any, sigmas: Any, seeds: Any, *rest: Any) -> Any:
        if seeds[0] == 1:
            raise MachineError("It is too hard to draw.", "Draw another.")
        return right(told, model, sigmas, seeds, *rest)

    def fails_together(told: Any, *rest: Any) -> Any:
        if len(told) > 1:
            raise MachineError("They are too hard to draw.", "Draw others.")
        return right_together(told, *rest)

    monkeypatch.setattr(drawing, "draw", fails)
    monkeypatch.setattr(drawing, "draw_together", fails_together)
    found = list(abreast.edit_many(map(make_request, range(4))))
    assert isinstance(found.pop(1), MachineError)
    del expected[1]
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_of_what_does_not_fit_together_one_fewer_is_tried(
    abreast: Editor, fast: Editor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, right, together = [fast.edit(make_request(number)) for number in range(7)], drawing.draw_together, list[int]()

    def fails(told: Any, *rest: Any) -> Any:
        together.append(len(told))
        if len(told) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(told, *rest)

    monkeypatch.setattr(drawing, "draw_together", fails)
    found = list(abreast.edit_many(map(make_request, range(7))))
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))
    assert together == [3, 1, 1, 1, 2, 1, 1, 1, 1]
    assert "From now on pictures are drawn 2 at a time, and not 3." in caplog.text
    assert "From now on pictures are drawn one at a time, and not 2." in caplog.text


@pytest.mark.parametrize(
    ("abreast", "edits", "negative", "fewer"),
    [(3, 3, None, 2), (2, 2, None, 1), (4, 2, "blur", 2), (3, 3, "blur", 1), (2, 2, "blur", 1)],
)
def test_fewer_are_fewer_passes(abreast: int, edits: int, negative: str | None, fewer: int) -> None:
    """Or what has not fitted together would be tried again in every wave."""
    model: Any = SimpleNamespace(fast=SimpleNamespace(network=SimpleNamespace(abreast=abreast)))
    asked: Any = [SimpleNamespace(course=SimpleNamespace(negative_prompt=negative))] * edits
    made: Any = None
    Stages(model, made)._draw_fewer_than(asked)
    assert model.fast.network.abreast == fewer < abreast


def test_cancelled_in_a_drawing_all_that_are_drawn_together_stop(abreast: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled, steps, go_on = threading.Event(), list[int](), Stages._go_on

    def stop_at_step(self: Stages, *step: int) -> None:
        go_on(self, *step)
        steps.extend(step[:1])
        if len(steps) == 3:  # in the first step of the second three
            cancelled.set()

    monkeypatch.setattr(Stages, "_go_on", stop_at_step)
    found = list(abreast.edit_many(map(make_request, range(9)), cancelled=cancelled))
    assert [one.seed for one in found if isinstance(one, EditResult)] == [0, 1, 2]
    assert steps == [0, 1, 0]
