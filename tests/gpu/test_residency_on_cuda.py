"""Weights that do not all stay on a card: the pictures to the bit, a host that never waits, memory that runs out or lasts."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from refuse_waiting import refuse_waiting

pytest.importorskip("triton")

from millicent.edits import EditRequest, EditResult
from millicent.engine import fitting, pipeline, pressure
from millicent.engine.editor import Editor, find_model
from millicent.engine.host_memory import allocate
from millicent.engine.layer_stack import Layer, Link, Stack
from millicent.engine.loading import Model, load_model, speed_up_model
from millicent.engine.placement import place_on_card
from millicent.engine.planner import plan
from millicent.engine.residency import Residency
from millicent.engine.settings import Settings
from millicent.errors import MachineError
from millicent.model.vae import VAE

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SETTINGS = {  # the card's own is FP8 where it has that
    "own": Settings(),
    "int8": Settings(format="int8"),
    "approximate": Settings(format="int8", attention="int8", reuse_reference=True),
}
SHARES = [0.9, 0.6, 0.3, 0.0]
SIZES = [(96, 96), (128, 96), (96, 128), (160, 96), (96, 160), (192, 96)]
PICTURES = [Image.radial_gradient("L").convert("RGB").resize(size) for size in SIZES]
# some 300 microseconds: ten times what a copy of a layer takes, or its work
LATE_CYCLES = 500_000
WORDS = ["make the shirt navy blue", "a table" * 9, "a sand backdrop", "a wall of red brick" * 20]


def ask(number: int, *pictures: int, **changes: Any) -> EditRequest:
    images = tuple(PICTURES[picture] for picture in pictures or (number % 3,))
    return EditRequest(images=images, **{"prompt": WORDS[number % 2], "seed": number, **changes})


REQUESTS = [ask(0), ask(1), ask(2, true_cfg=3.0, negative_prompt="blur"), ask(3, 0, 1, variants=2), ask(4)]


def load(kind: str, share: float | None, area_px: int = 256 * 256, shared_as: str | None = None, **changes: int) -> Model:
    """The demo on a card, with so much of the memory that its layers can use.

    share: 1 for all, 0 for the least, None for all with what is recorded beside it. changes: of the placement that has it so.
    """
    _, folder, card = find_model("demo")
    model = load_model(folder, card, torch.device("cpu"), torch.bfloat16)
    assert isinstance(model.vae, VAE)
    card = dataclasses.replace(model.card, vae_area_px=area_px)
    model = dataclasses.replace(model, card=card, device=CUDA, vae=model.vae.to(CUDA))
    chosen = plan(SETTINGS[kind], torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    assert chosen is not None
    parts = fitting.weigh_model(fitting.sizes_of(model), fitting.usual_work(card), chosen, CUDA)
    layers = parts.steady + parts.kept + parts.phases.largest + parts.transformer + parts.text_encoder - parts.least
    placement = place_on_card(parts, parts.whole if share is None else parts.least + round(share * layers))
    if changes.get("resident_encoder_layers", len(parts.encoder_sizes)) < len(parts.encoder_sizes):
        placement = dataclasses.replace(placement, recorded=())  # as where a placement streams it by itself
    return speed_up_model(model, chosen, dataclasses.replace(placement, **changes), shared_as)  # type: ignore[arg-type]


def residency_of(model: Model) -> Residency:
    assert model.residency is not None
    return model.residency


def layers_of(model: Model) -> list[Layer]:
    return [*residency_of(model).transformer.layers, *residency_of(model).text_encoder.layers]


def pictures_of(outcome: object) -> list[bytes]:
    assert isinstance(outcome, EditResult), outcome
    return [image.tobytes() for image in outcome.images]


def draw(model: Model) -> list[list[bytes]]:
    return [pictures_of(Editor("demo", model).edit(request)) for request in REQUESTS]


def draw_in_waves(model: Model, wave: int, cancelled: threading.Event | None = None) -> list[list[bytes]]:
    """Of what was not read or encoded before."""
    residency_of(model).wave = wave
    keep_contents(model, 1 << 26)
    return [pictures_of(one) for one in Editor("demo", model).edit_many(REQUESTS, cancelled=cancelled)]


def keep_contents(model: Model, budget_bytes: int) -> None:
    """From now on, of what is read and encoded; nothing of what was."""
    assert model.reader is not None
    assert model.latents is not None
    for kept in (model.reader.pictures, model.reader.openings, model.reader.embeddings, model.latents):
        kept.clear()
        kept.budget_bytes = budget_bytes


@cache
def wanted(kind: str) -> list[list[bytes]]:
    return draw(load(kind, None))


@pytest.fixture(autouse=True)
def whole_card_again() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


# the demo's text encoder is so small that hardly a placement streams it by itself
STREAMED_READING = [(0.3, {"resident_encoder_layers": number}) for number in (0, 1)]


@pytest.mark.parametrize(("share", "changes"), [*((share, {}) for share in SHARES), *STREAMED_READING])
@pytest.mark.parametrize("kind", SETTINGS)
def test_draws_the_same_pictures_wherever_weights_lie(kind: str, share: float, changes: dict[str, int]) -> None:
    model = load(kind, share, 256 * 256, None, **changes)
    assert residency_of(model).in_turn
    assert draw(model) == wanted(kind)
    for wave, cancelled in ((1, None), (3, threading.Event())):
        assert draw_in_waves(model, wave, cancelled) == wanted(kind)
    assert draw(model) == wanted(kind)


@pytest.mark.parametrize("late", ["copies", "layers"])
def test_nothing_is_read_before_it_comes_nor_written_over_before_it_is_read(monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    model = load("own", 0.3, resident_encoder_layers=0)
    send, arrive = Link.send, Stack.arrive

    def send_late(self: Link, *rest: Any) -> None:
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(LATE_CYCLES)
        send(self, *rest)

    def run_late(self: Stack, number: int) -> None:
        arrive(self, number)
        torch.cuda._sleep(LATE_CYCLES)

    monkeypatch.setattr(Link, "send", send_late if late == "copies" else send)
    monkeypatch.setattr(Stack, "arrive", run_late if late == "layers" else arrive)
    assert draw_in_waves(model, 3) == wanted("own")
    assert draw(model) == wanted("own")


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_the_host_waits_for_no_copy(share: float) -> None:
    model = load("own", share)
    for _ in range(2):  # what comes a second time is recorded, and that waits
        draw_in_waves(model, 3)
    before = residency_of(model).copied_bytes
    with refuse_waiting():
        found = draw_in_waves(model, 3)
    assert found == wanted("own")
    assert residency_of(model).copied_bytes > before


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [1, 3])
def test_copies_what_the_placement_says(share: float, count: int) -> None:
    """A wave exchanges once, and reads and draws for each of its edits."""
    model = load("own", share)
    residency, placement = residency_of(model), residency_of(model).placement
    Editor("demo", model).edit(ask(0))
    residency.wave, before = count, residency.copied_bytes
    outcomes = list(Editor("demo", model).edit_many(ask(number, 3 + number) for number in range(count)))
    copied = residency.copied_bytes - before
    assert all(pictures_of(one) for one in outcomes)
    told = placement.exchanged_bytes + count * placement.edit_bytes(fitting.usual_work(model.card))
    # what a ring has of the next pass when the other network comes is lost
    assert told <= copied <= told + 2 * max(layer.size_bytes for layer in layers_of(model))


def test_slabs_are_page_locked_until_they_are_closed_or_the_model_goes() -> None:
    layers, model = layers_of(load("own", 0.3)), load("own", 0.3)
    gc.collect()
    assert not any(layer.host.is_pinned() for layer in layers)
    assert all(layer.host.is_pinned() for layer in layers_of(model))
    residency_of(model).close()
    assert not any(layer.host.is_pinned() for layer in layers_of(model))
    again = allocate(sum(layer.size_bytes for layer in layers), None, CUDA)
    assert again.tensor.is_pinned()
    again.close()


OTHER_PROCESS = """
from test_residency_on_cuda import digest, draw, load, residency_of
model = load("own", 0.3, shared_as="demo")
assert residency_of(model).is_filled
print(digest(draw(model)))
"""


def digest(drawn: Sequence[Sequence[bytes]]) -> str:
    return hashlib.sha256(b"".join(itertools.chain.from_iterable(drawn))).hexdigest()


def test_two_processes_share_their_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = load("own", 0.3, shared_as="demo")
    assert not residency_of(model).is_filled
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", OTHER_PROCESS]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == digest(wanted("own"))
    assert draw(model) == wanted("own")


# a drawing of that size asks for memory that the one before has not left
LARGE_PX = 1024 * 1024
LARGE, SMALL = ask(5, 0, 3), ask(6, height=256, width=256)
OVERSIZED_BYTES = 4 << 30
# the layers' share of memory, and an arena far larger than they need, which is given back with the placement
STARTS = {"recorded": (None, 0), "on the card": (1.0, 0), "in turn": (0.9, OVERSIZED_BYTES)}


@pytest.fixture(params=STARTS)
def editor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Editor:
    # of the 5 MB that the demo's layers take
    monkeypatch.setattr(pressure, "_STEP_BYTES", 3 << 20)
    share, arena_bytes = STARTS[request.param]
    made = Editor("demo", load("own", share, LARGE_PX, None, **({"arena_bytes": arena_bytes} if arena_bytes else {})))
    assert pictures_of(made.edit(LARGE)) == wanted_large()[1]
    return made


@cache
def wanted_large() -> list[list[bytes]]:
    editor = Editor("demo", load("own", None, LARGE_PX))
    return [pictures_of(editor.edit(request)) for request in (SMALL, LARGE)]


def limit_draws(monkeypatch: pytest.MonkeyPatch, times: int, *, lifts: bool) -> None:
    """So many large drawings find less of the card's memory than is taken already. lifts: the limit, when each has ended."""
    right, left = pipeline.draw, iter(range(times))

    def limited(told: Any, model: Any, sigmas: Any, seeds: tuple[int, ...], *rest: Any) -> Any:
        if seeds != (LARGE.seed,) or next(left, None) is None:
            return right(told, model, sigmas, seeds, *rest)
        torch.cuda.empty_cache()
        allowed_bytes = max(torch.cuda.memory_reserved() - (64 << 20), 1 << 20)
        torch.cuda.set_per_process_memory_fraction(allowed_bytes / torch.cuda.get_device_properties(0).total_memory)
        try:
            return right(told, model, sigmas, seeds, *rest)
        finally:
            if lifts:
                torch.cuda.set_per_process_memory_fraction(1.0)

    monkeypatch.setattr(pipeline, "draw", limited)


