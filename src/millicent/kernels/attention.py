"""8-bit attention in Triton, for cards from Ampere on; `attention_reference.py` says what it computes, and from which paper.

What makes it fast, beyond the formats:

- Keys are stored permuted within groups of 16 tokens, so that the thread which holds a score in the tensor core's
  accumulator layout is the one that must hold it as the 8-bit left operand of the second product: the probabilities
  never leave their registers.
- The conversion of scores from integers (a quarter of the rate of an addition) is an addition of the bits of 1.5 * 2**23,
  which makes them a float; the offset, the scales and the running maximum then fold into one FMA.
- The FMA gives, in units of FP16's smallest number, what is nearly the logarithm's FP16 number itself: rounded to FP16 it has
  that number's bits but for a shift. So there is no exp2, of which a multiprocessor makes 16 a clock to 128 additions.
- Threads keep their parts of a row's sum to themselves until the last key.
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
from millicent.kernels import KeysValues
from millicent.kernels.attention_codes import NormRope, Queries, make_codes, quantize_keys_values, survey
from millicent.kernels.attention_kept import code
from millicent.kernels.attention_reference import E4M3_MAX_BITS, VALUE_HEADROOM

MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
MINUS_INFINITY_BITS = tl.constexpr(-8388608)
FP16_SMALLEST = tl.constexpr(2.0**-24)
ONE_BITS = tl.constexpr(E4M3_MAX_BITS)

# two neighboring columns and the two 8 on, in FP16_SMALLEST: their bits in FP16 but for the last 5, which are zeros; then four
# codes as the operand has them, and two sums
CODE_ASM = tl.constexpr("""{
.reg .b32 near, far;
.reg .b16 low, high;
cvt.rn.relu.f16x2.f32 near, $3, $2;
cvt.rn.relu.f16x2.f32 far, $5, $4;
shl.b32 near, near, 5;
shl.b32 far, far, 5;
cvt.rn.satfinite.e4m3x2.f16x2 low, near;
cvt.rn.satfinite.e4m3x2.f16x2 high, far;
mov.b32 $0, {low, high};
add.rn.f16x2 $1, near, far;
}""")


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
    maxnreg: int | None = None
    """The most registers of a thread; None leaves them to the compiler."""


HOPPER_CONFIGS = (
    AttentionConfig(64, 128, 4, 2, tma=True, maxnreg=168),  # three blocks of a multiprocessor's 65536 registers
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
def _add_halves(x, M: tl.constexpr, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two numbers in FP16 each, (M, G, 4) -> (M, G / 2, 4)."""
    a, b = tl.split(x.reshape(M, G // 2, 2, 4).permute(0, 1, 3, 2))
    return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _sum_pairs(pairs, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """FP32 (M, 8) from two numbers in FP16 each, (M, N / 16, 4)."""
    pairs = _add_halves(pairs, M, N // 16)
    pairs = _add_halves(pairs, M, N // 32)
    if N == 128:
        pairs = _add_halves(pairs, M, 2)
    sums = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(tl.float16, bitcast=True)
    return sums.reshape(M, 8).to(tl.float32)


@triton.jit
def _code(scores, scale, largest, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """E4M3 probabilities (M, N) with their columns in the values' order of tokens, and their sums in 8 parts, (M, 8).

    A thread t of four holds columns 8a + 2t + b of a group of 16 as accumulator, and columns 4t + 2a + b as 8-bit left
    operand (PTX ISA, the fragments of m64nNk32 and m16n8k32), so that this moves nothing between threads.
    """
    unit = scale * (32 * FP16_SMALLEST)
    offset = tl.fma(unit, MAGIC, (largest * 32 - ONE_BITS) * FP16_SMALLEST)
    halves = scores * unit[:, None] - offset[:, None]
    even, odd = tl.split(halves.reshape(M, N // 16, 2, 4, 2))
    a, c = tl.split(even.permute(0, 1, 3, 2))
    b, d = tl.split(odd.permute(0, 1, 3, 2))
    kinds: tl.constexpr = (tl.int32, tl.int32)
    four, pairs = tl.inline_asm_elementwise(CODE_ASM, "=r,=r,r,r,r,r", [a, b, c, d], dtype=kinds, is_pure=True, pack=1)
    first, second = tl.join(four, four >> 16).to(tl.int8), tl.join(four >> 8, four >> 24).to(tl.int8)
    codes = tl.join(first, second).reshape(M, N)
    return codes.to(tl.float8e4nv, bitcast=True), _sum_pairs(pairs, M, N)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, q_scale, k, v, k_scale, v_stride, head, tile, k_tokens, k_padded, acc, total, running_max,
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
    scale = q_scale * k_scale
    bits = tl.dot(q, keys.T, out_dtype=tl.int32) + MAGIC_BITS
    if MASK:
        token = start + column
        if FP8:
            token = start + column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2
        bits = tl.where((token < k_tokens)[None, :], bits, MINUS_INFINITY_BITS)
    scores = bits.to(tl.float32, bitcast=True)
    # of bits, for Hopper compares three integers at once: those of positive floats and of minus infinity have their order
    top = tl.max(bits, 1).to(tl.float32, bitcast=True)
    largest = tl.maximum(running_max, (top - MAGIC) * scale)
    shrink = tl.exp2(running_max - largest)
    if FP8:
        weights, part = _code(scores, scale, largest, M, N)
        total = tl.fma(total, tl.broadcast_to(shrink[:, None], total.shape), part)
        if TMA:
            values = v.load([head * D, start])
        else:
            values = tl.load(v + tl.arange(0, D).to(tl.int64)[:, None] * k_padded + (start + column)[None, :])
        if EXACT_SUM:
            acc = tl.fma(acc, tl.broadcast_to(shrink[:, None], acc.shape), tl.dot(weights, values.T))
        else:
            acc = tl.dot(weights, values.T, acc * shrink[:, None])
    else:
        address = v + (start + column).to(tl.int64)[:, None] * v_stride + tl.arange(0, D)[None, :]
        values = tl.load(address, (start + column < k_tokens)[:, None], 0.0) if MASK else tl.load(address)
        p = tl.exp2(scores * scale[:, None] - (scale * MAGIC + largest)[:, None])
        acc = tl.dot(p.to(tl.bfloat16), values, acc * shrink[:, None])
        total = total * shrink + tl.sum(p, 1)
    return acc, total, largest


@triton.jit
def _attend_all(  # type: ignore[no-untyped-def]
    q, q_scale, k, v, k_scale_ptr, v_stride, v_head_stride, head, k_tokens, k_padded, acc, total, running_max,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr, EXACT_SUM: tl.constexpr,
):  # fmt: skip
    """The online softmax over all keys of one head; the new accumulator, sum and maximum (in log2)."""
    k_scale_ptr += head * (k_padded // N)
    if not TMA:
        k += head.to(tl.int64) * k_padded * D
        v += head.to(tl.int64) * (k_padded * D if FP8 else v_head_stride)
    full_tiles = k_tokens // N
    k_scale = tl.load(k_scale_ptr)
    for tile in range(full_tiles):
        if TMA:
            # the next one is on its way in a register, rather than in shared memory behind a barrier of its own
            next_scale = tl.load(k_scale_ptr + tl.minimum(tile + 1, full_tiles - 1))
        else:
            k_scale = tl.load(k_scale_ptr + tile)
        acc, total, running_max = _attend(
            q, q_scale, k, v, k_scale, v_stride, head, tile, k_tokens, k_padded, acc, total, running_max,
            D, M, N, FP8, TMA, EXACT_SUM, False,
        )  # fmt: skip
        if TMA:
            k_scale = next_scale
    if full_tiles * N < k_tokens:
        k_scale = tl.load(k_scale_ptr + full_tiles)
        acc, total, running_max = _attend(
            q, q_scale, k, v, k_scale, v_stride, head, full_tiles, k_tokens, k_padded, acc, total, running_max,
            D, M, N, FP8, TMA, EXACT_SUM, True,
        )  # fmt: skip
    return acc, total, running_max


# one key alone would become a compile-time 1, of which the compiler makes NaN
@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "kept_tokens"])
def _attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k, v, q_scale_ptr, k_scale_ptr, v_scale_ptr, kept_k, kept_v, kept_k_scale_ptr, out_ptr, v_stride, v_head_stride,
    kept_v_stride, kept_v_head_stride, out_stride, q_tokens, k_tokens, q_padded, k_padded, kept_tokens, kept_padded,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr, EXACT_SUM: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """The output of M queries of one head."""
    block, head = tl.program_id(0), tl.program_id(1)
    row = block * M + tl.arange(0, M)
    channel = tl.arange(0, D)
    q_row = head.to(tl.int64) * q_padded + row
    q = tl.load(q_ptr + q_row[:, None] * D + channel[None, :])
    q_scale = tl.load(q_scale_ptr + q_row)
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M, 8], tl.float32) if FP8 else tl.zeros([M], tl.float32)
    running_max = tl.full([M], float("-inf"), tl.float32)
    if KEPT:
        acc, total, running_max = _attend_all(
            q, q_scale, kept_k, kept_v, kept_k_scale_ptr, kept_v_stride, kept_v_head_stride, head, kept_tokens, kept_padded,
            acc, total, running_max, D, M, N, FP8, TMA, EXACT_SUM,
        )  # fmt: skip
    acc, total, running_max = _attend_all(
        q, q_scale, k, v, k_scale_ptr, v_stride, v_head_stride, head, k_tokens, k_padded,
        acc, total, running_max, D, M, N, FP8, TMA, EXACT_SUM,
    )  # fmt: skip
    if FP8:
        total = tl.sum(total, 1)
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
    config: AttentionConfig | None = None, *, kept: KeysValues | None = None,
) -> Tensor:  # fmt: skip
    """`reference.qk_norm_rope` of the rows from `first_row` on, then attention_int8 of the rows `queries` over all S rows.

    qkv (S, 3, H, D) BF16: the rows before `first_row` hold normed and turned q and k already. Afterwards its k are all normed
    and turned; its q stay as they came. weights (2, 2, D), cos and sin (S, D/2) FP32, and img_rows, how many of the S are
    pictures', as in reference.qk_norm_rope. out (Q, H * D) BF16 is written and returned. D and `config` as in attention_int8.
    kept: is given what attend_kept_int8 is to find, the codes of its first rows among them.
    """
    config = config or _config_of(qkv.device)
    norm_rope = _check_layer(qkv, weights, cos, sin, img_rows, queries, first_row)
    q, k, v = qkv.unbind(1)
    columns, fp8, tokens = config.columns, config.fp8_values, queries.stop - queries.start
    made = survey(q, k, v, queries, fp8, norm_rope)
    if kept is None:
        return attend(made, quantize_keys_values(k, v, made, columns, fp8), tokens, len(k), out, config)
    rest = slice(kept.tokens, None)
    if kept.tokens:
        quantize_keys_values(k[: kept.tokens], v[: kept.tokens], made, columns, fp8, VALUE_HEADROOM, kept)
        if not fp8:
            kept.v.copy_(v[: kept.tokens])
    codes = make_codes(v[rest], columns, fp8, kept)
    quantize_keys_values(k[rest], v[rest], made, columns, fp8, VALUE_HEADROOM, codes)
    return attend(made, codes, tokens, codes.tokens, out, config, kept)


def attend_kept_int8(
    qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int, queries: slice, out: Tensor, kept: KeysValues,
    config: AttentionConfig | None = None,
) -> Tensor:  # fmt: skip
    """attend_normed_int8 at a later step, of all rows of qkv (S, 3, H, D), which are left as they came, and of those `kept`.

    The mean key and the values' scales are those of the step that gave them to `kept`; img_rows, cos and sin (S, D/2) are of
    qkv's rows alone. What goes beyond the scales' headroom saturates.
    """
    config = config or _config_of(qkv.device)
    norm_rope = _check_layer(qkv, weights, cos, sin, img_rows, queries, 0)
    q, k, v = qkv.unbind(1)
    made, codes = code(q, k, v, queries, config.columns, config.fp8_values, norm_rope, kept)
    return attend(made, codes, queries.stop - queries.start, len(qkv), out, config, kept)


def make_kept(
    layers: int, tokens: int, heads: int, width: int, device: torch.device, config: AttentionConfig | None = None
) -> KeysValues:  # fmt: skip
    """Room for what attend_normed_int8 keeps of each layer; `tokens` are the references', or 0 where they are not kept."""
    config = config or _config_of(device)
    # values that get no codes are kept as they came, and not in the buffer that they came in
    like = torch.empty(1, dtype=torch.bfloat16, device=device).expand(tokens, heads, width)
    one = make_codes(like, config.columns, config.fp8_values)
    tensors = (one.k_mean, one.k, one.k_scale, one.v, one.v_scale)
    return KeysValues(tokens, *(torch.empty(layers, *x.shape, dtype=x.dtype, device=device) for x in tensors))


def _check_layer(
    qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int, queries: slice, first_row: int
) -> NormRope:  # fmt: skip
    tokens, _, heads, width = qkv.shape
    assert qkv.dtype == torch.bfloat16
    assert qkv.stride()[1:] == (heads * width, width, 1)
    assert weights.shape == (2, 2, width)
    assert cos.shape == sin.shape == (tokens, width // 2)
    assert all(tensor.is_contiguous() for tensor in (weights, cos, sin))
    assert 0 <= queries.start < queries.stop <= tokens
    return NormRope(weights, cos, sin, img_rows, first_row)


def _config_of(device: torch.device) -> AttentionConfig:
    return choose_config(torch.cuda.get_device_capability(device))


def attend(
    made: Queries, codes: KeysValues, q_tokens: int, k_tokens: int, out: Tensor, config: AttentionConfig,
    kept: KeysValues | None = None,
) -> Tensor:  # fmt: skip
    """The attention of quantized queries, keys and values (attention_codes.py), written to `out` (Q, H * D) BF16.

    kept: more keys and values, before the others, coded with the same k_mean and v_scale.
    """
    heads, q_padded, width = made.q.shape
    assert width in (32, 64, 128)
    assert out.shape == (q_tokens, heads * width)
    assert out.stride(1) == 1
    assert out.dtype == torch.bfloat16
    keys, values, *v_strides = _operands(codes, config)
    has_kept = kept is not None and kept.tokens > 0
    kept = kept if kept is not None and has_kept else codes
    kept_keys, kept_values, *kept_strides = _operands(kept, config) if has_kept else (None, None, 0, 0)
    _attention_kernel[(triton.cdiv(q_tokens, config.rows), heads)](
        made.q, keys, values, made.q_scale, codes.k_scale, codes.v_scale, kept_keys, kept_values, kept.k_scale, out,
        *v_strides, *kept_strides, out.stride(0), q_tokens, k_tokens, q_padded, codes.k.shape[1], kept.tokens, kept.k.shape[1],
        D=width, M=config.rows, N=config.columns, FP8=config.fp8_values, TMA=config.tma,
        EXACT_SUM=config.exact_sum, KEPT=has_kept, num_warps=config.warps, num_stages=config.stages, maxnreg=config.maxnreg,
    )  # fmt: skip
    return out


def _operands(codes: KeysValues, config: AttentionConfig) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor, int, int]:
    """Keys, values, and the strides of a token and a head of values that have no codes."""
    _, padded, width = codes.k.shape
    if config.tma:
        keys = TensorDescriptor.from_tensor(codes.k.view(-1, width), [config.columns, width])
        return keys, TensorDescriptor.from_tensor(codes.v.view(-1, padded), [width, config.columns]), 0, 0
    return codes.k, codes.v, *((0, 0) if config.fp8_values else (codes.v.stride(0), codes.v.stride(1)))
