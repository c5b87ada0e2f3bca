"""The codes that 8-bit attention multiplies, in Triton: two launches between the projection of q, k and v and attention.

The first norms and turns what is still to be (the twin of `reference.qk_norm_rope`), codes the queries from the registers
they were normed in, and takes the sums of the keys and the largest values, chunk by chunk. The second, which needs those of
all tokens, codes keys and values. `attention_reference.py` says what the codes are, and from which paper.

Normed and turned numbers are rounded to BF16 before they are coded or summed, so that the codes are those which
`elementwise.qk_norm_rope` and a quantization after it would give, but for FP32's last bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from millicent.kernels import KeysValues
from millicent.kernels.reference import NORM_EPS

PADDING_TOKENS = 128
"""Codes are padded with zeros to a multiple of this many tokens, so that no load of a tile needs a mask."""
CHUNK_TOKENS = 256
LARGEST_CHUNKS = 64
"""The second launch reads the statistics of all chunks in every program: more tokens make longer chunks, not more."""
BLOCK_TOKENS = 16
E4M3_MAX = 448.0
QUERY_SCALE = math.log2(math.e) / 127.0

ROUNDING = tl.constexpr(12582912.0)
SMALLEST_AMAX = tl.constexpr(1e-12)


@dataclass(frozen=True)
class NormRope:
    """What turns q and k into what attention takes: see `reference.qk_norm_rope`; cos and sin (S, D/2), img_rows of S.

    Tokens before `first_row` have been normed and turned already.
    """

    weights: Tensor
    cos: Tensor
    sin: Tensor
    img_rows: int
    first_row: int


@dataclass(frozen=True)
class Queries:
    """INT8 queries (H, padded, D) with scales (H, padded), which hold log2(e) / sqrt(D) too."""

    q: Tensor
    q_scale: Tensor


@dataclass(frozen=True)
class Survey(Queries):
    """What the first launch makes: queries, and each chunk's sum of the keys and largest |value|, (chunks, H, D) FP32, of all
    `tokens`."""

    k_sum: Tensor
    v_amax: Tensor
    tokens: int


@triton.jit
def load_tile(ptr, token, stride, mask, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """(tokens, D) FP32, zero where not `mask`."""
    return tl.load(ptr + token[:, None] * stride + tl.arange(0, D)[None, :], mask[:, None], 0.0).to(tl.float32)


@triton.jit
def round_to_int8(x):  # type: ignore[no-untyped-def]
    """`x` rounded to the nearest, ties to even; |x| <= 127."""
    # the sum's last bits are the integer, in two's complement
    return (x + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def norm_and_turn(  # type: ignore[no-untyped-def]
    x, weight_ptr, c, s, token, img, EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of x (BLOCK, D), normed and turned, in FP32; zeros stay zeros."""
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
    stream = tl.where(token < img, 0, 1)
    weight = tl.load(weight_ptr + (stream * 2 * D)[:, None] + tl.arange(0, D)[None, :])
    normed = x * rstd[:, None] * weight.to(tl.float32)
    a, b = tl.split(tl.reshape(normed, (BLOCK, D // 2, 2)))
    return tl.reshape(tl.join(a * c - b * s, a * s + b * c), (BLOCK, D))


@triton.jit
def store_queries(x, codes_ptr, scale_ptr, row, stored, factor, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes and scales of x (BLOCK, D), one scale a row."""
    amax = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST_AMAX)
    codes = round_to_int8(x * (127.0 / amax)[:, None])
    # 8 codes a store, not 16: the layout follows the widest, and in this one q lies as it was read
    channel = tl.max_contiguous(tl.arange(0, D), 8)
    tl.store(codes_ptr + row[:, None] * D + channel[None, :], codes, stored[:, None])
    tl.store(scale_ptr + row, amax * factor, stored)


@triton.jit
def _survey_queries_keys(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, weights_ptr, cos_ptr, sin_ptr, codes_ptr, scale_ptr, q_stride, k_stride, start, chunk_tokens, tokens,
    q_first, q_last, q_padded, first_row, img, factor,
    EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Queries to codes, keys to what they are to be, in place; the sum of the keys (D,). Pointers are of one head."""
    # tiles are added up, and only the last sum is taken over tokens: that one needs all warps to wait
    k_sum = tl.zeros([BLOCK, D], tl.float32)
    for first in range(start, start + chunk_tokens, BLOCK):
        token = (first + tl.arange(0, BLOCK)).to(tl.int64)
        inside = token < tokens
        due = inside & (token >= first_row)
        k = load_tile(k_ptr, token, k_stride, inside, D)
        # read here, not where it is used, so that both are on their way at once
        q = load_tile(q_ptr, token, q_stride, (token >= q_first) & (token < q_last), D)
        if NORM:
            pair = (token * (D // 2))[:, None] + tl.arange(0, D // 2)[None, :]
            c = tl.load(cos_ptr + pair, due[:, None], 0.0)
            s = tl.load(sin_ptr + pair, due[:, None], 0.0)
            turned = norm_and_turn(k, weights_ptr + D, c, s, token, img, EPS, D, BLOCK)
            k = tl.where(due[:, None], turned.to(tl.bfloat16).to(tl.float32), k)
            k_at = k_ptr + token[:, None] * k_stride + tl.arange(0, D)[None, :]
            tl.store(k_at, k.to(tl.bfloat16), due[:, None])
        k_sum += k
        if (first + BLOCK > q_first) & (first < q_first + q_padded):
            if NORM:
                turned = norm_and_turn(q, weights_ptr, c, s, token, img, EPS, D, BLOCK)
                q = tl.where(due[:, None], turned.to(tl.bfloat16).to(tl.float32), q)
            stored = (token >= q_first) & (token < q_first + q_padded)
            store_queries(q, codes_ptr, scale_ptr, token - q_first, stored, factor, D)
    return tl.sum(k_sum, 0)


@triton.jit
def _largest_values(v_ptr, v_stride, start, chunk_tokens, tokens, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest |v| of each channel (D,) over a chunk of one head's values."""
    largest = tl.zeros([BLOCK, D], tl.float32)
    for first in range(start, start + chunk_tokens, BLOCK):
        token = (first + tl.arange(0, BLOCK)).to(tl.int64)
        largest = tl.maximum(largest, tl.abs(load_tile(v_ptr, token, v_stride, token < tokens, D)))
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["tokens", "q_first", "q_last", "first_row", "img"])
def _survey_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, weights_ptr, cos_ptr, sin_ptr, codes_ptr, scale_ptr, k_sum_ptr, v_amax_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    tokens, q_first, q_last, q_padded, first_row, img, chunk_tokens, factor,
    EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One chunk of tokens of one head: queries and keys, or values, by the grid's second axis."""
    head, heads, chunk = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(2)
    start = chunk * chunk_tokens
    at = (chunk * heads + head) * D + tl.arange(0, D)
    if tl.program_id(1) == 0:
        k_sum = _survey_queries_keys(
            q_ptr + head * q_head_stride, k_ptr + head * k_head_stride, weights_ptr, cos_ptr, sin_ptr,
            codes_ptr + head * q_padded * D, scale_ptr + head * q_padded, q_stride, k_stride, start, chunk_tokens, tokens,
            q_first, q_last, q_padded, first_row, img, factor, EPS, D, BLOCK, NORM,
        )  # fmt: skip
        tl.store(k_sum_ptr + at, k_sum)
    else:
        largest = _largest_values(v_ptr + head * v_head_stride, v_stride, start, chunk_tokens, tokens, D, 2 * BLOCK)
        tl.store(v_amax_ptr + at, largest)


@triton.jit
def _load_partials(ptr, chunks, head, heads, D: tl.constexpr, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The statistics of one head: (CHUNKS, D), zero beyond `chunks`."""
    chunk = tl.arange(0, CHUNKS)[:, None]
    return tl.load(ptr + (chunk * heads + head) * D + tl.arange(0, D)[None, :], chunk < chunks, 0.0)


@triton.jit
def _quantize_keys(  # type: ignore[no-untyped-def]
    k_ptr, mean, codes_ptr, scale_ptr, stride, token, tokens, D: tl.constexpr, PERMUTE: tl.constexpr
):
    """Codes of one block of one head's keys less the mean key, and the block's scale."""
    inside = token < tokens
    x = tl.where(inside[:, None], load_tile(k_ptr, token, stride, inside, D) - mean[None, :], 0.0)
    amax = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), SMALLEST_AMAX)
    if PERMUTE:
        # token 4t + 2a + b of a group of 16 goes to row 8a + 2t + b: see attention._align_with_operand
        token = (token // 16) * 16 + (token // 2 % 2) * 8 + (token // 4 % 4) * 2 + token % 2
    tl.store(codes_ptr + token[:, None] * D + tl.arange(0, D)[None, :], round_to_int8(x * (127.0 / amax)))
    tl.store(scale_ptr, amax / 127.0)


@triton.jit(do_not_specialize=["tokens", "chunks", "all_tokens"])
def _quantize_keys_values_kernel(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, k_sum_ptr, v_amax_ptr, k_codes_ptr, v_codes_ptr, k_scale_ptr, v_scale_ptr, k_mean_ptr,
    k_stride, k_head_stride, v_stride, v_head_stride, tokens, padded_tokens, chunks, all_tokens, v_unit,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One block of keys or, by the grid's second axis, of values of one head."""
    head, heads, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.num_programs(2)
    # from the last block on, which the launch before left in the cache
    block = blocks - 1 - tl.program_id(2)
    token = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    if tl.program_id(1) == 0:
        mean = tl.sum(_load_partials(k_sum_ptr, chunks, head, heads, D, CHUNKS), 0) / all_tokens
        if block == 0:
            tl.store(k_mean_ptr + head * D + tl.arange(0, D), mean)
        _quantize_keys(
            k_ptr + head * k_head_stride, mean, k_codes_ptr + head * padded_tokens * D, k_scale_ptr + head * blocks + block,
            k_stride, token, tokens, D, FP8,
        )  # fmt: skip
    elif FP8:
        amax = tl.maximum(tl.max(_load_partials(v_amax_ptr, chunks, head, heads, D, CHUNKS), 0), SMALLEST_AMAX)
        scale = amax * v_unit
        x = load_tile(v_ptr + head * v_head_stride, token, v_stride, token < tokens, D)
        codes = tl.trans((x * (1.0 / scale)[None, :]).to(tl.float8e4nv))
        row = head * D + tl.arange(0, D)
        tl.store(v_codes_ptr + row[:, None] * padded_tokens + token[None, :], codes)
        if block == 0:
            tl.store(v_scale_ptr + row, scale)


def survey(q: Tensor, k: Tensor, v: Tensor, queries: slice, fp8_values: bool, norm_rope: NormRope | None = None) -> Survey:
    """The first launch, over q, k and v (S, H, D) BF16: of q only the rows `queries` are read, and need be there.

    With `norm_rope`, keys that are still to be normed and turned are, in place; queries are on their way to codes.
    """
    tokens, heads, width = k.shape
    first, last = queries.start, queries.stop
    padded = triton.cdiv(last - first, PADDING_TOKENS) * PADDING_TOKENS
    codes = torch.empty(heads, padded, width, dtype=torch.int8, device=k.device)
    scale = torch.empty(heads, padded, dtype=torch.float32, device=k.device)
    # chunks go on where queries' padding does
    reach = max(tokens, first + padded)
    chunk_tokens = CHUNK_TOKENS * triton.cdiv(reach, CHUNK_TOKENS * LARGEST_CHUNKS)
    k_sum = torch.empty(triton.cdiv(reach, chunk_tokens), heads, width, dtype=torch.float32, device=k.device)
    v_amax = torch.empty_like(k_sum) if fp8_values else k_sum
    made = None if norm_rope is None else (norm_rope.weights, norm_rope.cos, norm_rope.sin)
    _survey_kernel[(heads, 2 if fp8_values else 1, len(k_sum))](
        q, k, v, *(made or (None, None, None)), codes, scale, k_sum, v_amax, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        tokens, first, last, padded, norm_rope.first_row if norm_rope else 0, norm_rope.img_rows if norm_rope else 0,
        chunk_tokens, QUERY_SCALE / math.sqrt(width),
        EPS=NORM_EPS, D=width, BLOCK=BLOCK_TOKENS, NORM=norm_rope is not None, num_warps=4,
    )  # fmt: skip
    return Survey(codes, scale, k_sum, v_amax, tokens)


def make_codes(v: Tensor, block_tokens: int, fp8_values: bool, statistics: KeysValues | None = None) -> KeysValues:
    """Room for the codes of keys and values like `v` (S, H, D); without `fp8_values` v itself stands for its own.

    Keys (H, padded, D) have scales (H, blocks), values are E4M3 (H, D, padded). `statistics`: whose k_mean and v_scale they share.
    """
    tokens, heads, width = v.shape
    padded = triton.cdiv(tokens, PADDING_TOKENS) * PADDING_TOKENS
    codes = torch.empty(heads, padded, width, dtype=torch.int8, device=v.device)
    k_scale = torch.empty(heads, padded // block_tokens, dtype=torch.float32, device=v.device)
    values = torch.empty(heads, width, padded, dtype=torch.float8_e4m3fn, device=v.device) if fp8_values else v
    if statistics is not None:
        return KeysValues(tokens, statistics.k_mean, codes, k_scale, values, statistics.v_scale)
    k_mean, v_scale = torch.empty(2, heads, width, dtype=torch.float32, device=v.device)
    return KeysValues(tokens, k_mean, codes, k_scale, values, v_scale)


def quantize_keys_values(
    k: Tensor, v: Tensor, made: Survey, block_tokens: int, fp8_values: bool, headroom: float = 1.0, codes: KeysValues | None = None
) -> KeysValues:  # fmt: skip
    """The second launch: codes of k and, with `fp8_values`, of v, both (S, H, D); one scale for `block_tokens` keys.

    k and v may be a part of the tokens surveyed. headroom: how far beyond the largest |v| surveyed the codes reach. codes: where
    they and what the survey found are written, by default new memory.
    """
    codes = codes or make_codes(v, block_tokens, fp8_values)
    heads, padded, width = codes.k.shape
    assert codes.tokens == len(k)
    assert codes.k_scale.shape == (heads, padded // block_tokens)
    chunks = len(made.k_sum)
    _quantize_keys_values_kernel[(heads, 2 if fp8_values else 1, padded // block_tokens)](
        k, v, made.k_sum, made.v_amax, codes.k, codes.v, codes.k_scale, codes.v_scale, codes.k_mean,
        *k.stride()[:2], *v.stride()[:2], len(k), padded, chunks, made.tokens, headroom / E4M3_MAX,
        D=width, BLOCK=block_tokens, CHUNKS=triton.next_power_of_2(chunks), FP8=fp8_values, num_warps=8,
    )  # fmt: skip
    return codes
