"""Every format's linear against float64, and NVFP4 against comfy-kitchen's quantizer."""

import sys
from types import SimpleNamespace
from typing import Any

import comfy_kitchen as kitchen
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millicent.errors import InputError, MachineError
from millicent.formats import fp8, int8, int8_weight, nvfp4
from millicent.formats.bf16 import BF16Linear
from millicent.formats.fp8 import FP8Linear
from millicent.formats.int8 import INT8Linear
from millicent.formats.int8_weight import INT8WeightLinear
from millicent.formats.nvfp4 import NVFP4Linear
from millicent.kernels import choose

LINEARS: list[Any] = [BF16Linear, FP8Linear, INT8Linear, INT8WeightLinear, NVFP4Linear]
CPU = torch.device("cpu")
M, N, K = 64, 96, 768
# what a product of 4- and 8-bit codes keeps of random operands; a layer that pairs a scale wrongly stays below 20
MIN_SNR_DB = {BF16Linear: 45.0, FP8Linear: 27.0, INT8Linear: 34.0, INT8WeightLinear: 38.0, NVFP4Linear: 16.0}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_activations(outliers: bool) -> Tensor:
    x = draw(M, K, seed=1)
    if outliers:
        x[:, torch.arange(8) * 97 + 5] *= 100
    return x.bfloat16()


