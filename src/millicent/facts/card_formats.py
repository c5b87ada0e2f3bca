"""What each number format is worth on one card: its rate, and that rate beside BF16's."""

from __future__ import annotations

from dataclasses import dataclass

from millicent.facts.formats import ENGINE_FORMATS, FORMAT_NAMES, Capability, FormatName, Support, support
from millicent.facts.gpus import RATES, Gpu, rate_of


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFormat:
    """A format on a card.

    rate: dense, with FP32 accumulation, in TFLOP/s or TOP/s; None where the tensor cores do not run it, or nobody published it.
    times_bf16: that rate over BF16's. is_certain: whether the rate was read, and not derived or recalled.
    """

    support: Support
    rate: float | None
    times_bf16: float | None
    is_certain: bool


def weigh_formats(capability: Capability, gpu: Gpu | None = None) -> tuple[CardFormat, ...]:
    """Every format of the table on a capability, with the rates of one of its cards where one is given.

    Raises InputError for a capability that the table lacks.
    """
    return tuple(_weigh(name, capability, gpu) for name in FORMAT_NAMES)


def _weigh(name: FormatName, capability: Capability, gpu: Gpu | None) -> CardFormat:
    row = support(name, capability)
    rate = rate_of(gpu, name) if gpu and row.runs else None
    return CardFormat(
        support=row,
        rate=rate,
        times_bf16=rate / gpu.bf16_tflops if gpu and rate and gpu.bf16_tflops else None,
        is_certain=rate is not None and gpu is not None and not {RATES[name], "bf16_tflops"} & set(gpu.unverified),
    )


def list_engine_formats(capability: Capability) -> tuple[str, ...]:
    """The engine's names of the formats that it can run there: none without BF16, which all but the blocks' products is in."""
    if not support("bf16", capability).runs:
        return ()
    return tuple(name for name, computed in ENGINE_FORMATS.items() if support(computed, capability).runs)
