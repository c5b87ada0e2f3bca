"""What is asked of the engine, apart from the picture. `None` and "auto" are decided by engine/planner.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from millicent.errors import InputError
from millicent.facts.formats import FORMATS, Format

__all__ = ["FORMATS", "Attention", "Format", "Settings"]

Attention = Literal["exact", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the transformer is drawn with.

    format: of the blocks' weights and products; None for the one that the card runs fastest.
    attention: "exact", or "int8", an approximation with 8-bit products.
    reuse_reference: the references' keys and values are computed at the first step alone; an approximation.
    bf16_down: keep the MLPs' down-projections, whose inputs have the largest outliers, in BF16.
    bf16_edge_blocks: keep so many blocks at either end in BF16.
    plain: draw with the plain network of model/, without our kernels and formats; the reference for all else.
    memory_gb: of the card's memory, use at most so many GB of 1e9 bytes, in this process from then on; what does not fit waits on
    the host. None for all that is free.
    """

    format: Format | None = None
    attention: Attention = "exact"
    reuse_reference: bool = False
    bf16_down: bool = False
    bf16_edge_blocks: int = 0
    plain: bool = False
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        """Raises InputError."""
        if self.format not in (None, *FORMATS):
            raise InputError(f"The format is {self.format!r}.", f"Use one of {', '.join(FORMATS)}.")
        if self.attention not in get_args(Attention):
            raise InputError(f"The attention is {self.attention!r}.", "Use exact or int8.")
        if self.bf16_edge_blocks < 0:
            raise InputError(f"bf16_edge_blocks is {self.bf16_edge_blocks}.", "Use 0 or more.")
        if self.memory_gb is not None and not 0 < self.memory_gb < 1e6:
            raise InputError(f"memory_gb is {self.memory_gb}.", "Use the GB of the card's memory that may be used.")
        if self.plain and self.memory_gb is not None:
            raise InputError("The plain network lies on the card as a whole.", "Leave out --plain, or the limit of memory.")
        if self.plain and (self.format or self.attention != "exact" or self.reuse_reference):
            raise InputError(
                "The plain network has no formats, 8-bit attention or reuse.", "Leave out --plain, or everything that it excludes."
            )
