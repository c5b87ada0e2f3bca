"""The blocks' linears in the formats of a Plan. Codes of a file that are of that format already are kept, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from millicent.engine.blocks import MakeLinear, RowLinear
from millicent.engine.planner import Plan
from millicent.engine.settings import Format
from millicent.engine.uploading import Upload, move
from millicent.formats.bf16 import BF16Linear
from millicent.formats.fp8 import FP8Linear
from millicent.formats.int8 import INT8Linear
from millicent.formats.int8_weight import INT8WeightLinear
from millicent.formats.nvfp4 import NVFP4Linear
from millicent.formats.scaled import ScaledLinear, dequantize

LINEARS: dict[Format, type[BF16Linear | FP8Linear | INT8Linear | INT8WeightLinear | NVFP4Linear]] = {
    "bf16": BF16Linear,
    "fp8": FP8Linear,
    "int8": INT8Linear,
    "int8-weight": INT8WeightLinear,
    "nvfp4": NVFP4Linear,
}


def linear_maker(plan: Plan, num_layers: int, device: torch.device, dtype: torch.dtype, upload: Upload = move) -> MakeLinear:
    """Makes one linear of several of the network's, stacked by rows: on `device`, biases in `dtype`.

    upload: what brings weights there.
    """

    def make(name: str, modules: Sequence[nn.Module]) -> RowLinear:
        wanted = plan.format_of(name, num_layers)
        bias = _stack([module.bias for module in modules if isinstance(module.bias, Tensor)], device, dtype)
        if wanted == "fp8" and all(_holds(module, torch.float8_e4m3fn) for module in modules):
            return _stack_codes(modules, bias, device, upload)
        weight = torch.cat([_weight(module, device, upload) for module in modules])
        return LINEARS[wanted].from_weight(weight.to(dtype) if wanted == "bf16" else weight, bias)

    return make


def _holds(module: nn.Module, dtype: torch.dtype) -> bool:
    return isinstance(module, ScaledLinear) and module.weight.dtype == dtype


def _stack_codes(modules: Sequence[nn.Module], bias: Tensor | None, device: torch.device, upload: Upload) -> FP8Linear:
    linears = [module for module in modules if isinstance(module, ScaledLinear)]
    codes = torch.cat([upload(linear.weight, device) for linear in linears])
    scales = torch.cat([linear.weight_scale.to(device).expand(linear.out_features, 1) for linear in linears])
    return FP8Linear(codes, scales, bias)


def _weight(module: nn.Module, device: torch.device, upload: Upload) -> Tensor:
    """(N, K) on the device; FP32 where it was held as codes."""
    assert isinstance(module, (nn.Linear, ScaledLinear))
    weight = upload(module.weight, device)
    return dequantize(weight, module.weight_scale.to(device)) if isinstance(module, ScaledLinear) else weight


def _stack(biases: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    return torch.cat([bias.to(device, dtype) for bias in biases]) if biases else None
