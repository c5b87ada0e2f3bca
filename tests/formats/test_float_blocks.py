"""Four-bit and eight-bit blocks against the libraries that write them: comfy-kitchen and compressed-tensors."""

import comfy_kitchen as kitchen
import pytest
import torch
from comfy_kitchen.backends import eager
from comfy_kitchen.float_utils import e8m0_to_f32, pack_uint4, swap_nibbles, to_blocked
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millicent.errors import CheckpointError
from millicent.formats.float_blocks import dequantize_blocks, dequantize_mxfp8, dequantize_nvfp4
from millicent.formats.packed import E2M1, decode_e2m1, decode_e8m0, decode_int4, unpack_nibbles
from millicent.formats.swizzle import deswizzle, round_up, swizzle
from millicent.kernels.hadamard import largest_group, rotate

# rows that are no multiple of 128 and columns of no 64 come first, then whole tiles
SHAPES = [(50, 96), (130, 208), (33, 100), (1, 16), (256, 128)]
WHOLE_TILES = (256, 256)
MAX_ERROR_8_BIT = 0.05
MAX_ERROR_NVFP4 = 0.12
# what a test on real weights must be able to tell from a correct decode
MIN_ERROR_IF_WRONG = 0.3


def draw_weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Rows of very different sizes and a few large columns, as trained weights have: then a misplaced scale shows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[0], 1, generator=generator).exp()
    columns = torch.randn(1, shape[1], generator=generator).mul(0.5).exp()
    return 0.02 * rows * columns * torch.randn(shape, generator=generator)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def quantize_nvfp4(w: Tensor, high_first: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, swizzled block scales and the global scale, padded as comfy-kitchen stores them."""
    global_scale = w.abs().amax() / 2688
    packed, scales = kitchen.quantize_nvfp4(w, global_scale, pad_16x=True, hi_first=high_first)
    return packed, scales, global_scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("high_first", [True, False])
def test_nvfp4_equals_comfy_kitchen(shape: tuple[int, int], high_first: bool) -> None:
    w = draw_weight(shape)
    packed, scales, global_scale = quantize_nvfp4(w, high_first)
    expected = kitchen.dequantize_nvfp4(packed, global_scale, scales, torch.float32, hi_first=high_first)
    decoded = dequantize_nvfp4(packed, scales, global_scale, shape, high_first, swizzled=True)
    assert torch.equal(decoded, expected[: shape[0], : shape[1]])
    assert relative_error(decoded, w) < MAX_ERROR_NVFP4
    as_bytes = dequantize_nvfp4(packed.view(torch.int8), scales.view(torch.uint8), global_scale[None], shape, high_first, True)
    assert torch.equal(as_bytes, decoded)


@pytest.mark.parametrize("shape", [(50, 96), (130, 208), (256, 128)])
def test_nvfp4_equals_compressed_tensors(shape: tuple[int, int]) -> None:
    """Its layout is ModelOpt's too: the low nibble first, the scales as they are, no padding. Its global scale divides."""
    w = draw_weight(shape)
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    global_scale = 2688 / w.abs().amax()
    block_amax = w.unflatten(1, (-1, 16)).abs().amax(-1)
    scales = (block_amax / 6 * global_scale).to(torch.float8_e4m3fn)
    values = quantize(w, scales.float(), None, args, global_scale=global_scale)
    packed = pack_fp4_to_uint8(values)
    decoded = dequantize_nvfp4(packed, scales, 1 / global_scale, shape, high_first=False, swizzled=False)
    expected = dequantize(values, scales.float(), None, args, global_scale=global_scale)
    torch.testing.assert_close(decoded, expected, rtol=4e-7, atol=0)
    assert relative_error(decoded, w) < MAX_ERROR_NVFP4


@pytest.mark.parametrize(("high_first", "swizzled"), [(False, True), (True, False), (False, False)])
def test_nvfp4_in_a_wrong_layout_is_far_off(high_first: bool, swizzled: bool) -> None:
    w = draw_weight(WHOLE_TILES)
    packed, scales, global_scale = quantize_nvfp4(w)
    decoded = dequantize_nvfp4(packed, scales, global_scale, WHOLE_TILES, high_first, swizzled)
    assert relative_error(decoded, w) > MIN_ERROR_IF_WRONG


@pytest.mark.parametrize("shape", SHAPES)
def test_mxfp8_equals_comfy_kitchen(shape: tuple[int, int]) -> None:
    w = draw_weight(shape)
    codes, scales = kitchen.quantize_mxfp8(w, pad_32x=True)
    expected = kitchen.dequantize_mxfp8(codes, scales, torch.float32)
    decoded = dequantize_mxfp8(codes, scales, shape, swizzled=True)
    assert torch.equal(decoded, expected[: shape[0], : shape[1]])
    assert relative_error(decoded, w) < MAX_ERROR_8_BIT
    assert torch.equal(dequantize_mxfp8(codes, scales.view(torch.uint8), shape, True), decoded)
    plain = deswizzle(scales, codes.shape[0], codes.shape[1] // 32)
    assert torch.equal(dequantize_mxfp8(codes, plain, shape, swizzled=False), decoded)


def test_mxfp8_not_deswizzled_is_far_off() -> None:
    w = draw_weight(WHOLE_TILES)
    codes, scales = kitchen.quantize_mxfp8(w)
    assert relative_error(dequantize_mxfp8(codes, scales, WHOLE_TILES, swizzled=False), w) > MIN_ERROR_IF_WRONG


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rotate_is_the_hadamard_product_in_float64(group: int) -> None:
    w = draw_weight((5, 512))
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < group:
        h = torch.kron(h, h4)
    h /= group**0.5
    assert torch.equal(rotate(torch.eye(group), group), h.float())
    assert torch.equal(h, h.T)
    expected = (w.double().unflatten(1, (-1, group)) @ h).flatten(1)
    torch.testing.assert_close(rotate(w, group).double(), expected, rtol=0, atol=1e-6 * float(w.abs().amax()))
    torch.testing.assert_close(rotate(w, group), eager.rotate_int8_convrot_weight(w, group))


@pytest.mark.parametrize("shape", [(50, 512), (7, 64), (5, 48)])
def test_int8_convrot_equals_comfy_kitchen(shape: tuple[int, int]) -> None:
    w = draw_weight(shape)
    group = largest_group(shape[1])
    codes, scales = eager.quantize_int8_convrot_weight(w, group)
    rotated = codes.float() * scales
    expected = eager.dequantize_int8_convrot_weight(codes, scales, group)
    torch.testing.assert_close(rotate(rotated, group), expected, rtol=1e-5, atol=1e-7)
    assert relative_error(rotate(rotated, group), w) < MAX_ERROR_8_BIT
    assert relative_error(rotated, w) > MIN_ERROR_IF_WRONG


def test_int4_convrot_equals_comfy_kitchen() -> None:
    w = draw_weight((50, 256))
    packed, scales = eager.quantize_convrot_w4a4_weight(w)
    rotated = decode_int4(unpack_nibbles(packed, high_first=False)) * scales[:, None]
    expected = eager.dequantize_convrot_w4a4_weight(packed, scales)
    torch.testing.assert_close(rotate(rotated, 256), expected, rtol=1e-5, atol=1e-7)
    assert relative_error(rotate(rotated, 256), w) < 0.2


@pytest.mark.parametrize(("k", "wanted", "group"), [(3072, 256, 256), (64, 256, 64), (96, 256, 16), (3072, 100, 64), (6, 256, 1)])
def test_largest_group(k: int, wanted: int, group: int) -> None:
    assert largest_group(k, wanted) == group


@pytest.mark.parametrize("shape", [(256, 384), (300, 200), (64, 256)])
@pytest.mark.parametrize("code_type", ["int", "float"])
def test_a_grid_of_scales_equals_compressed_tensors(shape: tuple[int, int], code_type: str) -> None:
    w = draw_weight(shape)
    args = QuantizationArgs(num_bits=8, type=code_type, strategy="block", block_structure=[128, 128], symmetric=True)
    grid = (-(-shape[0] // 128), -(-shape[1] // 128))
    padded = torch.zeros(grid[0] * 128, grid[1] * 128)
    padded[: shape[0], : shape[1]] = w
    scales = padded.reshape(grid[0], 128, grid[1], 128).abs().amax((1, 3)) / (448 if code_type == "float" else 127)
    dtype = torch.float8_e4m3fn if code_type == "float" else torch.int8
    codes = quantize(w, scales, torch.zeros_like(scales), args, dtype=dtype)
    decoded = dequantize_blocks(codes, scales, shape)
    assert torch.equal(decoded, dequantize(codes, scales, None, args))
    # a grid cannot follow rows of very different sizes in INT8
    assert relative_error(decoded, w) < (MAX_ERROR_8_BIT if code_type == "float" else 0.1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("singleton", [False, True])
def test_scales_per_row_and_block(dtype: torch.dtype, singleton: bool) -> None:
    codes = torch.randint(-128, 128, (6, 192), generator=torch.Generator().manual_seed(0)).to(torch.float32).to(dtype)
    scales = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.stack([codes[:, k].float() * scales[:, k // 64].float() for k in range(192)], 1)
    assert torch.equal(dequantize_blocks(codes, scales[..., None] if singleton else scales, (6, 192)), expected)


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((3072, 3072), (24, 24), (128, 128)),
        ((24, 3072), (24, 24), (1, 128)),
        ((64, 3072), (1, 48), (64, 64)),
        ((3072, 64), (24, 1), (128, 64)),
        ((5, 7), (1, 1), (5, 7)),
        ((5, 7), (5, 1), (1, 7)),
        ((1, 64), (1, 4), (1, 16)),
    ],
)
def test_the_scales_shape_says_the_blocks_size(shape: tuple[int, int], grid: tuple[int, int], block: tuple[int, int]) -> None:
    scales = torch.arange(1.0, 1 + grid[0] * grid[1]).reshape(grid)
    decoded = dequantize_blocks(torch.ones(shape, dtype=torch.int8), scales, shape)
    for row, column in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)]:
        assert decoded[row, column] == scales[row // block[0], column // block[1]]


def test_every_e2m1_code_equals_compressed_tensors() -> None:
    packed = torch.arange(256, dtype=torch.uint8)[None]
    expected = unpack_fp4_from_uint8(packed, 1, 512, torch.float32)
    assert torch.equal(decode_e2m1(unpack_nibbles(packed, high_first=False)), expected)
    assert torch.equal(decode_e2m1(unpack_nibbles(swap_nibbles(packed), high_first=True)), expected)
    assert torch.equal(E2M1.signbit(), torch.arange(16) >= 8)


def test_every_int4_code() -> None:
    assert decode_int4(torch.arange(16, dtype=torch.uint8)).tolist() == [*range(8), *range(-8, 0)]


def test_every_e8m0_exponent() -> None:
    exponents = torch.arange(256, dtype=torch.uint8)
    powers = decode_e8m0(exponents)
    assert torch.equal(powers[:255], e8m0_to_f32(exponents)[:255])
    assert torch.equal(powers[1:255], exponents.view(torch.float8_e8m0fnu).float()[1:255])
    assert powers[0] == 0
    assert powers[255].isnan()
    assert torch.equal(decode_e8m0(exponents.view(torch.float8_e8m0fnu))[:255], powers[:255])


@given(rows=st.integers(1, 5), pairs=st.integers(1, 9), high_first=st.booleans(), signed=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None)
def test_nibbles_come_back(rows: int, pairs: int, high_first: bool, signed: bool, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_uint4(codes, hi_first=high_first)
    assert torch.equal(unpack_nibbles(packed.view(torch.int8) if signed else packed, high_first), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16, torch.float32])
@given(rows=st.integers(1, 300), columns=st.integers(1, 20))
@settings(deadline=None, max_examples=20)
def test_swizzled_scales_come_back(dtype: torch.dtype, rows: int, columns: int) -> None:
    scales = torch.arange(rows * columns).remainder(251).to(torch.uint8).reshape(rows, columns)
    scales = scales.view(dtype) if dtype.itemsize == 1 else scales.to(dtype)
    swizzled = swizzle(scales)
    assert swizzled.shape == (round_up(rows, 128), round_up(columns, 4))
    as_bytes = swizzled.contiguous().view(torch.uint8)
    assert torch.equal(as_bytes, to_blocked(scales, flatten=False).contiguous().view(torch.uint8))
    back = deswizzle(swizzled, rows, columns)
    assert back.dtype == dtype
    assert torch.equal(back.contiguous().view(torch.uint8), scales.view(torch.uint8))


def test_a_swizzled_scale_stands_where_cublas_has_it() -> None:
    scales = torch.arange(200 * 11, dtype=torch.int32).reshape(200, 11)
    flat = swizzle(scales).flatten()
    for row, column in [(0, 0), (1, 0), (31, 3), (32, 0), (127, 2), (128, 4), (199, 10)]:
        tile = (row // 128) * 3 + column // 4
        offset = 512 * tile + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4
        assert flat[offset] == scales[row, column]


@given(group=st.sampled_from([4, 16, 64]), groups=st.integers(1, 4), seed=st.integers(0, 99))
@settings(deadline=None)
def test_rotated_twice_comes_back(group: int, groups: int, seed: int) -> None:
    w = torch.randn(2, 3, group * groups, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rotate(rotate(w, group), group), w, rtol=0, atol=1e-5)


@given(rows=st.integers(1, 40), columns=st.integers(1, 80), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_any_size_comes_back_within_the_bounds(rows: int, columns: int, seed: int) -> None:
    w = draw_weight((rows, columns), seed)
    packed, scales, global_scale = quantize_nvfp4(w)
    decoded = dequantize_nvfp4(packed, scales, global_scale, (rows, columns), True, True)
    # half of the widest gap, from 4 to 6 of 6, under a scale that E4M3 may have rounded up by 1/16
    assert (decoded - w).abs().max() <= w.abs().max() / 6 * 17 / 16
    codes, exponents = kitchen.quantize_mxfp8(w, pad_32x=True)
    assert relative_error(dequantize_mxfp8(codes, exponents, (rows, columns), True), w) <= 2**-4


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


E4M3 = torch.float8_e4m3fn
ONE = torch.ones(())


@pytest.mark.parametrize(
    ("packed", "block_scales", "global_scale", "swizzled", "message"),
    [
        (zeros(50, 48), zeros(128, 8), ONE, True, r"codes are \(50, 48\); a \(50, 100\) weight wants \(50, 56\) or \(64, 56\)"),
        (zeros(128, 56), zeros(128, 8), ONE, True, r"codes are \(128, 56\)"),
        (zeros(64 * 56), zeros(128, 8), ONE, True, r"codes are \(3584,\)"),
        (zeros(64, 56, dtype=E4M3), zeros(128, 8), ONE, True, "codes are float8_e4m3fn; wanted uint8 or int8"),
        (zeros(64, 56), zeros(128, 8, dtype=torch.float32), ONE, True, "scales are float32; wanted float8_e4m3fn or uint8"),
        (zeros(64, 56), zeros(64, 7), ONE, True, r"scales are \(64, 7\); 64 x 7 of them want \(128, 8\)"),
        (zeros(64, 56), zeros(1024), ONE, True, r"scales are \(1024,\)"),
        (zeros(64, 56), zeros(128, 8), ONE, False, r"scales are \(128, 8\); wanted \(64, 7\)"),
        (zeros(50, 56), zeros(64, 7), ONE, False, r"scales are \(64, 7\); wanted \(50, 7\)"),
        (zeros(64, 56), zeros(128, 8), torch.ones(50), True, r"global scale of \(50,\); wanted one number"),
    ],
)
def test_nvfp4_refuses(packed: Tensor, block_scales: Tensor, global_scale: Tensor, swizzled: bool, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize_nvfp4(packed, block_scales, global_scale, (50, 100), True, swizzled)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("codes", "block_scales", "swizzled", "message"),
    [
        (zeros(64, 100, dtype=E4M3), zeros(128, 4), True, r"codes are \(64, 100\); .* \(50, 128\) or \(64, 128\)"),
        (zeros(64, 128, dtype=torch.int8), zeros(128, 4), True, "codes are int8; wanted float8_e4m3fn"),
        (zeros(64, 128, dtype=E4M3), zeros(128, 4, dtype=E4M3), True, "scales are float8_e4m3fn; wanted float8_e8m0fnu or uint8"),
        (zeros(64, 128, dtype=E4M3), zeros(128, 8), True, r"scales are \(128, 8\)"),
        (zeros(64, 128, dtype=E4M3), zeros(128, 4), False, r"scales are \(128, 4\); wanted \(64, 4\)"),
    ],
)
def test_mxfp8_refuses(codes: Tensor, block_scales: Tensor, swizzled: bool, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize_mxfp8(codes, block_scales, (50, 100), swizzled)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("shape", "codes", "scales", "message"),
    [
        ((50, 96), zeros(50, 96), torch.ones(50, 3), "codes are uint8; wanted int8 or float8_e4m3fn or float8_e5m2"),
        ((50, 96), zeros(50, 96, dtype=torch.int8), zeros(50, 3), "scales are uint8; wanted float32"),
        ((50, 96), zeros(64, 96, dtype=torch.int8), torch.ones(50, 3), r"codes are \(64, 96\); wanted \(50, 96\)"),
        ((50, 96), zeros(50, 96, dtype=torch.int8), torch.ones(50, 7), "found none"),
        ((50, 96), zeros(50, 96, dtype=torch.int8), torch.ones(3, 50), "found none"),
        ((50, 96), zeros(50, 96, dtype=torch.int8), torch.ones(50), "found none"),
        ((50, 96), zeros(50, 96, dtype=torch.int8), torch.ones(()), "found none"),
        ((50, 96), zeros(50, 96, dtype=torch.int8), torch.ones(50, 0), "found none"),
        ((50, 96), zeros(50, 96, dtype=torch.int8), torch.ones(50, 3, 2), "found none"),
        ((1, 6), zeros(1, 6, dtype=torch.int8), torch.ones(1, 2), "found 1 x 3 or 1 x 4"),
    ],
)
def test_blocks_refuse(shape: tuple[int, int], codes: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize_blocks(codes, scales, shape)
    assert caught.value.fix


@pytest.mark.parametrize(("group", "message"), [(0, "is 0 wide"), (1, "is 1 wide"), (8, "is 8 wide"), (48, "48"), (64, "do not")])
def test_rotate_refuses(group: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        rotate(torch.ones(2, 96), group)


def test_only_bytes_hold_nibbles() -> None:
    with pytest.raises(CheckpointError, match="are int32; wanted uint8 or int8"):
        unpack_nibbles(zeros(2, 2, dtype=torch.int32), high_first=True)
