"""The specification of 8-bit attention against exact attention in float64, and each of its steps against its definition."""

import math

import pytest
import torch
from torch import Tensor

from millicent.kernels.attention_reference import attention_int8, quantize_keys, quantize_queries, quantize_values


def sample(q_tokens: int, k_tokens: int, heads: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of one fused projection; keys have the large channel bias that real ones have."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(max(q_tokens, k_tokens), 3, heads, width, generator=generator)
    fused[:, 1] += 4.0 * torch.randn(heads, width, generator=generator)
    fused = fused.bfloat16()
    return fused[:q_tokens, 0], fused[:k_tokens, 1], fused[:k_tokens, 2]


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64, (Q, H * D)."""
    scores = torch.einsum("qhd,shd->hqs", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("hqs,shd->qhd", scores.softmax(dim=-1), v.double()).flatten(1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(77, 77), (128, 256), (1, 333), (130, 1)])
@pytest.mark.parametrize(("heads", "width"), [(2, 128), (3, 64)])
# E4M3 rounds p and v by up to 2**-4 each, by 2.6% in the root mean square: about 3.7% together; BF16 leaves INT8's 1%
@pytest.mark.parametrize(("fp8_values", "tolerance"), [(True, 0.045), (False, 0.015)])
def test_near_exact_attention(q_tokens: int, k_tokens: int, heads: int, width: int, fp8_values: bool, tolerance: float) -> None:
    q, k, v = sample(q_tokens, k_tokens, heads, width)
    found = attention_int8(q, k, v, fp8_values=fp8_values)
    assert found.dtype == torch.bfloat16
    assert found.shape == (q_tokens, heads * width)
    assert relative_error(found, exact_attention(q, k, v)) < tolerance


def test_a_bias_of_the_keys_costs_nothing() -> None:
    q, k, v = sample(64, 256, 2, 128)
    far = k.float() + 64.0
    # what INT8 would leave of keys whose mean is not taken out: their spread is one step of its grid
    assert relative_error(attention_int8(q, far, v), exact_attention(q, far, v)) < 0.045


@pytest.mark.parametrize("block_tokens", [64, 128])
def test_large_scores_and_many_blocks(block_tokens: int) -> None:
    q, k, v = sample(32, 700, 2, 128)
    # scores of up to some 40: nearly one-hot rows, and a running maximum that rises from block to block
    q = q * 8
    found = attention_int8(q, k, v, block_tokens=block_tokens)
    # one step of INT8 is worth 8 times as much here
    assert relative_error(found, exact_attention(q, k, v)) < 0.15


def test_codes_are_within_half_a_step() -> None:
    q, k, v = sample(40, 200, 2, 64)
    q_codes, q_scale = quantize_queries(q)
    step = q_scale * math.sqrt(64) / math.log2(math.e)
    assert ((q_codes * step[..., None] - q.float()).abs() <= 0.501 * step[..., None]).all()
    k_codes, k_scale = quantize_keys(k, 128)
    rows = k_scale.repeat_interleave(128, dim=0)[:200, :, None]
    assert ((k_codes * rows - (k.float() - k.float().mean(0))).abs() <= 0.501 * rows).all()
    v_codes, v_scale = quantize_values(v)
    # half a step of 3 mantissa bits, or of the subnormals' 2**-9
    bound = torch.maximum(v.float().abs() * 2.0**-4, v_scale * 2.0**-10) * 1.001
    assert ((v_codes.float() * v_scale - v.float()).abs() <= bound).all()


def test_zeros_stay_finite() -> None:
    q, k, v = sample(16, 130, 2, 64)
    mean = v.float().mean(0).flatten()
    found = attention_int8(torch.zeros_like(q), torch.zeros_like(k), v).float()
    # every key weighs the same: one E4M3 rounding of v, averaged over 130 tokens
    assert torch.allclose(found, mean.expand_as(found), atol=0.02)
    assert attention_int8(q, k, torch.zeros_like(v)).eq(0).all()