@pytest.mark.parametrize("many", [False, True])
def test_draws_once_more_with_less(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, many: bool
) -> None:
    before, (small, large) = residency_of(editor._model).placement, wanted_large()
    # what an oversized arena gives back is all that the next try has; a run tries once more as it is before
    limit_lasts = before.arena_bytes == OVERSIZED_BYTES
    limit_draws(monkeypatch, 2 if many and not limit_lasts else 1, lifts=not limit_lasts)
    outcomes = list(editor.edit_many([SMALL, LARGE, SMALL, LARGE])) if many else [editor.edit(LARGE)]
    assert [pictures_of(one) for one in outcomes] == ([small, large, small, large] if many else [large])
    assert caplog.text.count("the edit is drawn again") == 1
    assert residency_of(editor._model).placement.peak_bytes < before.peak_bytes
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert pictures_of(editor.edit(LARGE)) == large


@pytest.mark.parametrize("many", [False, True])
def test_tells_where_less_is_not_enough_and_goes_on(editor: Editor, monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    before, (small, large) = residency_of(editor._model).placement, wanted_large()
    with monkeypatch.context() as patch:
        limit_draws(patch, 99, lifts=True)
        if many:
            found = list(editor.edit_many([SMALL, LARGE, SMALL]))
            assert isinstance(found.pop(1), MachineError)
            assert [pictures_of(one) for one in found] == [small, small]
        else:
            with pytest.raises(MachineError, match="too small for this edit"):
                editor.edit(LARGE)
    assert residency_of(editor._model).placement == before
    for _ in range(3):
        assert pictures_of(editor.edit(LARGE)) == large


EDITS, WARM, PERIOD, GROWTH_BYTES = 500, 60, 48, 2 << 20


def ask_mixed(number: int) -> EditRequest:
    """Each of 24 shapes twice in a row, so that it is recorded where passes are, and forgotten before it comes again."""
    shape = number // 2
    return ask(number, shape % 6, prompt=WORDS[shape // 6 % 4], steps=1 + shape % 2)


@pytest.mark.parametrize(("share", "many"), [(None, False), (0.3, False), (0.3, True)])
def test_memory_does_not_grow_over_edits_of_mixed_sizes(share: float | None, many: bool) -> None:
    model = load("own", share)
    residency_of(model).wave = 3
    keep_contents(model, 0)  # or most edits would read and encode nothing
    gc.collect()
    torch.cuda.empty_cache()
    editor, requests, seen = Editor("demo", model), map(ask_mixed, range(EDITS)), []
    for outcome in editor.edit_many(requests) if many else map(editor.edit, requests):
        assert pictures_of(outcome)
        reserved = torch.cuda.memory_reserved()
        seen.append((reserved, reserved - torch.cuda.memory_allocated()))
    # of each period, as MiB: what is reserved, and what of that is idle
    fullest = [
        tuple(max(each) >> 20 for each in zip(*seen[begin : begin + PERIOD], strict=True)) for begin in range(WARM, EDITS, PERIOD)
    ]
    for number in range(WARM + PERIOD, EDITS):  # against the same place in the first period
        then = seen[WARM + (number - WARM) % PERIOD]
        grown = [after - before for after, before in zip(seen[number], then, strict=True)]
        assert max(grown) <= GROWTH_BYTES, (number, grown, fullest)