def snr_db(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float(20 * torch.log10(wanted.norm() / (found.double() - wanted).norm()))


@pytest.mark.parametrize("linear_type", LINEARS)
@pytest.mark.parametrize("outliers", [False, True])
def test_linears_keep_the_product(linear_type: Any, outliers: bool) -> None:
    weight, bias = (0.02 * draw(N, K)).bfloat16(), draw(N, seed=2).bfloat16()
    x = draw_activations(outliers)
    linear = linear_type.from_weight(weight, bias)
    assert (linear.in_features, linear.out_features) == (K, N)
    assert snr_db(linear(x), F.linear(x.double(), weight.double(), bias.double())) >= MIN_SNR_DB[linear_type]


def test_int8_needs_the_rotation() -> None:
    weight, x = 0.02 * draw(N, K), draw_activations(outliers=True)
    expected = x.double() @ weight.double().T
    turned = INT8Linear.from_weight(weight, None)
    plain = INT8Linear(*int8.quantize(weight, 1), None, group=1)
    assert turned.group == 256
    assert snr_db(turned(x), expected) >= snr_db(plain(x), expected) + 10


@pytest.mark.parametrize("linear_type", LINEARS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linears_stand_where_a_linear_stood(linear_type: Any, with_bias: bool) -> None:
    stood = nn.Linear(64, 32, bias=with_bias).bfloat16().requires_grad_(False)
    for parameter in stood.parameters():
        parameter.copy_(draw(*parameter.shape))
    linear = linear_type.from_weight(stood.weight, stood.bias)
    x = draw(2, 5, 64, seed=3).bfloat16()
    y = linear(x)
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, 5, 32)
    assert snr_db(y, stood(x).double()) >= MIN_SNR_DB[linear_type]
    rows = choose(CPU).quantize_rows(x.flatten(0, 1), linear.code, linear.group)
    assert torch.equal(linear.matmul(rows.values, rows.scale), y.flatten(0, 1))
    assert ("bias" in dict(linear.named_parameters())) is with_bias


@pytest.mark.parametrize("linear_type", LINEARS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_matmul_writes_to_rows_of_a_wider_tensor(linear_type: Any, with_bias: bool) -> None:
    linear = linear_type.from_weight(draw(32, 64).bfloat16(), draw(32, seed=2).bfloat16() if with_bias else None)
    rows = choose(CPU).quantize_rows(draw(5, 64, seed=3).bfloat16(), linear.code, linear.group)
    wide = torch.full((5, 48), torch.nan, dtype=torch.bfloat16)
    out = wide[:, :32]
    assert linear.matmul(rows.values, rows.scale, out=out) is out
    # the same products, which a GEMM may sum in another order
    torch.testing.assert_close(out, linear.matmul(rows.values, rows.scale), rtol=2**-7, atol=2**-7)
    assert wide[:, 32:].isnan().all()


@pytest.mark.parametrize("linear_type", [BF16Linear, INT8WeightLinear, NVFP4Linear])
def test_references_stay_in_fp32(linear_type: Any) -> None:
    linear = linear_type.from_weight(draw(32, 64), draw(32, seed=2))
    y = linear.matmul(draw(5, 64, seed=3), None)
    assert y.dtype == torch.float32
    assert not torch.equal(y, y.bfloat16().float())


@pytest.mark.parametrize("linear_type", [FP8Linear, INT8Linear])
def test_outputs_have_the_dtype_of_the_inputs(linear_type: Any) -> None:
    linear = linear_type.from_weight(draw(32, 64), draw(32, seed=2))
    assert linear.bias.dtype == torch.bfloat16
    assert linear(draw(5, 64, seed=3)).dtype == torch.float32


def test_fp8_products_equal_torchs() -> None:
    linear = FP8Linear.from_weight(draw(32, 64), draw(32, seed=2))
    values, scale = choose(CPU).quantize_rows(draw(5, 64, seed=3), "fp8")
    y = linear.matmul(values, scale)
    product = torch._scaled_mm(
        values, linear.weight.t(), scale_a=scale, scale_b=linear.weight_scale.t(), bias=linear.bias, out_dtype=torch.bfloat16
    )
    # BF16's rounding, twice where a sum in another order falls on the other side
    torch.testing.assert_close(y, product, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("linear_type", "dtype"), [(FP8Linear, torch.float8_e4m3fn), (INT8Linear, torch.int8), (INT8WeightLinear, torch.int8)]
)
def test_one_scale_for_the_tensor_is_one_for_each_row(linear_type: Any, dtype: torch.dtype) -> None:
    linear = linear_type(draw(32, 64).to(dtype), torch.full((1, 1), 0.25), None)
    assert torch.equal(linear.weight_scale, torch.full((32, 1), 0.25))


@pytest.mark.parametrize("quantizer", [fp8, int8_weight])
def test_weights_come_back(quantizer: Any) -> None:
    weight = draw(N, K)
    assert snr_db(quantizer.dequantize(*quantizer.quantize(weight)), weight.double()) > 30


@pytest.mark.parametrize("group", [1, 16, 256])
def test_turned_weights_come_back(group: int) -> None:
    weight = draw(N, K)
    codes, scale = int8.quantize(weight, group)
    assert snr_db(int8.dequantize(codes, scale, group), weight.double()) > 38


@pytest.mark.parametrize("linear_type", [FP8Linear, INT8Linear, NVFP4Linear])
@pytest.mark.parametrize("shape", [(32, 72), (40, 64)])
def test_sides_that_16_does_not_divide_are_refused(linear_type: Any, shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"(FP8|INT8|NVFP4) wants .* this one is \({shape[0]}, {shape[1]}\)") as caught:
        linear_type.from_weight(draw(*shape), None)
    assert caught.value.fix


@pytest.mark.parametrize("shape", [(50, 96), (130, 208), (1, 16), (256, 128)])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_nvfp4_equals_comfy_kitchen(shape: tuple[int, int], spread: float) -> None:
    # with spread, some blocks fall so far below the largest that their scales are subnormal or zero
    weight = draw(*shape) * (spread * draw(shape[0], 1, seed=4)).exp()
    packed = nvfp4.quantize(weight)
    global_scale = weight.abs().amax() / 2688
    codes, scales = kitchen.quantize_nvfp4(weight, global_scale, hi_first=False)
    assert torch.equal(packed.global_scale, global_scale)
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.scales.view(torch.uint8), scales.view(torch.uint8).view(packed.scales.shape))
    expected = kitchen.dequantize_nvfp4(codes, global_scale, scales, torch.float32, hi_first=False)
    assert torch.equal(nvfp4.dequantize(packed), expected)


def test_nvfp4_rounds_ties_to_even() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.0])
    # 448 blocks' worth of range, so that the first block's scale is one exactly
    values = torch.stack([ties, torch.full((16,), 2688.0)])
    even = torch.tensor([0.0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -1, -2, -2, -4, -4, 0])
    assert torch.equal(nvfp4.dequantize(nvfp4.quantize(values))[0], even)


