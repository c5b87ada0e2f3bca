"""An edit's later steps in 8-bit attention: codes in one launch, and attention over them and those kept, against their twins."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from millicent.kernels import KeysValues, attention_reference, elementwise, reference  # noqa: E402
from millicent.kernels.attention import (  # noqa: E402
    ADA_CONFIG,
    AMPERE_CONFIG,
    HOPPER_CONFIGS,
    AttentionConfig,
    attend_kept_int8,
    attend_normed_int8,
    make_kept,
)
from millicent.kernels.attention_codes import NormRope  # noqa: E402
from millicent.kernels.attention_kept import code  # noqa: E402
from millicent.kernels.attention_reference import VALUE_HEADROOM  # noqa: E402

CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Case:
    """Tokens of a layer, of pictures among them, references that are kept, and which tokens ask."""

    tokens: int
    img_rows: int
    references: int
    queries: slice


CASES = [
    Case(333, 300, 0, slice(0, 333)),  # a block, nothing reused
    Case(640, 512, 0, slice(256, 512)),  # the last block: the target alone asks
    Case(640, 512, 256, slice(256, 640)),
    Case(601, 500, 250, slice(250, 601)),  # the references end within a block of keys
    Case(601, 500, 250, slice(250, 500)),
    Case(2112, 2048, 1031, slice(1031, 2112)),
    Case(130, 129, 129, slice(129, 130)),
    Case(300, 300, 100, slice(100, 300)),  # no text
]
# see test_attention_codes.py: FP32's last bits round a normed number to BF16's other neighbor, and so move a code by one
MOVED_SHARE = 0.01


@dataclass(frozen=True)
class Layer:
    """qkv (S, 3, H, D) of a first and a later step, which share the keys' bias of each channel; norm weights, cos and sin."""

    first: Tensor
    later: Tensor
    weights: Tensor
    cos: Tensor
    sin: Tensor


def sample(case: Case, heads: int, width: int) -> Layer:
    generator = torch.Generator(CUDA).manual_seed(12)
    steps = 3.0 * torch.randn(2, case.tokens, 3, heads, width, generator=generator, device=CUDA)
    steps[:, :, 1] += 6.0 * torch.randn(heads, width, generator=generator, device=CUDA)
    weights = torch.rand(2, 2, width, generator=generator, device=CUDA) + 0.5
    angles = 6.28 * torch.rand(case.tokens, width // 2, generator=generator, device=CUDA)
    first, later = steps.bfloat16()
    return Layer(first, later, weights.bfloat16(), angles.cos(), angles.sin())


def configs_of_this_card() -> list[AttentionConfig]:
    if not torch.cuda.is_available():
        return []
    capability = torch.cuda.get_device_capability()
    return [
        AMPERE_CONFIG,
        *([ADA_CONFIG] if capability >= (8, 9) else []),
        *(HOPPER_CONFIGS if capability[0] == 9 else []),
    ]


def take_first_step(case: Case, layer: Layer, config: AttentionConfig) -> tuple[KeysValues, KeysValues, Tensor, Tensor]:
    """What the kernels and what the specification keep, and what either gives."""
    _, _, heads, width = layer.first.shape
    place = layer.weights, layer.cos, layer.sin, case.img_rows, 0, slice(0, case.tokens)
    shape = 3, case.references, heads, width, CUDA
    kept = make_kept(*shape, config).layer(1)
    wanted_kept = attention_reference.make_kept(*shape, config.columns, config.fp8_values).layer(1)
    found = torch.full((case.tokens, heads * width), torch.nan, dtype=torch.bfloat16, device=CUDA)
    wanted = torch.empty_like(found)
    attend_normed_int8(layer.first.clone(), *place, found, config, kept=kept)
    attention_reference.attend_normed_int8(
        layer.first.clone(), *place, wanted, config.columns, config.fp8_values, kept=wanted_kept
    )  # fmt: skip
    return kept, wanted_kept, found, wanted


def later_place(case: Case, layer: Layer) -> tuple[Tensor, Tensor, Tensor, int, slice]:
    first, asked = case.references, case.queries
    rows = slice(asked.start - first, asked.stop - first)
    return layer.weights, layer.cos[first:], layer.sin[first:], case.img_rows - first, rows


def exact(case: Case, layer: Layer) -> Tensor:
    """In float64, with the references' keys and values of the first step; q and k are rounded to BF16."""
    mixed = torch.cat([layer.first[: case.references], layer.later[case.references :]])
    reference.qk_norm_rope(mixed, layer.weights, layer.cos, layer.sin, case.img_rows)
    q, k, v = mixed.double().unbind(1)
    scores = torch.einsum("qhd,shd->hqs", q[case.queries], k) / q.shape[-1] ** 0.5
    return torch.einsum("hqs,shd->qhd", scores.softmax(dim=-1), v).flatten(1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def moved_share(found: Tensor, wanted: Tensor) -> float:
    apart = (found.int() - wanted.int()).abs()
    assert apart.max() <= 1
    return float(apart.float().mean())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(24, 128), (3, 64), (1, 32)])
