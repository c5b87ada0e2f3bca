"""Every operation in plain PyTorch: the specification that the Triton twins are held to.

Shapes: M tokens, D channels, H heads of d channels. Tokens come in the order references, target, text; `bounds` is where the
references end and where all pictures end. What modulates them, (3, D), has a row for each of the three. Numbers are FP32
inside, and are rounded once, on the way out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from millicent.kernels import Bounds, Code, Rows
from millicent.kernels.hadamard import rotate

NORM_EPS = 1e-6
LARGEST: dict[Code, float] = {"fp8": 448.0, "int8": 127.0}


def quantize_rows(x: Tensor, code: Code, group: int = 1) -> Rows:
    """x (M, K) -> its codes with one FP32 scale a row, which takes the row's largest value to the format's largest.

    group: turned by a Hadamard matrix in groups of so many channels first, so that outliers spread; 1 for no turn.
    "bf16" gives x back.
    """
    if code == "bf16":
        assert group == 1
        return Rows(x, None)
    x32 = x.float() if group == 1 else rotate(x, group)
    scale = x32.abs().amax(1, keepdim=True) / LARGEST[code]
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    steps = x32 / scale
    return Rows(steps.to(torch.float8_e4m3fn) if code == "fp8" else steps.round().to(torch.int8), scale)


def by_row(vectors: Tensor, rows: int, bounds: Bounds) -> Tensor:
    """(3, D) -> FP32 (rows, D): each token's own."""
    references, img = bounds
    counts = (references, img - references, rows - img)
    return torch.cat([vector.expand(count, -1) for vector, count in zip(vectors.float().split(1), counts, strict=True)])


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, bounds: Bounds, code: Code, group: int = 1) -> Rows:
    """layer_norm(x) (1 + scale) + shift of x (M, D), as rows in `code`; shift and scale (3, D)."""
    rows = len(x)
    normed = F.layer_norm(x.float(), (x.shape[1],), eps=NORM_EPS)
    y = normed * (1 + by_row(scale, rows, bounds)) + by_row(shift, rows, bounds)
    return Rows(y.to(x.dtype), None) if code == "bf16" else quantize_rows(y, code, group)


def add_gated_norm_modulate(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bounds: Bounds, code: Code, group: int = 1
) -> Rows:
    """x += gate update, in place; then norm_modulate of the sum. update (M, D), gate (3, D)."""
    x.copy_(x.float() + by_row(gate, len(x), bounds) * update.float())
    return norm_modulate(x, shift, scale, bounds, code, group)


def qk_norm_rope(qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int) -> None:
    """RMS norm over each head of q and k, then rotary positions, in place; v is left.

    qkv (M, 3, H, d). weights (2, 2, d): of q and k for pictures, then for text. cos, sin (M, d/2) FP32: adjacent channels
    are a pair.
    """
    qk = qkv[:, :2].float()
    stream = torch.cat([weights[:1].expand(img_rows, -1, -1), weights[1:].expand(len(qkv) - img_rows, -1, -1)])
    normed = qk * torch.rsqrt(qk.square().mean(-1, keepdim=True) + NORM_EPS) * stream[:, :, None].float()
    a, b = normed.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None, None], sin[:, None, None]
    qkv[:, :2] = torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).to(qkv.dtype)


def gelu_rows(x: Tensor, code: Code, group: int = 1) -> Rows:
    """gelu(x) by its tanh form, of x (M, N), as rows in `code`."""
    y = F.gelu(x.float(), approximate="tanh")
    return Rows(y.to(x.dtype), None) if code == "bf16" else quantize_rows(y, code, group)
