"""Failures of a card in the middle of an edit: too little memory, drawing and recording; the editor then draws as a fresh one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import draw_picture

pytest.importorskip("triton")

from millicent.edits import EditRequest, EditResult
from millicent.engine import drawing
from millicent.engine.editor import Editor
from millicent.engine.transformer import Drawing
from millicent.errors import MachineError

pytestmark = pytest.mark.gpu

AREA_PX = 1024 * 1024
PICTURE = draw_picture(1024, 1024)
REQUEST = EditRequest(images=(PICTURE,), prompt="make it navy blue", seed=5)
SMALL = EditRequest(images=(PICTURE,), prompt="make it navy blue", seed=6, height=256, width=256)
# one tensor of the MLP of 8192 tokens takes 12 MiB; PyTorch takes 20 MiB at once for it
SPARE_BYTES = 4 << 20


def open_editor() -> Editor:
    """The demo, drawing pictures of a real size."""
    model = Editor.open("demo", device="cuda")._model
    return Editor("demo", dataclasses.replace(model, card=dataclasses.replace(model.card, vae_area_px=AREA_PX)))


@pytest.fixture(scope="module")
def expected() -> bytes:
    return open_editor().edit(REQUEST).image.tobytes()


@pytest.fixture(autouse=True)
def whole_card_again() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def limit_memory() -> None:
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + SPARE_BYTES
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)


def draw_in_little_memory(monkeypatch: pytest.MonkeyPatch, when: Callable[[tuple[int, ...]], bool]) -> None:
    """Drawing has little memory where `when` says so of the seeds."""
    draw = drawing.draw

    def limited(conditioning: Any, model: Any, sigmas: Any, seeds: tuple[int, ...], *rest: Any) -> Any:
        if when(seeds):
            limit_memory()
        try:
            return draw(conditioning, model, sigmas, seeds, *rest)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    monkeypatch.setattr(drawing, "draw", limited)


@pytest.mark.parametrize("edits_before", [0, 1, 2], ids=["first", "to be recorded", "recorded"])
def test_a_card_too_small_for_a_drawing(monkeypatch: pytest.MonkeyPatch, expected: bytes, edits_before: int) -> None:
    editor = open_editor()
    for _ in range(edits_before):
        assert editor.edit(REQUEST).image.tobytes() == expected
    other_shape = EditRequest(images=(PICTURE, PICTURE), prompt="make it navy blue", seed=5)
    draw_in_little_memory(monkeypatch, lambda _: True)
    with pytest.raises(MachineError, match=r"The memory of .*GiB\) is too small for this edit with (fp8|int8)") as caught:
        editor.edit(REQUEST if edits_before < 2 else other_shape)
    monkeypatch.undo()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert editor.edit(REQUEST).image.tobytes() == expected
    assert editor.edit(REQUEST).image.tobytes() == expected  # recorded anew
    assert editor.edit(REQUEST).image.tobytes() == expected


def test_memory_comes_back_while_the_error_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = open_editor()
    editor.edit(REQUEST)
    before = torch.cuda.memory_allocated()
    draw_in_little_memory(monkeypatch, lambda _: True)
    with pytest.raises(MachineError) as caught:
        editor.edit(REQUEST)
    # what was kept of the first edit is gone too; half a mebibyte for what the held frames of the edit still name
    assert torch.cuda.memory_allocated() <= before + (1 << 19), caught


@pytest.mark.parametrize("in_side_stream", [False, True])
def test_a_recording_that_fails_half_way(monkeypatch: pytest.MonkeyPatch, expected: bytes, in_side_stream: bool) -> None:
    editor = open_editor()
    assert editor._model.fast is not None
    editor.edit(REQUEST)
    project, linear = Drawing._project, editor._model.fast.network.blocks[1].txt.qkv
    matmul = linear.matmul

    failures: list[int] = []

    def fail_in_block(self: Drawing, number: int, *rest: Any, **named: Any) -> Any:
        if number == 1 and torch.cuda.is_current_stream_capturing():
            failures.append(number)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return project(self, number, *rest, **named)

    def fail_in_matmul(*args: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return matmul(*args)

    with monkeypatch.context() as patch:
        # in the text's product beside the pictures' the recording has a second stream, which has not come back yet
        patch.setattr(*((linear, "matmul", fail_in_matmul) if in_side_stream else (Drawing, "_project", fail_in_block)))
        stream = torch.cuda.current_stream()
        # what was kept of the first edit goes, and the second is drawn once more, as it is: a shape that comes for the first time
        assert editor.edit(REQUEST).image.tobytes() == expected
        assert failures == [1]
        assert torch.cuda.current_stream() == stream
        assert not torch.cuda.is_current_stream_capturing()
    for _ in range(3):  # as it is, recorded, replayed
        assert editor.edit(REQUEST).image.tobytes() == expected


def test_in_a_run_the_others_are_drawn(monkeypatch: pytest.MonkeyPatch, expected: bytes) -> None:
    small = open_editor().edit(SMALL).image.tobytes()
    large = dataclasses.replace(REQUEST, seed=7)
    draw_in_little_memory(monkeypatch, lambda seeds: seeds == (7,))
    found = list(open_editor().edit_many([REQUEST, SMALL, large, SMALL, REQUEST]))
    assert isinstance(found.pop(2), MachineError)
    for one, picture in zip(found, [expected, small, small, expected], strict=True):
        assert isinstance(one, EditResult)
        assert one.image.tobytes() == picture
