"""A model whose weights do not all stay on its device draws the same pictures, to the bit, wherever they lie."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from millicent import demo
from millicent.edits import EditRequest, EditResult
from millicent.engine import fitting, pipeline, pressure
from millicent.engine.editor import Editor, find_model
from millicent.engine.loading import Model, load_model, speed_up_model
from millicent.engine.placement import Placement, place_on_card
from millicent.engine.planner import Plan, plan
from millicent.engine.residency import Residency
from millicent.engine.settings import Format, Settings
from millicent.engine.weighing import Components
from millicent.errors import MachineError

CPU = torch.device("cpu")
SIZES = [(64, 96), (96, 64)]


def make_plan(number_format: Format = "bf16", reuse: bool = False) -> Plan:
    made = plan(Settings(format=number_format, reuse_reference=reuse), None, "a CPU")
    assert made is not None
    return made


def load(chosen: Plan, share: float | None) -> Model:
    """The demo model with so much of the memory that it can use: 1 for all, 0 for the least that it can do with."""
    _, folder, card = find_model("demo")
    model = load_model(folder, card, CPU, torch.bfloat16)
    return speed_up_model(model, chosen, None if share is None else place(weigh(model, chosen), share))


def weigh(model: Model, chosen: Plan) -> Components:
    return fitting.weigh_model(fitting.sizes_of(model), fitting.usual_work(model.card), chosen, CPU)


def place(parts: Components, share: float) -> Placement:
    return place_on_card(parts, parts.least + round(share * (parts.resident - parts.least)))


def make_requests() -> list[EditRequest]:
    photo = Image.open(demo.folder() / "photo.png") if (demo.folder() / "photo.png").exists() else Image.radial_gradient("L")
    pictures = [photo.convert("RGB").resize(size) for size in SIZES]
    prompts = ["make the shirt navy blue", "a sand backdrop"]
    return [
        EditRequest(images=(pictures[n % 2],), prompt=prompt, seed=n, schedule="base", steps=2) for n, prompt in enumerate(prompts)
    ]


def draw(model: Model) -> list[bytes]:
    editor = Editor("demo", model)
    return [image.tobytes() for request in make_requests() for image in editor.edit(request).images]


@cache
def wanted(number_format: Format, reuse: bool) -> Sequence[bytes]:
    return draw(load(make_plan(number_format, reuse), 1.0))


SHARES = [0.9, 0.6, 0.3, 0.0]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("number_format", "reuse"), [("bf16", False), ("fp8", False), ("int8", True)])
def test_draws_the_same_pictures_wherever_weights_lie(share: float, number_format: Format, reuse: bool) -> None:
    model = load(make_plan(number_format, reuse), share)
    assert model.residency is not None
    assert model.residency.in_turn
    assert draw(model) == wanted(number_format, reuse)


def test_the_shares_are_different_placements() -> None:
    _, folder, card = find_model("demo")
    parts = weigh(load_model(folder, card, CPU, torch.bfloat16), make_plan())
    placements = [place(parts, share) for share in (1.0, *SHARES)]
    assert not placements[0].in_turn
    assert all(placement.in_turn for placement in placements[1:])
    assert [placement.streamed_step_bytes > 0 for placement in placements] == [False, False, True, True, True]


@pytest.mark.parametrize("resident", [0, 1, 5])
def test_draws_the_same_pictures_with_a_streamed_text_encoder(resident: int) -> None:
    """Of a demo that is so small no placement streams it."""
    chosen = make_plan()
    _, folder, card = find_model("demo")
    model = load_model(folder, card, CPU, torch.bfloat16)
    placement = dataclasses.replace(place(weigh(model, chosen), 0.3), resident_encoder_layers=resident)
    model = speed_up_model(model, chosen, placement)
    assert draw(model) == wanted("bf16", False)


MIXED = [
    *make_requests(),
    dataclasses.replace(make_requests()[0], seed=7, variants=3, steps=1),
    dataclasses.replace(make_requests()[1], seed=11, true_cfg=3.0, negative_prompt="blur"),
    dataclasses.replace(make_requests()[1], seed=12, prompt="make the shirt navy blue", steps=3),
]


@pytest.mark.parametrize(
    ("number_format", "attention", "abreast"), [("bf16", "exact", 2), ("bf16", "exact", 3), ("int8", "int8", 4)]
)
def test_pictures_drawn_together_are_those_of_each(number_format: Format, attention: Any, abreast: int) -> None:
    """Of different shapes, steps and variants, with guidance and without; each with its own codes kept."""
    chosen = plan(Settings(format=number_format, attention=attention), None, "a CPU")
    assert chosen is not None
    expected = wanted_mixed(chosen)
    editor = Editor("demo", load_abreast(chosen, abreast))
    assert [[image.tobytes() for image in editor.edit(request).images] for request in MIXED] == expected
    found = list(editor.edit_many(MIXED))
    assert [[image.tobytes() for image in one.images] for one in found if isinstance(one, EditResult)] == expected


@cache
def wanted_mixed(chosen: Plan) -> list[list[bytes]]:
    editor = Editor("demo", load(chosen, 1.0))
    return [[image.tobytes() for image in editor.edit(request).images] for request in MIXED]


def load_abreast(chosen: Plan, abreast: int) -> Model:
    """The demo with most blocks streamed, for so many passes together, and all of a wave."""
    _, folder, card = find_model("demo")
    model = load_model(folder, card, CPU, torch.bfloat16)
    placement = dataclasses.replace(place(weigh(model, chosen), 0.3), abreast=abreast)
    model = speed_up_model(model, chosen, placement)
    assert model.residency is not None
    model.residency.wave = len(MIXED)
    return model


@pytest.mark.parametrize(
    ("variants", "guided", "abreast", "passes"), [(4, False, 1, 4), (4, False, 3, 2), (3, True, 4, 2), (1, True, 2, 1)]
)
def test_blocks_come_once_for_all_that_are_drawn_together(variants: int, guided: bool, abreast: int, passes: int) -> None:
    chosen, request = make_plan(), make_requests()[0]
    model = load_abreast(chosen, abreast)
    request = dataclasses.replace(request, variants=variants, **({"true_cfg": 3.0, "negative_prompt": "x"} if guided else {}))
    assert model.residency is not None
    assert model.reader is not None
    editor, placement = Editor("demo", model), model.residency.placement
    editor.edit(request)
    before = model.residency.copied_bytes
    editor.edit(request)  # is read no more, so that nothing else is copied
    copied = model.residency.copied_bytes - before
    assert placement.streamed_step_bytes > 0
    assert copied == passes * len(editor.edit(request).sigmas[:-1]) * placement.streamed_step_bytes


@pytest.mark.parametrize("share", SHARES)
def test_copies_what_the_placement_says(share: float) -> None:
    """After the first edit; two readings of the text for one drawing of so many steps."""
    chosen = make_plan()
    model = load(chosen, share)
    editor, requests = Editor("demo", model), make_requests()
    assert model.residency is not None
    editor.edit(requests[0])
    before = model.residency.copied_bytes
    editor.edit(dataclasses.replace(requests[1], seed=5))
    copied, placement = model.residency.copied_bytes - before, model.residency.placement
    work = dataclasses.replace(fitting.usual_work(model.card), steps=2)
    # what a ring has of the next pass when the other network comes is lost
    ring = 2 * (max(weigh(model, chosen).blocks) + 2 * max(weigh(model, chosen).encoder_sizes))
    told = placement.exchanged_bytes + placement.edit_bytes(work)
    assert told <= copied <= told + ring


def test_runs_out_of_memory_once_and_draws_with_less(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = load(make_plan(), 1.0)
    assert model.residency is not None
    lower = place(weigh(model, make_plan()), 0.3)
    monkeypatch.setattr(pressure, "_lower", lambda *_: lower)
    editor, tries = Editor("demo", model), []
    request = make_requests()[0]

    def edit() -> list[bytes]:
        tries.append(model.residency and model.residency.in_turn)
        return [image.tobytes() for image in editor.edit(request).images]

    drawn = pressure.once_more_with_less(model, make_requests()[0], MachineError("The memory is too small.", "Use less."), edit)
    assert drawn == list(wanted("bf16", False))[:1]
    assert tries == [True]
    assert "on the card in turn" in caplog.text
    assert draw(model) == wanted("bf16", False)


def test_comes_back_to_the_former_placement_where_less_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_plan(), 1.0)
    assert model.residency is not None
    before = model.residency.placement
    monkeypatch.setattr(pressure, "_lower", lambda *_: place(weigh(model, make_plan()), 0.0))

    def fail() -> None:
        raise MachineError("It is too small again.", "Use less.") from torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MachineError, match="again"):
        pressure.once_more_with_less(model, make_requests()[0], MachineError("It is too small.", "Use less."), fail)
    assert model.residency.placement == before
    assert not model.residency.in_turn
    copied = model.residency.copied_bytes
    assert draw(model) == wanted("bf16", False)
    assert model.residency.copied_bytes == copied


def test_what_fails_for_another_reason_with_less_leaves_it_at_that(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_plan(), 1.0)
    lower = place(weigh(model, make_plan()), 0.3)
    monkeypatch.setattr(pressure, "_lower", lambda *_: lower)

    def fail() -> None:
        raise MachineError("Something else is wrong.", "Mend it.")

    try:
        raise MachineError("It is too small.", "Use less.") from torch.OutOfMemoryError("CUDA out of memory")
    except MachineError as error:
        with pytest.raises(MachineError, match="else"):
            pressure.once_more_with_less(model, make_requests()[0], error, fail)
    assert model.residency is not None
    assert model.residency.placement == lower


def test_what_an_open_model_has_on_the_host_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_plan(), 1.0)
    assert model.residency is not None
    monkeypatch.setattr(pressure, "_STEP_BYTES", 1 << 20)
    monkeypatch.setattr(pressure, "free_bytes", lambda *_: 1 << 62)
    parts = weigh(model, make_plan())
    slabs = parts.transformer + parts.text_encoder
    for missing, fits in ((0, True), (1, False)):
        monkeypatch.setattr(pressure, "free_host_bytes", lambda missing=missing: slabs - missing)
        assert (pressure._lower(model, model.residency, make_requests()[0]) is not None) == fits


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("missing", [0, 3 << 20])
def test_less_is_as_much_as_the_request_leaves_room_for(monkeypatch: pytest.MonkeyPatch, share: float, missing: int) -> None:
    """missing: of what the request takes beside the weights that lie there, as where another program has taken some."""
    step, chosen = 1 << 18, make_plan(reuse=True)
    model = load(chosen, share)
    assert model.residency is not None
    request = dataclasses.replace(
        make_requests()[0], images=(make_requests()[0].images[0],) * 2, true_cfg=3.0, negative_prompt="blur"
    )
    work = pipeline.weigh_request(request, model)
    assert (work.references, work.steps, work.guided) == (2, 2, True)
    parts, usual = fitting.weigh_model(fitting.sizes_of(model), work, chosen, CPU), weigh(model, chosen)
    assert parts.kept == 4 * usual.kept
    now = model.residency.placement
    taken = parts.beside() + (now.arena_bytes if now.in_turn else parts.transformer + parts.text_encoder)
    monkeypatch.setattr(pressure, "_STEP_BYTES", step)
    for free, left in ((taken - missing, taken - missing - step), (1 << 62, taken - step)):
        monkeypatch.setattr(pressure, "free_bytes", lambda *_, free=free: free)
        lower = pressure._lower(model, model.residency, request)
        assert lower == place_on_card(parts, left)
    monkeypatch.setattr(pressure, "free_bytes", lambda *_: parts.least)
    assert pressure._lower(model, model.residency, request) is None


def test_a_request_weighs_what_is_read_of_it() -> None:
    model = load(make_plan(), 1.0)
    for request in MIXED:
        prepared = pipeline.prepare(request, model)
        work = pipeline.weigh_request(request, model)
        course = pipeline.settle(request, model, prepared.height, prepared.width)
        told = pipeline.encode(prepared, model, request.prompt, course.negative_prompt)
        assert (work.width, work.height) == (prepared.width, prepared.height)
        assert work.forwards == (1 if told.negative is None else 2)
        longest = max(text.shape[1] for text in (told.positive, told.negative) if text is not None)
        # each picture weighs what a square one does, 16 tokens where these have 15, and its place in the template
        assert abs(work.text_tokens - longest) <= 2 * len(request.images)


def test_says_the_first_error_where_nothing_less_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_plan(), 0.0)
    monkeypatch.setattr(pressure, "_lower", lambda *_: None)
    with pytest.raises(MachineError, match="too small"):
        pressure.once_more_with_less(model, make_requests()[0], MachineError("It is too small.", "Use less."), lambda: None)


def test_two_models_of_one_host_share_their_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    chosen = make_plan("fp8")
    _, folder, card = find_model("demo")
    models = []
    for _ in range(2):
        model = load_model(folder, card, CPU, torch.bfloat16)
        models.append(speed_up_model(model, chosen, place(weigh(model, chosen), 0.3), "the-same-layers"))
    residencies = [model.residency for model in models]
    assert [residency is not None and residency.is_filled for residency in residencies] == [False, True]
    assert draw(models[1]) == wanted("fp8", False)
    assert draw(models[0]) == wanted("fp8", False)


def test_memory_does_not_grow_over_edits_of_mixed_sizes() -> None:
    """On a card the whole of it is in tests/gpu; here the arena, what it holds and what is copied stay the same."""
    model = load(make_plan(), 0.3)
    residency = model.residency
    assert residency is not None
    editor, sizes = Editor("demo", model), [(64, 64), (96, 64), (64, 128), (80, 80)]
    copied = []
    for number in range(12):
        before = residency.copied_bytes
        picture = Image.radial_gradient("L").convert("RGB").resize(sizes[number % 4])
        editor.edit(EditRequest(images=(picture,), prompt=f"make it {number}", seed=number, schedule="base", steps=1))
        copied.append(residency.copied_bytes - before)
    assert len(set(copied[1:])) == 1


def test_goes_on_once_there_is_memory_for_the_arena_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken by another program when weights were to change places."""
    model = load(make_plan(), 0.6)
    assert model.residency is not None
    placement, empty = model.residency.placement, torch.empty

    def refuse(*shape: object, **options: object) -> torch.Tensor:
        if options.get("dtype") == torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, **options)  # type: ignore[call-overload,no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            fitting.carry_out(model, placement)
    assert draw(model) == wanted("bf16", False)


def test_all_is_of_one_placement_where_there_is_no_memory_for_its_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_plan(), 1.0)
    assert model.fast is not None
    lower = place(weigh(model, make_plan()), 0.3)
    monkeypatch.setattr(pressure, "_lower", lambda *_: lower)
    monkeypatch.setattr(Residency, "settle", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(MachineError, match="too small"):
        pressure.once_more_with_less(model, make_requests()[0], MachineError("It is too small.", "Use less."), lambda: None)
    assert lower.abreast > 1
    assert (model.fast.network.abreast, model.fast.modulation.keeps_on_host) == (lower.abreast, True)
    monkeypatch.undo()
    fitting.carry_out(model, lower)
    assert draw(model) == wanted("bf16", False)
