"""What will happen on a whole machine: formats, where everything lies, how long an edit takes, what it costs; with reasons.

`planner.plan` decides on formats and kernels, and is what loading carries out; this adds the rest. It is pure: the same question on
the same day has the same answer.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import get_args

from millicent.engine.placement import MOST_ABREAST, Placement, place
from millicent.engine.planner import TENSOR_CORES, Capability, EncoderFormat, Plan, plan
from millicent.engine.predictions import (
    CARD_STAGES,
    Draw,
    Estimate,
    Layouts,
    estimate,
    has_rates,
    link_gb_per_s,
    predict,
    shares_of,
)
from millicent.engine.settings import Format, Settings
from millicent.engine.weighing import Components, weigh
from millicent.errors import InputError, MachineError
from millicent.facts.gpus import Gpu, identify, read_gpus
from millicent.facts.prices import RentalPrice, is_stale, prices_of
from millicent.hardware.machine import MIB, Card, Machine, machine_of
from millicent.model.config import MMDiTConfig
from millicent.model.sizes import ModelSizes, Workload, block_matrices, block_tensors, slab_bytes

WAVE_SHARE = 0.01  # of a wave's time that the exchange of text encoder and transformer may take
# a wave's results come as they finish, but a run that is killed draws again what it had claimed of one
MOST_OF_A_WAVE = 256
# where nothing tells the seconds of an edit: enough for a card that draws one in two seconds, over a link of PCIe 4.0
USUAL_WAVE = 32
# of the host's memory for each picture of a wave: 12 megapixels decoded (36 MB, and what is made of them on the way), 4 MB that are
# prepared, 4 MB of hidden states and latents; with a margin
WAVE_PICTURE_BYTES = 64 * 10**6
# of the host's free memory, as much again is wanted by what is made of a wave, and half is other programs'
WAVE_HOST_SHARE = 0.25
_USD = Decimal("0.0000001")


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedImage:
    """One picture at one rental price. usd: with the card never idle. stale: nobody has looked at the price for long."""

    price: RentalPrice
    usd: Decimal
    stale: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another format on the same machine, or the chosen one. seconds: of one picture of a row; None with `refused` or no rates."""

    format: Format
    text_encoder: EncoderFormat | None
    seconds: float | None
    usd: tuple[Decimal, Decimal] | None
    in_turn: bool
    streams: bool
    refused: str | None
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinePlan:
    """What will happen on a machine.

    formats: of the networks, and attention. gpu: the card's row in the table; None for a card that is not there, whose times are
    not predicted. components: bytes; placement: where they lie. link_gb_per_s: between host and card. wave: pictures that share
    one exchange of text encoder and transformer; 1 where they lie there together. stages: of one picture of a row.
    alone_s: a picture by itself, host and exchange included. prices: the cheapest first. alternatives: the fastest first.
    """

    card: str
    gpu: Gpu | None
    work: Workload
    formats: Plan
    components: Components
    placement: Placement
    link_gb_per_s: float
    wave: int
    stages: Mapping[str, Estimate]
    alone_s: float | None
    prices: tuple[PricedImage, ...]
    alternatives: tuple[Alternative, ...]
    because: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Between one picture of a row and the next: what the card does. The host prepares and writes beside it."""
        return row_seconds(self.stages)

    @property
    def images_per_hour(self) -> float | None:
        return None if self.seconds is None else 3600 / self.seconds


def row_seconds(stages: Mapping[str, Estimate]) -> float | None:
    return sum(stages[stage].seconds for stage in CARD_STAGES if stage in stages) or None


def plan_machine(
    model: ModelSizes,
    machine: Machine,
    settings: Settings,
    work: Workload,
    *,
    on: datetime.date,
    gpu: Gpu | None = None,
    prices: Path | None = None,
    compares: bool = True,
) -> MachinePlan:
    """The whole plan for the machine's first card.

    on: the day whose prices count. gpu: the card's row where it is known already; else its reported name tells. prices: a folder of
    newer ones. compares: plan the other formats too.
    Raises MachineError for no card, a card or host that is too small, or a format that the card does not run; InputError for the
    plain network, which has no plan.
    """
    card = machine.card
    if card is None:
        told = machine.no_cards_because or "none was found"
        raise MachineError(f"This machine has no NVIDIA card: {told}.", 'Name one to plan for: millicent plan --gpu "RTX 4090".')
    gpu = _limit_power(gpu or identify(card.name, card.capability, card.memory_mib), card)
    asked = _Asked(model, work, card, gpu, _limit_memory(card, settings), machine.ram_available_bytes, on, prices)
    made = asked.lay_out(asked.choose(settings))
    others = _compare(asked, settings, made.formats) if compares else ()
    return replace(made, alternatives=others, because=(*made.because, *_tell_faster(made.formats, gpu, others)))


def _limit_power(gpu: Gpu | None, card: Card) -> Gpu | None:
    """The row with no more power than the card is set to."""
    if gpu is None or gpu.power_w is None or not card.power_limit_w or card.power_limit_w >= gpu.power_w:
        return gpu
    return replace(gpu, power_w=round(card.power_limit_w))


def _limit_memory(card: Card, settings: Settings) -> int:
    """Bytes of the card's memory that are free, and may be used."""
    free_bytes = card.free_mib * MIB
    return free_bytes if settings.memory_gb is None else min(free_bytes, int(settings.memory_gb * 1e9))


