"""Weights of 4 or 8 bits with one scale per block: NVFP4, MXFP8, and 8-bit codes on a grid of scales.

Sources: comfy-kitchen 0.2.40 (NVFP4 and MXFP8, padded and swizzled), NVIDIA ModelOpt and compressed-tensors (NVFP4,
plain), musubi-tuner and DeepSeek-V3 (grids). All scales multiply, in FP32. N and K are the weight's rows and columns; a
stored tensor may be padded beyond them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millicent.errors import CheckpointError
from millicent.formats.packed import decode_e2m1, decode_e8m0, unpack_nibbles
from millicent.formats.swizzle import deswizzle, round_up

NVFP4_BLOCK = 16
MXFP8_BLOCK = 32
# comfy-kitchen pads rows as it pads columns, up to whole blocks
NVFP4_ROW_MULTIPLE = NVFP4_BLOCK
MXFP8_ROW_MULTIPLE = MXFP8_BLOCK

_FIX = "Fetch the file again, or use another quantization of this model."


def dequantize_nvfp4(
    packed: Tensor, block_scales: Tensor, global_scale: Tensor, shape: tuple[int, int], high_first: bool, swizzled: bool
) -> Tensor:
    """FP32 of `shape` (N, K): w = e2m1 * block scale * global scale, a block being 16 neighbors along K.

    packed: codes, two to a byte: (rows, K up to a multiple of 16, by 2), rows being N or N up to a multiple of 16.
    block_scales: E4M3 or its bytes, one for each block of `packed`; swizzled, padded to multiples of 128 and 4.
    global_scale: one number, multiplied; where a file stores its inverse (`weight_global_scale`), pass the inverse of that.
    high_first: the even element lies in the high nibble.
    Raises CheckpointError for other types or shapes.
    """
    _check_dtype("NVFP4 codes", packed, torch.uint8, torch.int8)
    _check_dtype("NVFP4 block scales", block_scales, torch.float8_e4m3fn, torch.uint8)
    columns = round_up(shape[1], NVFP4_BLOCK)
    _check_padded("NVFP4 codes", packed, shape, columns // 2, NVFP4_ROW_MULTIPLE)
    if global_scale.numel() != 1:
        raise CheckpointError(f"An NVFP4 weight has a global scale of {tuple(global_scale.shape)}; wanted one number.", _FIX)
    plain = _plain_scales("NVFP4", block_scales, packed.shape[0], columns // NVFP4_BLOCK, swizzled)
    scales = global_scale.float().reshape(()) * plain.view(torch.float8_e4m3fn).float()
    return _scale_blocks(decode_e2m1(unpack_nibbles(packed, high_first)), scales, shape)


def dequantize_mxfp8(codes: Tensor, block_scales: Tensor, shape: tuple[int, int], swizzled: bool) -> Tensor:
    """FP32 of `shape` (N, K): w = code * 2^(b - 127), a block being 32 neighbors along K.

    codes: E4M3, (rows, K up to a multiple of 32), rows being N or N up to a multiple of 32.
    block_scales: E8M0 or its bytes b, one for each block of `codes`; swizzled, padded to multiples of 128 and 4.
    Raises CheckpointError for other types or shapes.
    """
    _check_dtype("MXFP8 codes", codes, torch.float8_e4m3fn)
    _check_dtype("MXFP8 block scales", block_scales, torch.float8_e8m0fnu, torch.uint8)
    columns = round_up(shape[1], MXFP8_BLOCK)
    _check_padded("MXFP8 codes", codes, shape, columns, MXFP8_ROW_MULTIPLE)
    plain = _plain_scales("MXFP8", block_scales, codes.shape[0], columns // MXFP8_BLOCK, swizzled)
    return _scale_blocks(codes.float(), decode_e8m0(plain), shape)


def dequantize_blocks(codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """FP32 of `shape` (N, K): w = code * scale, the block's size being what the scales' shape says.

    codes: INT8, E4M3 or E5M2, (N, K).
    scales: FP32, FP16 or BF16, either a grid (ceil(N/b), ceil(K/b)) over square blocks, b a power of 2 as every known
    producer has it, the last ones cut off; or per row (N, K/b) or (N, K/b, 1), b any divisor of K.
    Raises CheckpointError for other types, and for shapes that fit neither reading or two different ones.
    """
    _check_dtype("8-bit codes", codes, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    # bytes here would be E8M0 exponents, which only look like numbers
    _check_dtype("Block scales", scales, torch.float32, torch.float16, torch.bfloat16)
    if tuple(codes.shape) != shape:
        raise CheckpointError(f"8-bit codes are {tuple(codes.shape)}; wanted {shape}.", _FIX)
    rows, columns = _read_block_size(tuple(scales.shape), shape)
    per_row = scales.float().reshape(scales.shape[:2]).repeat_interleave(rows, 0)[: shape[0]]
    return per_row.repeat_interleave(columns, 1)[:, : shape[1]] * codes.float()


def _read_block_size(grid: tuple[int, ...], shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a block, cut to the weight's."""
    n, k = shape
    sizes = [1 << power for power in range(max(shape).bit_length() + 1)]
    readings = {(min(size, n), min(size, k)) for size in sizes if grid == (-(-n // size), -(-k // size))}
    if len(grid) in (2, 3) and grid[0] == n and grid[2:] in ((), (1,)) and grid[1] > 0 and k % grid[1] == 0:
        readings.add((1, k // grid[1]))
    if len(readings) != 1:
        fitting = " or ".join(f"{rows} x {columns}" for rows, columns in sorted(readings)) or "none"
        raise CheckpointError(f"Block scales are {grid} for a {shape} weight; wanted one size of block, found {fitting}.", _FIX)
    return readings.pop()


def _check_dtype(what: str, tensor: Tensor, *wanted: torch.dtype) -> None:
    if tensor.dtype not in wanted:
        found, *names = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *wanted))
        raise CheckpointError(f"{what} are {found}; wanted {' or '.join(names)}.", _FIX)


def _check_padded(what: str, codes: Tensor, shape: tuple[int, int], columns: int, row_multiple: int) -> None:
    # ModelOpt leaves the rows as they are
    wanted = sorted({(shape[0], columns), (round_up(shape[0], row_multiple), columns)})
    if tuple(codes.shape) not in wanted:
        raise CheckpointError(f"{what} are {tuple(codes.shape)}; a {shape} weight wants {' or '.join(map(str, wanted))}.", _FIX)


def _plain_scales(what: str, block_scales: Tensor, rows: int, columns: int, swizzled: bool) -> Tensor:
    if swizzled:
        return deswizzle(block_scales, rows, columns)
    if tuple(block_scales.shape) != (rows, columns):
        raise CheckpointError(f"{what} block scales are {tuple(block_scales.shape)}; wanted {(rows, columns)}.", _FIX)
    return block_scales


def _scale_blocks(values: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """values (rows, columns), overwritten, times scales (rows, blocks), cut to `shape`."""
    values.view(*scales.shape, -1).mul_(scales[..., None])
    return values[: shape[0], : shape[1]]
