"""The Triton kernels against their twins, on a card: odd shapes, outliers, outputs filled with NaN beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from millicent.kernels import Code, Rows, reference

pytestmark = pytest.mark.gpu
elementwise = pytest.importorskip("millicent.kernels.elementwise")

SIZES = [(1, 64), (63, 192), (100, 768), (257, 3072), (33, 12288)]
CODES: list[tuple[Code, int]] = [("bf16", 1), ("fp8", 1), ("int8", 1), ("int8", 64)]
# half a step of each code, of the row's scale or of the number itself; and what TF32 products, whose 10 bits are a quarter of an
# INT8 step of the row's largest, add where a row is turned
STEPS = {"bf16": (0.0, 2**-8), "fp8": (2**-10, 2**-4), "int8": (0.5, 0.0)}


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write stays NaN, or 127 in INT8."""
    original = torch.empty

    def poisoned(*size: object, **options: object) -> Tensor:
        made: Tensor = original(*size, **options)
        return made.fill_(127 if made.dtype == torch.int8 else float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(*shape: int, seed: int = 0, outliers: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    made = torch.randn(shape, generator=generator, device="cuda")
    made[..., :: max(1, shape[-1] // 8)] *= outliers
    return made.bfloat16()


def assert_near(found: Rows, wanted64: Tensor, code: Code, turned: bool) -> None:
    """wanted64: the numbers before they were made codes, FP64."""
    of_scale, of_number = STEPS[code]
    scale = torch.ones(len(wanted64), 1, device="cuda") if found.scale is None else found.scale
    error = (found.values.double() * scale.double() - wanted64).abs()
    largest = wanted64.abs().amax(1, keepdim=True)
    allowed = of_scale * scale.double() + of_number * wanted64.abs() + (2e-3 if turned else 1e-5) * largest
    assert bool((error <= allowed).all()), float((error / allowed.clamp(min=1e-30)).max())


def turned(y: Tensor, group: int) -> Tensor:
    if group == 1:
        return y
    eye = torch.eye(group, device=y.device)
    return (y.unflatten(1, (-1, group)) @ reference.rotate(eye, group).double()).flatten(1)


def norm64(x: Tensor, shift: Tensor, scale: Tensor, bounds: tuple[int, int]) -> Tensor:
    normed = torch.nn.functional.layer_norm(x.double(), (x.shape[1],), eps=reference.NORM_EPS)
    return normed * (1 + reference.by_row(scale, len(x), bounds).double()) + reference.by_row(shift, len(x), bounds).double()


@pytest.mark.parametrize(("code", "group"), CODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("outliers", [1.0, 1e6])
def test_norms(size: tuple[int, int], code: Code, group: int, outliers: float) -> None:
    rows, columns = size
    x, update = draw(rows, columns, outliers=outliers), draw(rows, columns, seed=1)
    mods = draw(3, 6, columns, seed=2)
    bounds = (rows // 3, rows - rows // 4)
    made = elementwise.norm_modulate(x, mods[:, 0], mods[:, 1], bounds, code, group)
    assert_near(made, turned(norm64(x, mods[:, 0], mods[:, 1], bounds), group), code, group > 1)
    summed = x.clone()
    reference.add_gated_norm_modulate(summed, update, mods[:, 2], mods[:, 0], mods[:, 1], bounds, "bf16")
    made = elementwise.add_gated_norm_modulate(x, update, mods[:, 2], mods[:, 0], mods[:, 1], bounds, code, group)
    # the sum is one multiplication and one addition, fused or not: a unit in BF16's last place where it is rounded
    assert bool(((x.double() - summed.double()).abs() <= 2**-7 * summed.double().abs()).all())
    assert_near(made, turned(norm64(x, mods[:, 0], mods[:, 1], bounds), group), code, group > 1)


@pytest.mark.parametrize(("code", "group"), CODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gelu_and_codes(size: tuple[int, int], code: Code, group: int) -> None:
    x = draw(*size, outliers=100.0)
    gelu = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert_near(elementwise.gelu_rows(x, code, group), turned(gelu, group), code, group > 1)
    assert_near(elementwise.quantize_rows(x, code, group), turned(x.double(), group), code, group > 1)


@pytest.mark.parametrize("columns", [256, 3072, 12288])
def test_turns_of_256(columns: int) -> None:
    x = draw(40, columns, outliers=100.0)
    assert_near(elementwise.quantize_rows(x, "int8", 256), turned(x.double(), 256), "int8", True)


def test_rows_of_zeros_have_zero_codes() -> None:
    for code in ("fp8", "int8"):
        made = elementwise.quantize_rows(torch.zeros(3, 64, dtype=torch.bfloat16, device="cuda"), code)
        assert bool((made.values.float() == 0).all())
        assert bool((made.scale == 1).all())


@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 1, 16), (77, 3, 64), (130, 24, 128), (9, 5, 32)])
def test_qk_norm_rope(rows: int, heads: int, width: int) -> None:
    qkv = draw(rows, 3, heads, width, outliers=1e4)
    weights, angles = draw(2, 2, width, seed=3), torch.randn(rows, width // 2, device="cuda")
    wanted = qkv.float()
    reference.qk_norm_rope(wanted, weights, angles.cos(), angles.sin(), rows // 2)
    values = qkv[:, 2].clone()
    elementwise.qk_norm_rope(qkv, weights, angles.cos(), angles.sin(), rows // 2)
    assert torch.equal(qkv[:, 2], values)
    # BF16's half unit in the last place, of the pair: where its two terms cancel, FP32's own rounding shows
    pair = wanted[:, :2].unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, -1, -1, 2).flatten(-2)
    assert bool(((qkv[:, :2].float() - wanted[:, :2]).abs() <= 2**-8 * pair + 1e-6).all())


@pytest.mark.parametrize(("code", "group"), CODES[1:])
def test_a_row_with_no_number_has_no_scale_and_the_others_have(code: Code, group: int) -> None:
    x = draw(9, 768)
    x[4, 300] = torch.nan
    made = elementwise.quantize_rows(x, code, group)
    assert made.scale.isnan()[:, 0].tolist() == [number == 4 for number in range(9)]
