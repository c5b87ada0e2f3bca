"""The 8-bit matrix product against float64, and the linears on the card against the same linears on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from millicent.errors import InputError
from millicent.formats.fp8 import FP8Linear, default_backend
from millicent.formats.int8 import INT8Linear
from millicent.kernels import reference

pytest.importorskip("triton")
from millicent.kernels.matmul import HOPPER_TILES, TILES, Tile, scaled_matmul

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
FP8, INT8 = torch.float8_e4m3fn, torch.int8
# rows beyond whole tiles, K and N that no tile divides, then the transformer's own
SHAPES = [
    (1, 16, 16),
    (70, 48, 80),
    (129, 272, 400),
    (4352, 3072, 3072),
    (256, 3072, 12288),
    (300, 9216, 3072),
    (8192, 12288, 3072),
]
# BF16's rounding of the result, the only one: half of its last bit
ROUNDED_ONCE = 2**-8
# Hopper's FP8 sums keep about 14 bits after each 32 products, cut and not rounded; K of 12288 has 384 such cuts
CUT_SUMS = 0.02


def draw_codes(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, device=CUDA)
    return (values * 30).round().clamp(-127, 127).to(dtype) if dtype == INT8 else (values * 100).clamp(-448, 448).to(dtype)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA)


def multiply_in_float64(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    # codes as FP32 first: FP8 has no conversion to float64 on every card
    y = x.float().double() @ weight.float().double().T * x_scale.double() * weight_scale.double().T
    return y if bias is None else y + bias.double()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())


def skip_without_fp8(dtype: torch.dtype) -> None:
    if dtype == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 before compute capability 8.9")


def check(shape: tuple[int, int, int], dtype: torch.dtype, with_bias: bool, tile: Tile | None) -> None:
    m, n, k = shape
    x, weight = draw_codes(m, k, dtype, seed=0), draw_codes(n, k, dtype, seed=1)
    # a row's scale is its own, so that a scale of another row shows
    x_scale, weight_scale = draw(m, 1, seed=2).exp() / 1000, draw(n, 1, seed=3).exp() / 100
    bias = draw(n, seed=4).bfloat16() if with_bias else None
    wide = torch.full((m, n + 16), torch.nan, dtype=torch.bfloat16, device=CUDA)
    out = wide[:, :n]
    assert scaled_matmul(x, x_scale, weight, weight_scale, bias, out, tile) is out
    error = relative_error(out, multiply_in_float64(x, x_scale, weight, weight_scale, bias))
    assert error <= (CUT_SUMS if dtype == FP8 else ROUNDED_ONCE)
    assert wide[:, n:].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scaled_matmul_equals_float64(shape: tuple[int, int, int], dtype: torch.dtype, with_bias: bool) -> None:
    skip_without_fp8(dtype)
    check(shape, dtype, with_bias, tile=None)


@pytest.mark.parametrize("tile", [*HOPPER_TILES, *TILES[9, 0]], ids=str)
@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("shape", [(70, 48, 80), (4352, 9216, 3072)])
def test_every_tile_of_hopper(tile: Tile, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("tiles for Hopper")
    check(shape, dtype, with_bias=True, tile=tile)


def test_int8_sums_are_exact() -> None:
    """Half of the products cancel the other half but for a one, which FP32 loses: the sums go beyond 2^24 in between."""
    k = 12288
    x, weight = torch.full((1, k), 127, dtype=INT8, device=CUDA), torch.full((16, k), 127, dtype=INT8, device=CUDA)
    x[:, k // 2 :] = -127
    x[:, 0] = weight[:, 0] = 1
    x[:, -1] = 0
    out = torch.empty(1, 16, dtype=torch.bfloat16, device=CUDA)
    one = torch.ones(16, 1, device=CUDA)
    scaled_matmul(x, one[:1], weight, one, None, out)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize(("n", "k"), [(24, 64), (32, 72)])
def test_sides_that_16_does_not_divide_are_refused(n: int, k: int) -> None:
    x, weight, one = draw_codes(4, k, INT8, 0), draw_codes(n, k, INT8, 1), torch.ones(n, 1, device=CUDA)
    with pytest.raises(InputError, match=rf"INT8 .* this one is \({n}, {k}\)"):
        scaled_matmul(x, one[:4], weight, one, None, torch.empty(4, n, dtype=torch.bfloat16, device=CUDA))


def skip_where_torch_hangs(backend: str | None) -> None:
    if backend == "torch" and default_backend(torch.cuda.get_device_capability()) != "torch":
        pytest.skip("this torch hangs on this card")


@pytest.mark.parametrize(("linear_type", "backend"), [(FP8Linear, "torch"), (FP8Linear, "triton"), (INT8Linear, None)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [256, 1000])
def test_linears_equal_themselves_on_the_cpu(linear_type: Any, backend: str | None, with_bias: bool, rows: int) -> None:
    skip_without_fp8(FP8 if linear_type is FP8Linear else INT8)
    skip_where_torch_hangs(backend)
    linear = linear_type.from_weight(draw(768, 512, seed=0).bfloat16(), draw(768, seed=1).bfloat16() if with_bias else None)
    twin = linear_type(linear.weight.cpu(), linear.weight_scale.cpu(), None if linear.bias is None else linear.bias.cpu())
    if backend:
        linear.backend = backend
    x = draw(2, rows // 2, 512, seed=2).bfloat16()
    values, scale = reference.quantize_rows(x.flatten(0, 1).cpu(), linear.code, linear.group)
    found = linear.matmul(values.cuda(), scale.cuda()).cpu()
    # both round to BF16 once, so that a sum may fall on either side; FP8's are cut on Hopper, 16 times at a K of 512
    assert relative_error(found, twin.matmul(values, scale).double()) <= 2**-8
    # the card's quantization may be one code off where TF32 turned the row, about 1 % of a row's spread
    assert relative_error(linear(x).cpu(), twin(x.cpu()).double()) <= 0.02


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fp8_writes_to_rows_of_a_wider_tensor(backend: Any) -> None:
    skip_without_fp8(FP8)
    skip_where_torch_hangs(backend)
    linear = FP8Linear.from_weight(draw(768, 512, seed=0), draw(768, seed=1))
    linear.backend = backend
    values, scale = draw_codes(100, 512, FP8, seed=2), draw(100, 1, seed=3).exp()
    wide = torch.full((100, 1000), torch.nan, dtype=torch.bfloat16, device=CUDA)
    out = wide[:, :768]
    assert linear.matmul(values, scale, out=out) is out
    assert torch.equal(out, linear.matmul(values, scale))
    assert wide[:, 768:].isnan().all()


@pytest.mark.parametrize(("n", "k"), [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (3584, 18944)])
def test_fp8_multiplies_any_number_of_rows(n: int, k: int) -> None:
    """cuBLAS has no product for some; a text may be of any length."""
    skip_without_fp8(FP8)
    linear = FP8Linear(draw_codes(n, k, FP8, seed=0), draw(n, 1, seed=1).exp() / 100, draw(n, seed=2).bfloat16())
    weight = linear.weight.float() * linear.weight_scale
    for rows in (1, 2, 7, 16, 40, 63, 64, 65, 127, 128, 200, 255, 256, 257, 300, 512, 1000):
        values, scale = draw_codes(rows, k, FP8, seed=3), draw(rows, 1, seed=4).exp() / 1000
        for _ in range(2):  # the first may ask cuBLAS in vain
            found = linear.matmul(values, scale)
            wanted = values.float().double() * scale.double() @ weight.double().T + linear.bias.double()
            assert relative_error(found, wanted) <= CUT_SUMS, rows
