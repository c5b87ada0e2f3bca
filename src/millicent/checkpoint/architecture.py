"""Which network a header's tensors belong to, told by names and by the shapes of what is never quantized.

Nothing here imports torch. The expected tensors of Qwen-Image's transformer are listed as diffusers'
QwenImageTransformer2DModel names them; a test holds the list equal to the network itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from millicent.checkpoint import llama_cpp
from millicent.checkpoint.header import TensorInfo
from millicent.errors import CheckpointError, WeightsMismatchError

Part = Literal["transformer", "text_encoder", "vae", "lora", "all-in-one", "other"]

# what stands before a component's own names; all of its tensors share one
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "net.", "")
ALL_IN_ONE = {"transformer": "model.diffusion_model.", "text_encoder": "text_encoders.qwen25_7b.transformer.", "vae": "vae."}
ZERO_COND_T_MARKER = "__index_timestep_zero__"  # ComfyUI's flag for 2511; no weight
LAYERED_MARKER = "time_text_embed.addition_t_embedding.weight"
LORA_ENDINGS = re.compile(
    r"(\.|_)(lora_(down|up|A|B|[AB]\.\w+|linear_layer\.(down|up))|lora\.(down|up)|lokr_w[12](_[ab])?|hada_w[12]_[ab]"
    r"|diff(_b)?|set_weight|dora_scale)(\.weight)?$"
)
# other families that are met under similar file names: a tensor that only they have
OTHER_FAMILIES = {
    "Qwen-Image-2.1": ("txt_in.text_norm.weight", "modulation.1.weight"),
    "Flux": ("double_blocks.0.img_attn.qkv.weight",),
    "Wan": ("blocks.0.self_attn.q.weight",),
    "Lens": ("transformer_blocks.0.img_mlp.w1.weight",),
    "Z-Image": ("cap_embedder.0.weight",),
    "another language or vision model of llama.cpp's": ("blk.0.attn_q.weight", "v.blk.0.attn_q.weight", "v.blk.0.attn_qkv.weight"),
}
STREAM_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")


@dataclass(frozen=True, slots=True)
class Found:
    """part: what the tensors are. prefix: what stands before the part's own names. family: for part "other"."""

    part: Part
    prefix: str = ""
    family: str = ""


def find_part(keys: Collection[str]) -> Found:
    """Tell what a file holds by its tensors' names alone."""
    if not keys:
        return Found("other", family="an empty file")
    if sum(bool(LORA_ENDINGS.search(key)) for key in keys) * 2 > len(keys):
        return Found("lora")
    if {part for part, prefix in ALL_IN_ONE.items() if any(key.startswith(prefix) for key in keys)} == set(ALL_IN_ONE):
        return Found("all-in-one")
    for prefix in PREFIXES:
        if f"{prefix}txt_norm.weight" in keys and any(key.startswith(f"{prefix}transformer_blocks.0.") for key in keys):
            return Found("transformer", prefix)
    if llama_cpp.is_text_encoder(keys):
        return Found("text_encoder")
    for prefix in PREFIXES:
        for family, markers in OTHER_FAMILIES.items():
            if any(f"{prefix}{marker}" in keys for marker in markers):
                return Found("other", prefix, family)
    if any(key.endswith("layers.0.self_attn.k_proj.bias") for key in keys):
        return Found("text_encoder", ALL_IN_ONE["text_encoder"] if any(key.startswith("text_encoders.") for key in keys) else "")
    if "decoder.middle.0.residual.0.gamma" in keys or "decoder.up_blocks.0.resnets.0.conv1.weight" in keys:
        return Found("vae")
    return Found("other", family="an unknown network")


def strip_prefix(tensors: Mapping[str, TensorInfo], prefix: str, name: str) -> dict[str, TensorInfo]:
    """The tensors by the part's own names. Raises CheckpointError for one that does not carry the prefix."""
    if outside := sorted(key for key in tensors if not key.startswith(prefix)):
        raise CheckpointError(
            f"{name} has {len(outside)} tensors without the prefix {prefix!r} that the others have, such as {outside[0]}.",
            "Use a file that holds one model.",
        )
    return {key.removeprefix(prefix): info for key, info in tensors.items()}


