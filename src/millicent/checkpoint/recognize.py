"""What a checkpoint is, from its headers alone: which parts of the model it holds, and how each of their weights is stored.

What comes out of here loads: whatever this version does not read is refused here, with what to use in its place. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from millicent.checkpoint import llama_cpp
from millicent.checkpoint.architecture import (
    ALL_IN_ONE,
    LAYERED_MARKER,
    ZERO_COND_T_MARKER,
    Part,
    find_part,
    strip_prefix,
    text_encoder_config,
    text_encoder_name,
    text_encoder_names,
    text_encoder_tensors,
    transformer_config,
    transformer_tensors,
)
from millicent.checkpoint.converted import OWN_METADATA, VERSION, split_table, without_modulation
from millicent.checkpoint.files import JoinedSource, WeightFiles, open_weights
from millicent.checkpoint.header import Header, TensorInfo
from millicent.checkpoint.layout import PLAIN_DTYPES, Decide, Layout, lay_out
from millicent.checkpoint.marks import Marks, read_marks
from millicent.errors import CheckpointError

Network = Literal["transformer", "text_encoder", "vae"]
Tensors = Mapping[str, TensorInfo]
ListTensors = Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]

# a name that says that few-step distillation is in the weights already
_DISTILLED = re.compile(r"lightning|turbo|rapid|distill|(?<![0-9])[48][-_ ]?steps?(?![a-z])", re.IGNORECASE)
_STEPS = re.compile(r"(?<![0-9])(\d{1,2})[-_ ]?steps?(?![a-z])", re.IGNORECASE)
_Z_DIM = 16
_PROBED_MATRICES, _PROBED_BYTES = 3, 64 << 10
# codes without their sign from which on a value is 200 or more: a cast weight never is, a scaled one is in every tensor
_LARGE_CODES = {"F8_E4M3": 0x75, "F8_E5M2": 0x5B}


@dataclass(frozen=True, slots=True)
class Component:
    """One network of a checkpoint.

    prefix: what stands before its names in the file. config: what config.json would say, as far as tensors tell.
    tensors: all that is its own, by its own names. layout: how they store its parameters; None for the VAE, which is always plain.
    zero_cond_t: whether a mark says that it is 2511's kind; None where no mark does. table: a modulation table's tensors, where
    `millicent convert` has put one in.
    """

    network: Network
    prefix: str
    config: Mapping[str, Any]
    tensors: Tensors
    layout: Layout | None
    marks: Marks
    zero_cond_t: bool | None = None
    table: Tensors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Distilled:
    """Few-step distillation in the weights. steps: None where nobody says. is_certain: more than a name says so."""

    steps: int | None
    because: str
    is_certain: bool = False


@dataclass(frozen=True, slots=True)
class Recognized:
    """part: what the checkpoint is as a whole. components: none for a LoRA. warnings: what to know before it is used."""

    name: str
    part: Part
    header: Header
    source: JoinedSource
    components: Mapping[Network, Component]
    distilled: Distilled | None
    warnings: tuple[str, ...]


def recognize(where: str | Path, token: str | None = None, decide: Decide | None = None) -> Recognized:
    """Tell what a file, folder or URL holds.

    decide: asked where a matrix can be read in several ways and no mark tells which; without it such a file is refused.
    Raises CheckpointError and its kinds for what this version does not load.
    """
    return recognize_files(open_weights(where, token), decide)


def recognize_files(files: WeightFiles, decide: Decide | None = None) -> Recognized:
    """As `recognize`, of files whose headers are read already."""
    header = files.header
    found = find_part(header.tensors)
    if found.part == "other":
        raise CheckpointError(f"{header.name} is {found.family}, which this version does not run.", "Use a Qwen-Image-Edit file.")
    prefixes: Mapping[str, str] = ALL_IN_ONE if found.part == "all-in-one" else {found.part: found.prefix}
    if outside := sorted(
        key for key in header.tensors if found.part == "all-in-one" and not key.startswith(tuple(prefixes.values()))
    ):
        raise CheckpointError(f"{header.name} holds {outside[0]}, which is of none of its parts.", "Use another file.")
    components: dict[Network, Component] = {}
    if "transformer" in prefixes:
        components["transformer"] = _transformer(files, prefixes["transformer"], found.part, decide)
    if "text_encoder" in prefixes:
        components["text_encoder"] = _text_encoder(files, prefixes["text_encoder"], decide)
    if "vae" in prefixes:
        components["vae"] = _vae(header, prefixes["vae"])
    for component in components.values():
        _refuse_lost_scales(header.name, component, files.source)
    return Recognized(header.name, found.part, header, files.source, components, _distilled(header), tuple(_warnings(components)))


def _own(header: Header, prefix: str) -> dict[str, TensorInfo]:
    return {key: info for key, info in header.tensors.items() if key.startswith(prefix)}


def _transformer(files: WeightFiles, prefix: str, part: Part, decide: Decide | None) -> Component:
    header = files.header
    mine = _own(header, prefix) if part == "all-in-one" else header.tensors
    tensors = strip_prefix(mine, prefix, header.name)
    if LAYERED_MARKER in tensors:
        raise CheckpointError(
            f"{header.name} is Qwen-Image-Layered, which this version does not run.", "Use a Qwen-Image-Edit file."
        )
    tensors, table = split_table(tensors) if OWN_METADATA in header.metadata else (tensors, {})
    config = files.config if "num_layers" in files.config else transformer_config(tensors, header.name)
    expected = _expected(transformer_tensors, config, header.name)
    if table and not _own_metadata(header).get("modulation_weights", True):
        expected = without_modulation(expected)
    marks = read_marks(header, files.source, prefix, files.config.get("quantization_config"))
    layout = lay_out(tensors, expected, marks, header.name, decide)
    return Component("transformer", prefix, config, tensors, layout, marks, _zero_cond_t(files, tensors), table)


def _expected(list_tensors: ListTensors, config: Mapping[str, Any], name: str) -> dict[str, tuple[int, ...]]:
    try:
        return list_tensors(config)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"The config.json of {name} lacks {error}, or holds no number there.", "Fetch the folder again."
        ) from error


def _zero_cond_t(files: WeightFiles, tensors: Tensors) -> bool | None:
    """A mark in the file, or the config beside it. Nothing in the shapes tells; that the mark is absent proves nothing."""
    said = files.config.get("zero_cond_t", _json(files.header, "config").get("zero_cond_t"))
    own = _own_metadata(files.header).get("zero_cond_t")
    said = said if own is None else own
    marked = ZERO_COND_T_MARKER in tensors
    if marked and said is False:
        raise CheckpointError(
            f"{files.header.name} is marked as Qwen-Image-Edit-2511 ({ZERO_COND_T_MARKER}) and its config says that it is not.",
            "Use a file that says one thing.",
        )
    return True if marked else None if said is None else bool(said)


def _own_metadata(header: Header) -> Mapping[str, Any]:
    """What `millicent convert` has written. Raises CheckpointError for what a later version wrote."""
    own = _json(header, OWN_METADATA)
    if own.get("version", VERSION) != VERSION:
        raise CheckpointError(
            f"{header.name} was converted into version {own['version']} of millicent's layout; this one reads version {VERSION}.",
            "Install a later millicent, or convert it again.",
        )
    return own


def _json(header: Header, key: str) -> Mapping[str, Any]:
    try:
        value = json.loads(header.metadata.get(key, "{}"))
    except (TypeError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text_encoder(files: WeightFiles, prefix: str, decide: Decide | None) -> Component:
    header = files.header
    if llama_cpp.is_text_encoder(header.tensors):
        return _llama_cpp_text_encoder(files)
    tensors = text_encoder_names(strip_prefix(_own(header, prefix) if prefix else header.tensors, prefix, header.name))
    config = files.config if "vision_config" in files.config else text_encoder_config(tensors, header.name)
    marks = read_marks(header, files.source, prefix, files.config.get("quantization_config"))
    marks = Marks(marks.maker, {text_encoder_name(f"{layer}.").removesuffix("."): note for layer, note in marks.notes.items()})
    layout = lay_out(tensors, _expected(text_encoder_tensors, config, header.name), marks, header.name, decide)
    return Component("text_encoder", prefix, config, tensors, layout, marks)


def _llama_cpp_text_encoder(files: WeightFiles) -> Component:
    """The two files of llama.cpp's, which bear no marks."""
    name = files.header.name
    tensors = llama_cpp.own_names(files.header.tensors, name)
    given = "vision_config" in files.config
    config = files.config if given else text_encoder_config(llama_cpp.with_whole_patches(tensors), name)
    stored, joined = llama_cpp.split(_expected(text_encoder_tensors, config, name), tensors)
    layout = replace(lay_out(tensors, stored, Marks(None), name), joined=joined)
    return Component("text_encoder", "", config, tensors, layout, Marks(None))


