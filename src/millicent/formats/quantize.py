"""FP32 weights to 8-bit codes with one FP32 scale for each output row, both symmetric: w = code * scale.

The scale takes a row's largest value to the format's largest; the codes are the nearest ones, ties to even. Rounding to the
nearest has the least error; the stochastic rounding of some tools trades it for a mean that stays.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RowFormat = Literal["fp8", "int8"]
CODE_DTYPES: dict[RowFormat, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST: dict[RowFormat, float] = {"fp8": 448.0, "int8": 127.0}


def quantize_rows(weight: Tensor, row_format: RowFormat) -> tuple[Tensor, Tensor]:
    """weight (N, K) FP32 -> codes (N, K) float8_e4m3fn or int8, scales (N, 1) FP32."""
    largest = LARGEST[row_format]
    scale = weight.abs().amax(1, keepdim=True) / largest
    # a row of zeros has zeros for codes under any scale; a subnormal scale has too few bits left to divide by
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    # the row's largest can come out a unit in the last place above the format's, to which rounding brings it back
    steps = weight / scale
    if row_format == "int8":
        steps.round_()
    return steps.to(CODE_DTYPES[row_format]), scale
