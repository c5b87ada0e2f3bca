"""The codes of an edit's later steps, in Triton: one launch between the projection of q, k and v and attention.

What the two of `attention_codes.py` need all tokens for, the mean key and each channel's largest value, is that of the first
step (`attention_reference.py` says why it serves). So nothing has to be known of other tokens, and each is read once: a program
norms, turns and codes one block of keys of one head and the same tokens' queries, or codes a block of values.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from millicent.kernels import KeysValues
from millicent.kernels.attention_codes import (
    PADDING_TOKENS,
    QUERY_SCALE,
    SMALLEST_AMAX,
    NormRope,
    Queries,
    make_codes,
    norm_and_turn,
    round_to_int8,
    store_queries,
)
from millicent.kernels.reference import NORM_EPS

PARTS = 4
"""Of a block of tokens: one is read while the one before it is coded. More are more to read, fewer need more registers."""
WARP_TOKENS = 8
PART_CHANNELS = 64
MOST_REGISTERS = {128: 64, 64: 80}
"""A thread's, by a block's tokens: for two programs of 16 warps on a multiprocessor, or three of 8, for which Blackwell's compiler
needs 72. Left to itself it takes more, and more are waited for."""


@triton.jit
def _round_to_bf16(x):  # type: ignore[no-untyped-def]
    """FP32 to BF16, two at once; what is rounded and widened again the compiler would round one by one."""
    return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2)


@triton.jit
def _hold(x):  # type: ignore[no-untyped-def]
    """BF16 `x`; what is computed from it from here on is not what was computed before, and so not held in its place."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.bfloat16, False, 2)


@triton.jit
def _read_part(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_stride, k_stride, row, end, asked_first, asked_end, D: tl.constexpr
):  # fmt: skip
    """Rows of q, k, cos and sin as they lie in memory, for the fewest registers; zeros from `end` on, and of q where none asks."""
    inside, channel = (row < end)[:, None], tl.arange(0, D)[None, :]
    asked = ((row >= asked_first) & (row < asked_end))[:, None]
    pair = row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    k = tl.load(k_ptr + row[:, None] * k_stride + channel, inside, 0.0)
    q = tl.load(q_ptr + row[:, None] * q_stride + channel, asked, 0.0)
    return q, k, tl.load(cos_ptr + pair, inside, 0.0), tl.load(sin_ptr + pair, inside, 0.0)


