"""Number formats by compute capability: what the tensor cores run, since when and why, from data/formats.toml."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from millicent.errors import InputError
from millicent.facts.rows import read_rows, require_known

FORMATS_FILE = Path(__file__).parent / "data" / "formats.toml"

Capability = tuple[int, int]
FormatName = Literal["bf16", "fp16", "int8", "fp8-tensorwise", "fp8-rowwise", "fp8-blockwise", "mxfp8", "nvfp4", "int4"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)
Format = Literal["bf16", "fp8", "int8", "int8-weight", "nvfp4"]
FORMATS: tuple[Format, ...] = get_args(Format)
# what the engine calls a format, and the one whose products it then computes
ENGINE_FORMATS: dict[str, FormatName] = {
    "bf16": "bf16",
    "fp8": "fp8-rowwise",
    "int8": "int8",
    "int8-weight": "bf16",
    "nvfp4": "nvfp4",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportRow:
    """One statement of the file, for each capability that it names: there is no "and later"."""

    format: FormatName
    capabilities: tuple[Capability, ...]
    runs: bool
    because: str
    source: str
    checked: datetime.date
    min_torch: str | None = None
    min_cuda: str | None = None
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Whether one capability's tensor cores run a format, at a rate that is worth it.

    min_torch, min_cuda: with these and later ones. unverified: fields that no page settles.
    """

    format: FormatName
    capability: Capability
    runs: bool
    because: str
    source: str
    checked: datetime.date
    min_torch: str | None = None
    min_cuda: str | None = None
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFormat:
    """A way to store weights that saves memory and no time: the products are computed in another format, on every card."""

    name: str
    because: str
    source: str
    checked: datetime.date


def support(format: str, capability: Capability) -> Support:  # noqa: A002
    """What is known of a format on a capability. Raises InputError for either that the table lacks."""
    table = _read_all()[0]
    if format not in FORMAT_NAMES:
        raise InputError(f"There is no format {format!r} in the table.", f"Use one of {', '.join(FORMAT_NAMES)}.")
    for row in table:
        if row.format == format and row.capability == capability:
            return row
    known = ", ".join(f"{major}.{minor}" for major, minor in list_capabilities())
    raise InputError(f"The table knows nothing of compute capability {capability[0]}.{capability[1]}.", f"It knows {known}.")


def list_capabilities() -> tuple[Capability, ...]:
    """Every compute capability that the table has, in rising order."""
    return tuple(sorted({row.capability for row in _read_all()[0]}))


def tensor_core_capabilities(format_name: str) -> frozenset[Capability]:
    """Where the engine can use a format, by its name there or in the table: the tensor cores run it, and BF16 for all else.

    So Turing, which has INT8 and no BF16, is not among INT8's. Raises InputError for a format that neither knows.
    """
    wanted = {ENGINE_FORMATS.get(format_name, format_name), "bf16"}
    return frozenset(each for each in list_capabilities() if all(support(name, each).runs for name in wanted))


def read_memory_formats() -> tuple[MemoryFormat, ...]:
    """What saves memory only."""
    return _read_all()[1]


@cache
def _read_all() -> tuple[tuple[Support, ...], tuple[MemoryFormat, ...]]:
    return read_formats(FORMATS_FILE)


def read_formats(path: Path) -> tuple[tuple[Support, ...], tuple[MemoryFormat, ...]]:
    """A file of formats.

    Raises InputError for a key that is unknown, missing or of the wrong type, and for a format and a capability of the file that
    are stated together twice or never.
    """
    rows = read_rows(path, {"support": SupportRow, "memory": MemoryFormat})
    found: dict[tuple[str, Capability], Support] = {}
    for row in rows["support"]:
        require_known(f"{path}: {row.format}", row.unverified, SupportRow)
        shared = {field.name: getattr(row, field.name) for field in fields(row) if field.name != "capabilities"}
        for capability in row.capabilities:
            if (row.format, capability) in found:
                raise InputError(f"{path} states {row.format} on {capability} twice.", "Correct the facts file.")
            found[row.format, capability] = Support(capability=capability, **shared)
    capabilities = {capability for _, capability in found}
    if missing := sorted((name, each) for name in FORMAT_NAMES for each in capabilities if (name, each) not in found):
        raise InputError(f"{path} says nothing of {missing[0][0]} on {missing[0][1]}.", "Correct the facts file.")
    return tuple(found.values()), rows["memory"]