def _vae(header: Header, prefix: str) -> Component:
    """Its convolutions are never quantized; names and shapes are checked against the network when it is loaded."""
    tensors = strip_prefix(_own(header, prefix) if prefix else header.tensors, prefix, header.name)
    first = tensors.get("decoder.conv_in.weight") or tensors.get("decoder.conv1.weight")
    if first is None or len(first.shape) < 2 or first.shape[1] != _Z_DIM:
        channels = "no" if first is None else first.shape[1] if len(first.shape) > 1 else "odd"
        raise CheckpointError(
            f"{header.name} is a VAE of {channels} latent channels; Qwen-Image's has {_Z_DIM}.", "Use its own VAE."
        )
    if quantized := next((key for key, info in tensors.items() if info.dtype not in PLAIN_DTYPES), None):
        raise CheckpointError(
            f"In {header.name} {quantized} is {tensors[quantized].dtype}; a quantized VAE ruins pictures.",
            "Use a BF16 or FP32 VAE.",
        )
    return Component("vae", prefix, {}, tensors, None, Marks(None))


def _refuse_lost_scales(name: str, component: Component, source: JoinedSource) -> None:
    """A scaled FP8 file whose scales are gone looks like a plain cast, until one looks at the size of its numbers."""
    if component.layout is None:
        return
    raw = [(layer, m.parts["weight"]) for layer, m in component.layout.matrices.items() if m.scheme.name == "raw fp8"]
    for layer, info in raw[:: max(1, len(raw) // _PROBED_MATRICES)]:
        codes = {code & 0x7F for code in set(source.read(info.begin, min(info.end, info.begin + _PROBED_BYTES)))}
        if codes and max(codes) >= _LARGE_CODES[info.dtype]:
            raise CheckpointError(
                f"In {name} {layer} is FP8 without a scale, but reaches 200 and more: it was scaled, and the scales are lost.",
                "Use a file that holds its scales; this one draws static.",
            )


def _distilled(header: Header) -> Distilled | None:
    if "distilled_steps" in (own := _own_metadata(header)):
        steps = own["distilled_steps"]
        return Distilled(int(steps), "its metadata says so", is_certain=True) if steps else None
    name = re.split(r"[/\\]", header.name.rstrip("/\\"))[-1]
    if not (found := _DISTILLED.search(name)):
        return None
    steps = _STEPS.search(name)
    return Distilled(int(steps[1]) if steps else None, f"its name says {found[0]!r}")


def _warnings(components: Mapping[Network, Component]) -> list[str]:
    warnings = []
    for component in components.values():
        raw = [] if component.layout is None else [m for m in component.layout.matrices.values() if m.scheme.name == "raw fp8"]
        dtypes = {matrix.parts["weight"].dtype for matrix in raw}
        if "F8_E5M2" in dtypes:
            warnings.append(f"The {component.network} is cast to FP8 e5m2 without scales: two bits of mantissa, visibly worse.")
        elif dtypes:
            warnings.append(
                f"The {component.network} is cast to FP8 without scales: what is below 0.001 is lost, worst with Lightning."
            )
    return warnings
