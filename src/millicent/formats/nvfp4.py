"""NVFP4: E2M1 codes, an E4M3 scale for each 16 neighbors along K, one FP32 scale for the tensor; weights and activations.

value = code * block scale * global scale. The recipe is NVIDIA's, as comfy-kitchen 0.2.40 has it: the global scale takes the
tensor's largest value to 6 * 448, each block's to 6; codes are the nearest ones, ties to even. Packed with the low nibble
first and the scales swizzled, as cuBLAS reads them. Blackwell's tensor cores multiply such operands. That path has not yet
run on a Blackwell card; the emulation is exact up to FP32's rounding and runs anywhere, slowly.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from millicent.errors import MachineError
from millicent.formats.float_blocks import NVFP4_BLOCK, dequantize_nvfp4
from millicent.formats.fp8 import check_sides
from millicent.formats.swizzle import swizzle

LARGEST_E2M1 = 6.0
LARGEST_E4M3 = 448.0
NATIVE_MAJORS = (10, 12)
# halfway between two codes' magnitudes; a tie goes to the even code, which is the upper one at every second boundary
_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)

Backend = Literal["emulation", "native"]


class Packed(NamedTuple):
    """(N, K) in NVFP4: codes (N, K/2) uint8, scales E4M3 (N up to a multiple of 128, K/16 of 4), global_scale () FP32."""

    codes: Tensor
    scales: Tensor
    global_scale: Tensor


def quantize(values: Tensor) -> Packed:
    """values (N, K) FP32 or BF16, 16 dividing K -> codes and scales."""
    n, k = values.shape
    assert k % NVFP4_BLOCK == 0, k
    blocks = values.float().reshape(n, k // NVFP4_BLOCK, NVFP4_BLOCK)
    global_scale = blocks.abs().amax() / (LARGEST_E2M1 * LARGEST_E4M3)
    # zeros have zeros for codes under any scale
    global_scale = torch.where(global_scale < torch.finfo(torch.float32).tiny, 1.0, global_scale)
    scales = (blocks.abs().amax(-1) / LARGEST_E2M1 / global_scale).clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn)
    steps = global_scale * scales.float()
    # a block far below the tensor's largest has a scale that rounds to zero, and zeros for codes
    scaled = torch.where(steps[..., None] == 0, 0.0, blocks / steps[..., None])
    codes = _encode_e2m1(scaled).view(n, k)
    return Packed(codes[:, ::2] | codes[:, 1::2] << 4, swizzle(scales), global_scale)


def dequantize(packed: Packed) -> Tensor:
    """What quantize gave -> FP32 (N, K)."""
    shape = (packed.codes.shape[0], 2 * packed.codes.shape[1])
    return dequantize_nvfp4(*packed, shape, high_first=False, swizzled=True)


def _encode_e2m1(values: Tensor) -> Tensor:
    """FP32 (...) -> codes (...), uint8, 0 to 15: the nearest, and the largest for all beyond it."""
    magnitudes = torch.bucketize(values.abs(), _thresholds(values.device))
    return (magnitudes | values.signbit().long() << 3).to(torch.uint8)


@functools.cache
def _thresholds(device: torch.device) -> Tensor:
    """Between the magnitudes; once for each device, as no CUDA graph can be recorded of what is copied from the host."""
    with torch.inference_mode(False):
        boundaries = torch.tensor(_BOUNDARIES)
        below = torch.nextafter(boundaries, torch.zeros_like(boundaries))
        return torch.where(torch.isin(boundaries, torch.tensor(_TIES_UP)), below, boundaries).to(device)


class NVFP4Linear(nn.Module):
    """y = x w^T + b, of x (..., K), in the dtype of x; the rows of x are quantized as the weight is, all under one global scale.

    backend: "emulation" multiplies out both operands to FP32; "native" is the tensor cores' product, for Blackwell; None for the
    one that the device of the rows runs.
    """

    # its product takes plain rows, as the global scale of a tensor cannot come from its rows
    code: Literal["bf16"] = "bf16"
    group = 1
    weight: Tensor
    weight_scale: Tensor
    weight_global_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, global_scale: Tensor, backend: Backend | None = None
    ) -> None:
        """codes, scale and global_scale as Packed has them; bias (N,) or None.

        Raises InputError for sides that 16 does not divide.
        """
        super().__init__()
        self.out_features, self.in_features = codes.shape[0], 2 * codes.shape[1]
        check_sides(self.out_features, self.in_features, "NVFP4")
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_global_scale", global_scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.backend = backend

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """weight (N, K) BF16 or FP32, quantized where it lies; bias (N,) or None.

        Raises InputError for sides that 16 does not divide.
        """
        check_sides(weight.shape[0], weight.shape[1], "NVFP4")
        codes, scales, global_scale = quantize(weight)
        return cls(codes, scales, bias, global_scale)

    def matmul(self, values: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
        """values (M, K) BF16 or FP32, no scale -> (M, N) in their dtype, in `out` if given.

        Raises MachineError for the native backend on another card than a Blackwell one.
        """
        assert scale is None
        x = quantize(values)
        weight = Packed(self.weight, self.weight_scale, self.weight_global_scale)
        backend = self.backend or ("native" if _major(values.device) in NATIVE_MAJORS else "emulation")
        y = _multiply_native(x, weight) if backend == "native" else dequantize(x) @ dequantize(weight).t()
        y = (y if self.bias is None else y + self.bias.float()).to(values.dtype)
        return y if out is None else out.copy_(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x.reshape(-1, self.in_features), None).view(*x.shape[:-1], self.out_features)


def _major(device: torch.device) -> int:
    """Of a card's compute capability; 0 for a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _multiply_native(x: Packed, weight: Packed) -> Tensor:
    """(M, K) and (N, K) -> FP32 (M, N), rounded to BF16 on the way."""
    device = x.codes.device
    major = _major(device)
    if major not in NATIVE_MAJORS:
        found = f"compute capability {major}.x" if major else f"the device {device.type}"
        raise MachineError(
            f"NVFP4 products want a Blackwell card, compute capability 10 or 12; this is {found}.",
            "Choose FP8 or INT8 for this card.",
        )
    product = torch._scaled_mm(
        x.codes.view(torch.float4_e2m1fn_x2),
        weight.codes.view(torch.float4_e2m1fn_x2).t(),
        scale_a=x.scales.flatten(),
        scale_b=weight.scales.flatten(),
        out_dtype=torch.bfloat16,
    )
    # the product knows the block scales alone
    return product.float() * (x.global_scale * weight.global_scale)
