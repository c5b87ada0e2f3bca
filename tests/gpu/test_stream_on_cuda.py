"""Many edits in a row on a card: the pictures are those of edit to the bit, and the thread that gives work waits for none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from conftest import draw_picture
from refuse_waiting import refuse_waiting

pytest.importorskip("triton")

from millicent.edits import EditRequest, EditResult
from millicent.engine.editor import Editor
from millicent.engine.settings import Settings
from millicent.errors import PromptTooLongError

pytestmark = pytest.mark.gpu

SETTINGS = {
    "plain": Settings(plain=True),
    "bf16": Settings(format="bf16"),
    "auto": Settings(),
    "reuse": Settings(reuse_reference=True),
}
PICTURES = [draw_picture(512, 512), draw_picture(700, 400, seed=1), draw_picture(512, 512, seed=2)]
WORDS = ("make it navy", "make it red, on a table", "remove the background")


def make_request(number: int, **changes: object) -> EditRequest:
    asked = {"images": (PICTURES[number % 3],), "prompt": WORDS[number % 2], "seed": number}
    return EditRequest(**{**asked, **changes})  # type: ignore[arg-type]


# each shape often enough to be drawn as it is, recorded and replayed
REQUESTS = [
    *(make_request(number) for number in range(12)),
    make_request(12, variants=3),
    *(make_request(number, true_cfg=3.0, negative_prompt="blur") for number in (0, 3, 6)),
    *(make_request(0, images=(PICTURES[0], PICTURES[1])) for _ in range(3)),
    make_request(0),
]


def open_editor(settings: Settings) -> Editor:
    """The demo, drawing pictures large enough that a card is still at work when the next is given to it."""
    model = Editor.open("demo", device="cuda", settings=settings)._model
    return Editor("demo", dataclasses.replace(model, card=dataclasses.replace(model.card, vae_area_px=1024 * 1024)))


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_pictures_are_those_of_edit_to_the_bit(kind: str) -> None:
    single, many = open_editor(SETTINGS[kind]), open_editor(SETTINGS[kind])
    expected = [single.edit(request) for request in REQUESTS]
    for ahead in (1, 4):
        found = list(many.edit_many(REQUESTS, ahead))
        assert len(found) == len(expected)
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert isinstance(one, EditResult), one
            assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images], number


def test_edits_between_results_and_a_stop_do_no_harm() -> None:
    editor = open_editor(SETTINGS["auto"])
    expected = [editor.edit(request).image.tobytes() for request in REQUESTS[:4]]
    for _ in range(3):
        results = editor.edit_many(REQUESTS)
        first = next(results)
        assert isinstance(first, EditResult)
        assert first.image.tobytes() == expected[0]
        assert editor.edit(REQUESTS[1]).image.tobytes() == expected[1]
        forget_contents(editor)  # so that it reads and encodes, while the run decodes
        assert editor.edit(REQUESTS[1]).image.tobytes() == expected[1]
        second = next(results)
        assert isinstance(second, EditResult)
        assert second.image.tobytes() == expected[1]
        results.close()  # type: ignore[attr-defined]
        assert editor.edit(REQUESTS[3]).image.tobytes() == expected[3]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    with refuse_waiting():
        yield


@pytest.fixture(scope="module")
def warm() -> Editor:
    """An editor that has recorded all that it does for the requests: a shape is recorded the second time that it is worked on."""
    editor = open_editor(SETTINGS["auto"])
    for _ in range(3):
        forget_contents(editor)
        list(editor.edit_many(REQUESTS[:12]))
    return editor


def forget_contents(editor: Editor) -> None:
    """What was read and encoded is to be read and encoded again; what was recorded for their shapes stays."""
    model = editor._model
    assert model.reader is not None
    assert model.latents is not None
    for cache in (model.reader.pictures, model.reader.openings, model.reader.embeddings, model.latents):
        cache.clear()


def test_an_edit_that_fails_between_results_leaves_nothing_that_others_meet(warm: Editor) -> None:
    """It has read one text and encoded its pictures by then, with buffers that the run's next edit uses on another stream."""
    too_long = make_request(0, true_cfg=3.0, negative_prompt="blur " * 4000)
    expected = [warm.edit(request).image.tobytes() for request in REQUESTS[:12]]
    found = []
    for result in warm.edit_many(REQUESTS[:12]):
        assert isinstance(result, EditResult)
        found.append(result.image.tobytes())
        forget_contents(warm)
        with pytest.raises(PromptTooLongError):
            warm.edit(too_long)
    assert found == expected


@pytest.mark.usefixtures("no_waiting")
def test_the_thread_that_gives_work_waits_for_none(warm: Editor) -> None:
    forget_contents(warm)
    assert all(isinstance(one, EditResult) for one in warm.edit_many(REQUESTS[:12]))
