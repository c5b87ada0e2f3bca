"""The matrix product of 8-bit rows with an 8-bit weight, both scales and the bias applied while the sums are in registers.

One source for FP8 and INT8. Tiles of the result go in groups that share their operands in the L2 cache (the order of
Triton's matrix multiplication tutorial). On Hopper the operands come through tensor descriptors (TMA) into wgmma, and a
persistent tile loads the next tile's operands while it writes this one's result; elsewhere they come by pointers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from millicent.errors import InputError, MachineError

MULTIPLE = 16
GROUP_M = 8
FEW_ROWS = 512
FIRST_FP8 = (8, 9)
FIRST_INT8 = (8, 0)
FORMAT_NAMES = {torch.float8_e4m3fn: "FP8", torch.int8: "INT8"}


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block of threads computes at a time, in elements, and how.

    num_stages: tiles of operands in flight, (block_m + block_n) * block_k bytes of shared memory each.
    descriptors: operands through TMA, for Hopper. persistent: one block a processor walks over many tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    persistent: bool = False


HOPPER_TILES = (
    Tile(128, 256, 128, 8, 4, descriptors=True, persistent=True),
    Tile(128, 256, 128, 8, 4, descriptors=True),
    Tile(128, 256, 128, 8, 3, descriptors=True, persistent=True),
    Tile(128, 128, 128, 8, 5, descriptors=True, persistent=True),
    Tile(128, 128, 128, 4, 3, descriptors=True),
    Tile(128, 256, 128, 8, 3),
)
# both fit in 99 KB of shared memory, the least that any card since Ampere has
FEW_ROWS_TILE = Tile(64, 64, 128, 4, 4)
PLAIN_TILE = Tile(128, 128, 128, 8, 4)
# by compute capability: with few rows, and with many
TILES = {
    (8, 0): (FEW_ROWS_TILE, Tile(128, 256, 64, 8, 4)),
    (9, 0): (Tile(64, 128, 128, 4, 4, descriptors=True), HOPPER_TILES[0]),
}


def choose_tile(capability: tuple[int, int], rows: int) -> Tile:
    """The tile for a card's compute capability and the number of rows, M."""
    few, many = TILES.get(capability, (FEW_ROWS_TILE, PLAIN_TILE))
    return few if rows <= FEW_ROWS else many


def scaled_matmul(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, tile: Tile | None = None
) -> Tensor:
    """out = (x @ weight.T) * x_scale * weight_scale.T + bias, rounded once; summed in FP32 for FP8 and int32 for INT8.

    x (M, K) and weight (N, K): codes, both float8_e4m3fn or both int8, contiguous. x_scale (M, 1), weight_scale (N, 1) FP32.
    bias (N,) BF16. out (M, N) BF16; its rows may lie further apart than N. tile: None for the card's own. Returns out.
    FP8 sums on Hopper keep 14 bits or so, as cuBLAS's use_fast_accum has it.
    Raises InputError for K or N that 16 does not divide, MachineError for a card without such arithmetic.
    """
    (m, k), n = x.shape, weight.shape[0]
    check_shape(k, n, x.dtype)
    assert weight.shape[1] == k, (x.shape, weight.shape)
    assert weight.dtype == x.dtype, (x.dtype, weight.dtype)
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert x_scale.shape == (m, 1), x_scale.shape
    assert weight_scale.shape == (n, 1), weight_scale.shape
    assert x_scale.dtype == weight_scale.dtype == torch.float32
    assert x_scale.is_contiguous()
    assert weight_scale.is_contiguous()
    assert out.shape == (m, n), (out.shape, m, n)
    assert out.stride(1) == 1
    assert bias is None or (bias.shape == (n,) and bias.is_contiguous())
    if m:
        _launch(x, x_scale, weight, weight_scale, bias, out, tile or _own_tile(x))
    return out


