"""What a file that `millicent convert` wrote says of itself, and the names in it that no network has. No torch.

Beside the network's parameters such a file may hold a modulation table (model/modulation.py), once for each dtype that an edit
computes in, as modulation.bf16.* and modulation.fp32.*, and then may leave out every parameter that sees the timestep alone.
Its header's metadata has the key "millicent": JSON with

    version             of this layout
    format              fp8, int8 or bf16: what the blocks' matrices are stored as; the header decides how each is read
    distilled_steps     that few-step weights draw in if nothing else is asked; 0 for weights that are not distilled
    schedule, steps     that the table is for; steps is null without one
    modulation_table, modulation_weights    whether each is in the file
    zero_cond_t         as in config.json; null where nothing told
    source, loras       the name of what was converted; name, sha256 and strength of each LoRA that is fused in
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

OWN_METADATA = "millicent"
VERSION = 1
TABLE_PREFIX = "modulation."
_SEES_TIMESTEP_ALONE = re.compile(r"time_text_embed\.|norm_out\.linear\.|transformer_blocks\.\d+\.(img|txt)_mod\.")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FusedLora:
    name: str
    sha256: str
    strength: float


@dataclass(frozen=True, slots=True)
class ConvertedMetadata:
    """The fields of the module's docstring."""

    format: str
    distilled_steps: int
    schedule: str
    steps: int | None
    modulation_table: bool
    modulation_weights: bool
    zero_cond_t: bool | None
    source: str
    loras: tuple[FusedLora, ...] = ()
    version: int = VERSION

    def to_header(self) -> dict[str, str]:
        """As safetensors' __metadata__."""
        return {"format": "pt", OWN_METADATA: json.dumps(asdict(self), sort_keys=True)}


def sees_timestep_alone(parameter: str) -> bool:
    """Whether a parameter of the transformer is one that a modulation table makes superfluous."""
    return bool(_SEES_TIMESTEP_ALONE.match(parameter))


def split_table(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """A file's tensors -> the network's own, and the table's with their prefix."""
    table = {key: tensor for key, tensor in tensors.items() if key.startswith(TABLE_PREFIX)}
    return {key: tensor for key, tensor in tensors.items() if key not in table}, table


def table_of(table: Mapping[str, T], dtype: str) -> dict[str, T]:
    """The tensors of one dtype's table, "bf16" or "fp32", by the names that ModulationTable.from_stored wants."""
    prefix = f"{TABLE_PREFIX}{dtype}."
    return {key.removeprefix(prefix): tensor for key, tensor in table.items() if key.startswith(prefix)}


def without_modulation(expected: Mapping[str, T]) -> dict[str, T]:
    """What a file must still hold of the transformer's parameters where a table stands in for the rest."""
    return {name: value for name, value in expected.items() if not sees_timestep_alone(name)}
