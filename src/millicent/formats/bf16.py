"""Plain numbers: the weight as it is, in BF16 or, for references, FP32."""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multiply(values: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """values (M, K) w^T + b in their dtype -> (M, N), in `out` if given. weight (N, K) and bias (N,) of the same dtype."""
    if out is None:
        return F.linear(values, weight, bias)
    if bias is None:
        return torch.mm(values, weight.t(), out=out)
    return torch.addmm(bias, values, weight.t(), out=out)


class BF16Linear(nn.Module):
    """y = x w^T + b, of x (..., K) in the weight's dtype."""

    code: Literal["bf16"] = "bf16"
    group = 1
    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: None, bias: Tensor | None) -> None:
        """weight (N, K) BF16 or FP32, bias (N,) or None. There is no scale; its place is that of the other formats."""
        super().__init__()
        assert scale is None
        assert weight.dtype in (torch.bfloat16, torch.float32), weight.dtype
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.bias = None if bias is None else nn.Parameter(bias.to(weight.dtype), requires_grad=False)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """weight (N, K) BF16 or FP32, kept as it is; bias (N,) or None."""
        return cls(weight, None, bias)

    def matmul(self, values: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
        """values (M, K) in the weight's dtype, no scale -> (M, N) in it, in `out` if given."""
        assert scale is None
        return multiply(values, self.weight, self.bias, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
