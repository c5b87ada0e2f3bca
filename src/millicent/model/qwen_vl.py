"""Qwen2.5-VL's forward pass in few launches and without a host synchronization, over our modules or transformers' own.

model.qwen_vl_layers has the modules, and transformers has the same; what it does around the matrix products for every kind of
batch is left out here: one picture grid's indices are planned once on the host, equal windows attend as one batch, and keys
and values come back so that a prompt can go on where another one's pictures ended. Linear layers are reached by attribute
and called, so they may be replaced by any module with the same forward(x), and those that read the same rows by one: an
attention's q_proj, k_proj and v_proj by a `qkv_proj`, an MLP's gate_proj and up_proj by a `gate_up_proj`, stacked in that
order.

The architecture: Qwen2.5-VL, arXiv 2502.13923, section 2.1; M-RoPE: Qwen2-VL, arXiv 2409.12191, section 2.1. RMSNorm and the
vision tower's rotation are FP32 inside, as in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millicent.errors import CheckpointError

Grid = tuple[int, int, int]
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class VisionPlan:
    """All that the vision tower needs to know of its pictures' sizes. N patches make N / merge^2 tokens.

    order: (tokens,) the tokens window by window, longest windows of a frame first; restore: (tokens,) its inverse.
    cos, sin: (N, d) FP32 rotation of each patch, in that order, for heads of d channels.
    windows, frames: (count, patches) of each run of equal windows and of equal frames, in that order.
    """

    order: Tensor
    restore: Tensor
    cos: Tensor
    sin: Tensor
    windows: Runs
    frames: Runs

    def to(self, device: torch.device) -> VisionPlan:
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("order", "restore", "cos", "sin")}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, slots=True)
class KeyValues:
    """What later tokens attend to: for each layer, keys (after rotation) and values, (1, key-value heads, T, d)."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        return self.keys[0].shape[2]

    def pack(self) -> Tensor:
        """(2, layers, 1, key-value heads, T, d), copied: whatever shares the memory, as queries do, is free to go."""
        return torch.stack([*self.keys, *self.values]).unflatten(0, (2, -1))

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """Views of what `pack` made."""
        return cls(tuple(packed[0]), tuple(packed[1]))


def check_config(config: Any) -> None:
    """Raises CheckpointError for a Qwen2.5-VL config that asks for what is not computed here."""
    text = config.text_config
    rope = text.rope_parameters["rope_type"]
    if rope not in ("default", "mrope") or "sliding_attention" in (text.layer_types or ()):
        raise CheckpointError(
            f"The text encoder's config asks for {rope} rotary positions and {sorted(set(text.layer_types or ()))};"
            " Qwen-Image-Edit has default positions and full attention.",
            "Use the text encoder of a Qwen-Image-Edit, -2509 or -2511 folder.",
        )


def plan_vision(grid_thw: Sequence[Grid], config: Any) -> VisionPlan:
    """Plan for pictures of (frames, height, width) patches, on the CPU. config: the model's vision_config.

    A window never leaves its frame, so any order of the windows of a frame gives the same result: equal ones are put side
    by side, so that they are one batch.
    """
    merge: int = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size
    order: list[Tensor] = []
    angles: list[Tensor] = []
    windows: list[int] = []
    frames: list[int] = []
    tokens = 0
    for count, height, width in grid_thw:
        assert height % merge == 0 == width % merge
        rows, columns = height // merge, width // merge
        patches = _axial_angles(height, width, config).unflatten(0, (rows * columns, merge**2))
        blocks = _windows(rows, columns, side)
        for _ in range(count):
            order += [block + tokens for block in blocks]
            angles += [patches[block].flatten(0, 1) for block in blocks]
            windows += [len(block) * merge**2 for block in blocks]
            frames.append(height * width)
            tokens += rows * columns
    joined = torch.cat(order)
    angle = torch.cat(angles)
    return VisionPlan(joined, joined.argsort(), angle.cos(), angle.sin(), _runs(windows), _runs(frames))


def _windows(rows: int, columns: int, side: int) -> list[Tensor]:
    """The tokens of each window of a grid cut into squares, what is left over in the last ones; longest first."""
    index = torch.arange(rows * columns).view(rows, columns)
    blocks = [block.flatten() for band in index.split(side, 0) for block in band.split(side, 1)]
    return sorted(blocks, key=len, reverse=True)


