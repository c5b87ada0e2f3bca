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

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from millicent.errors import MachineError
from millicent.kernels.attention_codes import NormRope, QuantizedKeysValues, Survey, quantize_keys_values, survey

MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
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


HOPPER_CONFIGS = (
    AttentionConfig(64, 128, 4, 2, tma=True),
    AttentionConfig(64, 128, 4, 3, tma=True),
    AttentionConfig(64, 64, 4, 3, tma=True),
    AttentionConfig(128, 128, 8, 3, tma=True),
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


# one key alone would become a compile-time 1, of which the compiler makes NaN
@triton.jit(do_not_specialize=["q_tokens", "k_tokens"])
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
    k_scale_ptr += head * (k_padded // N)
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


def attention_int8(q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: AttentionConfig | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask, in 8 bits, written to `out` (Q, H * D) BF16, which is returned.

    q (Q, H, D), k and v (S, H, D) are BF16 views of any strides whose last dimension is contiguous; D is 32, 64 or 128.
    `config` is by default the card's. Raises MachineError for cards older than Ampere.
    """
    heads, width = q.shape[1:]
    assert k.shape == v.shape
    assert k.shape[1:] == (heads, width)
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    config = config or _config_of(q.device)
    made = survey(q, k, v, slice(0, len(q)), config.fp8_values)
    return attend(made, quantize_keys_values(k, v, made, config.columns, config.fp8_values), len(q), len(k), out, config)


def attend_normed_int8(
    qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int, first_row: int, queries: slice, out: Tensor,
    config: AttentionConfig | None = None,
) -> Tensor:  # fmt: skip
    """`reference.qk_norm_rope` of the rows from `first_row` on, then attention_int8 of the rows `queries` over all S rows.

    qkv (S, 3, H, D) BF16: the rows before `first_row` hold normed and turned q and k already. Afterwards its k are all normed
    and turned; its q stay as they came. weights (2, 2, D), cos and sin (S, D/2) FP32, and img_rows, how many of the S are
    pictures', as in reference.qk_norm_rope. out (Q, H * D) BF16 is written and returned. D and `config` as in attention_int8.
    """
    tokens, _, heads, width = qkv.shape
    assert qkv.dtype == torch.bfloat16
    assert qkv.stride()[1:] == (heads * width, width, 1)
    assert weights.shape == (2, 2, width)
    assert cos.shape == sin.shape == (tokens, width // 2)
    assert all(tensor.is_contiguous() for tensor in (weights, cos, sin))
    assert 0 <= queries.start < queries.stop <= tokens
    config = config or _config_of(qkv.device)
    q, k, v = qkv.unbind(1)
    made = survey(q, k, v, queries, config.fp8_values, NormRope(weights, cos, sin, img_rows, first_row))
    codes = quantize_keys_values(k, v, made, config.columns, config.fp8_values)
    return attend(made, codes, queries.stop - queries.start, tokens, out, config)


def _config_of(device: torch.device) -> AttentionConfig:
    return choose_config(torch.cuda.get_device_capability(device))


def attend(made: Survey, codes: QuantizedKeysValues, q_tokens: int, k_tokens: int, out: Tensor, config: AttentionConfig) -> Tensor:
    """The attention of quantized queries, keys and values (attention_codes.py), written to `out` (Q, H * D) BF16."""
    heads, q_padded, width = made.q.shape
    k_padded = codes.k.shape[1]
    assert width in (32, 64, 128)
    assert out.shape == (q_tokens, heads * width)
    assert out.stride(1) == 1
    assert out.dtype == torch.bfloat16
    keys: Tensor | TensorDescriptor = codes.k
    values: Tensor | TensorDescriptor = codes.v
    if config.tma:
        keys = TensorDescriptor.from_tensor(codes.k.view(-1, width), [config.columns, width])
        values = TensorDescriptor.from_tensor(codes.v.view(-1, k_padded), [width, config.columns])
    v_strides = (0, 0) if config.fp8_values else (codes.v.stride(0), codes.v.stride(1))
    _attention_kernel[(triton.cdiv(q_tokens, config.rows), heads)](
        made.q, keys, values, made.q_scale, codes.k_scale, codes.v_scale, out, *v_strides, out.stride(0), q_tokens, k_tokens,
        q_padded, k_padded, D=width, M=config.rows, N=config.columns, FP8=config.fp8_values, TMA=config.tma,
        EXACT_SUM=config.exact_sum, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
