"""SVDQuant and AWQ weights as DeepCompressor packs them for nunchaku.

No file of nunchaku's was at hand when this was written. What stands in for one are two packers: the arithmetic below, which
says for every number where it lies and shares nothing with the decoder, and DeepCompressor's own, which wrote those files.
The latter's package asks for half of PyPI, so it is no dependency of ours; the tests that need it run where
`pip install --no-deps deepcompressor-toolkit==0.1.0` has been run.
"""

import importlib
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millicent.errors import CheckpointError
from millicent.formats.packed import E2M1
from millicent.formats.svdquant import (
    GELU_SHIFT,
    dequantize_awq,
    dequantize_svdq_fp4,
    dequantize_svdq_int4,
    restore_modulation,
    unpack_vector,
    unshift_bias,
)

SHAPES = [(128, 128), (256, 384), (384, 256)]
RANK = 32
# Qwen-Image's attention and the two layers of its MLP
FULL_SHAPES = [(3072, 3072), (12288, 3072)]
MAX_ERROR_INT4 = 0.16
MAX_ERROR_FP4 = 0.12
# what a test on real weights must be able to tell from a correct decode
MIN_ERROR_IF_WRONG = 0.3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Rows of very different sizes and a few large columns, as trained weights have: then a misplaced scale shows."""
    return 0.02 * draw(shape[0], 1, seed=seed).exp() * draw(1, shape[1], seed=seed + 1).mul(0.5).exp() * draw(*shape, seed=seed + 2)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def residual_error(found: Tensor, w: Tensor, parts: dict[str, Tensor]) -> float:
    """Relative to what was quantized. Relative to w, a wrong scale may look like rounding: the low-rank pair has most of w."""
    return float((found - w).norm() / (w - parts["up"].float() @ parts["down"].float()).norm())


def place(numbers: Tensor, offsets: Tensor) -> Tensor:
    """The numbers, flat, each at its offset; all offsets must occur."""
    packed = torch.empty(numbers.numel(), dtype=numbers.dtype)
    packed[offsets.flatten()] = numbers.flatten()
    assert torch.equal(offsets.flatten().sort().values, torch.arange(numbers.numel()))
    return packed


def grid(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.arange(shape[0])[:, None], torch.arange(shape[1])


def code_offsets(n: Tensor, k: Tensor, columns: int) -> Tensor:
    """In codes. Tile of 128 x 64; in it the 16 rows, row lane, column lane, half of rows, half of columns, neighbor."""
    tile = n // 128 * (columns // 64) + k // 64
    lane = (n % 128 // 16 * 8 + n % 8) * 4 + k % 32 // 8
    return ((tile * 256 + lane) * 4 + n % 16 // 8 * 2 + k % 64 // 32) * 8 + k % 8


def scale_offsets(n: Tensor, group: Tensor, groups: int) -> Tensor:
    """128 rows of a group stand together: 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15, 16 17 24 25 and so on."""
    return (n // 128 * groups + group) * 128 + n % 128 // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2


def micro_scale_offsets(n: Tensor, group: Tensor, groups: int) -> Tensor:
    """128 rows of four groups stand together: rows 0 32 64 96, 8 40 72 104, 16 48 80 112, 24 56 88 120, 1 33 and so on."""
    row = n % 8 * 16 + n % 32 // 8 * 4 + n % 128 // 32
    return ((n // 128 * (groups // 4) + group // 4) * 128 + row) * 4 + group % 4


def fragment_offsets(n: Tensor, k: Tensor) -> Tensor:
    """In a fragment of 16 x 16: row lane, column lane, half of rows, half of columns, neighbor."""
    return (n % 8 * 4 + k % 8 // 2) * 8 + n % 16 // 8 * 4 + k % 16 // 8 * 2 + k % 2


def awq_offsets(n: Tensor, k: Tensor, columns: int) -> Tensor:
    """In codes. Four rows take turns every 64 columns; a word has the columns i, i + 8, i + 16 and i + 24 of 32."""
    turn = (n // 4 * (columns // 64) + k // 64) * 4 + n % 4
    return ((turn * 2 + k % 64 // 32) * 8 + k % 8) * 4 + k % 32 // 8


def pack_nibbles(codes: Tensor) -> Tensor:
    """Flat codes, 0 to 15 -> bytes, the earlier one in the low nibble."""
    return codes[::2] | codes[1::2] << 4


def pack_codes(codes: Tensor) -> Tensor:
    """(N, K), uint8, 0 to 15 -> (N, K/2), INT8."""
    offsets = code_offsets(*grid(codes.shape), codes.shape[1])
    return pack_nibbles(place(codes, offsets)).view(torch.int8).reshape(codes.shape[0], -1)


def pack_scales(scales: Tensor) -> Tensor:
    """(N, groups) -> (groups, N)."""
    return place(scales, scale_offsets(*grid(scales.shape), scales.shape[1])).reshape(-1, scales.shape[0])


def pack_vector(vector: Tensor) -> Tensor:
    return pack_scales(vector[:, None]).flatten()


def pack_micro_scales(scales: Tensor) -> Tensor:
    """(N, groups) -> (groups, N), E4M3."""
    offsets = micro_scale_offsets(*grid(scales.shape), scales.shape[1])
    return place(scales.to(torch.float8_e4m3fn).view(torch.uint8), offsets).view(torch.float8_e4m3fn).reshape(-1, scales.shape[0])


def pack_up(up: Tensor) -> Tensor:
    """(N, r) -> (N, r), fragments along the rank first."""
    n, r = grid(up.shape)
    return place(up, (n // 16 * (up.shape[1] // 16) + r // 16) * 256 + fragment_offsets(n, r)).reshape(up.shape)


def pack_down(down: Tensor) -> Tensor:
    """(r, K) -> (K, r), fragments along the rank first."""
    r, k = grid(down.shape)
    return place(down, (k // 16 * (down.shape[0] // 16) + r // 16) * 256 + fragment_offsets(r, k)).reshape(-1, down.shape[0])


def pack_awq(codes: Tensor) -> Tensor:
    """(N, K), uint8, 0 to 15 -> (N/4, K/2), INT32."""
    offsets = awq_offsets(*grid(codes.shape), codes.shape[1])
    return pack_nibbles(place(codes, offsets)).view(torch.int32).reshape(codes.shape[0] // 4, -1)


def split(w: Tensor) -> dict[str, Tensor]:
    """SVDQuant: outliers go from x to w, the largest singular values to a low-rank pair, and what is left will be quantized.

    The pair is kept for the x that is not smoothed, as files have it. All BF16 but the rest.
    """
    smooth = (1 / w.abs().amax(0).sqrt()).bfloat16()
    u, s, v = torch.linalg.svd(w * smooth.float(), full_matrices=False)
    up = (u[:, :RANK] * s[:RANK]).bfloat16()
    down = (v[:RANK] / smooth.float()).bfloat16()
    return {"smooth": smooth, "up": up, "down": down, "rest": (w - up.float() @ down.float()) * smooth.float()}


def round_to_int4(rest: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, -7 to 7, (N, K) FP32, and BF16 scales (N, K/64)."""
    groups = rest.unflatten(1, (-1, 64))
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    return (groups / scales.float()[..., None]).round().clamp(-7, 7).flatten(1), scales