@dataclass(frozen=True, slots=True)
class _Asked:
    """The question, but for the formats: as plan_machine's arguments. free_bytes: of the card; host_bytes: of the host."""

    model: ModelSizes
    work: Workload
    card: Card
    gpu: Gpu | None
    free_bytes: int
    host_bytes: int
    on: datetime.date
    prices: Path | None

    @property
    def name(self) -> str:
        return self.gpu.name if self.gpu else self.card.name

    @property
    def capability(self) -> Capability:
        """Raises MachineError where nothing tells it."""
        found = capability_of(self.card, self.gpu)
        if found is None:
            raise MachineError(f"The compute capability of {self.name} is not known.", "Name the card with --gpu.")
        return found

    def choose(self, settings: Settings) -> Plan:
        """Raises as plan_machine."""
        chosen = plan(settings, self.capability, self.name)
        if chosen is None:
            raise InputError("The plain network has no formats to plan.", "Leave out --plain.")
        return chosen

    def lay_out(self, formats: Plan) -> MachinePlan:
        """Placement, times and prices. Raises as plan_machine."""
        components = weigh_plan(self.model, self.work, formats, self.capability)
        placement = place(components, self.free_bytes, self.host_bytes)
        link = link_of(self.card)
        edit_s = row_seconds(time_edit(self.model, self.work, self.gpu, formats, placement, link))
        wave = wave_of(placement.exchanged_bytes, link, edit_s, self.host_bytes - placement.needed_host_bytes, placement.abreast)
        stages = time_edit(self.model, self.work, self.gpu, formats, placement, link, wave)
        by_itself = time_edit(self.model, self.work, self.gpu, formats, placement, link, pictures=1)
        alone = sum(each.seconds for each in by_itself.values()) + placement.exchanged_bytes / (1e9 * link)
        return MachinePlan(
            card=self.name,
            gpu=self.gpu,
            work=self.work,
            formats=formats,
            components=components,
            placement=placement,
            link_gb_per_s=link,
            wave=wave,
            stages=stages,
            alone_s=alone if stages else None,
            prices=_price(self.gpu, row_seconds(stages), self.on, self.prices),
            alternatives=(),
            because=(
                *formats.because,
                placement.because,
                *tell_streams(placement, slowdown(self.model, self.work, self.gpu, formats, placement, link)),
                *tell_wave(placement, link, edit_s, wave),
                _tell_times(self, formats, stages),
            ),
        )


def link_of(card: Card) -> float:
    """GB/s between host and card, at the link's best: an idle card lowers the generation."""
    return link_gb_per_s(card.pcie_max_generation or card.pcie_generation, card.pcie_max_lanes or card.pcie_lanes)