def _axial_angles(height: int, width: int, config: Any) -> Tensor:
    """(height * width, d): half of a head's channel pairs turn with a patch's row and half with its column.

    Patches come token by token, merge x merge of them each, as the image processor cuts them.
    """
    merge = config.spatial_merge_size
    quarter = config.hidden_size // config.num_heads // 2
    frequencies = _inverse_frequencies(config.rope_parameters["rope_theta"], quarter, torch.device("cpu"))
    places = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    blocks = [place.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2).flatten() for place in places]
    angles = torch.cat([block[:, None].float() * frequencies for block in blocks], -1)
    return torch.cat([angles, angles], -1)


def _inverse_frequencies(theta: float, channels: int, device: torch.device) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, channels, 2, dtype=torch.float, device=device) / channels))


def _runs(lengths: Sequence[int]) -> Runs:
    return tuple((len(list(equal)), length) for length, equal in groupby(lengths))


def cut_patches(picture: Tensor, levels: Tensor, config: Any) -> Tensor:
    """The patches of a still picture, (N, channels * frames * patch^2) FP32: merge x merge of them for each token.

    picture: (H, W, 3) uint8, sides whole numbers of tokens. levels: (3, 256) FP32, what each level of each color stands for.
    config: the model's vision_config. The picture stands still for as many frames as a patch has.
    """
    colors = torch.arange(3, device=picture.device)
    pixels = levels[colors, picture.int()]
    merge, side, frames = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
    # (rows of tokens, merge, side), then the same of columns, then colors
    cut = pixels.unflatten(1, (-1, merge, side)).unflatten(0, (-1, merge, side))
    patches = cut.permute(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, frames, -1, -1)
    return patches.flatten(4).flatten(0, 3)