def check_shape(k: int, n: int, dtype: torch.dtype) -> None:
    """Raises InputError unless 16 divides both sides of the weight (N, K)."""
    if k % MULTIPLE or n % MULTIPLE:
        raise InputError(
            f"{FORMAT_NAMES[dtype]} products want weights whose sides {MULTIPLE} divides; this one is ({n}, {k}).",
            "Keep this layer in BF16.",
        )


def _own_tile(x: Tensor) -> Tile:
    capability = torch.cuda.get_device_capability(x.device)
    first = FIRST_FP8 if x.dtype == torch.float8_e4m3fn else FIRST_INT8
    if capability < first:
        found = f"{FORMAT_NAMES[x.dtype]} products want compute capability {first[0]}.{first[1]} or later"
        raise MachineError(f"{found}; this card has {capability[0]}.{capability[1]}.", "Choose another format for this card.")
    return choose_tile(capability, x.shape[0])


def _launch(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, tile: Tile) -> None:
    (m, k), n = x.shape, weight.shape[0]
    blocks = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    if tile.persistent:
        blocks = min(blocks, torch.cuda.get_device_properties(x.device).multi_processor_count)
    _scaled_matmul[(blocks,)](
        TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]) if tile.descriptors else x,
        x_scale,
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]) if tile.descriptors else weight,
        weight_scale,
        weight_scale if bias is None else bias,
        out,
        m,
        n,
        k,
        out.stride(0),
        HAS_BIAS=bias is not None,
        ACCUMULATOR=tl.int32 if x.dtype == torch.int8 else tl.float32,
        DESCRIPTORS=tile.descriptors,
        PERSISTENT=tile.persistent,
        EVEN_K=k % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP=GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit
def _place(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile's row and column in the grid of tiles: down a group of rows, then to the next column."""
    rows = tl.cdiv(m, BLOCK_M)
    columns = tl.cdiv(n, BLOCK_N)
    first_row = tile // (GROUP * columns) * GROUP
    height = min(rows - first_row, GROUP)
    within = tile % (GROUP * columns)
    return first_row + within % height, within // height


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    source, row, rows, start_k, k, DESCRIPTORS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(BLOCK, BLOCK_K) codes; zeros beyond K, whatever beyond the last row."""
    if DESCRIPTORS:
        codes = source.load([row, start_k])
    else:
        # wrapped, so that no row needs a mask: what a wrapped row gives is never stored
        offsets_row = (row + tl.arange(0, BLOCK)) % rows
        offsets_k = start_k + tl.arange(0, BLOCK_K)
        pointers = source + offsets_row.to(tl.int64)[:, None] * k + offsets_k[None, :]
        codes = tl.load(pointers) if EVEN_K else tl.load(pointers, mask=offsets_k[None, :] < k, other=0.0)
    return codes


@triton.jit
def _scaled_matmul(  # type: ignore[no-untyped-def]
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    out,
    m,
    n,
    k,
    out_stride,
    HAS_BIAS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = _place(tile, m, n, BLOCK_M, BLOCK_N, GROUP)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACCUMULATOR)
        for step in tl.range(0, tl.cdiv(k, BLOCK_K)):
            a = _load(x, tile_m * BLOCK_M, m, step * BLOCK_K, k, DESCRIPTORS, EVEN_K, BLOCK_M, BLOCK_K)
            b = _load(weight, tile_n * BLOCK_N, n, step * BLOCK_K, k, DESCRIPTORS, EVEN_K, BLOCK_N, BLOCK_K)
            accumulator = tl.dot(a, b.T, accumulator, out_dtype=ACCUMULATOR)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        scale_m = tl.load(x_scale + rows, mask=rows < m, other=0.0)
        scale_n = tl.load(weight_scale + columns, mask=columns < n, other=0.0)
        y = accumulator.to(tl.float32) * scale_m[:, None] * scale_n[None, :]
        if HAS_BIAS:
            y += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        pointers = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
        tl.store(pointers, y.to(tl.bfloat16), mask=(rows < m)[:, None] & (columns < n)[None, :])
