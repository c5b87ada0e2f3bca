"""Many edits in a row against the same edits one by one: the pictures to the bit, the order, the errors in their places."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_picture

from millicent.edits import EditRequest, EditResult
from millicent.engine import drawing, pipeline
from millicent.engine.editor import Editor
from millicent.engine.settings import Settings
from millicent.engine.stream import Stages
from millicent.errors import CheckpointError, InputError, MachineError, MillicentError, PromptTooLongError, SizeError

PICTURES = [draw_picture(100, 150), draw_picture(150, 100, seed=1), draw_picture(100, 150, seed=2)]
SETTINGS = {"plain": Settings(), "fast": Settings(format="fp8")}


@pytest.fixture(scope="module", params=list(SETTINGS))
def editor(request: pytest.FixtureRequest, tiny_folder: Path) -> Editor:
    return Editor.open(tiny_folder, device="cpu", settings=SETTINGS[request.param])


def make_request(number: int, **changes: Any) -> EditRequest:
    asked = {"images": (PICTURES[number % len(PICTURES)],), "prompt": f"make it {number}", "seed": number, "steps": 2}
    return EditRequest(**{**asked, **changes})


def same(found: EditResult | MillicentError, expected: EditResult) -> bool:
    assert isinstance(found, EditResult), found
    assert (found.seeds, found.sigmas, found.true_cfg) == (expected.seeds, expected.sigmas, expected.true_cfg)
    pairs = zip(found.images, expected.images, strict=True)
    return all(one.size == other.size and one.tobytes() == other.tobytes() for one, other in pairs)


REQUESTS = [
    make_request(0),
    make_request(1, variants=2),
    make_request(2, height=77, width=101, fit="pad"),
    make_request(3, true_cfg=3.0, negative_prompt="blur"),
    make_request(4, images=tuple(PICTURES[:2])),
    make_request(0),
]


@pytest.mark.parametrize("ahead", [1, 3, 20])
def test_the_pictures_are_those_of_edit(editor: Editor, ahead: int, tiny_folder: Path) -> None:
    # another editor, so that neither finds what the other has kept
    plan = editor.plan
    single = Editor.open(tiny_folder, device="cpu", settings=SETTINGS["plain" if plan is None else "fast"])
    found = list(editor.edit_many(REQUESTS, ahead))
    assert len(found) == len(REQUESTS)
    for one, request in zip(found, REQUESTS, strict=True):
        assert same(one, single.edit(request))


def test_no_request_gives_no_result(editor: Editor) -> None:
    assert list(editor.edit_many([])) == []


def test_one_request_gives_one(editor: Editor) -> None:
    [found] = editor.edit_many(iter([REQUESTS[1]]))
    assert same(found, editor.edit(REQUESTS[1]))


@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_error_comes_at_its_turn_and_the_others_go_on(editor: Editor, place: int) -> None:
    broken = {
        PromptTooLongError: make_request(1, prompt="navy" * 65),
        SizeError: make_request(1, images=(PICTURES[0].resize((4000, 2)),)),
    }
    for kind, request in broken.items():
        found = list(editor.edit_many([*REQUESTS[:place], request, *REQUESTS[place:3]]))
        assert isinstance(found.pop(place), kind)
        assert all(same(one, editor.edit(expected)) for one, expected in zip(found, REQUESTS[:3], strict=True))


def test_nothing_but_errors(editor: Editor) -> None:
    found = list(editor.edit_many([make_request(1, prompt="<|image_pad|>")] * 3))
    assert [type(one) for one in found] == [InputError] * 3


def test_values_that_are_not_finite_are_told_at_their_turn(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = editor._model.vae.decode, iter(range(9))
    monkeypatch.setattr(editor._model.vae, "decode", lambda z: decode(z) * (torch.nan if next(calls) == 1 else 1))
    found = list(editor.edit_many([make_request(0), make_request(1), make_request(2)]))
    assert [type(one) for one in found] == [EditResult, CheckpointError, EditResult]


def test_what_fails_for_memory_once_is_drawn_again_and_what_always_does_is_told(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [editor.edit(make_request(number)) for number in range(4)]
    draw, calls = drawing.draw, []

    def fails(conditioning: Any, model: Any, sigmas: Any, seeds: tuple[int, ...], *rest: Any) -> Any:
        calls.append(seeds[0])
        if seeds[0] == 2 or (seeds[0] == 1 and calls.count(1) == 1):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw(conditioning, model, sigmas, seeds, *rest)

    monkeypatch.setattr(drawing, "draw", fails)
    found = list(editor.edit_many([make_request(number) for number in range(4)]))
    assert calls == [0, 1, 1, 2, 2, 3]
    assert isinstance(found.pop(2), MachineError)
    del expected[2]
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_an_error_that_is_no_ones_request_ends_the_run(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "fit_to", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(editor.edit_many([make_request(0, height=64, width=64), make_request(1)]))
    monkeypatch.undo()
    assert same(next(iter(editor.edit_many([make_request(0)]))), editor.edit(make_request(0)))


def test_a_result_comes_when_the_next_but_ahead_has_been_taken(editor: Editor) -> None:
    taken: list[int] = []

    def source() -> Iterator[EditRequest]:
        for number in range(6):
            taken.append(number)
            yield make_request(number)

    results = editor.edit_many(source(), ahead=2)
    assert taken == []
    next(results)
    # the first is out, the second drawn, the third encoded, two more in preparation
    assert taken == [0, 1, 2, 3, 4]
    assert len(list(results)) == 5


def test_it_can_be_stopped_and_edits_made_between(editor: Editor) -> None:
    expected = [editor.edit(request) for request in REQUESTS[:3]]
    results = editor.edit_many(REQUESTS)
    assert same(next(results), expected[0])
    assert not torch.is_inference_mode_enabled()
    assert same(editor.edit(REQUESTS[2]), expected[2])
    assert same(next(results), expected[1])
    results.close()  # type: ignore[attr-defined]
    names = {thread.name.partition("_")[0] for thread in threading.enumerate()}
    assert not names & {"prepare", "finish"}
    assert same(editor.edit(REQUESTS[0]), expected[0])


def test_the_next_is_prepared_while_one_is_drawn(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first drawing waits until the second request is prepared; alone in its thread it would wait for ever."""
    second_prepared = threading.Event()
    prepare, draw = pipeline.prepare, drawing.draw

    def prepare_and_tell(request: EditRequest, model: Any) -> Any:
        made = prepare(request, model)
        if request.seed == 1:
            second_prepared.set()
        return made

    def wait_and_draw(*args: Any) -> Any:
        assert second_prepared.wait(timeout=60)
        return draw(*args)

    monkeypatch.setattr(pipeline, "prepare", prepare_and_tell)
    monkeypatch.setattr(drawing, "draw", wait_and_draw)
    assert len(list(editor.edit_many([make_request(0), make_request(1)]))) == 2


