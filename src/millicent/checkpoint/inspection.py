"""What to tell a person of a checkpoint before it is loaded or downloaded: what its headers hold, also of one that is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millicent.checkpoint.architecture import LAYERED_MARKER, ZERO_COND_T_MARKER, Found, find_part
from millicent.checkpoint.files import WeightFiles, open_weights
from millicent.checkpoint.folder import open_folder
from millicent.checkpoint.recognize import Component, Recognized, recognize_files
from millicent.checkpoint.schemes import keeps_codes
from millicent.errors import CheckpointError

_MAX_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Refusal:
    """why: what was found and what was wanted. instead: what to get in its place."""

    why: str
    instead: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """what: transformer, text_encoder, vae, lora, all-in-one or another family's name.

    variant: 2511 or not, Layered; "unknown" where nothing in the file tells. layouts, formats: by network, how many matrices
    have each. tensors: by dtype. high_precision: the matrices that stay plain in a quantized file.
    loads: "natively", "by dequantizing to BF16", or "no".
    """

    name: str
    what: str
    variant: str | None
    container: str
    prefix: str
    size_bytes: int
    tensors: Mapping[str, int]
    maker: str | None
    layouts: Mapping[str, Mapping[str, int]]
    formats: Mapping[str, Mapping[str, int]]
    high_precision: tuple[str, ...]
    distilled: str | None
    loads: str
    warnings: tuple[str, ...]
    refused: Refusal | None

    def as_dict(self) -> dict[str, Any]:
        told = dataclasses.asdict(self)
        told["high_precision"] = _shorten(self.high_precision)
        told["warnings"] = list(self.warnings)
        return {**told, "refused": None if self.refused is None else f"{self.refused.why} {self.refused.instead}"}


def inspect_checkpoint(where: str, token: str | None = None) -> list[Inspection]:
    """One for a file, a URL or a part's folder; one for each network of a model folder.

    Raises CheckpointError and its kinds where no header can be read at all.
    """
    if (Path(where) / "model_index.json").is_file():
        open_folder(Path(where))
        return [_inspect(open_weights(Path(where) / network)) for network in ("transformer", "text_encoder", "vae")]
    return [_inspect(open_weights(where, token))]


def _inspect(files: WeightFiles) -> Inspection:
    header, found = files.header, find_part(files.header.tensors)
    refused: Refusal | None = None
    recognized: Recognized | None = None
    try:
        recognized = recognize_files(files)
    except CheckpointError as error:
        refused = Refusal(error.message, error.fix)
    components = {} if recognized is None else recognized.components
    layouts = {network: c.layout for network, c in components.items() if c.layout is not None}
    return Inspection(
        name=header.name,
        what=found.family or found.part,
        variant=_variant(files, found, components.get("transformer")),
        container=header.container,
        prefix=found.prefix,
        size_bytes=header.size_bytes,
        tensors=dict(Counter(info.dtype for info in header.tensors.values()).most_common()),
        maker=next((c.marks.maker for c in components.values() if c.marks.maker), None),
        layouts={network: dict(layout.schemes.most_common()) for network, layout in layouts.items()},
        formats={
            network: dict(Counter(m.scheme.format for m in layout.matrices.values()).most_common())
            for network, layout in layouts.items()
        },
        high_precision=tuple(layer for layout in layouts.values() for layer in layout.high_precision),
        distilled=None if recognized is None or recognized.distilled is None else recognized.distilled.because,
        loads="no" if refused is not None else _how(components),
        warnings=() if recognized is None else recognized.warnings,
        refused=refused,
    )


def _variant(files: WeightFiles, found: Found, transformer: Component | None) -> str | None:
    if found.part not in ("transformer", "all-in-one"):
        return None
    keys = files.header.tensors
    if any(key.endswith(LAYERED_MARKER) for key in keys):
        return "Layered"
    said = (
        transformer.zero_cond_t
        if transformer is not None
        else (True if any(k.endswith(ZERO_COND_T_MARKER) for k in keys) else None)
    )
    return {True: "2511", False: "Edit or 2509", None: "unknown: the model folder it is used with decides"}[said]


def _how(components: Mapping[Any, Component]) -> str:
    matrices = [m for c in components.values() if c.layout is not None for m in c.layout.matrices.values()]
    is_native = all(
        m.scheme.name == "plain" or keeps_codes(m.scheme.name, m.parts, m.shape, bool(m.note.get("convrot"))) for m in matrices
    )
    return "natively" if is_native else "by dequantizing to BF16"


def _shorten(layers: tuple[str, ...]) -> list[str]:
    rest = len(layers) - _MAX_SHOWN
    return [*layers[:_MAX_SHOWN], *([f"and {rest} more"] if rest > 0 else [])]