def time_edit(
    model: ModelSizes,
    work: Workload,
    gpu: Gpu | None,
    formats: Plan,
    placement: Placement,
    link: float,
    wave: int | None = None,
    pictures: int = MOST_ABREAST,
) -> dict[str, Estimate]:
    """Estimates by stage, of one picture of a row; none for a card without rates.

    wave: pictures that share an exchange of text encoder and transformer; None leaves it out. pictures: that wait to be drawn.
    """
    if gpu is None or not _has_rates(gpu, formats):
        return {}
    exchanged_bytes = placement.exchanged_bytes / wave if wave else 0
    draw = replace(_draw(model, work, formats, placement, pictures), exchanged_bytes=exchanged_bytes)
    return estimate(model, work, gpu, draw, link)


def slowdown(model: ModelSizes, work: Workload, gpu: Gpu | None, formats: Plan, placement: Placement, link: float) -> float | None:
    """How many times longer an edit takes for what is streamed in it; None for a card without rates.

    By the roofline on both sides, as what was measured was measured without streaming.
    """
    if gpu is None or not _has_rates(gpu, formats):
        return None
    draw = _draw(model, work, formats, placement)
    stays = replace(draw, streamed_step_bytes=0, streamed_text_bytes=0)
    times = (predict(model, work, gpu, each, link) for each in (draw, stays))
    streamed_s, stays_s = (sum(stages[stage] for stage in CARD_STAGES if stage in stages) for stages in times)
    return streamed_s / stays_s


def _has_rates(gpu: Gpu, formats: Plan) -> bool:
    return has_rates(gpu, formats.format, formats.text_encoder, "int8" if formats.attention == "int8" else "exact")


def _draw(model: ModelSizes, work: Workload, formats: Plan, placement: Placement, pictures: int = MOST_ABREAST) -> Draw:
    return Draw(
        layouts=block_layouts(model.transformer, formats.format, formats.bf16_down, formats.bf16_edge_blocks),
        text_encoder=formats.text_encoder,
        attention="int8" if formats.attention == "int8" else "exact",
        reuses=formats.reuse_reference,
        streamed_step_bytes=placement.streamed_step_bytes / placement.passes_together(work, pictures),
        streamed_text_bytes=placement.reading_bytes(work),
    )


