"""What a model in a format needs of a machine, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from millicent.errors import InputError
from millicent.facts.formats import ENGINE_FORMATS, Support, list_capabilities, support
from millicent.facts.models import Card as ModelFacts
from millicent.facts.models import find_any_card
from millicent.hardware.machine import GIB, Machine

Format = Literal["bf16", "fp8", "int8", "int8-weight", "nvfp4"]
FORMATS: tuple[Format, ...] = get_args(Format)

# Qwen-Image-Edit's parameters, by the shapes in checkpoint/architecture.py; modulation is needed only while weights load
TRANSFORMER_PARAMETERS = 20_430_401_088
MODULATION_PARAMETERS = 6_796_984_320
BLOCKS = 60
# Qwen2.5-VL-7B: 28 layers, and the vision tower, which stays BF16; the embedding table stays on the host, the LM head nowhere
LANGUAGE_PARAMETERS = 6_525_621_760
VISION_PARAMETERS = 676_550_144
EMBEDDING_BYTES = 152_064 * 3_584 * 2
VAE_BYTES = 254_000_000
# activations of a 1024x1024 edit with one reference, and CUDA's own: what the goal of 22 GiB in all with FP8 leaves
WORKING_BYTES = int(1.7 * GIB)
# below this not even one block after the other goes through the card; an estimate from the goal that 12 GB cards work
LEAST_CARD_BYTES = 10 * GIB
# Python, torch and CUDA's libraries, and a weight file's buffers while it loads; an estimate
HOST_BYTES = 4 * GIB
# so much more than the bytes to come, as for `millicent pull`: other programs write to the same disk meanwhile
DISK_MARGIN = 1.1
# of one weight with its share of the scales
WEIGHT_BYTES: Mapping[Format, float] = {"bf16": 2, "fp8": 1, "int8": 1, "int8-weight": 1, "nvfp4": 0.5625}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """model: a card's name. repo: where it is published. format: of the transformer's blocks.

    download_bytes: what is still to be fetched. resident_bytes: all weights on the card; working_bytes: beside them, for an edit.
    block_bytes: one block of the transformer, which is what is streamed at a time. least_card_bytes: free on the card, where
    weights are streamed. host_bytes: of the host's memory, before any streaming.
    """

    model: str
    format: Format
    download_bytes: int
    resident_bytes: int
    block_bytes: int
    repo: str | None = None
    working_bytes: int = WORKING_BYTES
    least_card_bytes: int = LEAST_CARD_BYTES
    host_bytes: int = HOST_BYTES + EMBEDDING_BYTES

    @property
    def card_bytes(self) -> int:
        """Free memory of a card on which everything stays."""
        return self.resident_bytes + self.working_bytes

    def streamed_bytes(self, free_bytes: int) -> int:
        """Weights that do not stay on a card with so much free memory, and go to it again for each picture."""
        return max(0, self.card_bytes - free_bytes)

    def pinned_bytes(self, free_bytes: int) -> int:
        """Host memory that is locked for streaming: torch rounds each block up to a power of two."""
        blocks = -(-self.streamed_bytes(free_bytes) // self.block_bytes)
        return blocks * (1 << (self.block_bytes - 1).bit_length())

    @property
    def disk_bytes(self) -> int:
        return int(self.download_bytes * DISK_MARGIN)


def needs_of(model: str, asked: str | None, machine: Machine, present_bytes: int = 0) -> Needs:
    """The needs of a published model in the asked format, None for the one that suits the machine's card.

    present_bytes: of its files, what is on the disk already. Raises ModelNotFoundError, InputError for a format.
    """
    card = find_any_card(model)
    if asked is not None and asked not in FORMATS:
        raise InputError(f"The format is {asked!r}.", f"Use one of {', '.join(FORMATS)}.")
    chosen = next((name for name in FORMATS if name == asked), None) or choose_format(machine)
    return Needs(
        model=model,
        format=chosen,
        repo=card.repo,
        download_bytes=max(0, _published_bytes(card) - present_bytes),
        resident_bytes=weights_bytes(chosen),
        block_bytes=int((TRANSFORMER_PARAMETERS - MODULATION_PARAMETERS) / BLOCKS * WEIGHT_BYTES[chosen]),
    )


def choose_format(machine: Machine) -> Format:
    """The format that the planner takes by itself: FP8, then INT8, then BF16."""
    capability = machine.card.capability if machine.card else None
    if capability is None:
        return "bf16"
    wishes: tuple[Format, ...] = ("fp8", "int8")
    return next((name for name in wishes if runs_on_card(name, capability)), "bf16")


def support_of(chosen: Format, capability: tuple[int, int]) -> Support | None:
    """What is known of a format's products on a card of this capability; None where the table does not know the capability."""
    return support(ENGINE_FORMATS[chosen], capability) if capability in list_capabilities() else None


def runs_on_card(chosen: Format, capability: tuple[int, int]) -> bool:
    """The tensor cores run the format's products, and BF16's, which everything around them is computed in."""
    return all((found := support_of(each, capability)) is not None and found.runs for each in (chosen, "bf16"))


def weights_bytes(chosen: Format) -> int:
    """All weights as they stay on the card: the transformer without its modulation, the text encoder, the VAE."""
    transformer = (TRANSFORMER_PARAMETERS - MODULATION_PARAMETERS) * WEIGHT_BYTES[chosen]
    # the encoder is in FP8 where the transformer's format says that the card has it
    language = LANGUAGE_PARAMETERS * (1 if chosen in ("fp8", "nvfp4") else 2)
    return int(transformer + language + 2 * VISION_PARAMETERS + VAE_BYTES)


def _published_bytes(card: ModelFacts) -> int:
    """With those of the model that a LoRA or a transformer is used on."""
    base = getattr(card, "base", None)
    return (card.size_bytes or 0) + (_published_bytes(find_any_card(base)) if base else 0)
