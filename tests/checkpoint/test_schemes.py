"""Schemes by the tensors that the real makers write, and by what is one tensor away from them."""

import itertools
import subprocess
import sys

import comfy_kitchen as kitchen
import pytest
import torch

from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.schemes import BY_NAME, FOREIGN_PARTS, KEEPABLE, SCHEMES, fitting_schemes, foreign_layout, near_misses
from millicent.formats.gguf_types import BLOCK_TYPES

QWEN_SHAPES = [(3072, 64), (3072, 3584), (18432, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (64, 3072), (6144, 3072)]
DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float32: "F32",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def info(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(dtype, shape, 0, 0)


def of(tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(DTYPES[tensor.dtype], tuple(tensor.shape), 0, 0)


def names(parts: dict[str, TensorInfo], shape: tuple[int, int]) -> list[str]:
    return [scheme.name for scheme in fitting_schemes(parts, shape)]


@pytest.mark.parametrize(("n", "k"), QWEN_SHAPES)
def test_each_maker_s_layer_has_one_reading_or_the_two_that_are_known(n: int, k: int) -> None:
    fp8, int8 = info("F8_E4M3", n, k), info("I8", n, k)
    value, row, rows = info("F32"), info("F32", n), info("F32", n, 1)
    assert names({"weight": info("BF16", n, k)}, (n, k)) == ["plain"]
    assert names({"weight": fp8}, (n, k)) == ["raw fp8"]
    assert names({"weight": fp8, "scale_weight": value}, (n, k)) == ["comfy scaled fp8"]
    assert names({"weight": fp8, "scale_weight": info("BF16", 1), "scale_input": value}, (n, k)) == ["comfy scaled fp8"]
    assert names(
        {"weight": fp8, "scale_weight": info("F32", n, k // 64, 1)} if k > 64 else {"weight": fp8, "scale_weight": rows}, (n, k)
    ) == ["musubi scaled fp8"]
    assert names({"weight": fp8, "weight_scale": value, "input_scale": value}, (n, k)) == ["fp8 per tensor"]
    assert names({"weight": fp8, "weight_scale": rows}, (n, k)) == ["fp8 per row"]
    assert names({"weight": int8, "weight_scale": row}, (n, k)) == ["int8 per row"]
    assert names({"weight": int8, "weight_scale": value, "comfy_quant": info("U8", 90)}, (n, k)) == ["int8 per tensor"]
    assert names({"weight": int8, "SCB": row}, (n, k)) == ["bitsandbytes int8"]
    assert names({"weight._data": int8, "weight._scale": rows}, (n, k)) == ["quanto"]
    grid = info("F32", -(-n // 128), -(-k // 128))
    assert names({"weight": fp8, "weight_scale_inv": grid}, (n, k)) == ["fine-grained fp8"]
    packed = {"weight": info("U8", n * k // 2, 1), "weight.absmax": info("F32", n * k // 64), "weight.quant_map": info("F32", 16)}
    assert names({**packed, "weight.quant_state.bitsandbytes__nf4": info("U8", 80)}, (n, k)) == ["bitsandbytes nf4"]
    modelopt = {"weight": info("U8", n, k // 2), "weight_scale": info("F8_E4M3", n, k // 16), "weight_scale_2": value}
    both = ["nvfp4, comfy", "nvfp4, modelopt"] if n % 128 == 0 else ["nvfp4, modelopt"]
    assert names(modelopt, (n, k)) == both
    packed_ct = {
        "weight_packed": info("U8", n, k // 2),
        "weight_scale": info("F8_E4M3", n, k // 16),
        "weight_global_scale": info("F32", 1),
    }
    assert names(packed_ct, (n, k)) == ["nvfp4, compressed-tensors"]
    if n % 128 == 0:
        lightx2v = {"weight": info("U8", n, k // 2), "weight_scale": info("F8_E4M3", n, k // 16), "input_global_scale": value}
        assert names(lightx2v | {"weight_global_scale": value}, (n, k)) == ["nvfp4, lightx2v"]
        calibrated = {**lightx2v, "alpha": value, "input_absmax": info("F32", 1)}
        assert names(calibrated, (n, k)) == ["nvfp4, lightx2v calibrated"]
        assert names({key: part for key, part in calibrated.items() if key != "alpha"}, (n, k)) == []


@pytest.mark.parametrize(("n", "k"), [(128, 64), (130, 208), (64, 3072), (3072, 64)])
def test_comfy_kitchens_own_tensors_fit_their_scheme(n: int, k: int) -> None:
    weight = torch.randn(n, k)
    codes, scales = kitchen.quantize_nvfp4(weight, weight.abs().amax() / 2688, pad_16x=True)[:2]
    parts = {"weight": of(codes), "weight_scale": of(scales), "weight_scale_2": info("F32")}
    assert "nvfp4, comfy" in names(parts, (n, k))
    codes, scales = kitchen.quantize_mxfp8(weight, pad_32x=True)[:2]
    assert "mxfp8, swizzled" in names({"weight": of(codes), "weight_scale": of(scales)}, (n, k))


def bitsandbytes_parts(kind: str, nested: bool, n: int = 3072, k: int = 3072) -> dict[str, TensorInfo]:
    blocks = n * k // 64
    parts = {
        "weight": info("U8", n * k // 2, 1),
        "weight.absmax": info("U8" if nested else "F32", blocks),
        "weight.quant_map": info("F32", 16),
        f"weight.quant_state.bitsandbytes__{kind}": info("U8", 90),
    }
    if nested:
        parts |= {"weight.nested_absmax": info("F32", blocks // 256), "weight.nested_quant_map": info("F32", 256)}
    return parts


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_is_whole_or_nothing(kind: str) -> None:
    for nested in (False, True):
        whole = bitsandbytes_parts(kind, nested)
        assert names(whole, (3072, 3072)) == [f"bitsandbytes {kind}{', nested' if nested else ''}"]
        for suffix in whole:
            assert names({key: part for key, part in whole.items() if key != suffix}, (3072, 3072)) == [], suffix
        other = "fp4" if kind == "nf4" else "nf4"
        both = whole | {f"weight.quant_state.bitsandbytes__{other}": info("U8", 90)}
        assert names(both, (3072, 3072)) == []
        assert names(whole | {"weight.absmax": info("F32" if nested else "U8", 3072 * 48)}, (3072, 3072)) == []
        assert names(whole | {"weight.absmax": info("U8" if nested else "F32", 3072 * 48 + 1)}, (3072, 3072)) == []


@pytest.mark.parametrize("block", [block for block in BLOCK_TYPES.values() if block.values > 1], ids=lambda block: block.name)
def test_each_of_ggufs_block_types_has_its_scheme(block: object) -> None:
    name, values = block.name, block.values  # type: ignore[attr-defined]
    (scheme,) = fitting_schemes({"weight": info(name, 3072, 3584)}, (3072, 3584))
    assert (scheme.name, scheme.format) == (f"gguf {name}", name.lower())
    assert names({"weight": info(name, 3584, 3072)}, (3072, 3584)) == []
    assert names({"weight": info(name, 3072, values // 2)}, (3072, values // 2)) == [], "rows that end amid a block"
    assert names({"weight": info(name, 3072, 3584), "weight_scale": info("F32")}, (3072, 3584)) == []


@pytest.mark.parametrize("name", ["GGML_10", "GGML_20", "Q2_K", "IQ4_NL"])
def test_other_types_of_ggml_have_none(name: str) -> None:
    assert names({"weight": info(name, 3072, 3072)}, (3072, 3072)) == []


def test_what_another_layout_has_is_known_by_name() -> None:
    for piece, layout in FOREIGN_PARTS.items():
        assert foreign_layout({"weight": info("I8", 8, 8), piece: info("F32", 8)}) == layout
        assert foreign_layout({f"weight.{piece}": info("F32", 8)}) == layout
        assert not [scheme.name for scheme in SCHEMES if piece in {*scheme.needed, *scheme.optional}]
    assert foreign_layout({"weight": info("I8", 8, 8), "weight_scale": info("F32")}) is None


def test_what_can_be_kept_is_needed_by_its_scheme() -> None:
    for name, suffixes in KEEPABLE.items():
        assert set(suffixes) <= set(BY_NAME[name].needed)


def test_telling_how_a_file_is_stored_loads_no_torch() -> None:
    code = "import sys, millicent.checkpoint.layout; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "False"


def test_two_readings_of_one_layer_differ_in_their_makers() -> None:
    """Wherever two schemes can fit the same tensors, a maker's mark tells them apart."""
    shapes = [*QWEN_SHAPES, (128, 128), (256, 64), (130, 208)]
    for (n, k), a, b in itertools.product(shapes, SCHEMES, SCHEMES):
        if a.name < b.name and a.needed.keys() == b.needed.keys():
            for combination in shared(a.needed, b.needed, n, k):
                assert fitting_schemes(combination, (n, k))
                assert a.makers, (a.name, b.name, n, k)
                assert b.makers, (a.name, b.name, n, k)
                assert not set(a.makers) & set(b.makers)


def shared(a: dict, b: dict, n: int, k: int) -> list[dict[str, TensorInfo]]:  # type: ignore[type-arg]
    """Tensors that both schemes would take, of some shapes that are likely for a matrix of (n, k)."""
    up = lambda count, multiple: -(-count // multiple) * multiple  # noqa: E731
    likely = {
        *((), (1,), (n,), (n, 1), (n, k), (n, k // 2), (n, k // 16), (n, k // 32), (n, k // 64), (n, k // 64, 1)),
        *((up(n, 16), up(k, 16) // 2), (up(n, 32), up(k, 32)), (-(-n // 128), -(-k // 128))),
        *((up(n, 128), up(-(-k // 16), 4)), (up(n, 128), up(-(-k // 32), 4))),
    }
    per_suffix = []
    for suffix in a:
        both = [
            TensorInfo(dtype, shape, 0, 0)
            for dtype in set(a[suffix].dtypes) & set(b[suffix].dtypes)
            for shape in likely
            if a[suffix].fits(TensorInfo(dtype, shape, 0, 0), n, k) and b[suffix].fits(TensorInfo(dtype, shape, 0, 0), n, k)
        ]
        per_suffix.append(both)
    return [dict(zip(a, chosen, strict=True)) for chosen in itertools.product(*per_suffix)]


CORRUPTIONS = {
    "a missing scale": ({"weight": info("I8", 3072, 3072)}, "weight_scale is missing"),
    "a renamed scale": ({"weight": info("I8", 3072, 3072), "weight_scales": info("F32", 3072)}, ""),
    "an extra scale": (
        {"weight": info("F8_E4M3", 3072, 3072), "weight_scale": info("F32"), "weight_scale_2": info("F32")},
        "weight_scale_2 does not belong",
    ),
    "a scale beside a plain weight": ({"weight": info("BF16", 3072, 3072), "weight_scale": info("F32")}, "weight is BF16"),
    "the transposed matrix's scales": (
        {"weight": info("I8", 3072, 3072), "weight_scale": info("F32", 1, 3072)},
        "weight_scale is F32 [1, 3072]",
    ),
    "another layer's codes": ({"weight": info("F8_E4M3", 3072, 64), "weight_scale": info("F32")}, "weight is F8_E4M3 [3072, 64]"),
    "TensorRT-LLM's flat scales": (
        {"weight": info("U8", 3072, 1536), "weight_scale": info("U8", 3072 * 192), "weight_scale_2": info("F32")},
        "weight_scale is U8",
    ),
    "half of 4-bit": ({"weight": info("U8", 3072, 1536)}, ""),
}


@pytest.mark.parametrize(("parts", "told"), CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_what_is_one_tensor_away_fits_nothing_and_is_told_why(parts: dict[str, TensorInfo], told: str) -> None:
    assert names(parts, (3072, 3072)) == []
    misses = near_misses(parts, (3072, 3072))
    if told:
        assert any(told in miss for miss in misses), misses


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(SCHEMES)
