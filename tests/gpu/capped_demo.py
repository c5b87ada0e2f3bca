"""The demo on a card with less memory than its weights take, the edits that are asked of it, and what they come to."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image

from millicent.edits import EditRequest, EditResult
from millicent.engine import fitting
from millicent.engine.editor import Editor, find_model
from millicent.engine.layer_stack import Layer
from millicent.engine.loading import Model, current, load_model, speed_up_model
from millicent.engine.placement import place_on_card
from millicent.engine.planner import plan
from millicent.engine.residency import Residency
from millicent.engine.settings import Settings
from millicent.engine.weighing import RECORDED
from millicent.model.vae import VAE

CUDA = torch.device("cuda")
SETTINGS = {  # the card's own is FP8 where it has that
    "own": Settings(),
    "int8": Settings(format="int8"),
    "approximate": Settings(format="int8", attention="int8", reuse_reference=True),
}
SHARES = [0.9, 0.6, 0.3, 0.0]
SIZES = [(96, 96), (128, 96), (96, 128), (160, 96), (96, 160), (192, 96)]
PICTURES = [Image.radial_gradient("L").convert("RGB").resize(size) for size in SIZES]
WORDS = ["make the shirt navy blue", "a table" * 9, "a sand backdrop", "a wall of red brick" * 20]


def ask(number: int, *pictures: int, **changes: Any) -> EditRequest:
    images = tuple(PICTURES[picture] for picture in pictures or (number % 3,))
    return EditRequest(images=images, **{"prompt": WORDS[number % 2], "seed": number, **changes})


REQUESTS = [ask(0), ask(1), ask(2, true_cfg=3.0, negative_prompt="blur"), ask(3, 0, 1, variants=2), ask(4)]


def load(
    kind: str,
    share: float | None,
    area_px: int = 256 * 256,
    shared_as: str | None = None,
    device: torch.device = CUDA,
    **changes: int,
) -> Model:
    """The demo on a card, with so much of the memory that its layers can use.

    share: 1 for all, 0 for the least, None for all with what is recorded beside it. changes: of the placement that has it so.
    """
    with current(device):
        return _load(kind, share, area_px, shared_as, device, changes)


def _load(
    kind: str, share: float | None, area_px: int, shared_as: str | None, device: torch.device, changes: dict[str, int]
) -> Model:
    _, folder, card = find_model("demo")
    model = load_model(folder, card, torch.device("cpu"), torch.bfloat16)
    assert isinstance(model.vae, VAE)
    card = dataclasses.replace(model.card, vae_area_px=area_px)
    model = dataclasses.replace(model, card=card, device=device, vae=model.vae.to(device))
    chosen = plan(SETTINGS[kind], torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    assert chosen is not None
    parts = fitting.weigh_model(fitting.sizes_of(model), fitting.usual_work(card), chosen, device)
    whole = parts.resident + parts.phases.recorded_bytes(RECORDED[0])
    free_bytes = whole if share is None else parts.least + round(share * (parts.resident - parts.least))
    placement = place_on_card(parts, free_bytes)
    resident = changes.get("resident_encoder_layers", placement.resident_encoder_layers)
    if placement.in_turn and resident == len(parts.encoder_sizes):
        # as larger models have it, whose recorded passes take little memory beside their layers
        placement = dataclasses.replace(placement, recorded=("text",))
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


def digest(drawn: Sequence[Sequence[bytes]]) -> str:
    return hashlib.sha256(b"".join(itertools.chain.from_iterable(drawn))).hexdigest()