def test_what_the_edits_add_is_the_run(editor: Editor) -> None:
    begin = time.perf_counter()
    results = list(editor.edit_many(REQUESTS[:4]))
    wall_s = time.perf_counter() - begin
    elapsed = [one.elapsed_s for one in results if isinstance(one, EditResult)]
    assert len(elapsed) == 4
    added = sum(seconds or 0 for seconds in elapsed)
    assert min(seconds or 0 for seconds in elapsed) >= 0
    # opening and closing threads is not in it
    assert 0.5 * wall_s < added <= wall_s
    for one in results:
        assert isinstance(one, EditResult)
        t = one.timings
        assert min(t.prepare_s, t.encode_s, t.denoise_s, t.decode_s) > 0
    assert editor.edit(REQUESTS[0]).elapsed_s is None


def test_less_than_one_ahead_is_refused(editor: Editor) -> None:
    with pytest.raises(InputError, match="ahead is 0"):
        editor.edit_many(REQUESTS, ahead=0)


def test_cancelled_in_a_drawing_it_stops_before_the_next_step(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled, steps, taken, go_on = threading.Event(), list[int](), list[int](), Stages._go_on

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
    found = list(editor.edit_many(source(), cancelled=cancelled))
    assert [one.seed for one in found if isinstance(one, EditResult)] == [0, 1]
    assert steps == [0, 1, 0, 1, 0]
    assert taken == [0, 1, 2, 3]
    monkeypatch.undo()
    # what was cut short leaves nothing behind that the next edit would meet
    assert same(editor.edit(make_request(2)), next(iter(editor.edit_many([make_request(2)]))))  # type: ignore[arg-type]


def test_cancelled_between_drawings_what_is_drawn_comes_out(editor: Editor) -> None:
    cancelled = threading.Event()
    results = editor.edit_many(map(make_request, range(9)), cancelled=cancelled)
    first = next(results)
    cancelled.set()
    # the second has been drawn by the time that the first is out
    found = [first, *results]
    assert [one.seed for one in found if isinstance(one, EditResult)] == [0, 1]


def test_cancelled_before_it_begins_no_request_is_taken(editor: Editor) -> None:
    cancelled, source = threading.Event(), map(make_request, range(3))
    cancelled.set()
    assert list(editor.edit_many(source, cancelled=cancelled)) == []
    assert next(source).seed == 0
