"""8-bit attention in plain PyTorch: the specification of `attention.py`, step by step and in float32.

The method is SageAttention2's (Zhang et al. 2024, arXiv 2411.10958): keys lose their mean over the tokens, which softmax
does not see but which holds most of their outliers; queries and keys become INT8; the probabilities, in [0, 1], and the
values become FP8 E4M3. Queries have one scale a token, keys one a block of tokens, values one a channel.

A probability's bits in FP16 are taken for a linear function of its logarithm (`exponentiate`; the idea is Schraudolph's 1999, "A
Fast, Compact Approximation of the Exponential Function"), which needs no exponential. From there it is rounded to E4M3.

From an edit's second step on, the mean key and the values' scales are those of its first, so that nothing has to be known of all
tokens before one is coded. Softmax sees no vector that all keys lose, whichever it is; the mean belongs to the weights and the
prompt more than to the noise, and so takes most of the outliers still. E4M3 is as precise far below its largest number as near
it, so that the scales can leave room for values that grow; what grows beyond it saturates.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from millicent.kernels import KeysValues
from millicent.kernels.reference import qk_norm_rope

INT8_MAX = 127.0
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-12
"""Stands in for the largest magnitude of a row of zeros, so that no scale is zero."""
VALUE_HEADROOM = 4.0
"""How far the values of later steps may grow beyond the first step's largest. It costs two of some 17 powers of 2."""
KEY_BLOCK = 128
E4M3_MAX_BITS = 760
"""448 in FP16, without the last 5 of its bits."""


