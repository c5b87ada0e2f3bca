"""What of a model fits on its card, and giving its weights their places by that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from millicent.engine.fast_vae import CapturedVAE
from millicent.engine.host_memory import shared_bytes
from millicent.engine.laying_out import take_all
from millicent.engine.machine_plan import wave_for, weigh_plan
from millicent.engine.placement import Placement, check_host_room, place_on_card
from millicent.engine.planner import Plan
from millicent.engine.weighing import CONTEXT_BYTES, Components
from millicent.facts.models import ModelCard
from millicent.hardware.memory import free_host_bytes
from millicent.model.sizes import ModelSizes, QwenVLSizes, Workload

if TYPE_CHECKING:
    from millicent.engine.loading import Model


def sizes_of(model: Model) -> ModelSizes:
    return ModelSizes(
        transformer=model.mmdit.config,
        text_encoder=QwenVLSizes.from_dict(model.text_encoder.network.config.to_dict()),  # type: ignore[operator,union-attr]
        vae=model.vae.config,
    )


def usual_work(card: ModelCard) -> Workload:
    """What room is left for when a model is opened: one reference, a square picture of the card's area."""
    side = round(math.sqrt(card.vae_area_px))
    return Workload(
        width=side,
        height=side,
        references=1,
        steps=card.steps,
        reference_px=card.vae_area_px,
        encoder_px=card.encoder_area_px,
        guided=card.true_cfg > 1,
    )


def free_bytes(device: torch.device, limit_bytes: int | None = None, placed_bytes: int = 0) -> int:
    """Of the card, with this process's context, and what its allocator has idle. placed_bytes: taken by what is to be placed."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + idle + placed_bytes + CONTEXT_BYTES
    return free if limit_bytes is None else min(free, limit_bytes)


def weigh_model(sizes: ModelSizes, work: Workload, plan: Plan, device: torch.device) -> Components:
    return weigh_plan(sizes, work, plan, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def choose_placement(
    sizes: ModelSizes,
    card: ModelCard,
    plan: Plan,
    device: torch.device,
    limit_bytes: int | None = None,
    shared_as: str | None = None,
) -> Placement:
    """As much on the card as fits. limit_bytes: of the card's memory, what may be used. shared_as: as speed_up_model's.

    Raises MachineError for a card or a host that is too small.
    """
    placement = place_on_card(weigh_model(sizes, usual_work(card), plan, device), free_bytes(device, limit_bytes))
    # what another process holds of these very weights need not be there twice
    shared = shared_bytes(shared_as) if shared_as is not None and placement.in_turn else 0
    check_host_room(placement, free_host_bytes() + shared)
    return placement


def carry_out(model: Model, placement: Placement) -> None:
    """Give the weights of a model that is open their places. Work on the card has ended, and nothing is remembered of any shape."""
    assert model.fast is not None
    assert model.reader is not None
    assert model.residency is not None
    if placement.in_turn and not model.residency.has_slabs:
        take_all(model.residency, model.fast.network, model.text_encoder.network)
        model.reader.hold = model.residency.text_encoder.held
    # before the arena: where there is no memory for that it comes later, and the rest has to be of the same placement
    record_passes(model, placement.recorded)
    model.fast.network.abreast = placement.abreast
    model.fast.modulation.keep_on_host(not placement.records_graphs)
    try:
        if model.residency.has_slabs:
            model.residency.settle(placement)
        else:
            model.residency.placement = placement
    finally:
        set_wave(model)


def set_wave(model: Model) -> None:
    """How many edits share an exchange, by what the host has free now that the weights are there."""
    if model.residency is None or model.device.type != "cuda":
        return
    assert model.fast is not None
    card, placement = torch.cuda.get_device_properties(model.device), model.residency.placement
    model.residency.wave = wave_for(
        sizes_of(model),
        model.fast.plan,
        placement,
        card.name,
        (card.major, card.minor),
        card.total_memory >> 20,
        free_host_bytes(),
    )


def record_passes(model: Model, recorded: Sequence[str]) -> None:
    """The phases (engine/weighing.py) of which shapes that come again are recorded as graphs."""
    assert model.fast is not None
    assert model.reader is not None
    model.fast.network.record("denoise" in recorded)
    model.reader.record("text" in recorded)
    if isinstance(model.vae, CapturedVAE):
        model.vae.record("VAE decode" in recorded)