def encode_vision(visual: nn.Module, pixel_values: Tensor, plan: VisionPlan) -> tuple[Tensor, Tensor]:
    """Pictures as the language model reads them.

    visual: the model's vision tower. pixel_values (N, channels * frames * patch^2), as the image processor cuts them.
    Returns image tokens (N / merge^2, C), row by row, picture after picture, and the last block's hidden states (N, D) of
    the patches in the order of pixel_values.
    """
    tower: Any = visual
    config = tower.config
    unit: int = config.spatial_merge_size**2
    # a convolution whose kernel is its stride is a matrix product
    weight = tower.patch_embed.proj.weight.flatten(1)
    x = F.linear(pixel_values.to(weight.dtype), weight)
    x = _reorder(x, plan.order, unit)
    sin = _signed(plan.sin)[:, None, None]
    cos = plan.cos[:, None, None]
    for index, block in enumerate(tower.blocks):
        runs = plan.frames if index in config.fullatt_block_indexes else plan.windows
        x = x + _attend_runs(block.attn, _norm(x, block.norm1), cos, sin, runs, config.num_heads)
        x = x + _mlp(block.mlp, _norm(x, block.norm2))
    merged = tower.merger.mlp(_norm(x, tower.merger.ln_q).view(len(x) // unit, -1))
    return merged[plan.restore], _reorder(x, plan.restore, unit)


def _reorder(x: Tensor, order: Tensor, unit: int) -> Tensor:
    return x.unflatten(0, (-1, unit))[order].flatten(0, 1)


def _attend_runs(attention: Any, x: Tensor, cos: Tensor, sin: Tensor, runs: Runs, heads: int) -> Tensor:
    """Attention within each segment of x (N, D); the segments of a run are a batch."""
    qkv = attention.qkv(x).view(len(x), 3, heads, -1)
    q, k = _rotate(qkv[:, :2].float(), cos, sin).to(x.dtype).unbind(1)
    sizes = [count * length for count, length in runs]
    parts = zip(q.split(sizes), k.split(sizes), qkv[:, 2].split(sizes), runs, strict=True)
    attended = [
        F.scaled_dot_product_attention(*(part.unflatten(0, run).transpose(1, 2) for part in qkv_part)).transpose(1, 2).flatten(0, 1)
        for *qkv_part, run in parts
    ]
    joined = attended[0] if len(attended) == 1 else torch.cat(attended)
    out: Tensor = attention.proj(joined.flatten(1))
    return out


def put_pictures(embedded: Tensor, image_features: Tensor, image_token_positions: Tensor) -> Tensor:
    """Token embeddings (1, T, C) with the pictures in their places.

    embedded: (T, C) of the embedding table. image_features: (N, C). image_token_positions: (N,) where each of them goes.
    """
    return embedded.index_copy(0, image_token_positions, image_features.to(embedded.dtype))[None]


def rotary_text(positions: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """M-RoPE's FP32 cos and sin (T, d) of positions (3, T): time, row and column; where the positions are.

    config: the model's text_config. Each channel pair turns with one of the three, by the sections of the config.
    """
    rope = config.rope_parameters
    channels = config.hidden_size // config.num_attention_heads
    frequencies = _inverse_frequencies(rope["rope_theta"], channels, positions.device)
    sections = (positions[..., None].float() * frequencies).split(list(rope["mrope_section"]), -1)
    angles = torch.cat([section[axis] for axis, section in enumerate(sections)], -1)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def run_language(
    language_model: nn.Module, embeds: Tensor, cos: Tensor, sin: Tensor, past: KeyValues | None
) -> tuple[Tensor, KeyValues]:
    """Hidden states (1, T, C) after the final norm, and the keys and values of past and new tokens.

    embeds: (1, T, C). cos, sin: (T, d), of rotary_text. past: what comes before them; each new token sees all of it, and
    the new ones up to itself.
    """
    model: Any = language_model
    x = embeds
    cos, sin = cos.to(x.dtype)[:, None], _signed(sin.to(x.dtype))[:, None]
    bias = None if past is None else _causal_after(past.tokens, x)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for index, layer in enumerate(model.layers):
        before = None if past is None else (past.keys[index], past.values[index])
        heads = (model.config.num_attention_heads, model.config.num_key_value_heads)
        attended, k, v = _attend_causally(layer.self_attn, _norm(x, layer.input_layernorm), cos, sin, heads, before, bias)
        keys.append(k)
        values.append(v)
        x = x + attended
        x = x + _mlp(layer.mlp, _norm(x, layer.post_attention_layernorm))
    return _norm(x, model.norm), KeyValues(tuple(keys), tuple(values))


def _causal_after(past_tokens: int, x: Tensor) -> Tensor:
    """What x (1, T, C) adds to its attention scores, (T, past_tokens + T): 0 where a token may look, else -inf.

    is_causal would align the corner at the upper left. The rows start at multiples of 8, or each layer would copy it.
    """
    tokens = x.shape[1]
    seen = past_tokens + tokens
    return x.new_full((tokens, seen + -seen % 8), -torch.inf).triu_(past_tokens + 1)[:, :seen]


def _attend_causally(
    attention: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    before: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of x (1, T, C) to itself and what was before; returns it, and all keys and values."""
    qk, v = _project(attention, x).unflatten(-1, (heads[0] + 2 * heads[1], -1)).split([sum(heads), heads[1]], 2)
    q, k = _rotate(qk, cos, sin).transpose(1, 2).split(heads, 1)
    v = v.transpose(1, 2)
    if before is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        # what is kept of each layer is an eighth of what these are views of
        k, v = k.clone(), v.clone()
    else:
        k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        # no kernel but the slow one takes both a mask and fewer key heads
        all_k, all_v = (part.repeat_interleave(heads[0] // heads[1], 1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, all_k, all_v, attn_mask=bias)
    return attention.o_proj(out.transpose(1, 2).flatten(2)), k, v


def _project(attention: Any, x: Tensor) -> Tensor:
    """(1, T, (heads + 2 key-value heads) d): queries, keys, values."""
    if hasattr(attention, "qkv_proj"):
        joined: Tensor = attention.qkv_proj(x)
        return joined
    return torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_up_proj(x).chunk(2, -1) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj(x), mlp.up_proj(x))
    out: Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
    return out


def _signed(sin: Tensor) -> Tensor:
    """The sign that the first half of a head takes when the halves change places, given to the sine once."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Channel i and i + d/2 are a pair, as in transformers' rotate_half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)