def transformer_config(tensors: Mapping[str, TensorInfo], name: str) -> dict[str, Any]:
    """What diffusers' config.json would say of the transformer, read from biases and norms, which no format quantizes.

    zero_cond_t is left out: no shape tells it. tensors: by the transformer's own names.
    Raises CheckpointError where a block is missing or a shape is another network's.
    """
    blocks = _count(tensors, r"transformer_blocks\.(\d+)\.", name)
    dim, head_dim = _length(tensors, "img_in.bias", name), _length(tensors, "transformer_blocks.0.attn.norm_q.weight", name)
    patch_values = _length(tensors, "proj_out.bias", name)
    if dim % head_dim or patch_values != 64:
        raise CheckpointError(
            f"{name} has {dim} channels in heads of {head_dim} and {patch_values} values a patch; Qwen-Image 1.x has 64.",
            "Use a Qwen-Image-Edit, -2509 or -2511 transformer.",
        )
    return {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": patch_values // 4,
        "num_layers": blocks,
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": _length(tensors, "txt_norm.weight", name),
        "axes_dims_rope": [head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16],
    }


def _length(tensors: Mapping[str, TensorInfo], key: str, name: str) -> int:
    info = tensors.get(key)
    if info is None or len(info.shape) != 1 or not info.shape[0]:
        found = "is missing" if info is None else f"has the shape {list(info.shape)}"
        raise WeightsMismatchError(f"In {name} {key} {found}; it is a vector in Qwen-Image's transformer.", "Fetch the file again.")
    return info.shape[0]


def transformer_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the transformer that a config.json describes, with its shape: 32 a block and 13 beside them."""
    head, joint = config["attention_head_dim"], config["joint_attention_dim"]
    dim = head * config["num_attention_heads"]
    patch_values = config["patch_size"] ** 2 * config["out_channels"]
    expected: dict[str, tuple[int, ...]] = {"txt_norm.weight": (joint,)}
    linears = {
        "img_in": (dim, config["in_channels"]),
        "txt_in": (dim, joint),
        "time_text_embed.timestep_embedder.linear_1": (dim, 256),
        "time_text_embed.timestep_embedder.linear_2": (dim, dim),
        "norm_out.linear": (2 * dim, dim),
        "proj_out": (patch_values, dim),
    }
    for i in range(config["num_layers"]):
        block = f"transformer_blocks.{i}"
        linears |= {f"{block}.attn.{projection}": (dim, dim) for projection in STREAM_PROJECTIONS}
        for stream in ("img", "txt"):
            linears[f"{block}.{stream}_mod.1"] = (6 * dim, dim)
            linears[f"{block}.{stream}_mlp.net.0.proj"] = (4 * dim, dim)
            linears[f"{block}.{stream}_mlp.net.2"] = (dim, 4 * dim)
        expected |= {f"{block}.attn.{norm}.weight": (head,) for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    for linear, (rows, columns) in linears.items():
        expected |= {f"{linear}.weight": (rows, columns), f"{linear}.bias": (rows,)}
    return expected


def text_encoder_names(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors by the names that transformers has in memory: language_model.* and visual.*; markers keep theirs."""
    named = {text_encoder_name(key): info for key, info in tensors.items()}
    if len(named) != len(tensors):
        raise CheckpointError("A text encoder holds a tensor under both of its names.", "Use a file that holds each once.")
    return named


def text_encoder_name(key: str) -> str:
    """`model.layers.0.…` and `model.language_model.layers.0.…` -> `language_model.layers.0.…`; likewise `visual.`."""
    bare = key.removeprefix("model.")
    if bare.startswith(("layers.", "embed_tokens.", "norm.")):
        return f"language_model.{bare}"
    return bare if bare.startswith(("language_model.", "visual.")) else key


