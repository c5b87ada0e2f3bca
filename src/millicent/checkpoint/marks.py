"""Who made a file, by the marks that makers leave beside the weights.

ComfyUI writes a note for each quantized layer, as a tensor of JSON bytes or in the metadata; quantization libraries write a
quantization_config; Nunchaku and DFloat11 their own. What only other libraries can read is refused here by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from millicent.checkpoint.header import Header
from millicent.checkpoint.source import Source, read_together
from millicent.errors import CheckpointError

COMFY_NOTE = ".comfy_quant"
COMFY_METADATA = "_quantization_metadata"
MAX_NOTE_BYTES = 4096
# quantization_config's quant_method -> the maker that schemes.py knows
MAKERS = {
    "modelopt": "modelopt",
    "compressed-tensors": "compressed-tensors",
    "fp8": "fine-grained",
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "quanto": "quanto",
    "svdquant": "nunchaku",
}
# tensors or metadata that only their own library can read
FOREIGN_ENDINGS = {
    ".encoded_exponent": "DFloat11",
    ".sign_mantissa": "DFloat11",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".W_q": "HQQ",
    ".svd_up": "SDNQ",
}


# in a checkpoint that holds everything, the notes of these are not the transformer's
OTHER_PARTS = ("text_encoders.", "vae.")


@dataclass(frozen=True, slots=True)
class Marks:
    """maker: as schemes.py names it, None where nothing tells. notes: ComfyUI's JSON by layer, without a prefix."""

    maker: str | None
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_marks(header: Header, source: Source, prefix: str, quantization: Mapping[str, Any] | None = None) -> Marks:
    """The marks of one file.

    prefix: what stands before the network's own names. quantization: the quantization_config of the folder's config.json.
    Raises CheckpointError for a format that only another library reads, two makers that contradict each other, a broken note.
    """
    for ending, library in FOREIGN_ENDINGS.items():
        if found := next((key for key in header.tensors if key.endswith(ending)), None):
            raise CheckpointError(
                f"{header.name} is {library}'s ({found}), which only that library reads.", "Use another file of this model."
            )
    notes = _metadata_notes(header, prefix) | _tensor_notes(header, source, prefix)
    declared = _declared_maker(header, quantization)
    is_comfy = bool(notes) or any(key.removeprefix(prefix) == "scaled_fp8" for key in header.tensors)
    if is_comfy and declared:
        raise CheckpointError(
            f"{header.name} has ComfyUI's marks and says that {declared} made it.", "Use a file that says one thing."
        )
    return Marks("comfy" if is_comfy else declared, notes)


def _declared_maker(header: Header, quantization: Mapping[str, Any] | None) -> str | None:
    if "tensor_names" in header.metadata and any(key.endswith("._weight_qdata") for key in header.tensors):
        return "torchao"
    config = quantization or _parse(header, "quantization_config", header.metadata.get("quantization_config", "{}"))
    method = config.get("quant_method") or config.get("method")
    if method is None:
        return None
    if method not in MAKERS:
        raise CheckpointError(
            f"{header.name} is quantized by {method}, which this version does not read.", f"Use one of {', '.join(MAKERS)}."
        )
    return MAKERS[method]


def _metadata_notes(header: Header, prefix: str) -> dict[str, Mapping[str, Any]]:
    """ "layers": {name: {"format": ...} or "format"}; names with or without the prefix."""
    if COMFY_METADATA not in header.metadata:
        return {}
    layers = _parse(header, COMFY_METADATA, header.metadata[COMFY_METADATA]).get("layers", {})
    if not isinstance(layers, dict):
        raise _broken(header, COMFY_METADATA)
    notes = {}
    for name, note in layers.items():
        if name.startswith(OTHER_PARTS):
            continue
        bare = name.removeprefix("model.diffusion_model.").removeprefix(prefix)
        notes[bare] = _flatten({"format": note} if isinstance(note, str) else note, header, name)
    return notes


def _tensor_notes(header: Header, source: Source, prefix: str) -> dict[str, Mapping[str, Any]]:
    places = {key: info for key, info in header.tensors.items() if key.endswith(COMFY_NOTE) and key.startswith(prefix)}
    for key, info in places.items():
        if info.end - info.begin > MAX_NOTE_BYTES:
            raise _broken(header, key)
    texts = read_together(source, {key: (info.begin, info.end) for key, info in places.items()})
    notes = {}
    for key, data in texts.items():
        text = data.rstrip(b"\0").decode("utf-8", "replace")
        notes[key.removeprefix(prefix).removesuffix(COMFY_NOTE)] = _flatten(_parse(header, key, text), header, key)
    return notes


def _flatten(note: object, header: Header, key: str) -> Mapping[str, Any]:
    """A note whose "params" may hold some of its fields."""
    if not isinstance(note, dict) or not isinstance(note.get("format"), str):
        raise _broken(header, key)
    params = note.get("params") or {}
    if not isinstance(params, dict):
        raise _broken(header, key)
    return {**params, **{name: value for name, value in note.items() if name != "params"}}


def _parse(header: Header, key: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(header, key) from error
    if not isinstance(value, dict):
        raise _broken(header, key)
    return value


def _broken(header: Header, key: str) -> CheckpointError:
    return CheckpointError(f"In {header.name} {key} is no note that can be read.", "Fetch the file again.")
