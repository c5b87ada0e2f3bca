"""The parts of the transformer: embeddings of time and place, modulation, joint attention, one block.

Parameter names are diffusers', so that its checkpoints fit as they are. Shapes: B pictures, T text tokens, L image
tokens (the target's first, then each reference's), D channels, H heads of d channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
TIMESTEP_CHANNELS = 256
ROPE_THETA = 10000.0


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean in FP32 (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + NORM_EPS)
        return normed.to(x.dtype) * self.weight


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIMESTEP_CHANNELS, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> a vector: cosines, then sines of 1000 t at 128 frequencies, through a two-layer MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(dim)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t (B,) -> (B, D); the sinusoid is FP32, only then cast to `dtype`."""
        half = TIMESTEP_CHANNELS // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = 1000 * (t[:, None].float() * frequencies)
        return self.timestep_embedder(torch.cat([angles.cos(), angles.sin()], -1).to(dtype))


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotations of the two streams, FP32: cosines and sines of shape (tokens, d/2)."""

    img_cos: Tensor
    img_sin: Tensor
    txt_cos: Tensor
    txt_sin: Tensor


def rope_angles(positions: Tensor, axes_dims: tuple[int, ...]) -> Tensor:
    """positions (tokens, axes) -> angles (tokens, d/2): each axis turns its own share of the channels."""
    per_axis = []
    for axis, channels in enumerate(axes_dims):
        exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
        per_axis.append(torch.outer(positions[:, axis], 1.0 / torch.pow(ROPE_THETA, exponents)))
    return torch.cat(per_axis, -1)


def image_positions(img_shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """(frame, row, column) of every image token, (L, 3): rows and columns count from the picture's middle."""
    grids = []
    for frame, (height, width) in enumerate(img_shapes):
        rows = torch.arange(height, device=device) - (height - height // 2)
        columns = torch.arange(width, device=device) - (width - width // 2)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
        grids.append(F.pad(grid, (1, 0), value=frame))
    return torch.cat(grids).float()


def make_rope(img_shapes: list[tuple[int, int]], txt_tokens: int, axes_dims: tuple[int, ...], device: torch.device) -> Rope:
    """Qwen-Image's MSRoPE: text goes on along the diagonal from where the largest picture ends."""
    first = max(max(height // 2, width // 2) for height, width in img_shapes)
    txt_positions = (torch.arange(txt_tokens, device=device).float() + first)[:, None].expand(-1, len(axes_dims))
    img = rope_angles(image_positions(img_shapes, device), axes_dims)
    txt = rope_angles(txt_positions, axes_dims)
    return Rope(img.cos(), img.sin(), txt.cos(), txt.sin())


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x (B, tokens, H, d) in FP32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None], sin[:, None]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Modulation:
    """Shift, scale and gate around one sub-layer, each (B, 1, D); (B, 2, D) where references have their own (2511)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def split_modulation(vectors: Tensor) -> tuple[Modulation, Modulation]:
    """vectors (B, 1 or 2, 6D) -> the modulation of the attention and of the MLP."""
    chunks = vectors.chunk(6, -1)
    return Modulation(*chunks[:3]), Modulation(*chunks[3:])


def _by_segment(vectors: Tensor, tokens: int, target_tokens: int) -> Tensor:
    """(B, 1, D) as it is; (B, 2, D) -> (B, tokens, D), the first for the target's tokens, the second for references."""
    if vectors.shape[1] == 1:
        return vectors
    target = vectors[:, :1].expand(-1, target_tokens, -1)
    return torch.cat([target, vectors[:, 1:].expand(-1, tokens - target_tokens, -1)], 1)


def modulate(x: Tensor, mod: Modulation, target_tokens: int) -> Tensor:
    """norm(x) (1 + scale) + shift, of x (B, tokens, D)."""
    scale = _by_segment(mod.scale, x.shape[1], target_tokens)
    shift = _by_segment(mod.shift, x.shape[1], target_tokens)
    return F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS) * (1 + scale) + shift


def add_gated(x: Tensor, update: Tensor, mod: Modulation, target_tokens: int) -> Tensor:
    """x + gate update, of x (B, tokens, D)."""
    return x + _by_segment(mod.gate, x.shape[1], target_tokens) * update


class JointAttention(nn.Module):
    """One attention over text and image tokens, each stream with its own projections and QK norms."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.add_q_proj = nn.Linear(dim, dim)
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim // heads)
        self.norm_k = RMSNorm(dim // heads)
        self.norm_added_q = RMSNorm(dim // heads)
        self.norm_added_k = RMSNorm(dim // heads)

    def forward(self, img: Tensor, txt: Tensor, rope: Rope, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """img (B, L, D), txt (B, T, D), mask (B, 1, 1, T + L) true where a key may be seen -> both streams' updates."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1))  # (B, tokens, H, d)

        img_q = apply_rope(self.norm_q(heads(self.to_q(img))), rope.img_cos, rope.img_sin)
        img_k = apply_rope(self.norm_k(heads(self.to_k(img))), rope.img_cos, rope.img_sin)
        txt_q = apply_rope(self.norm_added_q(heads(self.add_q_proj(txt))), rope.txt_cos, rope.txt_sin)
        txt_k = apply_rope(self.norm_added_k(heads(self.add_k_proj(txt))), rope.txt_cos, rope.txt_sin)
        q = torch.cat([txt_q, img_q], 1).transpose(1, 2)  # (B, H, T + L, d)
        k = torch.cat([txt_k, img_k], 1).transpose(1, 2)
        v = torch.cat([heads(self.add_v_proj(txt)), heads(self.to_v(img))], 1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        txt_out, img_out = out.split([txt.shape[1], img.shape[1]], 1)
        return self.to_out[0](img_out), self.to_add_out(txt_out)


class GELUProjection(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        # the empty place is diffusers' dropout, kept so that the names agree
        self.net = nn.ModuleList([GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """A double-stream block: modulated joint attention, then a modulated MLP for each stream."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.img_mod: nn.Module = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.txt_mod: nn.Module = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.attn = JointAttention(dim, heads)
        self.img_mlp = MLP(dim)
        self.txt_mlp = MLP(dim)

    def forward(
        self, img: Tensor, txt: Tensor, img_vec: Tensor, txt_vec: Tensor, rope: Rope, mask: Tensor | None, target_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """img (B, L, D), txt (B, T, D); img_vec (B, 1 or 2, D) and txt_vec (B, 1, D) are the embedded timesteps."""
        img_attn_mod, img_mlp_mod = split_modulation(self.img_mod(img_vec))
        txt_attn_mod, txt_mlp_mod = split_modulation(self.txt_mod(txt_vec))
        n = target_tokens
        img_update, txt_update = self.attn(modulate(img, img_attn_mod, n), modulate(txt, txt_attn_mod, n), rope, mask)
        img = add_gated(img, img_update, img_attn_mod, n)
        txt = add_gated(txt, txt_update, txt_attn_mod, n)
        img = add_gated(img, self.img_mlp(modulate(img, img_mlp_mod, n)), img_mlp_mod, n)
        txt = add_gated(txt, self.txt_mlp(modulate(txt, txt_mlp_mod, n)), txt_mlp_mod, n)
        return img, txt


class FinalNorm(nn.Module):
    """LayerNorm modulated by the timestep; here the scale comes first, then the shift."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x (B, tokens, D), vec (B, 1, D)."""
        scale, shift = self.modulation(vec).chunk(2, -1)
        return F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS) * (1 + scale) + shift

    def modulation(self, vec: Tensor) -> Tensor:
        """vec (B, 1, D) -> scale and shift in one, (B, 1, 2D)."""
        vectors: Tensor = self.linear(F.silu(vec))
        return vectors
