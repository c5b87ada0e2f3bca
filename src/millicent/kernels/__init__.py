"""The operations between the transformer's matrix products, each twice under the same name and signature.

`reference` is the specification in plain PyTorch and runs anywhere; the twins in Triton run on NVIDIA cards. Whoever draws
chooses once, by device, and what was chosen fails loudly where it cannot run: nothing falls back.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from millicent.errors import MachineError

Code = Literal["bf16", "fp8", "int8"]
# tokens come in the order references, target, text: how many are the references', and how many are pictures'
Bounds = tuple[int, int]


class Rows(NamedTuple):
    """Rows as a matrix product takes them: values (M, K), and scale (M, 1) FP32 for codes, None for plain numbers.

    "bf16" stands for plain numbers in the dtype of the stream that they come from.
    """

    values: Tensor
    scale: Tensor | None


class Kernels(Protocol):
    """What both sides have; reference.py says what each does."""

    def quantize_rows(self, x: Tensor, code: Code, group: int = 1) -> Rows: ...

    def norm_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, bounds: Bounds, code: Code, group: int = 1) -> Rows: ...

    def add_gated_norm_modulate(
        self, x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bounds: Bounds, code: Code, group: int = 1
    ) -> Rows: ...

    def qk_norm_rope(self, qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int) -> None: ...

    def gelu_rows(self, x: Tensor, code: Code, group: int = 1) -> Rows: ...


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of one layer's `tokens` as 8-bit attention takes them, and what the codes of others are to share.

    k_mean (H, D) FP32: what keys are coded without. v_scale (H, D) FP32: what stands for 1 in the codes of values. How k, k_scale
    and v are laid out is each side's own. Those of several layers, with an axis before, are apart by `layer`.
    """

    tokens: int
    k_mean: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor

    def layer(self, number: int) -> KeysValues:
        """What is of this layer: views."""
        tensors = [getattr(self, field.name)[number] for field in fields(self)[1:]]
        return KeysValues(self.tokens, *tensors)


class Int8Attention(Protocol):
    """8-bit attention as both sides have it; attention_reference.py says what each does."""

    def attend_normed_int8(
        self, qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int, first_row: int, queries: slice, out: Tensor,
        *, kept: KeysValues | None = None,
    ) -> Tensor: ...  # fmt: skip

    def attend_kept_int8(
        self, qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int, queries: slice, out: Tensor, kept: KeysValues
    ) -> Tensor: ...

    def make_kept(self, layers: int, tokens: int, heads: int, width: int, device: torch.device) -> KeysValues: ...


def choose(device: torch.device) -> Kernels:
    """The twins in Triton on a CUDA device, the reference elsewhere. Raises MachineError for a card without Triton."""
    return cast("Kernels", _choose(device, "elementwise", "reference"))


def choose_int8_attention(device: torch.device) -> Int8Attention:
    """As choose, of 8-bit attention."""
    return cast("Int8Attention", _choose(device, "attention", "attention_reference"))


def _choose(device: torch.device, fast: str, reference: str) -> ModuleType:
    name = fast if device.type == "cuda" else reference
    try:
        return importlib.import_module(f"millicent.kernels.{name}")
    except ModuleNotFoundError as error:
        raise MachineError(
            f"The fast kernels need Triton, and {error.name} is not installed.",
            "Install torch's CUDA build, which brings Triton along, or draw with --plain.",
        ) from error
