"""What a published model needs of a machine: the plan's own figures, for pre-flight to check before anything is fetched.

Of an edit of 1024x1024 with one reference in 4 steps. Where there is no plan - no card, or a format that the card does not run -
the figures are of the format that was asked for, or of BF16, with all weights on the card: the checks say what is wrong.
"""

from __future__ import annotations

from millicent.engine.machine_plan import (
    bare_plan,
    capability_of,
    link_of,
    row_seconds,
    slowdown,
    tell_streams,
    tell_wave,
    time_edit,
    wave_of,
    weigh_plan,
)
from millicent.engine.placement import HOST_BASE_BYTES, Placement, place_on_card
from millicent.engine.planner import Capability, Plan, plan
from millicent.engine.settings import FORMATS, Format, Settings
from millicent.engine.weighing import Components
from millicent.engine.workload import Asked, ask
from millicent.errors import MachineError
from millicent.facts.gpus import Gpu, identify
from millicent.facts.models import Card as ModelFacts
from millicent.facts.models import find_any_card
from millicent.hardware.machine import MIB, Card, Machine
from millicent.hardware.needs import Needs
from millicent.model.sizes import ModelSizes, Workload

SIZE_PX = (1024, 1024)
STEPS = 4


def needs_of(model: str, asked: str | None, machine: Machine, present_bytes: int = 0) -> Needs:
    """The needs of a published model in the asked format, None for the one that the plan takes on the machine's card.

    present_bytes: of its files, what is on the disk already. Raises ModelNotFoundError, InputError for a format.
    """
    facts, settings = find_any_card(model), Settings(format=asked)  # type: ignore[arg-type]  # it looks for itself
    of, card = ask(model, SIZE_PX, steps=STEPS), machine.card
    gpu = identify(card.name, card.capability, card.memory_mib) if card else None
    capability = capability_of(card, gpu) if card else None
    chosen = _choose(settings, capability)
    formats = chosen or bare_plan(settings.format or "bf16")
    parts = weigh_plan(of.model, of.work, formats, capability)
    free_bytes = card.free_mib * MIB if card else 0
    placement = _place(parts, free_bytes) if chosen else None
    has_room = free_bytes >= parts.resident
    slower, waves = (1.0, ()) if card is None or placement is None else _judge(of, machine, card, gpu, formats, placement)
    return Needs(
        model=model,
        format=formats.format,
        repo=facts.repo,
        download_bytes=max(0, _published_bytes(facts) - present_bytes),
        weights_bytes=parts.weights,
        working_bytes=parts.resident - parts.weights,
        least_card_bytes=parts.least,
        host_bytes=placement.needed_host_bytes if placement else HOST_BASE_BYTES + parts.embedding,
        pinned_bytes=placement.pinned_bytes if placement else 0,
        link_bytes=placement.exchanged_bytes + placement.edit_bytes(of.work) if placement else 0,
        placed=_tell(placement, slower, waves) if placement and not placement.records_graphs else None,
        slower=slower,
        other_formats=() if has_room else _list_fitting(of.model, of.work, capability, free_bytes, formats.format),
    )


def _choose(settings: Settings, capability: Capability | None) -> Plan | None:
    """None where the plan refuses."""
    if capability is None:
        return None
    try:
        return plan(settings, capability, "this card")
    except MachineError:
        return None


def _place(parts: Components, free_bytes: int) -> Placement | None:
    """None for a card that is too small even with everything streamed. Whether the host has the memory is for a check to say."""
    try:
        return place_on_card(parts, free_bytes)
    except MachineError:
        return None


def _judge(
    of: Asked, machine: Machine, card: Card, gpu: Gpu | None, formats: Plan, placement: Placement
) -> tuple[float | None, tuple[str, ...]]:
    """How much longer an edit takes for what is streamed; and what is told of waves."""
    link = link_of(card)
    seconds = row_seconds(time_edit(of.model, of.work, gpu, formats, placement, link))
    host_free = machine.ram_available_bytes - placement.needed_host_bytes
    wave = wave_of(placement.exchanged_bytes, link, seconds, host_free, placement.abreast)
    slower = slowdown(of.model, of.work, gpu, formats, placement, link) if placement.streams else 1.0
    return slower, tell_wave(placement, link, seconds, wave)


def _tell(placement: Placement, slower: float | None, waves: tuple[str, ...]) -> str:
    streamed = [f"{part.name}: {part.because}" for part in placement.parts if part.where == "streamed"]
    return "; ".join([placement.because, *streamed, *tell_streams(placement, slower), *waves])


def _list_fitting(
    model: ModelSizes, work: Workload, capability: Capability | None, free_bytes: int, chosen: Format
) -> tuple[Format, ...]:
    """The other formats in which all weights stay on the card."""
    found = [_choose(Settings(format=each), capability) for each in FORMATS if each != chosen]
    return tuple(each.format for each in found if each and weigh_plan(model, work, each, capability).resident <= free_bytes)


def _published_bytes(card: ModelFacts) -> int:
    """With those of the model that a LoRA or a transformer is used on."""
    base = getattr(card, "base", None)
    return (card.size_bytes or 0) + (_published_bytes(find_any_card(base)) if base else 0)
