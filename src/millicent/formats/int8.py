"""INT8 W8A8: weights with an FP32 scale for each output channel, activations with one for each token, both turned first.

y = (codes of x H . codes of w H) scale_x scale_w + b, the sum in int32. H is the Hadamard matrix of kernels.hadamard, its own
inverse, over groups of neighbors along K: it spreads a channel of outliers over its group, which INT8's even steps need and
FP8's do not. Tensor cores multiply such codes since Turing; our kernel wants Ampere.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor, nn

from millicent.formats.fp8 import check_sides
from millicent.formats.quantize import quantize_rows
from millicent.formats.scaled import dequantize as dequantize_rows
from millicent.kernels import choose
from millicent.kernels.hadamard import largest_group, rotate


def quantize(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight (N, K) FP32 or BF16 -> codes (N, K) int8 of the weight turned in groups, 1 for no turn; scales (N, 1) FP32."""
    return quantize_rows(weight.float() if group == 1 else rotate(weight, group), "int8")


def dequantize(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """What quantize gave -> FP32 (N, K), turned back."""
    turned = dequantize_rows(codes, scale)
    return turned if group == 1 else rotate(turned, group)


class INT8Linear(nn.Module):
    """y = x w^T + b, of x (..., K), in the dtype of x; rounded to BF16 on the way, as the product gives it.

    Our kernel multiplies on a CUDA card; elsewhere the same arithmetic is done in float64, which holds int32's sums.
    """

    # no ScaledLinear: codes times scales are not the weight here, but the turned weight
    code: Literal["int8"] = "int8"
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, group: int | None = None) -> None:
        """codes (N, K) int8 of the turned weight; scale (N, 1) or (1, 1) FP32; bias (N,) or None.

        group: channels that the weight was turned in, 1 for no turn; None for the largest that divides K.
        Raises InputError for sides that 16 does not divide.
        """
        assert codes.dtype == torch.int8, codes.dtype
        n, k = codes.shape
        check_sides(n, k, "INT8")
        assert scale.dtype == torch.float32, scale.dtype
        super().__init__()
        self.out_features, self.in_features = n, k
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale.expand(n, 1).contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.bfloat16(), requires_grad=False)
        self.group = largest_group(k) if group is None else group

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """weight (N, K) BF16 or FP32, turned and quantized where it lies; bias (N,) or None."""
        # a K that this cannot turn, __init__ refuses
        return cls(*quantize(weight, largest_group(weight.shape[1])), bias)

    def matmul(self, values: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
        """values (M, K) int8 of turned rows, scale (M, 1) FP32 -> (M, N) BF16, in `out` if given.

        Raises MachineError for a card before Ampere.
        """
        assert values.dtype == torch.int8, values.dtype
        assert scale is not None
        if values.device.type != "cuda":
            return self._emulate(values, scale, out)
        from millicent.kernels.matmul import scaled_matmul

        if out is None:
            out = torch.empty(len(values), self.out_features, dtype=torch.bfloat16, device=values.device)
        return scaled_matmul(values, scale, self.weight, self.weight_scale, self.bias, out)

    def forward(self, x: Tensor) -> Tensor:
        rows = choose(x.device).quantize_rows(x.reshape(-1, self.in_features), self.code, self.group)
        return self.matmul(rows.values, rows.scale).to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _emulate(self, values: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
        y = (values.double() @ self.weight.double().t()).float() * scale * self.weight_scale.t()
        y = (y if self.bias is None else y + self.bias.float()).bfloat16()
        return y if out is None else out.copy_(y)
