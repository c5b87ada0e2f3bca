"""8-bit attention in Triton, for cards from Ampere on; `attention_reference.py` says what it computes, and from which paper.

What makes it fast, beyond the formats:

- Keys are stored permuted within groups of 16 tokens, so that the thread which holds a score in the tensor core's
  accumulator layout is the one that must hold it as the 8-bit left operand of the second product: the probabilities
  never leave their registers.
- The conversion of scores from integers (a quarter of the rate of an addition) is an addition of the bits of 1.5 * 2**23,
  which makes them a float; the offset, the scales and the running maximum then fold into the one FMA before exp2.
- Only the last tile is masked, and only where the tokens do not fill it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from millicent.errors import MachineError
from millicent.kernels.attention_hopper import attend_hopper

PADDING_TOKENS = 128
"""Codes are padded with zeros to a multiple of this many tokens, so that no load of a tile needs a mask."""
CHUNK_TOKENS = 512
QUERY_SCALE = math.log2(math.e) / 127.0

MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
SMALLEST_AMAX = tl.constexpr(1e-12)
LOG2_E4M3_MAX = tl.constexpr(8.807354922057604)


@dataclass(frozen=True)
class AttentionConfig:
    """How the main kernel is tiled. A block of `columns` keys shares a scale, so results differ with it."""

    rows: int
    columns: int
    warps: int
    stages: int
    fp8_values: bool = True
    tma: bool = False
    """Tiles are fetched by the tensor memory accelerator (Hopper and later)."""
    exact_sum: bool = True
    """Tiles' products are added in FP32 outside of the tensor core, whose FP8 accumulator keeps some 14 bits only."""
    pipelined: bool = False
    """Hopper's own kernel (`attention_hopper.py`), which overlaps the second product with the next tile's softmax."""


HOPPER_CONFIGS = (
    AttentionConfig(64, 128, 4, 2, tma=True),
    AttentionConfig(64, 128, 4, 3, tma=True),
    AttentionConfig(64, 128, 4, 2, tma=True, exact_sum=False),
    AttentionConfig(64, 64, 4, 3, tma=True),
    AttentionConfig(64, 64, 4, 3, tma=True, exact_sum=False),
    AttentionConfig(128, 64, 8, 3, tma=True),
    AttentionConfig(128, 128, 8, 3, tma=True),
    AttentionConfig(128, 128, 8, 3, tma=True, exact_sum=False),
    AttentionConfig(64, 128, 4, 3),
    AttentionConfig(64, 64, 4, 3, tma=True, pipelined=True),
    AttentionConfig(64, 64, 4, 4, tma=True, pipelined=True),
    AttentionConfig(128, 64, 8, 4, tma=True, pipelined=True),
    AttentionConfig(64, 64, 4, 3, tma=True, pipelined=True, exact_sum=False),
    AttentionConfig(64, 128, 4, 2, tma=True, pipelined=True, exact_sum=False),
    AttentionConfig(64, 128, 4, 3, tma=True, pipelined=True, exact_sum=False),
    AttentionConfig(128, 128, 8, 2, tma=True, pipelined=True, exact_sum=False),
)
"""To be timed against each other; the first is the default."""
ADA_CONFIG = AttentionConfig(128, 64, 8, 3)
AMPERE_CONFIG = AttentionConfig(128, 64, 8, 2, fp8_values=False)


