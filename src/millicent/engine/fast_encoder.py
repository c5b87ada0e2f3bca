"""The text encoder's linears as a card likes them: FP8 where asked for, and one product for all that read the same rows.

At a few hundred tokens the bytes of the weights and the number of launches decide the time. q, k and v become one product, and
an MLP's gate and up another, under the names that model/qwen_vl.py knows. The vision tower's MLPs are 3420 wide, no multiple
of the 16 that FP8's products want, nor of the 8 that aligned loads of BF16 want: zeros make them 3424 wide, and as gate times up
is 0 there, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millicent.engine.planner import EncoderFormat
from millicent.engine.uploading import Upload, move
from millicent.formats.bf16 import BF16Linear
from millicent.formats.fp8 import MULTIPLE, FP8Linear
from millicent.formats.scaled import ScaledLinear, dequantize


@dataclass(frozen=True, slots=True)
class _Weight:
    """values (N, K): plain numbers where scale is None, else e4m3 codes with their scales (N, 1). bias (N,) or None."""

    values: Tensor
    scale: Tensor | None
    bias: Tensor | None

    @property
    def plain(self) -> Tensor:
        return self.values if self.scale is None else dequantize(self.values, self.scale)


def quantize_encoder(
    network: nn.Module,
    device: torch.device,
    wanted: EncoderFormat = "fp8",
    *,
    vision: bool = True,
    take: Callable[[nn.Module], None] = lambda layer: None,
    upload: Upload = move,
) -> None:
    """Lay out, in place and on `device`, the linears of the text encoder's network, one layer at a time.

    wanted: "fp8" is W8A8 for every linear whose sides 16 divides, with the e4m3 codes of a file kept bit for bit; "bf16" is
    plain numbers, in the dtype of the network's norms, as is what 16 does not divide. vision: the vision tower in `wanted`
    too; else in plain numbers. take: given each layer when it is laid out, before the next one is: the vision tower's blocks, the
    two linears of its merger, the language model's layers. upload: brings weights to the device.
    Embeddings, norms and the patch embedding stay as they are and where they are. Afterwards only model/qwen_vl.py knows how
    to run the network: TextEncoder.encode, which has transformers run it, raises.
    Raises MachineError, at the first reading, on a card that has no FP8.
    """
    tower: Any = network.visual
    language: Any = network.language_model
    maker = _Maker(device, language.norm.weight.dtype, wanted if vision else "bf16", upload)
    for block in tower.blocks:
        block.attn.qkv = maker.join(block.attn.qkv)
        block.attn.proj = maker.join(block.attn.proj)
        _lay_out_mlp(block.mlp, maker)
        take(block)
    merger = tower.merger.mlp
    merger[0], merger[2] = maker.join(merger[0]), maker.join(merger[2])
    take(merger)
    maker = _Maker(device, maker.dtype, wanted, upload)
    for layer in language.layers:
        attention = layer.self_attn
        attention.qkv_proj = maker.join(attention.q_proj, attention.k_proj, attention.v_proj)
        del attention.q_proj, attention.k_proj, attention.v_proj
        attention.o_proj = maker.join(attention.o_proj)
        _lay_out_mlp(layer.mlp, maker)
        take(layer)


def _lay_out_mlp(mlp: Any, maker: _Maker) -> None:
    # of the width inside alone: no one sees the channels that are added
    padding = -mlp.up_proj.out_features % MULTIPLE
    mlp.gate_up_proj = maker.join(mlp.gate_proj, mlp.up_proj, rows=padding)
    del mlp.gate_proj, mlp.up_proj
    mlp.down_proj = maker.join(mlp.down_proj, columns=padding)


@dataclass(frozen=True, slots=True)
class _Maker:
    device: torch.device
    dtype: torch.dtype
    wanted: EncoderFormat
    upload: Upload

    def join(self, *modules: nn.Module, rows: int = 0, columns: int = 0) -> nn.Module:
        """One linear of several, stacked by rows; rows, columns: of zeros, added to the weight of each."""
        weights = [_pad(_read(module, self.device, self.upload), rows, columns) for module in modules]
        biases = [weight.bias.to(self.dtype) for weight in weights if weight.bias is not None]
        assert len(biases) in (0, len(weights))
        bias = torch.cat(biases) if biases else None
        scales = [weight.scale for weight in weights if weight.scale is not None]
        fits = all(side % MULTIPLE == 0 for weight in weights for side in weight.values.shape)
        if self.wanted == "fp8" and fits and len(scales) == len(weights):
            return FP8Linear(torch.cat([weight.values for weight in weights]), torch.cat(scales), bias)
        values = torch.cat([weight.plain for weight in weights])
        return (
            FP8Linear.from_weight(values, bias)
            if self.wanted == "fp8" and fits
            else BF16Linear.from_weight(values.to(self.dtype), bias)
        )


def _read(module: nn.Module, device: torch.device, upload: Upload) -> _Weight:
    assert isinstance(module, (nn.Linear, ScaledLinear)), type(module)
    values = upload(module.weight, device)
    bias = None if module.bias is None else module.bias.to(device)
    if isinstance(module, nn.Linear):
        return _Weight(values, None, bias)
    scale = module.weight_scale.to(device).expand(len(values), 1)
    if values.dtype != torch.float8_e4m3fn:
        return _Weight(dequantize(values, scale), None, bias)
    return _Weight(values, scale, bias)


def _pad(weight: _Weight, rows: int, columns: int) -> _Weight:
    if rows == columns == 0:
        return weight
    values = weight.values
    # padding knows no FP8; the code of zero is the byte 0
    raw = F.pad(values.view(torch.uint8) if weight.scale is not None else values, (0, columns, 0, rows))
    scale = None if weight.scale is None else F.pad(weight.scale, (0, 0, 0, rows), value=1.0)
    bias = None if weight.bias is None else F.pad(weight.bias, (0, rows))
    return _Weight(raw.view(values.dtype), scale, bias)