def test_nvfp4_of_zeros_is_zero() -> None:
    assert torch.equal(nvfp4.dequantize(nvfp4.quantize(torch.zeros(16, 32))), torch.zeros(16, 32))


def test_native_nvfp4_is_refused_without_blackwell() -> None:
    linear = NVFP4Linear.from_weight(draw(32, 64), None)
    linear.backend = "native"
    with pytest.raises(MachineError, match="this is the device cpu"):
        linear(draw(5, 64).bfloat16())


def set_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], torch_version: str) -> FP8Linear:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", torch_version)
    return FP8Linear.from_weight(draw(32, 64), None)


@pytest.mark.parametrize(
    ("capability", "torch_version", "backend"),
    [
        ((8, 9), "2.11.0+cu130", "triton"),
        ((8, 9), "2.12.0", "torch"),
        ((9, 0), "2.11.0+cu130", "torch"),
        ((12, 0), "2.11.0", "torch"),
    ],
)
def test_fp8_backend_of_a_card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], torch_version: str, backend: str
) -> None:
    assert set_card(monkeypatch, capability, torch_version)._choose_backend(torch.device("cuda")) == backend


class OnACard(torch.Tensor):
    """A tensor in memory that says it is on a card."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLt...`",
        "Rowwise scaling is not currently supported on your device",
        "CUDA error: misaligned address",
    ],
)
def test_fp8_rows_without_a_product_go_to_our_kernel(monkeypatch: pytest.MonkeyPatch, backend: Any, said: str) -> None:
    linear = set_card(monkeypatch, (9, 0), "2.11.0+cu130")
    linear.backend = backend
    monkeypatch.setattr(fp8, "_WITHOUT_PRODUCT", set())
    asked: list[int] = []

    def refuse(values: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
        asked.append(len(values))
        if len(values) == 5:
            raise RuntimeError(said)
        return linear._emulate(values, scale, out)

    def multiply(values: Tensor, scale: Tensor, *rest: Tensor) -> str:
        return f"ours, {len(values)} rows"

    monkeypatch.setattr(linear, "_multiply_by_torch", refuse)
    monkeypatch.setitem(sys.modules, "millicent.kernels.matmul", SimpleNamespace(scaled_matmul=multiply))
    few, many = (draw(rows, 64).to(torch.float8_e4m3fn).as_subclass(OnACard) for rows in (5, 6))
    one, out = torch.ones(6, 1), torch.empty(6, 32)
    if backend is None and "misaligned" not in said:
        alike = fp8.FP8Linear(linear.weight, linear.weight_scale, linear.bias)
        assert [each.matmul(few, one[:5], out[:5]) for each in (linear, linear, alike)] == ["ours, 5 rows"] * 3
        assert asked == [5]  # and not again
        assert torch.equal(linear.matmul(many, one, out), out)
    else:
        with pytest.raises(RuntimeError, match=said[:20]):
            linear.matmul(few, one[:5], out[:5])


def test_fp8_refuses_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = set_card(monkeypatch, (8, 9), "2.11.0+cu130")
    linear.backend = "torch"
    with pytest.raises(MachineError, match=r"hangs on this card .* 177651"):
        linear._choose_backend(torch.device("cuda"))


@pytest.mark.parametrize("capability", [(10, 3), (12, 1)])
@pytest.mark.parametrize(
    ("version", "built_with", "wanted"),
    [
        ("2.9.1+cu130", "13.0", "triton"),
        ("2.10.0", "12.8", "triton"),
        ("2.10.0+cu129", "12.9", "torch"),
        ("2.13.0", None, "triton"),
    ],
)
def test_fp8_is_ours_where_torch_may_have_no_code_for_the_card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: str, built_with: str | None, wanted: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", built_with)
    assert fp8.default_backend(capability) == wanted
    assert fp8.default_backend((10, 0)) == fp8.default_backend((12, 0)) == "torch"


def test_fp8_refuses_cards_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match=r"8\.9 or later; this card has 8\.6"):
        set_card(monkeypatch, (8, 6), "2.11.0")._choose_backend(torch.device("cuda"))