def round_to_e2m1(values: Tensor) -> Tensor:
    return (values[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)


def lay_out(nibbles: Tensor, scales: tuple[Tensor, Tensor], parts: dict[str, Tensor], plain: str) -> dict[str, Tensor]:
    """As in a file. scales: packed, and not. plain: the tensor that is left in the order of the weight, if any."""
    packed = {
        "qweight": pack_codes(nibbles),
        "wscales": scales[0],
        "smooth_factor": pack_vector(parts["smooth"]),
        "proj_down": pack_down(parts["down"]),
        "proj_up": pack_up(parts["up"]),
    }
    unpacked = {
        "qweight": pack_nibbles(nibbles.flatten()).view(torch.int8).reshape(nibbles.shape[0], -1),
        "wscales": scales[1].T.contiguous(),
        "smooth_factor": parts["smooth"],
        "proj_down": parts["down"].T.contiguous(),
        "proj_up": parts["up"],
    }
    return {name: (unpacked if name == plain else packed)[name] for name in packed}


def quantize_int4(parts: dict[str, Tensor], plain: str = "") -> dict[str, Tensor]:
    codes, scales = round_to_int4(parts["rest"])
    return lay_out((codes.int() & 15).to(torch.uint8), (pack_scales(scales), scales), parts, plain)


def quantize_fp4(parts: dict[str, Tensor], plain: str = "") -> dict[str, Tensor]:
    """With a scale for all and one for each row, although files have had one or the other."""
    rest = parts["rest"]
    wcscales = (rest.abs().amax(1) / rest.abs().amax()).bfloat16()
    wtscale = (rest.abs().amax() / 2688).reshape(1)
    groups = (rest / wtscale / wcscales.float()[:, None]).unflatten(1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    codes = round_to_e2m1(groups / scales.float()[..., None]).flatten(1)
    packed = lay_out(codes, (pack_micro_scales(scales), scales), parts, plain)
    return {**packed, "wtscale": wtscale, "wcscales": wcscales if plain == "wcscales" else pack_vector(wcscales)}


def quantize_awq(w: Tensor) -> dict[str, Tensor]:
    groups = w.unflatten(1, (-1, 64))
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    zeros = (-7 * scales.float()).bfloat16()
    codes = ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 15)
    packed = pack_awq(codes.flatten(1).to(torch.uint8))
    return {"qweight": packed, "wscales": scales.T.contiguous(), "wzeros": zeros.T.contiguous()}


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_comes_back(shape: tuple[int, int]) -> None:
    w = draw_weight(shape)
    parts = split(w)
    codes, scales = round_to_int4(parts["rest"])
    decoded = dequantize_svdq_int4(**quantize_int4(parts))
    exact = codes.double() * scales.double().repeat_interleave(64, 1) / parts["smooth"].double()
    exact += parts["up"].double() @ parts["down"].double()
    assert relative_error(decoded.double(), exact) < 1e-6
    assert decoded.dtype == torch.float32
    assert relative_error(decoded, w) < MAX_ERROR_INT4
    assert residual_error(decoded, w, parts) < MAX_ERROR_INT4


@pytest.mark.parametrize("shape", SHAPES)
def test_fp4_comes_back(shape: tuple[int, int]) -> None:
    w = draw_weight(shape)
    parts = split(w)
    decoded = dequantize_svdq_fp4(**quantize_fp4(parts))
    assert relative_error(decoded, w) < MAX_ERROR_FP4
    assert residual_error(decoded, w, parts) < MAX_ERROR_FP4


def test_fp4_scales_that_a_file_lacks_are_1() -> None:
    packed = quantize_fp4(split(draw_weight((128, 128))))
    ones = {"wtscale": torch.ones(()), "wcscales": torch.ones(128).half()}
    without = {name: tensor for name, tensor in packed.items() if name not in ones}
    assert torch.equal(dequantize_svdq_fp4(**without), dequantize_svdq_fp4(**without, **ones))


@given(tiles=st.tuples(st.integers(1, 3), st.integers(1, 3)), rank=st.sampled_from([16, 48]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_every_number_comes_back(tiles: tuple[int, int], rank: int, seed: int) -> None:
    """With powers of 2 nothing is rounded: the result must be exact."""
    rows, columns = 128 * tiles[0], 128 * tiles[1]
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    codes, up, down = integers(-8, 8, rows, columns), integers(-3, 4, rows, rank), integers(-3, 4, rank, columns)
    scales, smooth = integers(-3, 4, rows, columns // 64).exp2(), integers(-3, 4, columns).exp2()
    others = (pack_vector(smooth.bfloat16()), pack_down(down.half()), pack_up(up.bfloat16()))
    nibbles = (codes.int() & 15).to(torch.uint8)
    int4 = dequantize_svdq_int4(pack_codes(nibbles), pack_scales(scales.half()), *others)
    assert torch.equal(int4, codes * scales.repeat_interleave(64, 1) / smooth + up @ down)
    micro, row_scales = integers(-3, 4, rows, columns // 16).exp2(), integers(-3, 4, rows).exp2()
    more = (torch.tensor([0.25]), pack_vector(row_scales.bfloat16()))
    fp4 = dequantize_svdq_fp4(pack_codes(nibbles), pack_micro_scales(micro), *others, *more)
    scaled = E2M1[nibbles.int()] * micro.repeat_interleave(16, 1) * row_scales[:, None] / 4
    assert torch.equal(fp4, scaled / smooth + up @ down)
    assert torch.equal(unpack_vector(pack_vector(row_scales.half())), row_scales)


@pytest.mark.parametrize("shape", FULL_SHAPES)
def test_layers_of_full_size(shape: tuple[int, int]) -> None:
    """Random bytes, and a thousand elements looked up one by one in what is packed."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    qweight = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, generator=generator)
    wscales, smooth = draw(columns // 64, rows).bfloat16(), draw(columns, seed=1).abs().add(0.5).bfloat16()
    down, up = draw(RANK, columns, seed=2).bfloat16(), draw(rows, RANK, seed=3).bfloat16()
    decoded = dequantize_svdq_int4(qweight, wscales, pack_vector(smooth), pack_down(down), pack_up(up))
    n = torch.randint(0, rows, (1000,), generator=generator)
    k = torch.randint(0, columns, (1000,), generator=generator)
    at = code_offsets(n, k, columns)
    codes = qweight.view(torch.uint8).flatten()[at // 2].int() >> at % 2 * 4 & 15
    scales = wscales.flatten()[scale_offsets(n, k // 64, columns // 64)].float()
    expected = ((codes ^ 8) - 8) * scales / smooth[k].float() + (up[n].float() * down[:, k].T.float()).sum(1)
    assert decoded.shape == shape
    torch.testing.assert_close(decoded[n, k], expected, rtol=1e-5, atol=1e-4)


PARTS = ["qweight", "wscales", "smooth_factor", "proj_down", "proj_up"]


@pytest.mark.parametrize("plain", PARTS)
def test_int4_in_a_wrong_order_is_far_off(plain: str) -> None:
    w = draw_weight((256, 256))
    parts = split(w)
    assert residual_error(dequantize_svdq_int4(**quantize_int4(parts, plain)), w, parts) > MIN_ERROR_IF_WRONG


@pytest.mark.parametrize("plain", [*PARTS, "wcscales"])
def test_fp4_in_a_wrong_order_is_far_off(plain: str) -> None:
    w = draw_weight((256, 256))
    parts = split(w)
    assert residual_error(dequantize_svdq_fp4(**quantize_fp4(parts, plain)), w, parts) > MIN_ERROR_IF_WRONG


@pytest.mark.parametrize("shape", [(4, 64), (24, 192), (384, 1024)])
def test_awq_comes_back(shape: tuple[int, int]) -> None:
    w = draw_weight(shape)
    decoded = dequantize_awq(**quantize_awq(w))
    assert decoded.dtype == torch.float32
    assert relative_error(decoded, w) < MAX_ERROR_INT4


def test_awq_in_a_wrong_order_is_far_off() -> None:
    w = draw_weight((384, 1024))
    packed = quantize_awq(w)
    of_other_rows = {name: packed[name].roll(1, 1) for name in ("wscales", "wzeros")}
    assert relative_error(dequantize_awq(**{**packed, **of_other_rows}), w) > MIN_ERROR_IF_WRONG
    codes = torch.randint(0, 16, (384, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = pack_nibbles(codes.flatten()).view(torch.int32).reshape(96, 512)
    ones, zeros = torch.ones(16, 384).bfloat16(), torch.zeros(16, 384).bfloat16()
    assert torch.equal(dequantize_awq(pack_awq(codes), ones, zeros), codes.float())
    assert relative_error(dequantize_awq(plain, ones, zeros), codes.float()) > MIN_ERROR_IF_WRONG


def test_the_modulation_layer_of_full_size() -> None:
    codes = torch.randint(
        -(2**31), 2**31 - 1, (18432 // 4, 3072 // 2), dtype=torch.int32, generator=torch.Generator().manual_seed(0)
    )
    scales, zeros = draw(48, 18432).bfloat16(), draw(48, 18432, seed=1).bfloat16()
    decoded = dequantize_awq(codes, scales, zeros)
    n = torch.randint(0, 18432, (1000,), generator=torch.Generator().manual_seed(1))
    k = torch.randint(0, 3072, (1000,), generator=torch.Generator().manual_seed(2))
    at = awq_offsets(n, k, 3072)
    nibbles = codes.view(torch.uint8).flatten()[at // 2].int() >> at % 2 * 4 & 15
    assert decoded.shape == (18432, 3072)
    assert torch.equal(decoded[n, k], nibbles * scales[k // 64, n].float() + zeros[k // 64, n].float())


def test_a_restored_modulation_draws_what_the_stored_one_does() -> None:
    """nunchaku: six numbers of each feature side by side, x * scale + shift. diffusers: six blocks, x * (1 + scale) + shift."""
    dim, columns = 8, 64
    stored_w, stored_bias = draw(dim * 6, columns), draw(dim * 6, seed=1).bfloat16()
    w, bias = restore_modulation(stored_w, stored_bias)
    temb, x = draw(columns, seed=2), draw(dim, seed=3)
    stored = (stored_w @ temb + stored_bias.float()).view(dim, 6)
    restored = (w @ temb + bias).view(6, dim)
    for first in (0, 3):
        shift, scale, gate = restored[first : first + 3]
        torch.testing.assert_close(x * (1 + scale) + shift, x * stored[:, first + 1] + stored[:, first])
        torch.testing.assert_close(gate, stored[:, first + 2])


def test_an_unshifted_bias_draws_what_the_kernel_does() -> None:
    """The kernel: low-rank pair on x, then 0.171875 added to x, smoothed, times codes and scales, plus the stored bias."""
    rows, columns = 128, 256
    parts = split(draw_weight((rows, columns)))
    packed = quantize_int4(parts)
    codes, scales = round_to_int4(parts["rest"])
    stored, x = draw(rows, seed=4), draw(columns, seed=5)
    smoothed = (x + 0.171875) / parts["smooth"].float()
    by_kernel = (codes * scales.float().repeat_interleave(64, 1)) @ smoothed + parts["up"].float() @ (parts["down"].float() @ x)
    w = dequantize_svdq_int4(**packed)
    plain = w @ x + unshift_bias(stored, w, packed["proj_down"], packed["proj_up"])
    assert relative_error(plain, by_kernel + stored) < 1e-5
    assert relative_error(w @ x + stored, by_kernel + stored) > 1e-2


@pytest.fixture(scope="module")
def packer() -> ModuleType:
    return importlib.import_module("deepcompressor.backend.nunchaku.convert")


# its padding indexes in a way that PyTorch deprecates
ITS_OWN_WARNING = "ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning"


@pytest.mark.filterwarnings(ITS_OWN_WARNING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("behind_gelu", [False, True])
def test_int4_equals_deepcompressor(packer: ModuleType, shape: tuple[int, int], behind_gelu: bool) -> None:
    w = draw_weight(shape)
    parts = split(w)
    # powers of 2, because it takes codes times scales in BF16
    scales = round_to_int4(parts["rest"])[1].float().log2().ceil().exp2().bfloat16()
    codes = (parts["rest"].unflatten(1, (-1, 64)) / scales.float()[..., None]).round().flatten(1)
    rest = (codes * scales.float().repeat_interleave(64, 1)).bfloat16()
    bias = draw(shape[0], seed=6)
    whole = rest.float() / parts["smooth"].float() + parts["up"].float() @ parts["down"].float()
    # it takes a bias that undoes the shift for the whole weight, and takes the low-rank pair's part out of that
    shift = torch.tensor([GELU_SHIFT]) if behind_gelu else None
    shifted = (bias - (GELU_SHIFT * whole.sum(1) if behind_gelu else 0)).bfloat16()
    written = packer.convert_to_nunchaku_w4x4y16_linear_state_dict(
        rest,
        scales[:, None, :, None],
        bias=shifted,
        smooth=parts["smooth"],
        lora=((parts["down"].float() * parts["smooth"].float()).bfloat16(), parts["up"]),
        shift=shift,
    )
    assert torch.equal(written["qweight"], pack_codes((codes.int() & 15).to(torch.uint8)))
    assert torch.equal(written["wscales"], pack_scales(scales))
    assert torch.equal(written["smooth"], pack_vector(parts["smooth"]))
    assert torch.equal(written["lora_up"], pack_up(parts["up"]))
    low_rank = written["lora_down"], written["lora_up"]
    decoded = dequantize_svdq_int4(written["qweight"], written["wscales"], written["smooth"], *low_rank)
    # the pair's down was rounded to BF16 smoothed, and again unsmoothed
    assert relative_error(decoded, whole) < 2**-8
    found = unpack_vector(written["bias"])
    if behind_gelu:
        found = unshift_bias(found, decoded, *low_rank)
    # the shifted bias was rounded to BF16 twice, the pair that it was computed from once more
    torch.testing.assert_close(found, bias, rtol=0, atol=2**-6 * float(shifted.abs().max()))


@pytest.mark.filterwarnings(ITS_OWN_WARNING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_row", [False, True])
def test_fp4_equals_deepcompressor(packer: ModuleType, shape: tuple[int, int], per_row: bool) -> None:
    w = draw_weight(shape).bfloat16()
    amax = w.float().abs().amax(1) if per_row else w.float().abs().amax()
    outer = (amax / 2048).bfloat16().reshape(-1)
    groups = (w.float() / outer.float()[:, None]).unflatten(1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    smooth, up, down = (1 + draw(shape[1]).abs()).bfloat16(), draw(shape[0], RANK).bfloat16(), draw(RANK, shape[1]).bfloat16()
    # a first axis of one is a scale for all, which it then stores as one number
    per_weight = outer[:, None, None, None] if per_row else outer
    qweight, outer_written, _, smooth_written, low_rank, written = packer.convert_to_nunchaku_w4x4y16_linear_weight(
        w, per_weight, smooth=smooth, lora=(down, up), float_point=True, subscale=scales.bfloat16()[:, None, :, None]
    )
    codes = round_to_e2m1(groups / scales.float()[..., None]).flatten(1)
    assert torch.equal(qweight, pack_codes(codes))
    assert torch.equal(written.view(torch.uint8), pack_micro_scales(scales).view(torch.uint8))
    assert torch.equal(outer_written, pack_vector(outer) if per_row else outer)
    assert torch.equal(low_rank[0], pack_down(down))
    name = "wcscales" if per_row else "wtscale"
    decoded = dequantize_svdq_fp4(qweight, written, smooth_written, *low_rank, **{name: outer_written})
    smoothed = w.float() / smooth.float()
    assert relative_error(decoded - up.float() @ down.float(), smoothed) < MAX_ERROR_FP4


@pytest.mark.filterwarnings(ITS_OWN_WARNING)
def test_awq_equals_deepcompressor(packer: ModuleType) -> None:
    w, bias = draw_weight((6 * 64, 1024)), draw(6 * 64, seed=6).mul(0.1).bfloat16()
    scales = (w.unflatten(1, (-1, 64)).abs().amax(-1) / 7).bfloat16()
    written = packer.convert_to_nunchaku_w4x16_adanorm_zero_state_dict(w.bfloat16(), scales[:, None, :, None], bias.clone())
    stored_bias = written.pop("bias")
    restored, restored_bias = restore_modulation(dequantize_awq(**written), stored_bias)
    assert relative_error(restored, w) < MAX_ERROR_INT4
    # half a step of BF16 just above 1
    torch.testing.assert_close(restored_bias, bias.float(), rtol=0, atol=2**-8)
    side_by_side = w.view(6, 64, 1024).transpose(0, 1).reshape(384, 1024)
    assert relative_error(dequantize_awq(**written), side_by_side) < MAX_ERROR_INT4


INT8, BF16 = torch.int8, torch.bfloat16


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def int4_of_zeros() -> dict[str, Tensor]:
    return {
        "qweight": zeros(128, 128, dtype=INT8),
        "wscales": zeros(4, 128),
        "smooth_factor": zeros(256),
        "proj_down": zeros(256, 32),
        "proj_up": zeros(128, 32),
    }


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("qweight", zeros(128, 128, dtype=torch.int32), "codes: found int32; wanted int8"),
        ("qweight", zeros(100, 128, dtype=INT8), r"codes are \(100, 128\); wanted \(N, K/2\), N and K multiples of 128"),
        ("qweight", zeros(128, 96, dtype=INT8), r"codes are \(128, 96\)"),
        ("qweight", zeros(128, 128, 1, dtype=INT8), r"codes are \(128, 128, 1\)"),
        ("qweight", zeros(0, 128, dtype=INT8), r"codes are \(0, 128\)"),
        ("wscales", zeros(128, 4), r"INT4 weight: found \(128, 4\); wanted \(4, 128\)"),
        ("wscales", zeros(16, 128, dtype=torch.float8_e4m3fn), "INT4 weight: found float8_e4m3fn; wanted bfloat16 or float16"),
        ("smooth_factor", zeros(128), r"smooth_factor: found \(128,\); wanted \(256,\)"),
        ("smooth_factor", zeros(256, dtype=torch.float32), "smooth_factor: found float32"),
        ("proj_down", zeros(32, 256), r"proj_down: found \(32, 256\); wanted \(256, 256\)"),
        ("proj_down", zeros(256, 24), r"proj_down is \(256, 24\); wanted \(K, r\), r a multiple of 16"),
        ("proj_down", zeros(256, 0), r"proj_down is \(256, 0\)"),
        ("proj_down", zeros(8192), r"proj_down is \(8192,\)"),
        ("proj_up", zeros(128, 16), r"proj_up: found \(128, 16\); wanted \(128, 32\)"),
        ("proj_up", zeros(128, 32, dtype=INT8), "proj_up: found int8"),
    ],
)
def test_int4_refuses(name: str, tensor: Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize_svdq_int4(**{**int4_of_zeros(), name: tensor})
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("wscales", zeros(4, 128), "FP4 weight: found bfloat16; wanted float8_e4m3fn"),
        ("wscales", zeros(4, 128, dtype=torch.float8_e4m3fn), r"FP4 weight: found \(4, 128\); wanted \(16, 128\)"),
        ("wtscale", zeros(2), r"wtscale: found \(2,\); wanted \(1,\)"),
        ("wtscale", zeros(1, dtype=INT8), "wtscale: found int8"),
        ("wcscales", zeros(256), r"wcscales: found \(256,\); wanted \(128,\)"),
        ("wcscales", zeros(128, dtype=torch.float8_e4m3fn), "wcscales: found float8_e4m3fn"),
    ],
)
def test_fp4_refuses(name: str, tensor: Tensor, message: str) -> None:
    whole = {**int4_of_zeros(), "wscales": zeros(16, 128, dtype=torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize_svdq_fp4(**{**whole, name: tensor})
    assert caught.value.fix


@pytest.mark.parametrize(
    ("qweight", "wscales", "wzeros", "message"),
    [
        (zeros(6, 64, dtype=INT8), zeros(2, 24), zeros(2, 24), "AWQ codes: found int8; wanted int32"),
        (zeros(6, 60, dtype=torch.int32), zeros(2, 24), zeros(2, 24), r"codes are \(6, 60\); wanted \(N/4, K/2\), K a multiple"),
        (zeros(384, dtype=torch.int32), zeros(2, 24), zeros(2, 24), r"codes are \(384,\)"),
        (zeros(6, 64, dtype=torch.int32), zeros(24, 2), zeros(2, 24), r"AWQ scales: found \(24, 2\); wanted \(2, 24\)"),
        (zeros(6, 64, dtype=torch.int32), zeros(2, 24), zeros(4, 24), r"AWQ zeros: found \(4, 24\); wanted \(2, 24\)"),
        (zeros(6, 64, dtype=torch.int32), zeros(2, 24), zeros(2, 24, dtype=INT8), "AWQ zeros: found int8"),
    ],
)
def test_awq_refuses(qweight: Tensor, wscales: Tensor, wzeros: Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize_awq(qweight, wscales, wzeros)
    assert caught.value.fix


@pytest.mark.parametrize(("w", "bias"), [(zeros(20, 4), zeros(20)), (zeros(24, 4), zeros(12)), (zeros(24), zeros(24))])
def test_a_modulation_is_refused(w: Tensor, bias: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"A modulation's weight is .* wanted \(dim \* 6, K\)"):
        restore_modulation(w, bias)


@pytest.mark.parametrize("vector", [zeros(100), zeros(128, 1), zeros(128, dtype=INT8)])
def test_a_vector_is_refused(vector: Tensor) -> None:
    with pytest.raises(CheckpointError, match="packed vector"):
        unpack_vector(vector)


@pytest.mark.parametrize(
    ("bias", "message"), [(zeros(128), "bias: found bfloat16; wanted float32"), (torch.zeros(256), r"bias: found \(256,\)")]
)
def test_unshift_refuses(bias: Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        unshift_bias(bias, torch.zeros(128, 256), zeros(256, 32), zeros(128, 32))
