"""INT8 weight-only: codes with an FP32 scale for each output channel, multiplied out for each product in plain numbers.

It saves memory and no time: the product is BF16's, and the weight is written out once more before it.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor

from millicent.formats.bf16 import multiply
from millicent.formats.quantize import quantize_rows
from millicent.formats.scaled import ScaledLinear, dequantize

__all__ = ["INT8WeightLinear", "dequantize", "quantize"]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) FP32 or BF16 -> codes (N, K) int8, scales (N, 1) FP32."""
    return quantize_rows(weight.float(), "int8")


class INT8WeightLinear(ScaledLinear):
    """y = x w^T + b, of x (..., K), in the dtype of x; the weight is rounded to it once."""

    code: Literal["bf16"] = "bf16"
    group = 1

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """codes (N, K) int8; scale (N, 1) or (1, 1) FP32; bias (N,) of the dtype of the inputs, or None."""
        assert codes.dtype == torch.int8, codes.dtype
        super().__init__(codes, scale.expand(codes.shape[0], 1).contiguous(), bias)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """weight (N, K) BF16 or FP32, quantized where it lies; bias (N,) or None."""
        return cls(*quantize(weight), bias)

    def matmul(self, values: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
        """values (M, K) BF16 or FP32, no scale -> (M, N) in their dtype, in `out` if given."""
        assert scale is None
        return multiply(values, dequantize(self.weight, self.weight_scale).to(values.dtype), self.bias, out)