def text_encoder_config(tensors: Mapping[str, TensorInfo], name: str) -> dict[str, Any]:
    """What of Qwen2.5-VL's config.json its tensors tell; tensors: by the names that transformers has in memory.

    The heads are given as their ratio, which is all that the shapes hold. Raises CheckpointError where a vector is missing.
    """
    if not any(key.startswith("visual.") for key in tensors):
        raise CheckpointError(
            f"{name} is a text encoder without its vision tower, which an edit needs to see the picture.",
            "Use a Qwen2.5-VL file that holds visual.* too.",
        )

    def length(key: str) -> int:
        return _length(tensors, key, name)

    dim, keys = length("language_model.norm.weight"), length("language_model.layers.0.self_attn.k_proj.bias")
    common = math.gcd(dim, keys)
    vision_dim, patches = length("visual.blocks.0.norm1.weight"), tensors.get("visual.patch_embed.proj.weight")
    if patches is None or len(patches.shape) != 5:
        raise CheckpointError(f"In {name} visual.patch_embed.proj.weight has no five dimensions.", "Fetch the file again.")
    return {
        "vocab_size": _rows(tensors, "language_model.embed_tokens", dim, name),
        "hidden_size": dim,
        "intermediate_size": _rows(tensors, "language_model.layers.0.mlp.gate_proj", dim, name),
        "num_hidden_layers": _count(tensors, r"language_model\.layers\.(\d+)\.", name),
        "num_attention_heads": dim // common,
        "num_key_value_heads": keys // common,
        "vision_config": {
            "hidden_size": vision_dim,
            "out_hidden_size": dim,
            "intermediate_size": length("visual.blocks.0.mlp.gate_proj.bias"),
            "depth": _count(tensors, r"visual\.blocks\.(\d+)\.", name),
            "in_channels": patches.shape[1],
            "temporal_patch_size": patches.shape[2],
            "patch_size": patches.shape[3],
            "spatial_merge_size": math.isqrt(length("visual.merger.mlp.0.bias") // vision_dim),
        },
    }


def _rows(tensors: Mapping[str, TensorInfo], layer: str, columns: int, name: str) -> int:
    """N of a matrix that may be packed: every layout but bitsandbytes' flat one keeps the rows as the first dimension."""
    for suffix in ("weight", "weight_packed", "_weight_qdata", "weight._data"):
        info = tensors.get(f"{layer}.{suffix}")
        if info is not None and info.shape:
            return 2 * info.values // columns if info.shape[1:] == (1,) else info.shape[0]
    raise CheckpointError(f"In {name} {layer}.weight is missing.", "Fetch the file again.")


def _count(tensors: Mapping[str, TensorInfo], pattern: str, name: str) -> int:
    numbers = sorted({int(found[1]) for key in tensors if (found := re.match(pattern, key))})
    if numbers != list(range(len(numbers))):
        # one more than there are: a file may say any number
        absent = next(number for number in range(len(numbers) + 1) if number not in numbers)
        raise CheckpointError(f"{name} has a block {numbers[-1]}, but no block {absent}.", "Fetch the whole file again.")
    return len(numbers)


def text_encoder_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of Qwen2.5-VL without its LM head, by the names that transformers has in memory, with its shape.

    config: a text_encoder/config.json, whose text part may stand at the top or under "text_config".
    """
    text, vision = config.get("text_config", config), config["vision_config"]
    dim, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    expected = {"language_model.embed_tokens.weight": (text["vocab_size"], dim), "language_model.norm.weight": (dim,)}
    for i in range(text["num_hidden_layers"]):
        layer = f"language_model.layers.{i}"
        expected |= {f"{layer}.input_layernorm.weight": (dim,), f"{layer}.post_attention_layernorm.weight": (dim,)}
        for name, rows in (("q", dim), ("k", dim // heads * kv_heads), ("v", dim // heads * kv_heads)):
            expected |= {f"{layer}.self_attn.{name}_proj.weight": (rows, dim), f"{layer}.self_attn.{name}_proj.bias": (rows,)}
        expected[f"{layer}.self_attn.o_proj.weight"] = (dim, dim)
        expected |= {f"{layer}.mlp.{name}.weight": shape for name, shape in _gated_mlp(dim, text["intermediate_size"]).items()}
    return expected | _vision_tensors(vision)


def _gated_mlp(dim: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (hidden, dim), "up_proj": (hidden, dim), "down_proj": (dim, hidden)}


def _vision_tensors(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, out, patch = vision["hidden_size"], vision["out_hidden_size"], vision["patch_size"]
    merged = dim * vision["spatial_merge_size"] ** 2
    linears: dict[str, tuple[int, int]] = {"merger.mlp.0": (merged, merged), "merger.mlp.2": (out, merged)}
    expected: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (dim, vision.get("in_channels", 3), vision["temporal_patch_size"], patch, patch),
        "visual.merger.ln_q.weight": (dim,),
    }
    for i in range(vision["depth"]):
        expected |= {f"visual.blocks.{i}.norm{n}.weight": (dim,) for n in (1, 2)}
        linears |= {f"blocks.{i}.attn.qkv": (3 * dim, dim), f"blocks.{i}.attn.proj": (dim, dim)}
        linears |= {f"blocks.{i}.mlp.{name}": shape for name, shape in _gated_mlp(dim, vision["intermediate_size"]).items()}
    for linear, shape in linears.items():
        expected |= {f"visual.{linear}.weight": shape, f"visual.{linear}.bias": shape[:1]}
    return expected