def wave_of(exchanged_bytes: int, link_gb_per_s: float, seconds: float | None, host_free_bytes: int, abreast: int = 1) -> int:
    """How many pictures share an exchange: so many that it costs no more than WAVE_SHARE of their time.

    seconds: of one picture without it; None where they are not known. host_free_bytes: of the host's memory, beside the weights
    that wait there. abreast: how many are drawn together, which is the answer where there is no exchange. Never more than the host
    has room for, nor than MOST_OF_A_WAVE.
    """
    if not exchanged_bytes:
        return abreast
    wanted = USUAL_WAVE if seconds is None else math.ceil(exchanged_bytes / (1e9 * link_gb_per_s) / (WAVE_SHARE * seconds))
    return max(1, min(wanted, MOST_OF_A_WAVE, int(WAVE_HOST_SHARE * host_free_bytes) // WAVE_PICTURE_BYTES))


def wave_for(
    model: ModelSizes,
    formats: Plan,
    placement: Placement,
    card_name: str,
    capability: Capability,
    memory_mib: int,
    host_free_bytes: int,
) -> int:
    """wave_of for a card as its driver names it, of usual edits, over the link of such a card. host_free_bytes: as wave_of's."""
    gpu, work = identify(card_name, capability, memory_mib), Workload()
    link = link_gb_per_s(gpu.pcie_generation, gpu.pcie_lanes) if gpu else link_gb_per_s(None, None)
    seconds = row_seconds(time_edit(model, work, gpu, formats, placement, link))
    return wave_of(placement.exchanged_bytes, link, seconds, host_free_bytes, placement.abreast)


def capability_of(card: Card, gpu: Gpu | None) -> Capability | None:
    """As the driver tells it, or the table; gpu: the card's row there."""
    return card.capability or (gpu.capability if gpu else None)


def weigh_plan(model: ModelSizes, work: Workload, formats: Plan, capability: Capability | None) -> Components:
    """What the planned formats weigh. capability: of the card; None where it is not known."""
    return weigh(
        model,
        work,
        block_sizes(model.transformer, formats),
        number_format=formats.format,
        text_encoder=formats.text_encoder,
        attention=formats.attention,
        reuses=formats.reuse_reference,
        has_fp8=capability in TENSOR_CORES["fp8"],
    )


def block_sizes(config: MMDiTConfig, formats: Plan) -> tuple[int, ...]:
    """Bytes of each of the transformer's blocks, as it lies in its slab."""
    return _block_sizes(config, formats.format, formats.bf16_down, formats.bf16_edge_blocks)


@cache
def _block_sizes(config: MMDiTConfig, number_format: Format, bf16_down: bool, bf16_edge_blocks: int) -> tuple[int, ...]:
    format_of = bare_plan(number_format, bf16_down, bf16_edge_blocks).format_of
    return tuple(slab_bytes(block_tensors(config, number, format_of)) for number in range(config.num_layers))


@cache
def block_layouts(config: MMDiTConfig, number_format: Format, bf16_down: bool, bf16_edge_blocks: int) -> Layouts:
    """How many blocks have their linears in which formats."""
    format_of = bare_plan(number_format, bf16_down, bf16_edge_blocks).format_of
    layers = config.num_layers
    return Counter(tuple(format_of(m.name, layers) for m in block_matrices(config, number)) for number in range(layers))


def bare_plan(number_format: Format, bf16_down: bool = False, bf16_edge_blocks: int = 0) -> Plan:
    """A plan for its formats alone."""
    return Plan(number_format, "bf16", "math", False, bf16_down, bf16_edge_blocks, ())


def tell_streams(placement: Placement, slower: float | None) -> tuple[str, ...]:
    """What streaming costs. slower: as slowdown says."""
    if not placement.streams or slower is None:
        return ()
    if slower < 1.005:
        return ("what is streamed comes while the card computes, and takes no time of its own",)
    return (f"what is streamed makes an edit {slower:.2f} times as long as with all weights on the card",)


def tell_wave(placement: Placement, link: float, seconds: float | None, wave: int) -> tuple[str, ...]:
    """How many pictures share an exchange, what it costs, and what bounds them. seconds: as wave_of's."""
    if not placement.exchanged_bytes:
        return ()
    exchange_s = placement.exchanged_bytes / (1e9 * link)
    told = f"waves of {wave} share an exchange of {exchange_s:.2f} s"
    if seconds is None:
        return (f"{told}; how long an edit takes is not known",)
    share = exchange_s / (exchange_s + wave * seconds)
    if share <= WAVE_SHARE:
        return (f"{told}, {share:.1%} of their time",)
    bound = "as a killed run draws again what it has claimed" if wave == MOST_OF_A_WAVE else "as the host's memory holds no more"
    return (f"{told}, {share:.1%} of their time: no larger, {bound}",)


def _tell_times(asked: _Asked, formats: Plan, stages: Mapping[str, Estimate]) -> str:
    if asked.gpu is None:
        return f"{asked.name} is not in our table of cards: its times and prices are not known"
    if not stages:
        return f"our table lacks rates of {asked.name} for {formats.format}: its times are not known"
    first = next(iter(stages.values()))
    if first.kind == "measured":
        return "times as measured on this card, for this very edit"
    told = "calibrated by runs on a card of this kind" if first.kind == "calibrated" else "modelled: we have not run this card"
    return f"times {told}, within {first.error or 0:.0%}; the shares of its rates are from {shares_of(asked.gpu).source}"


def _price(gpu: Gpu | None, seconds: float | None, on: datetime.date, folder: Path | None) -> tuple[PricedImage, ...]:
    if gpu is None or seconds is None:
        return ()
    return tuple(
        PricedImage(price=price, usd=usd_per_image(price.usd_per_hour, seconds), stale=is_stale(price, on))
        for price in prices_of(gpu.name, on, folder)
    )


def usd_per_image(usd_per_hour: Decimal, seconds: float) -> Decimal:
    """To a hundredth of a millicent, with the card never idle."""
    return (usd_per_hour * Decimal(repr(seconds)) / 3600).quantize(_USD)


def price_range(prices: Iterable[PricedImage]) -> tuple[Decimal, Decimal] | None:
    """The lowest and the highest of an image."""
    usd = [priced.usd for priced in prices]
    return (min(usd), max(usd)) if usd else None


def _compare(asked: _Asked, settings: Settings, chosen: Plan) -> tuple[Alternative, ...]:
    """Every format, the fastest first, then what has no times, then what cannot run."""
    found = [_try_format(asked, replace(settings, format=name), name, name == chosen.format) for name in get_args(Format)]
    return tuple(sorted(found, key=lambda each: (each.refused is not None, each.seconds is None, each.seconds or 0.0)))


def _try_format(asked: _Asked, settings: Settings, name: Format, is_chosen: bool) -> Alternative:
    try:
        made = asked.lay_out(asked.choose(settings))
    except MachineError as error:
        return _refused(name, error.message, is_chosen)
    return Alternative(
        format=name,
        text_encoder=made.formats.text_encoder,
        seconds=made.seconds,
        usd=price_range(made.prices),
        in_turn=made.placement.in_turn,
        streams=bool(made.placement.streamed_step_bytes or made.placement.streamed_text_bytes),
        refused=None,
        chosen=is_chosen,
    )


def _refused(name: Format, why: str, chosen: bool) -> Alternative:
    return Alternative(
        format=name, text_encoder=None, seconds=None, usd=None, in_turn=False, streams=False, refused=why, chosen=chosen
    )


def _tell_faster(chosen: Plan, gpu: Gpu | None, alternatives: tuple[Alternative, ...]) -> tuple[str, ...]:
    taken = next((each for each in alternatives if each.chosen), None)
    if gpu is None or taken is None or taken.seconds is None or alternatives[0].seconds is None or alternatives[0].chosen:
        return ()
    best = alternatives[0]
    assert best.seconds is not None
    times = f"{taken.seconds / best.seconds:.2f} times as fast as {chosen.format}"
    why = f", as the tensor cores of {gpu.name} run INT8 at a higher rate than FP8" if _has_fast_int8(best.format, gpu) else ""
    return (f"{best.format} is predicted to be {times}{why}; it is not chosen until it has been measured (--format {best.format})",)


def _has_fast_int8(number_format: Format, gpu: Gpu) -> bool:
    """Of GeForce cards, which halve FP8's rate where the sums are FP32."""
    return number_format == "int8" and (gpu.int8_tops or 0) > 1.5 * (gpu.fp8_tflops or math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Every card of the table on which the model runs: those with a price by the cheapest image, then the others by seconds.

    refused: (card, why) of the rest.
    """

    plans: tuple[MachinePlan, ...]
    refused: tuple[tuple[str, str], ...]


def rank_cards(model: ModelSizes, settings: Settings, work: Workload, *, on: datetime.date, prices: Path | None = None) -> Ranking:
    """Each card as a whole rental, with 64 GiB of memory on its host. on, prices: as plan_machine's."""
    plans, refused = [], []
    for gpu in read_gpus():
        machine = machine_of(gpu, checked=on.isoformat())
        try:
            plans.append(plan_machine(model, machine, settings, work, on=on, gpu=gpu, prices=prices))
        except MachineError as error:
            refused.append((gpu.name, error.message))
    return Ranking(plans=tuple(sorted(plans, key=_rank)), refused=tuple(refused))


def _rank(planned: MachinePlan) -> tuple[bool, Decimal, float, str]:
    usd = price_range(planned.prices)
    return usd is None, usd[0] if usd else Decimal(0), planned.seconds or math.inf, planned.card
