"""Qwen2.5-VL as llama.cpp writes it: two GGUF files, the language model and its vision tower ("mmproj"), by names of their own.

Source: ggml-org/llama.cpp, conversion/qwenvl.py (convert_hf_to_gguf.py before), `Qwen2VLModel` and `Qwen2VLVisionModel`, and
the name tables of its package `gguf`. Of the language model names alone change: the rows of q and k are put in another order
for Llama only (`LlamaModel.permute`), since for Qwen2-VL llama.cpp turns the same halves of a head as transformers does. Of
the vision tower each qkv may be cut into three, and the patch embedding always is into its two frames: ggml's tensors have
four dimensions at most. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from millicent.checkpoint.header import Header, TensorInfo
from millicent.checkpoint.layout import Joined
from millicent.errors import CheckpointError, IncompleteModelError, WeightsMismatchError

# general.architecture of either file, and the vision tower's clip.projector_type
LANGUAGE_ARCHITECTURES = ("qwen2vl", "qwen2.5vl")
VISION_ARCHITECTURE = "clip"
PROJECTOR = "qwen2.5vl_merger"
# the language model's keys have biases, the vision tower's MLP is gated: most others' are not
MARKERS = ("blk.0.attn_k.bias", "v.blk.0.ffn_gate.weight")

PATCHES = "visual.patch_embed.proj.weight"
_FRAMES = 2
_FRAME_NAMES = {"v.patch_embd.weight": f"{PATCHES}.0", "v.patch_embd.weight.1": f"{PATCHES}.1"}
_OUTSIDE = {
    "token_embd": "language_model.embed_tokens",
    "output_norm": "language_model.norm",
    "output": "lm_head",
    "v.post_ln": "visual.merger.ln_q",
    "mm.0": "visual.merger.mlp.0",
    "mm.2": "visual.merger.mlp.2",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_IN_LAYERS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    **_MLP,
}
_IN_VISION_BLOCKS = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_qkv": "attn.qkv",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_out": "attn.proj",
    **_MLP,
}
_IN_BLOCK = re.compile(r"(v\.)?blk\.([0-9]+)\.(\w+)")
_QKV = re.compile(r"(visual\.blocks\.[0-9]+\.attn\.)qkv\.(weight|bias)")
_FOLDER = "Put the language model and its mmproj file into a folder of their own, and give the folder."


def is_text_encoder(keys: Collection[str]) -> bool:
    """Whether tensors have llama.cpp's names of Qwen2.5-VL's language model, or of its vision tower."""
    return any(marker in keys for marker in MARKERS)


def check_pair(headers: Sequence[Header], name: str) -> None:
    """Tell by metadata whether a folder's GGUF files are the two of one text encoder.

    Raises IncompleteModelError where they are not, CheckpointError for another model's vision tower.
    """
    found = {str(header.metadata.get("general.architecture")): header for header in headers}
    if len(headers) != 2 or VISION_ARCHITECTURE not in found or not found.keys() & set(LANGUAGE_ARCHITECTURES):
        told = ", ".join(f"{Path(header.name).name} ({header.metadata.get('general.architecture')})" for header in headers)
        raise IncompleteModelError(
            f"{name} holds {len(headers)} GGUF files: {told}; wanted one, or Qwen2.5-VL's language model "
            f"({LANGUAGE_ARCHITECTURES[0]}) and its vision tower ({VISION_ARCHITECTURE}).",
            "Keep the files of one model.",
        )
    vision = found[VISION_ARCHITECTURE]
    if (projector := vision.metadata.get("clip.projector_type")) != PROJECTOR:
        raise CheckpointError(
            f"{vision.name} is the vision tower of another model ({projector}; wanted {PROJECTOR}).",
            "Use the mmproj file of Qwen2.5-VL.",
        )


def own_names(tensors: Mapping[str, TensorInfo], name: str) -> dict[str, TensorInfo]:
    """The tensors by the names that transformers has in memory, pieces by `split`'s; what llama.cpp does not name keeps its name.

    Raises IncompleteModelError where one of the two files is missing, WeightsMismatchError where they do not fit together,
    CheckpointError for a tensor that is there by both names.
    """
    renamed = {own_name(key): info for key, info in tensors.items()}
    if len(renamed) != len(tensors):
        twice = next(key for key in tensors if own_name(key) != key and own_name(key) in tensors)
        raise CheckpointError(f"{name} holds {own_name(twice)} twice, once as {twice}.", "Use another file of this model.")
    _check_halves(renamed, name)
    return renamed


def own_name(key: str) -> str:
    """`blk.0.attn_q.weight` -> `language_model.layers.0.self_attn.q_proj.weight`, `v.blk.0.ln1.weight` -> `visual.blocks.0.…`."""
    if key in _FRAME_NAMES:
        return _FRAME_NAMES[key]
    layer, _, kind = key.rpartition(".")
    found = _IN_BLOCK.fullmatch(layer)
    if found is None:
        own = _OUTSIDE.get(layer)
    else:
        names, blocks = (_IN_VISION_BLOCKS, "visual.blocks") if found[1] else (_IN_LAYERS, "language_model.layers")
        own = f"{blocks}.{found[2]}.{names[found[3]]}" if found[3] in names else None
    return f"{own}.{kind}" if own is not None and kind in ("weight", "bias") else key


def _check_halves(tensors: Mapping[str, TensorInfo], name: str) -> None:
    if not any(key.startswith("visual.") for key in tensors):
        raise IncompleteModelError(
            f"{name} is a text encoder without its vision tower, which an edit needs to see the picture.",
            f"Put the mmproj file beside it. {_FOLDER}",
        )
    if not any(key.startswith("language_model.") for key in tensors):
        raise IncompleteModelError(f"{name} is a vision tower (mmproj) without its language model.", _FOLDER)
    language, vision = (tensors.get(key) for key in ("language_model.norm.weight", "visual.merger.mlp.2.bias"))
    if language is not None and vision is not None and language.shape != vision.shape:
        raise WeightsMismatchError(
            f"{name}: the vision tower gives {list(vision.shape)} values a token, the language model takes {list(language.shape)}.",
            "Use the mmproj file of the same model size.",
        )


def with_whole_patches(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """`own_names`' tensors and the patch embedding in five dimensions, without its bytes: for what is told from shapes."""
    frame = next((tensors[key] for key in _FRAME_NAMES.values() if key in tensors), None)
    if frame is None:
        return dict(tensors)
    return {**tensors, PATCHES: TensorInfo(frame.dtype, (*frame.shape[:2], _FRAMES, *frame.shape[2:]), 0, 0)}


def split(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Joined]]:
    """What `expected` parameters are stored as: the shapes of tensors and pieces by name, and what the pieces make up.

    A qkv (3 C, ...) is three of (C, ...), or whole where `tensors` hold it whole; the patch embedding (C, 3, 2, H, W) is two of
    (C, 3, H, W).
    """
    stored: dict[str, tuple[int, ...]] = {}
    joined = {}
    for key, shape in expected.items():
        qkv = _QKV.fullmatch(key)
        if key == PATCHES:
            joined[key] = Joined(tuple(f"{PATCHES}.{frame}" for frame in range(shape[2])), 2, shape)
            stored |= dict.fromkeys(joined[key].pieces, (*shape[:2], *shape[3:]))
        elif qkv is not None and key not in tensors:
            joined[key] = Joined(tuple(f"{qkv[1]}{piece}.{qkv[2]}" for piece in "qkv"), 0, shape)
            stored |= dict.fromkeys(joined[key].pieces, (shape[0] // 3, *shape[1:]))
        else:
            stored[key] = shape
    return stored, joined
