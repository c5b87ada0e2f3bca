"""What the keys of LoRA files mean: which tensor of which layer each one holds, in every style that trainers write.

A key is a layer's name in the file's own style and an ending. Endings are looked up in one table; layers in another, made
from the module's real names in every style, so that a flattened name is never taken apart by guessing. The styles:

    PEFT, diffusers    transformer.transformer_blocks.0.attn.to_q.lora_A.weight, also with an adapter's name before .weight
    ComfyUI            diffusion_model.transformer_blocks.0.attn.to_q.lora_down.weight
    Lightning          transformer_blocks.0.attn.to_q.lora_down.weight
    kohya, musubi      lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight
    LyCORIS            lycoris_transformer_blocks_0_attn_to_q.lokr_w1
    old diffusers      transformer_blocks.0.attn.to_q_lora.down.weight, .lora.down.weight, .lora_linear_layer.down.weight
    DiffSynth          transformer_blocks.0.attn.to_q.lora_A.default.weight, from its trainer behind pipe.dit. at times
    PEFT's own         base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight, with adapter_config.json beside the file
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

PEFT_PREFIX = "base_model.model."
DOTTED_PREFIXES = (
    "",
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    PEFT_PREFIX,
    "pipe.dit.",
)
FLAT_PREFIXES = ("lora_unet_", "lycoris_")
TEXT_ENCODER = re.compile(r"lora_te\d*_|lycoris_te\d*_|(base_model\.model\.)?text_encoders?(_\d)?\.")
# one projection in the file, three in the model: the rows of its change are theirs, in this order
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
# ending -> (the part it holds, the spelling it belongs to); one layer has one spelling, and "" goes with each
ENDINGS = {
    **{f".lora_{part}.weight": (part, "lora_down") for part in ("down", "up")},
    **{f".lora.{part}.weight": (part, "lora.down") for part in ("down", "up")},
    **{f"_lora.{part}.weight": (part, "_lora.down") for part in ("down", "up")},
    **{f".lora_linear_layer.{part}.weight": (part, "lora_linear_layer") for part in ("down", "up")},
    **{f".{part}": (part, "") for part in ("alpha", "dora_scale", "diff_b")},
    **{f".{part}": (part, "hada") for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{f".{part}": (part, "lokr") for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    ".diff": ("diff", "diff"),
    ".set_weight": ("set_weight", "set_weight"),
    ".w_norm": ("diff", "w_norm"),
    ".b_norm": ("diff_b", ""),
}
ADAPTER_METADATA = "lora_adapter_metadata"
_ADAPTER_FIELDS: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "use_rslora": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}
# other adapters have their own fields; other inits (PiSSA, OLoRA, LoftQ) train beside a base that they changed first
_READABLE = {"peft_type": ("LORA",), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}
_PEFT_MATRIX = re.compile(r"\.lora_([AB])(?:\.([^.]+))?\.weight$")
_PEFT_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(?:\.([^.]+))??(?:\.weight)?$")


class Key(NamedTuple):
    """layer: its name in the file, style and all. part: which tensor of it. spelling: who writes it so; "" for anyone."""

    layer: str
    part: str
    spelling: str


def split_key(key: str) -> Key | None:
    """A key -> what it holds; None for an ending that no style has."""
    for ending, (part, spelling) in ENDINGS.items():
        if key.endswith(ending):
            return Key(key.removesuffix(ending), part, spelling)
    if match := _PEFT_MATRIX.search(key):
        return Key(key[: match.start()], {"A": "down", "B": "up"}[match[1]], _peft_spelling(match[2]))
    if match := _PEFT_MAGNITUDE.search(key):
        return Key(key[: match.start()], "magnitude", _peft_spelling(match[1]))
    return None


def _peft_spelling(adapter: str | None) -> str:
    return f"lora_A.{adapter}" if adapter else "lora_A"


def layer_table(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every name that a file may give a layer of a module; layers are the modules that own a weight."""
    return name_table(
        [name for name, layer in module.named_modules() if name and "weight" in dict(layer.named_parameters(recurse=False))]
    )


def name_table(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Every name that a file may give a layer -> the layers it stands for: one, or three where a file has them fused.

    names: of all layers. A flattened name that two layers share stands for neither.
    """
    targets = {name: (name,) for name in names} | _fused(names)
    table = {prefix + name: layers for name, layers in targets.items() for prefix in DOTTED_PREFIXES}
    flat_names = [name.replace(".", "_") for name in targets]
    for flat, layers in zip(flat_names, targets.values(), strict=True):
        if flat_names.count(flat) == 1:
            table |= {prefix + flat: layers for prefix in FLAT_PREFIXES}
    return table


def _fused(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    fused = {}
    for name in names:
        for whole, parts in FUSED.items():
            stem = name.removesuffix(parts[0])
            if stem != name and all(stem + part in names for part in parts):
                fused[stem + whole] = tuple(stem + part for part in parts)
    return fused


def nearest_layer(name: str, layers: Iterable[str]) -> str:
    """The layer whose name, or flattened name, is most like that of a file's layer; "" where none is like it."""
    flat = name.startswith(FLAT_PREFIXES)
    real = {layer.replace(".", "_") if flat else layer: layer for layer in layers}
    near = difflib.get_close_matches(bare_name(name), real, n=1)
    return real[near[0]] if near else ""


def bare_name(name: str) -> str:
    """A file's name of a layer without the longest prefix that it has; a flattened one stays flattened."""
    return name.removeprefix(max((p for p in (*DOTTED_PREFIXES, *FLAT_PREFIXES) if name.startswith(p)), key=len))


def read_adapter_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's LoraConfig as diffusers keeps it in a safetensors header; empty where there is none.

    save_lora_weights puts the part's name before each field, save_lora_adapter does not. Raises ValueError for a text
    that is no JSON object, or for fields that PEFT does not write or that we do not read.
    """
    config = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    if not isinstance(config, dict):
        raise ValueError(f"{ADAPTER_METADATA} is {type(config).__name__}, not an object")
    config = {field.removeprefix("transformer."): value for field, value in config.items()}
    for field, readable in _READABLE.items():
        if config.get(field, readable[0]) not in readable:
            raise ValueError(f"{field} is {config[field]!r}")
    kept = {field: config[field] for field in _ADAPTER_FIELDS if config.get(field) is not None}
    for field, value in kept.items():
        numbers = [*value.values()] if isinstance(value, dict) else [value]
        if not isinstance(value, _ADAPTER_FIELDS[field]) or not all(_is_number(number) for number in numbers):
            raise ValueError(f"{field} is {value!r}")
        if isinstance(value, bool) is not (field == "use_rslora"):
            raise ValueError(f"{field} is {value!r}")
    return kept


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def choose_by_pattern(patterns: Mapping[str, float], layer: str, default: float | None) -> float | None:
    """PEFT's rank_pattern and alpha_pattern: the value of the first pattern that the layer's name ends in.

    PEFT reads patterns as regular expressions (get_pattern_key in peft/utils/other.py). Trainers write plain names, with ^
    for the whole name; only these are read, since another expression from a file could run for ever. Raises ValueError.
    """
    for pattern, value in patterns.items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise ValueError(f"the pattern {pattern!r} is no plain name")
        name = bare_name(layer)
        if name == plain or (not pattern.startswith("^") and name.endswith("." + plain)):
            return value
    return default
