"""The Triton kernels of 8-bit attention against their specification and exact attention."""

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from millicent.errors import MachineError  # noqa: E402
from millicent.kernels import attention_reference as reference  # noqa: E402
from millicent.kernels.attention import (  # noqa: E402
    ADA_CONFIG,
    AMPERE_CONFIG,
    HOPPER_CONFIGS,
    AttentionConfig,
    attention_int8,
    choose_config,
)

SIZES = [(77, 77), (128, 128), (1, 300), (300, 1), (513, 1023), (1088, 2112)]


def sample(q_tokens: int, k_tokens: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Strided views of one fused projection, NaN outside of them; keys with a channel bias."""
    generator = torch.Generator("cuda").manual_seed(7)
    fused = torch.randn(max(q_tokens, k_tokens), 3, heads, width, generator=generator, device="cuda")
    fused[:, 1] += 4.0 * torch.randn(heads, width, generator=generator, device="cuda")
    fused = fused.bfloat16()
    fused[q_tokens:, 0] = fused[k_tokens:, 1:] = torch.nan
    return fused[:q_tokens, 0], fused[:k_tokens, 1], fused[:k_tokens, 2]


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("qhd,shd->hqs", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("hqs,shd->qhd", scores.softmax(dim=-1), v.double()).flatten(1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def configs_of_this_card() -> list[AttentionConfig]:
    if not torch.cuda.is_available():
        return []
    capability = torch.cuda.get_device_capability()
    return [
        AMPERE_CONFIG,
        *([ADA_CONFIG] if capability >= (8, 9) else []),
        *(HOPPER_CONFIGS if capability[0] == 9 else []),
    ]


@pytest.mark.parametrize("config", configs_of_this_card(), ids=str)
@pytest.mark.parametrize(("q_tokens", "k_tokens"), SIZES)
@pytest.mark.parametrize(("heads", "width"), [(3, 128), (2, 64), (1, 32)])
def test_matches_specification(config: AttentionConfig, q_tokens: int, k_tokens: int, heads: int, width: int) -> None:
    q, k, v = sample(q_tokens, k_tokens, heads, width)
    padded = torch.full((q_tokens + 1, heads * width), torch.nan, dtype=torch.bfloat16, device="cuda")
    out = attention_int8(q, k, v, padded[:q_tokens], config)
    wanted = reference.attention_int8(q, k, v, config.columns, config.fp8_values)
    # the offset's rounding, exp2's last bits and the mean's order of summation move some p and some codes to the neighboring
    # code: 0.5% in the interpreter; Hopper's FP8 accumulator adds some 14 bits' worth
    assert relative_error(out, wanted) < 0.012
    assert relative_error(out, exact_attention(q, k, v)) < 0.06
    assert padded[q_tokens:].isnan().all(), "wrote beyond the last query"


def test_long_sums_do_not_drift() -> None:
    q, k, v = sample(256, 8448, 2, 128)
    q, v = torch.zeros_like(q), torch.ones_like(v)
    out = torch.empty(256, 256, dtype=torch.bfloat16, device="cuda")
    attention_int8(q, k, v, out)
    # 8448 equal terms: an accumulator of 14 bits that truncates loses about a percent, FP32 nothing but BF16's 2**-9
    assert (out.float() - 1.0).abs().max() < 0.004


@pytest.mark.parametrize("config", configs_of_this_card(), ids=str)
def test_weights_add_up(config: AttentionConfig) -> None:
    q, k, v = sample(200, 1023, 2, 128)
    out = torch.empty(200, 256, dtype=torch.bfloat16, device="cuda")
    attention_int8(q, k, torch.ones_like(v), out, config)
    # weights are rounded after they are summed, to E4M3 by 2.6% in the root mean square, which a thousand of them average out
    assert (out.float() - 1.0).abs().max() <= 2**-8


@pytest.mark.parametrize("config", configs_of_this_card(), ids=str)
# rows of few weights, or one. At 1000 the numbers from which scores and offsets are subtracted end at a hundredth to a tenth in
# log2, and the few rows whose weights are in several blocks differ: 2.3% of all in the interpreter.
@pytest.mark.parametrize(("sharpness", "tolerance"), [(8, 0.012), (100, 0.012), (1000, 0.05)])
def test_sharp_rows(config: AttentionConfig, sharpness: int, tolerance: float) -> None:
    q, k, v = sample(200, 1023, 2, 128)
    q = q * sharpness
    out = attention_int8(q, k, v, torch.empty(200, 256, dtype=torch.bfloat16, device="cuda"), config)
    assert relative_error(out, reference.attention_int8(q, k, v, config.columns, config.fp8_values)) < tolerance


def test_a_card_that_cannot_is_refused() -> None:
    with pytest.raises(MachineError, match=r"8\.0"):
        choose_config((7, 5))