@pytest.mark.parametrize("config", configs_of_this_card(), ids=str)
def test_attention_matches_specification_and_float64(case: Case, heads: int, width: int, config: AttentionConfig) -> None:
    layer = sample(case, heads, width)
    kept, wanted_kept, found, wanted = take_first_step(case, layer, config)
    # the margins of test_attention.py, for the same reasons
    assert relative_error(found, wanted) < 0.012
    # sums of some hundred numbers of which some were rounded to BF16's other neighbor
    torch.testing.assert_close(kept.k_mean, wanted_kept.k_mean, rtol=1e-3, atol=1e-3)
    if config.fp8_values:
        torch.testing.assert_close(kept.v_scale, wanted_kept.v_scale, rtol=1e-6, atol=0)
    new, queries = layer.later[case.references :].clone(), case.queries.stop - case.queries.start
    padded = torch.full((queries + 1, heads * width), torch.nan, dtype=torch.bfloat16, device=CUDA)
    twin = torch.empty_like(padded[:queries])
    for _ in range(2):  # the second is what a third step gives: nothing that is kept has changed
        found = attend_kept_int8(new, *later_place(case, layer), padded[:queries], kept, config)
        assert padded[queries:].isnan().all(), "wrote beyond the last query"
        assert torch.equal(new, layer.later[case.references :]), "q, k and v were to stay as they came"
        columns, fp8 = config.columns, config.fp8_values
        attention_reference.attend_kept_int8(new.clone(), *later_place(case, layer), twin, wanted_kept, columns, fp8)
        assert relative_error(found, twin) < 0.012
        assert relative_error(found, exact(case, layer)) < 0.06


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("columns", [64, 128])
def test_codes_match_specification(case: Case, columns: int) -> None:
    layer, fp8 = sample(case, 24, 128), torch.cuda.get_device_capability() >= (8, 9)
    config = AttentionConfig(64, columns, 4, 2, fp8_values=fp8)
    kept, *_ = take_first_step(case, layer, config)
    weights, cos, sin, img, rows = later_place(case, layer)
    normed = layer.later[case.references :].clone()
    elementwise.qk_norm_rope(normed, weights, cos, sin, img)
    q, k, v = layer.later[case.references :].unbind(1)
    made, codes = code(q, k, v, rows, columns, fp8, NormRope(weights, cos, sin, img, 0), kept)
    q_codes, q_scale = attention_reference.quantize_queries(normed[rows, 0])
    k_codes, k_scale = attention_reference.quantize_keys(normed[:, 1], columns, kept.k_mean)
    queries, tokens = rows.stop - rows.start, len(normed)
    assert moved_share(made.q[:, :queries].transpose(0, 1), q_codes) < MOVED_SHARE
    torch.testing.assert_close(made.q_scale[:, :queries].T, q_scale, rtol=2**-7, atol=0)
    found = codes.k.unflatten(1, (-1, 16))
    if fp8:  # rows as they lie: token 4t + 2a + b of 16 in row 8a + 2t + b
        order = [8 * (token // 2 % 2) + 2 * (token // 4) + token % 2 for token in range(16)]
        found = found[:, :, order]
    found = found.flatten(1, 2)
    assert moved_share(found[:, :tokens].transpose(0, 1), k_codes) < MOVED_SHARE
    torch.testing.assert_close(codes.k_scale[:, : len(k_scale)].T, k_scale, rtol=2**-7, atol=0)
    assert not found[:, tokens:].any(), "padding of the keys"
    if fp8:
        v_codes, _ = attention_reference.quantize_values(v, kept.v_scale)
        found_v, wanted_v = codes.v[:, :, :tokens].permute(2, 0, 1).float(), v_codes.float()
        # neighbors in E4M3 are 2**-3 of the smaller apart, 2**-9 near zero; a division's last bit moves few
        assert ((found_v - wanted_v).abs() <= wanted_v.abs() / 8 + 2**-9).all()
        assert (found_v != wanted_v).float().mean() < 1e-3
        assert not codes.v[:, :, tokens:].float().any(), "padding of the values"


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="has no FP8")
def test_values_beyond_the_headroom_saturate_and_what_is_no_number_stays_so() -> None:
    case, config = CASES[0], AttentionConfig(64, 128, 4, 2)
    layer = sample(case, 2, 128)
    kept, *_ = take_first_step(case, layer, config)
    weights, cos, sin, img, rows = later_place(case, layer)
    grown = layer.first.clone()
    grown[:, 2] *= 4 * VALUE_HEADROOM
    grown[5, 2, 1, 7] = torch.nan
    q, k, v = grown.unbind(1)
    _, codes = code(q, k, v, rows, 128, True, NormRope(weights, cos, sin, img, 0), kept)
    found = codes.v[:, :, : case.tokens].permute(2, 0, 1).float()
    wanted = attention_reference.quantize_values(v, kept.v_scale)[0].float()
    assert found[5, 1, 7].isnan()
    assert found.isnan().sum() == 1
    assert (found.abs() == 448).float().mean() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1 / 8, atol=2**-9, equal_nan=True)


def test_a_graph_draws_the_same() -> None:
    case = CASES[3]
    layer = sample(case, 24, 128)
    config = configs_of_this_card()[-1]
    kept, *_ = take_first_step(case, layer, config)
    new, place = layer.later[case.references :], later_place(case, layer)
    out = torch.empty(case.queries.stop - case.queries.start, 24 * 128, dtype=torch.bfloat16, device=CUDA)
    wanted = attend_kept_int8(new, *place, out.clone(), kept, config)
    buffer, graph = torch.zeros_like(new), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_kept_int8(buffer, *place, out, kept, config)
    buffer.copy_(new)
    graph.replay()
    assert torch.equal(out, wanted)
