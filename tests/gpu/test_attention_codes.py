"""Norm, rope and codes in two launches, against the same in many, and attention over them against its specification."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from millicent.kernels import attention_reference, elementwise, reference  # noqa: E402
from millicent.kernels.attention import AMPERE_CONFIG, attend_normed_int8, choose_config  # noqa: E402
from millicent.kernels.attention_codes import NormRope, quantize_keys_values, survey  # noqa: E402


@dataclass(frozen=True)
class Case:
    """Tokens of a layer, of pictures among them, the first that is still to be normed, and the queries."""

    tokens: int
    img_rows: int
    first_row: int
    queries: slice


CASES = [
    Case(333, 300, 0, slice(0, 333)),  # a block
    Case(640, 512, 0, slice(256, 512)),  # the last block: the target alone asks
    Case(601, 500, 250, slice(250, 601)),  # the references' keys and values are kept from an earlier step
    Case(2112, 2048, 1024, slice(1024, 2112)),
    Case(129, 128, 128, slice(128, 129)),
    Case(300, 300, 0, slice(0, 300)),  # no text
]
HEADS, WIDTH = 24, 128
# the two are compiled apart, and their sums differ in FP32's last bits: that moves a number which lies halfway between two of
# BF16, and a code whose row's largest was such a number, by one
MOVED_SHARE = 0.01


def sample(case: Case, heads: int = HEADS, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv with a bias of each channel of k, norm weights, and rope's cos and sin."""
    generator = torch.Generator("cuda").manual_seed(11)
    qkv = 3.0 * torch.randn(case.tokens, 3, heads, width, generator=generator, device="cuda")
    qkv[:, 1] += 6.0 * torch.randn(heads, width, generator=generator, device="cuda")
    weights = torch.rand(2, 2, width, generator=generator, device="cuda") + 0.5
    angles = 6.28 * torch.rand(case.tokens, width // 2, generator=generator, device="cuda")
    return qkv.bfloat16(), weights.bfloat16(), angles.cos(), angles.sin()


def normed_apart(case: Case, qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The buffer after a launch for norm and rope alone."""
    made, first = qkv.clone(), case.first_row
    elementwise.qk_norm_rope(made[first:], weights, cos[first:], sin[first:], max(case.img_rows - first, 0))
    return made


def has_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("columns", [64, 128])
def test_fused_and_unfused_give_the_same_codes(case: Case, columns: int) -> None:
    qkv, weights, cos, sin = sample(case)
    before, apart, fp8 = qkv.clone(), normed_apart(case, qkv, weights, cos, sin), has_fp8()
    q, k, v = qkv.unbind(1)
    fused = survey(q, k, v, case.queries, fp8, NormRope(weights, cos, sin, case.img_rows, case.first_row))
    unfused = survey(apart[:, 0], apart[:, 1], apart[:, 2], case.queries, fp8)
    torch.testing.assert_close(qkv[:, 1], apart[:, 1], rtol=2**-7, atol=1e-6)
    assert (qkv[:, 1] != apart[:, 1]).float().mean() < MOVED_SHARE
    assert torch.equal(qkv[: case.first_row, 1], before[: case.first_row, 1]), "kept keys were to stay as they came"
    assert torch.equal(qkv[:, 0], before[:, 0]), "queries were to stay as they came"
    assert torch.equal(qkv[:, 2], before[:, 2]), "values were to stay as they came"
    assert off_by_one_share(fused.q, unfused.q) < MOVED_SHARE
    torch.testing.assert_close(fused.q_scale, unfused.q_scale, rtol=2**-7, atol=0)
    found = quantize_keys_values(k, v, fused, columns, fp8)
    wanted = quantize_keys_values(apart[:, 1], apart[:, 2], unfused, columns, fp8)
    assert off_by_one_share(found.k, wanted.k) < MOVED_SHARE
    torch.testing.assert_close(found.k_scale, wanted.k_scale, rtol=2**-7, atol=0)
    # values are only read
    assert torch.equal(found.v.view(torch.uint8), wanted.v.view(torch.uint8))
    assert torch.equal(found.v_scale, wanted.v_scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_match_specification(case: Case) -> None:
    qkv, _, _, _ = sample(case)
    q, k, v = qkv.unbind(1)
    fp8, queries, tokens = has_fp8(), q[case.queries], case.tokens
    made = survey(q, k, v, case.queries, fp8)
    codes = quantize_keys_values(k, v, made, 128, False)
    q_codes, q_scale = attention_reference.quantize_queries(queries)
    k_codes, k_scale = attention_reference.quantize_keys(k, 128)
    # a division's or a sum's last bit moves a number that lies halfway between two codes, and no other
    assert off_by_one_share(made.q[:, : len(queries)].transpose(0, 1), q_codes) < 1e-3
    assert off_by_one_share(codes.k[:, :tokens].transpose(0, 1), k_codes) < 1e-3
    torch.testing.assert_close(made.q_scale[:, : len(queries)].T, q_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(codes.k_scale.T, k_scale, rtol=1e-5, atol=0)
    assert not made.q[:, len(queries) :].any(), "padding of the queries"
    assert not codes.k[:, tokens:].any(), "padding of the keys"
    if fp8:
        coded = quantize_keys_values(k, v, made, 128, True)
        v_codes, v_scale = attention_reference.quantize_values(v)
        torch.testing.assert_close(coded.v_scale, v_scale, rtol=1e-6, atol=0)
        found, wanted = coded.v[:, :, :tokens].permute(2, 0, 1).float(), v_codes.float()
        # neighbors in E4M3 are 2**-3 of the smaller apart, 2**-9 near zero
        assert ((found - wanted).abs() <= wanted.abs() / 8 + 2**-9).all()
        assert (found != wanted).float().mean() < 1e-3
        assert not coded.v[:, :, tokens:].float().any(), "padding of the values"


def off_by_one_share(found: Tensor, wanted: Tensor) -> float:
    apart = (found.int() - wanted.int()).abs()
    assert apart.max() <= 1
    return float(apart.float().mean())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(3, 128), (2, 64), (1, 32)])
@pytest.mark.parametrize("without_fp8", [False, True])
def test_attention_matches_specification_and_float64(case: Case, heads: int, width: int, without_fp8: bool) -> None:
    qkv, weights, cos, sin = sample(case, heads, width)
    config = AMPERE_CONFIG if without_fp8 else choose_config(torch.cuda.get_device_capability())
    queries, place = case.queries.stop - case.queries.start, (case.img_rows, case.first_row, case.queries)
    padded = torch.full((queries + 1, heads * width), torch.nan, dtype=torch.bfloat16, device="cuda")
    twin, wanted, double = qkv.clone(), padded[:queries].clone(), exact(case, qkv, weights, cos, sin)
    found = attend_normed_int8(qkv, weights, cos, sin, *place, padded[:queries], config)
    columns, fp8 = config.columns, config.fp8_values
    attention_reference.attend_normed_int8(twin, weights, cos, sin, *place, wanted, columns, fp8)
    # rsqrt's last bit may round a normed number to BF16's other neighbor
    torch.testing.assert_close(qkv[:, 1], twin[:, 1], rtol=2**-7, atol=1e-3)
    assert torch.equal(qkv[:, ::2], twin[:, ::2]), "queries and values were to stay as they came"
    # the margins of test_attention.py, for the same reasons
    assert relative_error(found, wanted) < 0.012
    assert relative_error(found, double) < 0.06
    assert padded[queries:].isnan().all(), "wrote beyond the last query"


def exact(case: Case, qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in float64 without codes, but for q and k, which are rounded to BF16."""
    made, first = qkv.clone(), case.first_row
    reference.qk_norm_rope(made[first:], weights, cos[first:], sin[first:], max(case.img_rows - first, 0))
    q, k, v = made.double().unbind(1)
    scores = torch.einsum("qhd,shd->hqs", q[case.queries], k) / q.shape[-1] ** 0.5
    return torch.einsum("hqs,shd->qhd", scores.softmax(dim=-1), v).flatten(1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_a_graph_draws_the_same() -> None:
    case = CASES[2]
    first, weights, cos, sin = sample(case)
    place = (case.img_rows, case.first_row, case.queries)
    out = torch.empty(case.queries.stop - case.queries.start, HEADS * WIDTH, dtype=torch.bfloat16, device="cuda")
    wanted = attend_normed_int8(first.clone(), weights, cos, sin, *place, out.clone())
    buffer, graph = torch.zeros_like(first), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_normed_int8(buffer, weights, cos, sin, *place, out)
    buffer.copy_(first)
    graph.replay()
    assert torch.equal(out, wanted)