def choose_config(capability: tuple[int, int]) -> AttentionConfig:
    """The tiling for a card of this compute capability. Raises MachineError for cards older than Ampere."""
    if capability < (8, 0):
        raise MachineError(
            f"8-bit attention needs compute capability 8.0 or later; this card has {capability[0]}.{capability[1]}.",
            "Choose exact attention.",
        )
    if capability[0] == 9:
        return HOPPER_CONFIGS[0]
    return ADA_CONFIG if capability >= (8, 9) else AMPERE_CONFIG


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, k_sum_ptr, v_amax_ptr, k_stride, k_head_stride, v_stride, v_head_stride, tokens, D: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """For one chunk of tokens and one head: the sum of k and the largest |v| of each channel; both (chunks, H, D)."""
    chunk, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    channel = tl.arange(0, D)
    k_sum = tl.zeros([D], tl.float32)
    v_amax = tl.zeros([D], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        token = (chunk * CHUNK + start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (token < tokens)[:, None]
        k = tl.load(k_ptr + token[:, None] * k_stride + head * k_head_stride + channel[None, :], inside, 0.0)
        k_sum += tl.sum(k.to(tl.float32), 0)
        if FP8:
            v = tl.load(v_ptr + token[:, None] * v_stride + head * v_head_stride + channel[None, :], inside, 0.0)
            v_amax = tl.maximum(v_amax, tl.max(tl.abs(v.to(tl.float32)), 0))
    at = (chunk * heads + head) * D + channel
    tl.store(k_sum_ptr + at, k_sum)
    if FP8:
        tl.store(v_amax_ptr + at, v_amax)


@triton.jit
def _load_partials(ptr, chunks, head, heads, D: tl.constexpr, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The statistics of one head: (CHUNKS, D), zero beyond `chunks`."""
    chunk = tl.arange(0, CHUNKS)[:, None]
    return tl.load(ptr + (chunk * heads + head) * D + tl.arange(0, D)[None, :], chunk < chunks, 0.0)


@triton.jit
def _round_to_int8(x):  # type: ignore[no-untyped-def]
    """`x` rounded to the nearest, ties to even; |x| <= 127."""
    return (x + MAGIC - MAGIC).to(tl.int8)


@triton.jit
def _quantize_queries_kernel(  # type: ignore[no-untyped-def]
    q_ptr, codes_ptr, scale_ptr, stride, head_stride, tokens, padded_tokens, factor, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Codes (H, padded, D) and scales (H, padded) of one block of tokens of one head, one scale a token."""
    block, head = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, D)[None, :]
    token = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    x = tl.load(q_ptr + token[:, None] * stride + head * head_stride + channel, (token < tokens)[:, None], 0.0)
    x = x.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST_AMAX)
    codes = _round_to_int8(x * (127.0 / amax)[:, None])
    row = head.to(tl.int64) * padded_tokens + token
    tl.store(codes_ptr + row[:, None] * D + channel, codes)
    tl.store(scale_ptr + row, amax * factor)


@triton.jit
def _quantize_keys_kernel(  # type: ignore[no-untyped-def]
    k_ptr, sum_ptr, codes_ptr, scale_ptr, stride, head_stride, tokens, padded_tokens, chunks, D: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """Codes (H, padded, D) of one block of keys of one head less the mean key, and its scale in (H, blocks)."""
    block, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    channel = tl.arange(0, D)[None, :]
    token = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (token < tokens)[:, None]
    mean = tl.sum(_load_partials(sum_ptr, chunks, head, heads, D, CHUNKS), 0) / tokens
    x = tl.load(k_ptr + token[:, None] * stride + head * head_stride + channel, inside, 0.0).to(tl.float32)
    x = tl.where(inside, x - mean[None, :], 0.0)
    amax = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), SMALLEST_AMAX)
    codes = _round_to_int8(x * (127.0 / amax))
    if PERMUTE:
        # token 4t + 2a + b of a group of 16 goes to row 8a + 2t + b: see _align_with_operand
        token = (token // 16) * 16 + (token // 2 % 2) * 8 + (token // 4 % 4) * 2 + token % 2
    row = head.to(tl.int64) * padded_tokens + token
    tl.store(codes_ptr + row[:, None] * D + channel, codes)
    tl.store(scale_ptr + head * tl.num_programs(0) + block, amax / 127.0)


@triton.jit
def _quantize_values_kernel(  # type: ignore[no-untyped-def]
    v_ptr, amax_ptr, codes_ptr, scale_ptr, stride, head_stride, tokens, padded_tokens, chunks, D: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """E4M3 codes, transposed to (H, D, padded), of one block of values of one head, and scales (H, D)."""
    block, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    channel = tl.arange(0, D)
    token = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    amax = tl.max(_load_partials(amax_ptr, chunks, head, heads, D, CHUNKS), 0)
    amax = tl.maximum(amax, SMALLEST_AMAX)
    source = v_ptr + token[:, None] * stride + head * head_stride + channel[None, :]
    x = tl.load(source, (token < tokens)[:, None], 0.0).to(tl.float32)
    codes = tl.trans((x * (448.0 / amax)[None, :]).to(tl.float8e4nv))
    row = head.to(tl.int64) * D + channel
    tl.store(codes_ptr + row[:, None] * padded_tokens + token[None, :], codes)
    if block == 0:
        tl.store(scale_ptr + row, amax / 448.0)


@triton.jit
def _align_with_operand(p, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """`p` (M, N) with its columns in the values' order of tokens.

    A thread t of four holds columns 8a + 2t + b of a group of 16 as accumulator, and columns 4t + 2a + b as 8-bit left
    operand (PTX ISA, the fragments of m64nNk32 and m16n8k32), so that this moves nothing between threads.
    """
    return p.reshape(M, N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(M, N)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, q_scale, k, v, k_scale_ptr, v_stride, head, tile, k_tokens, k_padded, acc, total, running_max,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr, EXACT_SUM: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the N keys of `tile`; the new accumulator, sum and maximum (in log2)."""
    start = tile * N
    column = tl.arange(0, N)
    if TMA:
        keys = k.load([head * k_padded + start, 0])
    else:
        keys = tl.load(k + (start + column).to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :])
    scale = q_scale * tl.load(k_scale_ptr + tile)
    bits = tl.dot(q, keys.T, out_dtype=tl.int32) + MAGIC_BITS
    scores = bits.to(tl.float32, bitcast=True)
    if MASK:
        token = start + column
        if FP8:
            token = start + column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2
        scores = tl.where((token < k_tokens)[None, :], scores, float("-inf"))
    largest = tl.maximum(running_max, (tl.max(scores, 1) - MAGIC) * scale)
    shrink = tl.exp2(running_max - largest)
    offset = MAGIC * scale + largest
    if FP8:
        offset -= LOG2_E4M3_MAX
    p = tl.exp2(scores * scale[:, None] - offset[:, None])
    total = total * shrink + tl.sum(p, 1)
    if FP8:
        if TMA:
            values = v.load([head * D, start])
        else:
            values = tl.load(v + tl.arange(0, D).to(tl.int64)[:, None] * k_padded + (start + column)[None, :])
        weights = _align_with_operand(p.to(tl.float8e4nv), M, N)
        if EXACT_SUM:
            acc = tl.fma(acc, tl.broadcast_to(shrink[:, None], acc.shape), tl.dot(weights, values.T))
        else:
            acc = tl.dot(weights, values.T, acc * shrink[:, None])
    else:
        address = v + (start + column).to(tl.int64)[:, None] * v_stride + tl.arange(0, D)[None, :]
        values = tl.load(address, (start + column < k_tokens)[:, None], 0.0) if MASK else tl.load(address)
        acc = tl.dot(p.to(tl.bfloat16), values, acc * shrink[:, None])
    return acc, total, largest


@triton.jit
def _attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k, v, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr, v_stride, v_head_stride, out_stride,
    q_tokens, k_tokens, q_padded, k_padded,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr, EXACT_SUM: tl.constexpr,
):  # fmt: skip
    """The output of M queries of one head."""
    block, head = tl.program_id(0), tl.program_id(1)
    row = block * M + tl.arange(0, M)
    channel = tl.arange(0, D)
    q_row = head.to(tl.int64) * q_padded + row
    q = tl.load(q_ptr + q_row[:, None] * D + channel[None, :])
    q_scale = tl.load(q_scale_ptr + q_row)
    k_scale_ptr += head * tl.cdiv(k_tokens, N)
    if not TMA:
        k += head.to(tl.int64) * k_padded * D
        v += head.to(tl.int64) * (k_padded * D if FP8 else v_head_stride)
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    running_max = tl.full([M], float("-inf"), tl.float32)
    full_tiles = k_tokens // N
    for tile in range(full_tiles):
        acc, total, running_max = _attend(
            q, q_scale, k, v, k_scale_ptr, v_stride, head, tile, k_tokens, k_padded, acc, total, running_max,
            D, M, N, FP8, TMA, EXACT_SUM, False,
        )  # fmt: skip
    if full_tiles * N < k_tokens:
        acc, total, running_max = _attend(
            q, q_scale, k, v, k_scale_ptr, v_stride, head, full_tiles, k_tokens, k_padded, acc, total, running_max,
            D, M, N, FP8, TMA, EXACT_SUM, True,
        )  # fmt: skip
    result = acc * (1.0 / total)[:, None]
    if FP8:
        result *= tl.load(v_scale_ptr + head * D + channel)[None, :]
    out_at = out_ptr + row.to(tl.int64)[:, None] * out_stride + head * D + channel[None, :]
    tl.store(out_at, result.to(tl.bfloat16), (row < q_tokens)[:, None])


@dataclass(frozen=True)
class QuantizedKeysValues:
    """Keys (H, padded, D) and values, FP8 as (H, D, padded) or as they came, with their scales."""

    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor


def quantize_queries(q: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes (H, padded, D) of q (Q, H, D), and scales (H, padded) that hold log2(e) / sqrt(D) too."""
    tokens, heads, width = q.shape
    padded = triton.cdiv(tokens, PADDING_TOKENS) * PADDING_TOKENS
    codes = torch.empty(heads, padded, width, dtype=torch.int8, device=q.device)
    scale = torch.empty(heads, padded, dtype=torch.float32, device=q.device)
    grid = (padded // 64, heads)
    factor = QUERY_SCALE / math.sqrt(width)
    _quantize_queries_kernel[grid](
        q, codes, scale, q.stride(0), q.stride(1), tokens, padded, factor, D=width, BLOCK=64, num_warps=4
    )
    return codes, scale


def quantize_keys_values(k: Tensor, v: Tensor, block_tokens: int, fp8_values: bool) -> QuantizedKeysValues:
    """INT8 codes of k and, with `fp8_values`, E4M3 codes of v, both (S, H, D); one scale for `block_tokens` keys."""
    tokens, heads, width = k.shape
    padded = triton.cdiv(tokens, PADDING_TOKENS) * PADDING_TOKENS
    chunks, blocks = triton.cdiv(tokens, CHUNK_TOKENS), triton.cdiv(tokens, block_tokens)
    k_sum = torch.empty(chunks, heads, width, dtype=torch.float32, device=k.device)
    v_amax = torch.empty_like(k_sum)
    _statistics_kernel[(chunks, heads)](
        k, v, k_sum, v_amax, k.stride(0), k.stride(1), v.stride(0), v.stride(1), tokens,
        D=width, CHUNK=CHUNK_TOKENS, BLOCK=64, FP8=fp8_values, num_warps=8,
    )  # fmt: skip
    codes = torch.empty(heads, padded, width, dtype=torch.int8, device=k.device)
    k_scale = torch.empty(heads, blocks, dtype=torch.float32, device=k.device)
    chunk_slots = triton.next_power_of_2(chunks)
    _quantize_keys_kernel[(blocks, heads)](
        k, k_sum, codes, k_scale, k.stride(0), k.stride(1), tokens, padded, chunks,
        D=width, BLOCK=block_tokens, CHUNKS=chunk_slots, PERMUTE=fp8_values, num_warps=8,
    )  # fmt: skip
    if not fp8_values:
        return QuantizedKeysValues(codes, k_scale, v, k_scale)
    values = torch.empty(heads, width, padded, dtype=torch.float8_e4m3fn, device=k.device)
    v_scale = torch.empty(heads, width, dtype=torch.float32, device=k.device)
    _quantize_values_kernel[(padded // PADDING_TOKENS, heads)](
        v, v_amax, values, v_scale, v.stride(0), v.stride(1), tokens, padded, chunks,
        D=width, BLOCK=PADDING_TOKENS, CHUNKS=chunk_slots, num_warps=8,
    )  # fmt: skip
    return QuantizedKeysValues(codes, k_scale, values, v_scale)


def attention_int8(q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: AttentionConfig | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask, in 8 bits, written to `out` (Q, H * D) BF16, which is returned.

    q (Q, H, D), k and v (S, H, D) are BF16 views of any strides whose last dimension is contiguous; D is 32, 64 or 128.
    `config` is by default the card's. Raises MachineError for cards older than Ampere.
    """
    heads, width = q.shape[1:]
    assert k.shape == v.shape
    assert k.shape[1:] == (heads, width)
    assert out.shape == (q.shape[0], heads * width)
    assert width in (32, 64, 128)
    assert q.stride(2) == k.stride(2) == v.stride(2) == out.stride(1) == 1
    assert q.dtype == k.dtype == v.dtype == out.dtype == torch.bfloat16
    if config is None:
        config = choose_config(torch.cuda.get_device_capability(q.device))
    q_codes, q_scale = quantize_queries(q)
    codes = quantize_keys_values(k, v, config.columns, config.fp8_values)
    return attend(q_codes, q_scale, codes, q.shape[0], k.shape[0], out, config)


def attend(
    q: Tensor, q_scale: Tensor, codes: QuantizedKeysValues, q_tokens: int, k_tokens: int, out: Tensor, config: AttentionConfig
) -> Tensor:
    """The attention of quantized queries, keys and values (see the functions above), written to `out` (Q, H * D)."""
    heads, q_padded, width = q.shape
    k_padded = codes.k.shape[1]
    if config.pipelined:
        return attend_hopper(
            q, q_scale, codes.k, codes.k_scale, codes.v, codes.v_scale, q_tokens, k_tokens, out,
            config.rows, config.columns, config.stages, config.exact_sum,
        )  # fmt: skip
    keys: Tensor | TensorDescriptor = codes.k
    values: Tensor | TensorDescriptor = codes.v
    if config.tma:
        keys = TensorDescriptor.from_tensor(codes.k.view(-1, width), [config.columns, width])
        values = TensorDescriptor.from_tensor(codes.v.view(-1, k_padded), [width, config.columns])
    v_strides = (0, 0) if config.fp8_values else (codes.v.stride(0), codes.v.stride(1))
    _attention_kernel[(triton.cdiv(q_tokens, config.rows), heads)](
        q, keys, values, q_scale, codes.k_scale, codes.v_scale, out, *v_strides, out.stride(0), q_tokens, k_tokens,
        q_padded, k_padded, D=width, M=config.rows, N=config.columns, FP8=config.fp8_values, TMA=config.tma,
        EXACT_SUM=config.exact_sum, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