@triton.jit
def _code_queries_keys(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, weights_ptr, cos_ptr, sin_ptr, mean, q_codes_ptr, q_scale_ptr, k_codes_ptr, k_scale_ptr, q_stride, k_stride,
    start, tokens, q_first, q_last, img, factor,
    EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """Codes and scales of a block of keys less `mean` (D,), and of the queries among its tokens. Pointers are of one head."""
    # to the block's first row here, so that places within it need no more than 32 bits
    first = start.to(tl.int64)
    q_ptr, k_ptr = q_ptr + first * q_stride, k_ptr + first * k_stride
    cos_ptr, sin_ptr = cos_ptr + first * (D // 2), sin_ptr + first * (D // 2)
    q_codes_ptr, q_scale_ptr = q_codes_ptr + (first - q_first) * D, q_scale_ptr + (first - q_first)
    k_codes_ptr += first * D
    end, asked_first, asked_end = tokens - start, q_first - start, q_last - start

    # normed and turned keys wait until the block's largest is known: in BF16, for half of FP32's registers
    keys = ()
    largest = tl.full([PART], SMALLEST_AMAX, tl.float32)
    row = tl.arange(0, PART)
    ahead = _read_part(q_ptr, k_ptr, cos_ptr, sin_ptr, q_stride, k_stride, row, end, asked_first, asked_end, D)
    for part in tl.static_range(0, BLOCK, PART):
        q, k, c, s = ahead
        row = part + tl.arange(0, PART)
        asked = (row >= asked_first) & (row < asked_end)
        if part + PART < BLOCK:
            ahead = _read_part(q_ptr, k_ptr, cos_ptr, sin_ptr, q_stride, k_stride, row + PART, end, asked_first, asked_end, D)
        k = _round_to_bf16(norm_and_turn(k.to(tl.float32), weights_ptr + D, c, s, start + row, img, EPS, D, PART))
        # over rows only after the last part: all warps wait for that
        largest = tl.maximum(largest, tl.where(row < end, tl.max(tl.abs(k.to(tl.float32) - mean[None, :]), 1), 0.0))
        keys += (_hold(k),)  # type: ignore[assignment]
        q = _round_to_bf16(norm_and_turn(q.to(tl.float32), weights_ptr, c, s, start + row, img, EPS, D, PART)).to(tl.float32)
        store_queries(q, q_codes_ptr, q_scale_ptr, row, asked, factor, D)
    amax = tl.max(largest, 0)
    tl.store(k_scale_ptr, amax / 127.0)
    for part in tl.static_range(0, BLOCK, PART):
        row = part + tl.arange(0, PART)
        factors = tl.where(row < end, 127.0 / amax, 0.0)
        codes = round_to_int8((keys[part // PART].to(tl.float32) - mean[None, :]) * factors[:, None])
        if PERMUTE:
            # as attention_codes._quantize_keys does
            row = (row // 16) * 16 + (row // 2 % 2) * 8 + (row // 4 % 4) * 2 + row % 2
        channel = tl.max_contiguous(tl.arange(0, D), 8)
        tl.store(k_codes_ptr + row[:, None] * D + channel[None, :], codes)


@triton.jit
def _code_values(  # type: ignore[no-untyped-def]
    v_ptr, scale_ptr, codes_ptr, stride, token, tokens, padded_tokens, D: tl.constexpr, PART: tl.constexpr
):
    """E4M3 codes of a block of one head's values, a row a channel."""
    for part in tl.static_range(0, D, PART):
        channel = part + tl.arange(0, PART)
        scale = tl.load(scale_ptr + channel)
        x = tl.load(v_ptr + token[:, None] * stride + channel[None, :], (token < tokens)[:, None], 0.0).to(tl.float32)
        # a card's conversion saturates, and leaves what is no number
        codes = tl.trans((x * (1.0 / scale)[None, :]).to(tl.float8e4nv))
        tl.store(codes_ptr + channel.to(tl.int64)[:, None] * padded_tokens + token[None, :], codes)


@triton.jit(do_not_specialize=["tokens", "q_first", "q_last", "img"])
def _code_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, weights_ptr, cos_ptr, sin_ptr, mean_ptr, v_scale_ptr, q_codes_ptr, q_scale_ptr, k_codes_ptr, k_scale_ptr,
    v_codes_ptr, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, tokens, padded_tokens,
    q_first, q_last, q_padded, img, factor,
    EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, CHANNELS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One block of tokens of one head: queries and keys or, by the grid's second axis, values."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(2)
    start = block * BLOCK
    if tl.program_id(1) == 0:
        _code_queries_keys(
            q_ptr + head * q_head_stride, k_ptr + head * k_head_stride, weights_ptr, cos_ptr, sin_ptr,
            tl.load(mean_ptr + head * D + tl.arange(0, D)), q_codes_ptr + head * q_padded * D, q_scale_ptr + head * q_padded,
            k_codes_ptr + head * padded_tokens * D, k_scale_ptr + head * (padded_tokens // BLOCK) + block, q_stride, k_stride,
            start, tokens, q_first, q_last, img, factor, EPS, D, BLOCK, PART, FP8,
        )  # fmt: skip
    elif FP8:
        token = (start + tl.arange(0, BLOCK)).to(tl.int64)
        _code_values(
            v_ptr + head * v_head_stride, v_scale_ptr + head * D, v_codes_ptr + head * D * padded_tokens, v_stride, token, tokens,
            padded_tokens, D, CHANNELS,
        )  # fmt: skip


def code(
    q: Tensor, k: Tensor, v: Tensor, queries: slice, block_tokens: int, fp8_values: bool, norm_rope: NormRope, kept: KeysValues
) -> tuple[Queries, KeysValues]:
    """The codes of q, k and v (S, H, D) BF16, which are left as they came; of q only the rows `queries` are read.

    Keys and values are coded with k_mean and v_scale of `kept`. Queries' rows beyond the last are left as memory was: attention
    makes rows of them that it does not write.
    """
    assert norm_rope.first_row == 0
    tokens, heads, width = k.shape
    first, last = queries.start, queries.stop
    q_padded = triton.cdiv(last - first, PADDING_TOKENS) * PADDING_TOKENS
    made = Queries(
        torch.empty(heads, q_padded, width, dtype=torch.int8, device=k.device),
        torch.empty(heads, q_padded, dtype=torch.float32, device=k.device),
    )
    codes = make_codes(v, block_tokens, fp8_values, kept)
    padded = codes.k.shape[1]
    _code_kernel[(heads, 2 if fp8_values else 1, padded // block_tokens)](
        q, k, v, norm_rope.weights, norm_rope.cos, norm_rope.sin, kept.k_mean, kept.v_scale, made.q, made.q_scale, codes.k,
        codes.k_scale, codes.v, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], tokens, padded, first, last, q_padded,
        norm_rope.img_rows, QUERY_SCALE / math.sqrt(width),
        EPS=NORM_EPS, D=width, BLOCK=block_tokens, PART=block_tokens // PARTS, CHANNELS=min(width, PART_CHANNELS), FP8=fp8_values,
        num_warps=block_tokens // WARP_TOKENS, maxnreg=MOST_REGISTERS[block_tokens],
    )  # fmt: skip
    return made, codes
