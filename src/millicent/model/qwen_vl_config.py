"""Qwen2.5-VL's shape, as a text_encoder/config.json gives it. Keys and defaults are those of transformers.

A size that is missing is an error here, where transformers would take that of the 72B model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Self, TypeGuard, TypeVar

from millicent.errors import CheckpointError

_FIX = "Use the text encoder of a Qwen-Image-Edit, -2509 or -2511 folder."
_MODEL_TYPE = "qwen2_5_vl"
_LANGUAGE_THETA, _VISION_THETA = 1e6, 1e4
Config = TypeVar("Config")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision tower's. window_size: a side of a window, in pixels. fullatt_block_indexes: which blocks see the whole picture."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    hidden_act: str = "silu"
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        made = _fill(cls, config, rope_parameters={"rope_theta": _VISION_THETA, **(config.get("rope_parameters") or {})})
        if made.hidden_size % made.num_heads or made.window_size % (made.patch_size * made.spatial_merge_size):
            raise CheckpointError(
                f"The vision tower has {made.hidden_size} channels for {made.num_heads} heads, and windows of {made.window_size} "
                f"pixels for tokens of {made.patch_size * made.spatial_merge_size}.",
                _FIX,
            )
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """The language model's. layer_types: what each layer's tokens see. rope_parameters: rope_type, rope_theta, mrope_section."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    layer_types: tuple[str, ...] = ()
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read them from a text_config, or from a whole config of the older, flat layout."""
        heads = config.get("num_attention_heads")
        given = {**config, "num_key_value_heads": config.get("num_key_value_heads") or heads}
        given["layer_types"] = config.get("layer_types") or _layer_types_of(config)
        made = _fill(cls, given, rope_parameters=_rope_of(config))
        sections = made.rope_parameters.get("mrope_section")
        if made.hidden_size % made.num_attention_heads or made.num_attention_heads % made.num_key_value_heads:
            raise CheckpointError(
                f"The language model has {made.hidden_size} channels for {made.num_attention_heads} heads, "
                f"and {made.num_key_value_heads} of keys and values.",
                _FIX,
            )
        channels = made.hidden_size // made.num_attention_heads
        if not _are_whole(sections) or len(sections) != 3 or 2 * sum(sections) != channels:
            raise CheckpointError(
                f"The rotary positions' mrope_section is {sections!r}; it must be three numbers that add up to {channels // 2}, "
                f"half of a head's {channels} channels.",
                _FIX,
            )
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenVLConfig:
    """Of both networks, and the control tokens that an edit looks for."""

    vision_config: VisionConfig
    text_config: LanguageConfig
    image_token_id: int = 151655
    vision_end_token_id: int = 151653

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a text_encoder/config.json, of either of transformers' layouts. Raises CheckpointError for another architecture."""
        if config.get("model_type") != _MODEL_TYPE:
            raise CheckpointError(f"The text encoder is {config.get('model_type')!r}; Qwen-Image-Edit has {_MODEL_TYPE}.", _FIX)
        for part in ("vision_config", "text_config"):
            if not isinstance(config.get(part) or {}, Mapping):
                raise _refusal(part, config[part], "an object")
        return _fill(
            cls,
            config,
            vision_config=VisionConfig.from_dict(config.get("vision_config") or {}),
            text_config=LanguageConfig.from_dict(config.get("text_config") or config),
        )

    def to_dict(self) -> dict[str, Any]:
        """What from_dict reads, as transformers' config has it too."""
        return {"model_type": _MODEL_TYPE, **asdict(self)}


def _rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Newer files have rope_parameters, older ones rope_scaling, with theta beside it; "mrope" was a type of its own."""
    told = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(told, Mapping):
        raise _refusal("rope_scaling", told, "an object")
    theta = told.get("rope_theta") or config.get("rope_theta") or _LANGUAGE_THETA
    kind = told.get("rope_type", told.get("type", "default"))
    return {**told, "rope_theta": _check("rope_theta", "float", theta), "rope_type": "default" if kind == "mrope" else kind}


def _layer_types_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Where they are not told one by one, the layers from max_window_layers on slide, if any do."""
    count = _check("num_hidden_layers", "int", config.get("num_hidden_layers"))
    slides = config.get("use_sliding_window") and config.get("sliding_window", 4096)
    first = _check("max_window_layers", "int", config.get("max_window_layers", 80)) if slides else count
    return ("full_attention",) * min(first, count) + ("sliding_attention",) * max(0, count - first)


def _fill(cls: type[Config], config: Mapping[str, Any], **made: object) -> Config:
    """A config's keys as the fields of that name. Raises CheckpointError for one that is missing, or of another kind."""
    taken = dict(made)
    for each in fields(cls):  # type: ignore[arg-type]
        value = config.get(each.name)
        if each.name in made:
            continue
        if value is not None:
            taken[each.name] = _check(each.name, str(each.type), value)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise CheckpointError(f"The text encoder's config.json lacks {each.name}.", _FIX)
    return cls(**taken)


def _check(key: str, kind: str, value: Any) -> Any:
    """kind: as the field is annotated."""
    is_right, told = _KINDS[kind]
    if not is_right(value):
        raise _refusal(key, value, told)
    return tuple(value) if isinstance(value, list) else value


def _refusal(key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"The text encoder's config.json says {key} = {value!r}, where {wanted} was wanted.", _FIX)


def _is_whole(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_whole(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, (list, tuple)) and all(map(_is_whole, value))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "a word"),
    "int": (lambda value: _is_whole(value, 1), "a whole number from 1"),
    "float": (lambda value: isinstance(value, (int, float)) and 0 < value < math.inf, "a positive number"),
    "tuple[int, ...]": (_are_whole, "whole numbers"),
    "tuple[str, ...]": (lambda value: isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value), "words"),
}
