"""8-bit attention in plain PyTorch: the specification of `attention.py`, step by step and in float32.

The method is SageAttention2's (Zhang et al. 2024, arXiv 2411.10958): keys lose their mean over the tokens, which softmax
does not see but which holds most of their outliers; queries and keys become INT8; the probabilities, in [0, 1], and the
values become FP8 E4M3. Queries have one scale a token, keys one a block of tokens, values one a channel.
"""

import math

import torch
from torch import Tensor

from millicent.kernels.reference import qk_norm_rope

INT8_MAX = 127.0
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-12
"""Stands in for the largest magnitude of a row of zeros, so that no scale is zero."""


def quantize_queries(q: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes (Q, H, D) of `q` (Q, H, D), and scales (Q, H) in float32 that hold 1/sqrt(D) and log2(e) too."""
    values = q.float()
    amax = values.abs().amax(dim=-1).clamp_min(SMALLEST_AMAX)
    codes = torch.round(values * (INT8_MAX / amax).unsqueeze(-1)).to(torch.int8)
    return codes, amax * (math.log2(math.e) / (math.sqrt(q.shape[-1]) * INT8_MAX))


def quantize_keys(k: Tensor, block_tokens: int) -> tuple[Tensor, Tensor]:
    """INT8 codes (S, H, D) of `k` (S, H, D) less its mean over the tokens, and scales (ceil(S / block_tokens), H)."""
    values = k.float()
    values = values - values.mean(dim=0)
    blocks = values.split(block_tokens)
    amax = torch.stack([block.abs().amax(dim=(0, 2)) for block in blocks]).clamp_min(SMALLEST_AMAX)
    codes = [torch.round(block * (INT8_MAX / row)[None, :, None]) for block, row in zip(blocks, amax, strict=True)]
    return torch.cat(codes).to(torch.int8), amax / INT8_MAX


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes (S, H, D) of `v` (S, H, D), and scales (H, D) in float32."""
    values = v.float()
    amax = values.abs().amax(dim=0).clamp_min(SMALLEST_AMAX)
    return (values * (E4M3_MAX / amax)).to(torch.float8_e4m3fn), amax / E4M3_MAX


def attention_int8(q: Tensor, k: Tensor, v: Tensor, block_tokens: int = 128, fp8_values: bool = True) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask, in 8 bits: BF16 (Q, H * D) from q (Q, H, D), k and v (S, H, D).

    `block_tokens` keys share a scale and are one step of the online softmax. Without `fp8_values` the probabilities and
    the values stay BF16, as on cards that have no FP8.
    """
    q_codes, q_scale = quantize_queries(q)
    k_codes, k_scale = quantize_keys(k, block_tokens)
    # a card without FP8 multiplies BF16 probabilities, which need no scale
    v_codes, v_scale = quantize_values(v) if fp8_values else (v, torch.ones(v.shape[1:], device=v.device))
    peak = E4M3_MAX if fp8_values else 1.0
    tokens, heads, width = q.shape
    running_max = torch.full((heads, tokens), -math.inf, device=q.device)
    total = torch.zeros(heads, tokens, device=q.device)
    weighted = torch.zeros(heads, tokens, width, device=q.device)
    for block, (keys, values) in enumerate(zip(k_codes.split(block_tokens), v_codes.split(block_tokens), strict=True)):
        # float32 holds these integers exactly: 128 * 127 * 127 is below 2**24
        scores = torch.einsum("qhd,shd->hqs", q_codes.float(), keys.float())
        scores = scores * (q_scale.T[:, :, None] * k_scale[block][:, None, None])
        largest = torch.maximum(running_max, scores.amax(dim=-1))
        shrink = torch.exp2(running_max - largest)
        p = torch.exp2(scores - largest[:, :, None] + math.log2(peak)).clamp_max(peak)
        rounded = p.to(v_codes.dtype).float()
        total = total * shrink + p.sum(dim=-1)
        weighted = weighted * shrink[:, :, None] + torch.einsum("hqs,shd->hqd", rounded, values.float())
        running_max = largest
    result = weighted / total[:, :, None] * v_scale[:, None, :]
    return result.permute(1, 0, 2).reshape(tokens, heads * width).to(torch.bfloat16)


def attend_normed_int8(
    qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int, first_row: int, queries: slice, out: Tensor,
    block_tokens: int = 128, fp8_values: bool = True,
) -> Tensor:  # fmt: skip
    """qk_norm_rope of the rows from `first_row` on, then attention_int8 of the rows `queries` over all S rows.

    qkv (S, 3, H, D): the rows before `first_row` hold normed and turned q and k already. Afterwards its k are all normed and
    turned; its q stay as they came. weights (2, 2, D), cos and sin (S, D/2) FP32, and img_rows, how many of the S are
    pictures', as in reference.qk_norm_rope. out (Q, H * D) BF16 is written and returned.
    """
    made = qkv.clone()
    qk_norm_rope(made[first_row:], weights, cos[first_row:], sin[first_row:], max(img_rows - first_row, 0))
    qkv[:, 1] = made[:, 1]
    return out.copy_(attention_int8(made[queries, 0], made[:, 1], made[:, 2], block_tokens, fp8_values))
