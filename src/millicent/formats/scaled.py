"""8-bit codes with one FP32 scale, or one for each output row: FP8 e4m3 and INT8, kept as a file holds them.

w = code * scale. The linear multiplies out its weight for each call, so it saves memory and no time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes (N, K) float8_e4m3fn or int8, scale (N, 1) or (1, 1) FP32 -> FP32 (N, K)."""
    return codes.float().mul_(scale)


class ScaledLinear(nn.Module):
    """y = x w^T + b, of x (..., K), in the dtype of x; the weight is rounded to it once."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        assert codes.dtype in (torch.float8_e4m3fn, torch.int8), codes.dtype
        assert scale.shape in ((codes.shape[0], 1), (1, 1)), scale.shape
        assert scale.dtype == torch.float32, scale.dtype
        self.out_features, self.in_features = codes.shape
        # such a module is moved, never cast: a cast would turn the codes into numbers
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantize(self.weight, self.weight_scale).to(x.dtype), self.bias)
