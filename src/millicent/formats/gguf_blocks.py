"""GGUF's blocks of quantized weights -> FP32, in plain PyTorch, on the device that the bytes are on.

Source: the `dequantize_row_*` functions of ggml/src/ggml-quants.c and the `block_*` structs of ggml/src/ggml-common.h in
ggml-org/llama.cpp. The order of the arithmetic is that of its Python package `gguf`, so finite results equal that
package's bit for bit. Files are little-endian, as are the machines that PyTorch runs on.

Shapes: n blocks; a decoder takes (n, block_bytes) uint8 and returns n * values FP32 numbers in the order of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from millicent.errors import CheckpointError
from millicent.formats.gguf_types import BLOCK_TYPES, BlockType


def dequantize(data: Tensor, ggml_type: int, shape: tuple[int, ...]) -> Tensor:
    """data (bytes,) uint8 -> FP32 of `shape`, in torch's order: the last dimension is contiguous. The bytes are not kept.

    A GGUF file lists the dimensions the other way round. Scales that are infinite or NaN are computed with as they are.
    Raises CheckpointError for a type that is not in BLOCK_TYPES, a dimension below 1, a last dimension that is no
    multiple of the block, and a number of bytes that is not the shape's.
    """
    assert data.dtype == torch.uint8, data.dtype
    assert data.ndim == 1, data.shape
    if ggml_type not in BLOCK_TYPES:
        readable = ", ".join(block.name for block in BLOCK_TYPES.values())
        raise CheckpointError(f"A tensor has the ggml type {ggml_type}; those read are {readable}.", "Take a file in one of those.")
    block = BLOCK_TYPES[ggml_type]
    _check_size(data.numel(), block, shape)
    return _DECODERS[block.name](data.reshape(-1, block.block_bytes)).reshape(shape)


def _check_size(found_bytes: int, block: BlockType, shape: tuple[int, ...]) -> None:
    tensor, fix = f"A {block.name} tensor has the shape {tuple(shape)}", "The file is damaged or cut short: fetch it again."
    if any(size < 1 for size in shape):
        raise CheckpointError(f"{tensor}; every dimension must be 1 or more.", fix)
    row_values = shape[-1] if shape else 1
    if row_values % block.values:
        raise CheckpointError(f"{tensor}; its last dimension must be a multiple of {block.values}.", fix)
    wanted_bytes = math.prod(shape) // block.values * block.block_bytes
    if found_bytes != wanted_bytes:
        raise CheckpointError(f"{tensor} and {found_bytes} bytes; {wanted_bytes} bytes were wanted.", fix)


def _floats(stored: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """(n, bytes) -> (n, numbers) FP32. The copy is needed: bytes inside a file or a block are not aligned for `dtype`."""
    # Only NaNs may differ from the reference in their bits: a signaling one in F16 comes out quiet here, unchanged in NumPy.
    return stored.clone(memory_format=torch.contiguous_format).view(dtype).float()


def _bit_planes(packed: Tensor, bits: int) -> Tensor:
    """(..., k) -> (..., 8 / bits, k): first the lowest `bits` of every byte, then those above them."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-2) >> shifts[:, None]).bitwise_and_((1 << bits) - 1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """(n, 4) -> (n, 32), 0 or 16: bit i of the little-endian 32 belongs to value i."""
    return _bit_planes(packed[..., None], 1).flatten(1) << 4


# In all that follows, products are in place and each is rounded on its own: the levels are as large as the result,
# and addcmul may fuse product and sum, which no longer equals the reference.


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_floats(blocks[:, :2]))


def _q4_0(blocks: Tensor) -> Tensor:
    levels = _bit_planes(blocks[:, 2:], 4).flatten(1)
    return levels.float().sub_(8).mul_(_floats(blocks[:, :2]))


def _q4_1(blocks: Tensor) -> Tensor:
    d, m = _floats(blocks[:, :4]).split(1, -1)
    return _bit_planes(blocks[:, 4:], 4).flatten(1).float().mul_(d).add_(m)


def _q5_0(blocks: Tensor) -> Tensor:
    levels = _bit_planes(blocks[:, 6:], 4).flatten(1).bitwise_or_(_fifth_bits(blocks[:, 2:6]))
    return levels.float().sub_(16).mul_(_floats(blocks[:, :2]))


def _q5_1(blocks: Tensor) -> Tensor:
    d, m = _floats(blocks[:, :4]).split(1, -1)
    levels = _bit_planes(blocks[:, 8:], 4).flatten(1).bitwise_or_(_fifth_bits(blocks[:, 4:8]))
    return levels.float().mul_(d).add_(m)


def _k_scales(header: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 16): d, dmin, then 8 scales and 8 minima of 6 bits in 12 bytes -> d * scales, dmin * minima, each (n, 8, 1)."""
    d, dmin = _floats(header[:, :4]).split(1, -1)
    # as get_scale_min_k4: the first four of each stand whole, and their upper 2 bits are the upper bits of the last four
    scales, minima, low = header[:, 4:].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([scales & 63, (low & 15) | (scales >> 2 & 48)], -1)
    minima = torch.cat([minima & 63, (low >> 4) | (minima >> 2 & 48)], -1)
    return (d * scales).unsqueeze(-1), (dmin * minima).unsqueeze(-1)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _k_scales(blocks[:, :16])
    levels = _bit_planes(blocks[:, 16:].unflatten(-1, (4, 32)), 4).flatten(1, 2)
    return levels.float().mul_(scales).sub_(minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _k_scales(blocks[:, :16])
    high = _bit_planes(blocks[:, 16:48], 1) << 4
    levels = _bit_planes(blocks[:, 48:].unflatten(-1, (4, 32)), 4).flatten(1, 2).bitwise_or_(high)
    return levels.float().mul_(scales).sub_(minima)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = blocks.split([128, 64, 16, 2], -1)
    levels = _bit_planes(low.unflatten(-1, (2, 64)), 4).flatten(1)
    levels |= _bit_planes(high.unflatten(-1, (2, 32)), 2).flatten(1) << 4
    steps = (_floats(d) * scales.view(torch.int8)).unsqueeze(-1)
    return levels.unflatten(-1, (16, 16)).float().sub_(32).mul_(steps)


# by ggml's name of the type
_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": partial(_floats, dtype=torch.float32),
    "F16": partial(_floats, dtype=torch.float16),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "BF16": partial(_floats, dtype=torch.bfloat16),
}