def quantize_queries(q: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes (Q, H, D) of `q` (Q, H, D), and scales (Q, H) in float32 that hold 1/sqrt(D) and log2(e) too."""
    values = q.float()
    amax = values.abs().amax(dim=-1).clamp_min(SMALLEST_AMAX)
    codes = torch.round(values * (INT8_MAX / amax).unsqueeze(-1)).to(torch.int8)
    return codes, amax * (math.log2(math.e) / (math.sqrt(q.shape[-1]) * INT8_MAX))


def quantize_keys(k: Tensor, block_tokens: int, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """INT8 codes (S, H, D) of `k` (S, H, D) less `mean` (H, D), and scales (ceil(S / block_tokens), H).

    mean: by default k's own over the tokens.
    """
    values = k.float()
    values = values - (values.mean(dim=0) if mean is None else mean)
    blocks = values.split(block_tokens)
    amax = torch.stack([block.abs().amax(dim=(0, 2)) for block in blocks]).clamp_min(SMALLEST_AMAX)
    codes = [torch.round(block * (INT8_MAX / row)[None, :, None]) for block, row in zip(blocks, amax, strict=True)]
    return torch.cat(codes).to(torch.int8), amax / INT8_MAX


def scale_values(v: Tensor, headroom: float = 1.0) -> Tensor:
    """What stands for 1 in the codes of each channel (H, D) of `v` (S, H, D), so that they reach `headroom` times as far as v."""
    return v.float().abs().amax(dim=0).clamp_min(SMALLEST_AMAX) * (headroom / E4M3_MAX)


def quantize_values(v: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E4M3 codes (S, H, D) of `v` (S, H, D), and their scales (H, D) in float32, by default v's own. What is beyond saturates."""
    scale = scale_values(v) if scale is None else scale
    return (v.float() * (1.0 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def exponentiate(log2_p: Tensor) -> Tensor:
    """About E4M3_MAX * p of log2(p) <= 0, as FP16 numbers with 5 bits of mantissa, in float32.

    The bits of FP16, read as an integer of which 32 are an octave, stand for 2**e * (1 + m / 32) where the power is
    2**(e + m / 32): the two meet at each power of 2, and between them the first is up to 6% more, 4.06% on average. So the bits of
    p are round(32 * log2(p)) + 760 with 448 for 1: 448, which these bits stand for, is 4.06% more than 2**(760 / 32 - 15), which
    takes the average out. What is left is 1.9% in the root mean square, beside the 2.6% of E4M3's rounding.
    """
    bits = torch.round(32 * log2_p + E4M3_MAX_BITS).clamp(0, E4M3_MAX_BITS)
    return (bits.to(torch.int16) << 5).view(torch.float16).float()


def attention_int8(q: Tensor, k: Tensor, v: Tensor, block_tokens: int = KEY_BLOCK, fp8_values: bool = True) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask, in 8 bits: BF16 (Q, H * D) from q (Q, H, D), k and v (S, H, D).

    `block_tokens` keys share a scale and are one step of the online softmax. Without `fp8_values` the probabilities and
    the values stay BF16, as on cards that have no FP8.
    """
    return attend(q, [code(k, v, k.float().mean(dim=0), scale_values(v), block_tokens, fp8_values)], block_tokens)


def code(k: Tensor, v: Tensor, k_mean: Tensor, v_scale: Tensor, block_tokens: int, fp8_values: bool) -> KeysValues:
    """Codes of k and v (S, H, D): k and v laid out as these, k_scale (blocks, H). Values without `fp8_values` are v itself."""
    k_codes, k_scale = quantize_keys(k, block_tokens, k_mean)
    # a card without FP8 multiplies BF16 probabilities, which need no scale
    v_codes, v_scale = quantize_values(v, v_scale) if fp8_values else (v, torch.ones_like(v_scale))
    return KeysValues(len(k), k_mean, k_codes, k_scale, v_codes, v_scale)


def attend(q: Tensor, parts: list[KeysValues], block_tokens: int) -> Tensor:
    """Attention of q (Q, H, D) over the keys of all parts, which share their values' scales: BF16 (Q, H * D)."""
    q_codes, q_scale = quantize_queries(q)
    tokens, heads, width = q.shape
    running_max = torch.full((heads, tokens), -math.inf, device=q.device)
    total = torch.zeros(heads, tokens, device=q.device)
    weighted = torch.zeros(heads, tokens, width, device=q.device)
    for k_scale, keys, values in _blocks(parts, block_tokens):
        # float32 holds these integers exactly: 128 * 127 * 127 is below 2**24
        scores = torch.einsum("qhd,shd->hqs", q_codes.float(), keys.float())
        scores = scores * (q_scale.T[:, :, None] * k_scale[:, None, None])
        largest = torch.maximum(running_max, scores.amax(dim=-1))
        shrink = torch.exp2(running_max - largest)
        log2_p = scores - largest[:, :, None]
        p = exponentiate(log2_p) if values.dtype == torch.float8_e4m3fn else torch.exp2(log2_p)
        weights = p.to(values.dtype).float()
        total = total * shrink + p.sum(dim=-1)
        weighted = weighted * shrink[:, :, None] + torch.einsum("hqs,shd->hqd", weights, values.float())
        running_max = largest
    result = weighted / total[:, :, None] * parts[0].v_scale[:, None, :]
    return result.permute(1, 0, 2).reshape(tokens, heads * width).to(torch.bfloat16)


def _blocks(parts: list[KeysValues], block_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Scale (H,), keys and values (tokens, H, D) of each block; every part begins one."""
    for part in parts:
        yield from zip(part.k_scale, part.k.split(block_tokens), part.v.split(block_tokens), strict=True)


def attend_normed_int8(
    qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int, first_row: int, queries: slice, out: Tensor,
    block_tokens: int = KEY_BLOCK, fp8_values: bool = True, *, kept: KeysValues | None = None,
) -> Tensor:  # fmt: skip
    """qk_norm_rope of the rows from `first_row` on, then attention_int8 of the rows `queries` over all S rows.

    qkv (S, 3, H, D): the rows before `first_row` hold normed and turned q and k already. Afterwards its k are all normed and
    turned; its q stay as they came. weights (2, 2, D), cos and sin (S, D/2) FP32, and img_rows, how many of the S are
    pictures', as in reference.qk_norm_rope. out (Q, H * D) BF16 is written and returned. kept: is given what attend_kept_int8 is
    to find, the codes of its first rows among them.
    """
    made = qkv.clone()
    qk_norm_rope(made[first_row:], weights, cos[first_row:], sin[first_row:], max(img_rows - first_row, 0))
    qkv[:, 1] = made[:, 1]
    q, k, v = made.unbind(1)
    if kept is None:
        return out.copy_(attention_int8(q[queries], k, v, block_tokens, fp8_values))
    statistics = k.float().mean(dim=0), scale_values(v, VALUE_HEADROOM)
    parts = [code(x, y, *statistics, block_tokens, fp8_values) for x, y in _split(k, v, kept.tokens)]
    for name in ("k_mean", "k", "k_scale", "v", "v_scale") if kept.tokens else ("k_mean", "v_scale"):
        getattr(kept, name).copy_(getattr(parts[0], name))
    return out.copy_(attend(q[queries], parts, block_tokens))


def _split(k: Tensor, v: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
    """The `first` tokens, if any, and the others."""
    return [(x, y) for x, y in ((k[:first], v[:first]), (k[first:], v[first:])) if len(x)]


def attend_kept_int8(
    qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int, queries: slice, out: Tensor, kept: KeysValues,
    block_tokens: int = KEY_BLOCK, fp8_values: bool = True,
) -> Tensor:  # fmt: skip
    """attend_normed_int8 at a later step, of all rows of qkv (S, 3, H, D), which are left as they came, and of those `kept`.

    The mean key and the values' scales are those of the step that gave them to `kept`; img_rows, cos and sin (S, D/2) are of
    qkv's rows alone. What goes beyond the scales' headroom saturates.
    """
    made = qkv.clone()
    qk_norm_rope(made, weights, cos, sin, img_rows)
    q, k, v = made.unbind(1)
    new = code(k, v, kept.k_mean, kept.v_scale, block_tokens, fp8_values)
    return out.copy_(attend(q[queries], [kept, new] if kept.tokens else [new], block_tokens))


def make_kept(
    layers: int, tokens: int, heads: int, width: int, device: torch.device, block_tokens: int = KEY_BLOCK, fp8_values: bool = True
) -> KeysValues:  # fmt: skip
    """Room for what attend_normed_int8 keeps of each layer; `tokens` are the references', or 0 where they are not kept."""
    k = torch.empty(layers, tokens, heads, width, dtype=torch.int8, device=device)
    v = torch.empty_like(k, dtype=torch.float8_e4m3fn if fp8_values else torch.bfloat16)
    k_scale = torch.empty(layers, -(-tokens // block_tokens), heads, device=device)
    k_mean, v_scale = torch.empty(2, layers, heads, width, device=device)
    return KeysValues(tokens, k_mean, k, k_scale, v, v_scale)
