"""From what is asked and what the card is to what will run: every choice with its reason, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from millicent.engine.settings import FORMATS, Format, Settings
from millicent.errors import MachineError
from millicent.facts.formats import tensor_core_capabilities

Capability = tuple[int, int]
Backend = Literal["cudnn", "flash", "math", "int8"]
EncoderFormat = Literal["bf16", "fp8"]

TENSOR_CORES: Mapping[Format, frozenset[Capability]] = {name: tensor_core_capabilities(name) for name in FORMATS}
# of one weight with its share of the scales
FORMAT_BYTES: Mapping[Format, float] = {"bf16": 2, "fp8": 1, "int8": 1, "int8-weight": 1, "nvfp4": 0.5625}
_DOWN = re.compile(r"\.(img|txt)_mlp\.net\.2$")
_BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Plan:
    """What will run. because: a line for each choice."""

    format: Format
    text_encoder: EncoderFormat
    attention: Backend
    reuse_reference: bool
    bf16_down: bool
    bf16_edge_blocks: int
    because: tuple[str, ...]

    def format_of(self, name: str, num_layers: int) -> Format:
        """The format of one linear of the transformer, by its full name; what is not in a block stays BF16."""
        block = _BLOCK.match(name)
        if block is None or (self.bf16_down and _DOWN.search(name)):
            return "bf16"
        number, edge = int(block[1]), self.bf16_edge_blocks
        return "bf16" if number < edge or number >= num_layers - edge else self.format


def plan(settings: Settings, capability: Capability | None, card: str) -> Plan | None:
    """The plan for a card, or for a CPU, where capability is None; None for the plain network.

    Raises MachineError for a format that the card's tensor cores do not run, saying which they do.
    """
    if settings.plain or (capability is None and settings == Settings()):
        return None
    chosen, why = _choose_format(settings.format, capability, card)
    encoder, why_encoder = _choose_encoder(chosen, capability)
    backend, why_attention = _choose_attention(settings, capability, card)
    return Plan(
        format=chosen,
        text_encoder=encoder,
        attention=backend,
        reuse_reference=settings.reuse_reference,
        bf16_down=settings.bf16_down,
        bf16_edge_blocks=settings.bf16_edge_blocks,
        because=(why, why_encoder, why_attention),
    )


def _choose_format(asked: Format | None, capability: Capability | None, card: str) -> tuple[Format, str]:
    if capability is None:
        return asked or "bf16", f"{asked or 'bf16'} on a CPU is computed exactly, to see its pictures, and slowly"
    runs = [name for name, capabilities in TENSOR_CORES.items() if capability in capabilities]
    told = f"{card} (compute capability {capability[0]}.{capability[1]})"
    if not runs:
        raise MachineError(f"{told} has tensor cores for none of our formats.", "Use a card of the Ampere generation or later.")
    if asked is not None and asked not in runs:
        raise MachineError(f"The tensor cores of {told} do not run {asked}.", f"Use {' or '.join(runs)}, or another card.")
    if asked is not None:
        return asked, f"{asked} was asked for, and {told} runs it"
    if "fp8" in runs:
        return "fp8", f"fp8: {told} runs it at twice the rate of BF16, with half the bytes"
    return "int8", f"int8: {told} runs it at twice the rate of BF16, and has no FP8"


def _choose_encoder(transformer: Format, capability: Capability | None) -> tuple[EncoderFormat, str]:
    if transformer != "bf16" and capability in TENSOR_CORES["fp8"]:
        return "fp8", "the text encoder in fp8, with half the bytes"
    return "bf16", "the text encoder in plain numbers"


def _choose_attention(settings: Settings, capability: Capability | None, card: str) -> tuple[Backend, str]:
    if settings.attention == "int8":
        if capability is not None and capability not in TENSOR_CORES["int8"]:
            raise MachineError(
                f"The tensor cores of {card} (compute capability {capability[0]}.{capability[1]}) multiply INT8 no faster than "
                "BF16, and 8-bit attention is for speed alone.",
                "Leave out --attention int8.",
            )
        return "int8", "8-bit attention was asked for; it is an approximation"
    if capability is None:
        return "math", "exact attention in PyTorch"
    if capability[0] in (9, 10):
        return "cudnn", f"exact attention by cuDNN, which is made for {card}'s generation; PyTorch's FlashAttention is not"
    return "flash", "exact attention by FlashAttention"
