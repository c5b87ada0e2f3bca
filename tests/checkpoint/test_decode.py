"""Every scheme end to end: the maker's own quantizer writes, schemes.py recognizes, decode.py reads.

Where the registry has no maker (LightX2V, musubi-tuner, ComfyUI's old layout, ModelOpt, DeepSeek's grids) the writer in this
file follows the published equation, in float64 and the other way round from the decoder.
"""

import json
from collections.abc import Callable
from typing import Any

import comfy_kitchen as kitchen
import gguf
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes import nn as bnb_nn
from comfy_kitchen.backends import eager
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from optimum.quanto import freeze, qfloat8, qint8, quantize
from torch import Tensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from millicent.checkpoint.decode import decode_stored, decode_weight, read_codes
from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.layout import StoredMatrix
from millicent.checkpoint.schemes import BY_NAME, KEEPABLE, fitting_schemes
from millicent.errors import CheckpointError
from millicent.formats.gguf_types import BLOCK_TYPES
from millicent.formats.packed import E2M1
from millicent.formats.swizzle import swizzle

DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0", torch.uint8: "U8", torch.int8: "I8",
}  # fmt: skip
Parts = dict[str, Tensor]


def draw_weight(n: int, k: int) -> Tensor:
    """Rows of unequal size with a few outliers, as trained weights have them."""
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator) * (0.02 * torch.rand(n, 1, generator=generator) + 0.01)
    weight[torch.rand(n, k, generator=generator) < 0.001] *= 5
    return weight


def fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    limit = torch.finfo(dtype).max
    return (weight.double() / scale.double()).clamp(-limit, limit).float().to(dtype)


def e2m1_codes(values: Tensor) -> Tensor:
    """The nearest of E2M1's 16 values, by looking at all of them."""
    return (values[..., None].double() - E2M1.double()).abs().argmin(-1).to(torch.uint8)


def nvfp4_by_hand(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E2M1 values, plain block scales in E4M3, global scale: amax / 2688."""
    n, k = weight.shape
    blocks = weight.double().view(n, k // 16, 16)
    global_scale = weight.double().abs().max() / 2688
    scales = (blocks.abs().amax(-1) / 6 / global_scale).float().to(torch.float8_e4m3fn)
    steps = scales.double() * global_scale
    values = E2M1[e2m1_codes(blocks / steps[..., None]).long()]
    return values.view(n, k), scales, global_scale.float()


def quanto(weight: Tensor, kind: Any) -> Parts:
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    quantize(model, weights=kind)
    freeze(model)
    return {key.removeprefix("0."): tensor for key, tensor in model.state_dict().items()}


def modelopt_nvfp4(weight: Tensor) -> Parts:
    values, scales, global_scale = nvfp4_by_hand(weight)
    return {"weight": pack_fp4_to_uint8(values), "weight_scale": scales, "weight_scale_2": global_scale}


def lightx2v_nvfp4(weight: Tensor) -> Parts:
    values, scales, global_scale = nvfp4_by_hand(weight)
    return {"weight": pack_fp4_to_uint8(values), "weight_scale": swizzle(scales), "weight_global_scale": 1 / global_scale}


def lightx2v_calibrated(weight: Tensor) -> Parts:
    """As its converter does where activations were calibrated: what a kernel multiplies by, not what the weight was divided by."""
    parts = lightx2v_nvfp4(weight)
    weight_global, input_global = parts.pop("weight_global_scale").double(), torch.tensor(37.5)
    return {**parts, "alpha": (1 / (input_global * weight_global)).float(), "input_global_scale": input_global}


def compressed_nvfp4(weight: Tensor) -> Parts:
    values, scales, global_scale = nvfp4_by_hand(weight)
    return {"weight_packed": pack_fp4_to_uint8(values), "weight_scale": scales, "weight_global_scale": 1 / global_scale[None]}


def comfy_nvfp4(weight: Tensor) -> Parts:
    global_scale = weight.abs().max() / 2688
    codes, scales = kitchen.quantize_nvfp4(weight, global_scale, pad_16x=True)[:2]
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": global_scale}


def comfy_mxfp8(weight: Tensor) -> Parts:
    codes, scales = kitchen.quantize_mxfp8(weight, pad_32x=True)[:2]
    return {"weight": codes, "weight_scale": scales}


def plain_mxfp8(weight: Tensor) -> Parts:
    """The exponents in rows: the least power of 2 that brings a block of 32 below 448."""
    blocks = weight.double().unflatten(1, (-1, 32))
    exponents = (blocks.abs().amax(-1) / 448).log2().ceil().clamp(-127, 127)
    codes = (blocks / exponents.exp2()[..., None]).float().to(torch.float8_e4m3fn).flatten(1)
    return {"weight": codes, "weight_scale": (exponents + 127).to(torch.uint8)}


def int8_blocks(weight: Tensor) -> Parts:
    grid, spread = (scale * 448 / 127 for scale in grid_of(weight, 64))
    return {"weight": (weight / spread).round().to(torch.int8), "weight_scale": grid}


def bitsandbytes_4bit(weight: Tensor, kind: str, nested: bool) -> Parts:
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    return {"weight": packed, **{f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}


def bitsandbytes_int8(weight: Tensor) -> Parts:
    """As a layer is saved."""
    layer = bnb_nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb_nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return dict(layer.to("cpu").state_dict())


def grid_of(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """amax / 448 of each square block, and the same spread over the weight."""
    n, k = weight.shape
    grid = torch.zeros(-(-n // block), -(-k // block))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            grid[i, j] = weight[i * block : (i + 1) * block, j * block : (j + 1) * block].abs().max() / 448
    return grid, grid.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]


def fine_grained(weight: Tensor) -> Parts:
    grid, spread = grid_of(weight, 128)
    return {"weight": fp8(weight, spread), "weight_scale_inv": grid}


def comfy_old(weight: Tensor) -> Parts:
    scale = weight.abs().max() / 448
    return {"weight": fp8(weight, scale), "scale_weight": scale}


def lightx2v_comfy(weight: Tensor) -> Parts:
    """The scale in the source's BF16, and a placeholder for the input's."""
    scale = (weight.abs().max() / 448).bfloat16()
    return {"weight": fp8(weight, scale), "scale_weight": scale, "scale_input": torch.tensor(1.0)}


def musubi_blocks(weight: Tensor) -> Parts:
    n, k = weight.shape
    scale = weight.view(n, k // 64, 64).abs().amax(-1, keepdim=True) / 448
    return {"weight": fp8(weight.view(n, k // 64, 64), scale).view(n, k), "scale_weight": scale}


def per_row(weight: Tensor, limit: float) -> Tensor:
    return weight.abs().amax(1, keepdim=True) / limit


def lightx2v_int8(weight: Tensor) -> Parts:
    scale = per_row(weight, 127)
    return {"weight": (weight.double() / scale).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale}


def comfy_int8(weight: Tensor, rows: bool) -> Parts:
    codes, scale = (kitchen.quantize_int8_rowwise if rows else kitchen.quantize_int8_tensorwise)(weight)[:2]
    return {"weight": codes, "weight_scale": scale}


def comfy_convrot(weight: Tensor) -> Parts:
    group = 256 if weight.shape[1] % 256 == 0 else 64
    codes, scale = eager.quantize_int8_convrot_weight(weight, group)
    return {"weight": codes, "weight_scale": scale}


def torchao_weight(weight: Tensor, config: Any) -> Parts:
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    quantize_(model, config)
    return {key.removeprefix("0."): tensor for key, tensor in flatten_tensor_state_dict(model.state_dict())[0].items()}


def comfy_w4a4(weight: Tensor) -> Parts:
    group = 256 if weight.shape[1] % 256 == 0 else 64
    codes, scale = kitchen.quantize_convrot_w4a4_weight(weight, convrot_groupsize=group)
    return {"weight": codes, "weight_scale": scale, "comfy_quant": torch.zeros(3, dtype=torch.uint8)}


# scheme: (writer, ComfyUI's note, bound on the relative error: checkpoints' published 0.05 for 8 bits and 0.20 for 4)
WRITERS: dict[str, tuple[str, Callable[[Tensor], Parts], dict[str, Any], float]] = {
    "bf16": ("plain", lambda w: {"weight": w.bfloat16()}, {}, 0.003),
    "raw e4m3": ("raw fp8", lambda w: {"weight": w.to(torch.float8_e4m3fn)}, {}, 0.05),
    "raw e5m2": ("raw fp8", lambda w: {"weight": w.to(torch.float8_e5m2)}, {}, 0.08),
    "comfy old": (
        "comfy scaled fp8",
        lambda w: {"weight": fp8(w, w.abs().max() / 448), "scale_weight": w.abs().max() / 448},
        {},
        0.05,
    ),
    "lightx2v comfy": ("comfy scaled fp8", lightx2v_comfy, {}, 0.05),
    "musubi blocks": ("musubi scaled fp8", musubi_blocks, {}, 0.05),
    "musubi rows": ("musubi scaled fp8", lambda w: {"weight": fp8(w, per_row(w, 448)), "scale_weight": per_row(w, 448)}, {}, 0.05),
    "musubi two levels": (
        "musubi scaled fp8",
        lambda w: {"weight": fp8(w, per_row(w, 448)), "scale_weight": per_row(w, 224), "scale_weight_tensor": torch.tensor([0.5])},
        {},
        0.05,
    ),
    "modelopt fp8": (
        "fp8 per tensor",
        lambda w: {"weight": fp8(w, w.abs().max() / 448), "weight_scale": w.abs().max() / 448, "input_scale": torch.tensor(0.02)},
        {},
        0.05,
    ),
    "lightx2v fp8": ("fp8 per row", lambda w: {"weight": fp8(w, per_row(w, 448)), "weight_scale": per_row(w, 448)}, {}, 0.05),
    "per channel": ("fp8 per row", lambda w: {"weight": fp8(w, per_row(w, 448)), "weight_scale": per_row(w, 448)[:, 0]}, {}, 0.05),
    "fp8 grid": ("fp8 blocks", lambda w: {"weight": fp8(w, grid_of(w, 64)[1]), "weight_scale": grid_of(w, 64)[0]}, {}, 0.05),
    "fine-grained": ("fine-grained fp8", fine_grained, {}, 0.05),
    "lightx2v int8": ("int8 per row", lightx2v_int8, {}, 0.05),
    "comfy int8 rows": ("int8 per row", lambda w: comfy_int8(w, rows=True), {}, 0.05),
    "comfy int8 tensor": ("int8 per tensor", lambda w: comfy_int8(w, rows=False), {}, 0.12),
    "comfy convrot": ("int8 per row", comfy_convrot, {"convrot": True, "convrot_groupsize": 256}, 0.05),
    "comfy mxfp8": ("mxfp8, swizzled", comfy_mxfp8, {}, 0.05),
    "comfy nvfp4": ("nvfp4, comfy", comfy_nvfp4, {}, 0.20),
    "modelopt nvfp4": ("nvfp4, modelopt", modelopt_nvfp4, {}, 0.20),
    "lightx2v nvfp4": ("nvfp4, lightx2v", lightx2v_nvfp4, {}, 0.20),
    "lightx2v calibrated": ("nvfp4, lightx2v calibrated", lightx2v_calibrated, {}, 0.20),
    "plain mxfp8": ("mxfp8, plain", plain_mxfp8, {}, 0.05),
    "int8 grid": ("int8 blocks", int8_blocks, {"group_size": 64}, 0.05),
    "bitsandbytes nf4": ("bitsandbytes nf4", lambda w: bitsandbytes_4bit(w, "nf4", nested=False), {}, 0.20),
    "bitsandbytes nf4 nested": ("bitsandbytes nf4, nested", lambda w: bitsandbytes_4bit(w, "nf4", nested=True), {}, 0.20),
    "bitsandbytes fp4": ("bitsandbytes fp4", lambda w: bitsandbytes_4bit(w, "fp4", nested=False), {}, 0.20),
    "bitsandbytes fp4 nested": ("bitsandbytes fp4, nested", lambda w: bitsandbytes_4bit(w, "fp4", nested=True), {}, 0.20),
    "bitsandbytes int8": ("bitsandbytes int8", bitsandbytes_int8, {}, 0.05),
    "compressed-tensors nvfp4": ("nvfp4, compressed-tensors", compressed_nvfp4, {}, 0.20),
    "comfy w4a4": ("int4 convrot", comfy_w4a4, {"convrot_groupsize": 256}, 0.25),
    "torchao fp8": ("torchao", lambda w: torchao_weight(w, Float8WeightOnlyConfig()), {}, 0.05),
    "torchao int8": ("torchao", lambda w: torchao_weight(w, Int8WeightOnlyConfig()), {}, 0.05),
    "quanto int8": ("quanto", lambda w: quanto(w, qint8), {}, 0.05),
    "quanto fp8": ("quanto", lambda w: quanto(w, qfloat8), {}, 0.05),
}
IDS = list(WRITERS)
SHAPES = [(256, 512), (128, 64), (64, 256)]


def infos(parts: Parts) -> dict[str, TensorInfo]:
    return {suffix: TensorInfo(DTYPES[tensor.dtype], tuple(tensor.shape), 0, 0) for suffix, tensor in parts.items()}


def error(decoded: Tensor, weight: Tensor) -> float:
    return float((decoded - weight).norm() / weight.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", IDS)
def test_what_a_maker_writes_is_recognized_and_decoded(name: str, shape: tuple[int, int]) -> None:
    scheme, write, note, bound = WRITERS[name]
    weight = draw_weight(*shape)
    parts = write(weight)
    assert scheme in [fitting.name for fitting in fitting_schemes(infos(parts), shape)]
    decoded = decode_weight("layer", scheme, parts, shape, note)
    assert decoded.dtype == torch.float32
    assert error(decoded, weight) < bound
    assert decoded.norm() / weight.norm() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    "name", [name for name in IDS if any("scale" in suffix for suffix in WRITERS[name][1](draw_weight(128, 64)))]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0, 0.0])
def test_a_scale_that_is_no_scale_is_refused(name: str, bad: float) -> None:
    scheme, write, note, _ = WRITERS[name]
    for suffix in write(draw_weight(128, 64)):
        parts = {key: tensor.clone() for key, tensor in write(draw_weight(128, 64)).items()}
        tensor = parts[suffix]
        if "scale" not in suffix or not tensor.is_floating_point() or tensor.element_size() == 1:
            continue
        tensor.view(-1)[0] = bad
        with pytest.raises(CheckpointError, match=rf"layer\.{suffix} holds scales"):
            decode_weight("layer", scheme, parts, (128, 64), note)


@pytest.mark.parametrize("name", ["raw e4m3", "comfy old", "lightx2v fp8", "fine-grained", "comfy mxfp8"])
def test_a_code_that_is_no_number_is_refused(name: str) -> None:
    scheme, write, note, _ = WRITERS[name]
    parts = write(draw_weight(128, 64))
    parts["weight"] = parts["weight"].clone()
    parts["weight"].view(torch.uint8).view(-1)[7] = 0x7F
    with pytest.raises(CheckpointError, match="no numbers"):
        decode_weight("layer", scheme, parts, (128, 64), note)


WRONG_READINGS = [
    ("comfy nvfp4", "nvfp4, modelopt", {}),
    ("modelopt nvfp4", "nvfp4, comfy", {}),
    ("comfy convrot", "int8 per row", {}),
]


@pytest.mark.parametrize(("name", "scheme", "note"), WRONG_READINGS)
def test_the_other_reading_is_static(name: str, scheme: str, note: dict[str, Any]) -> None:
    """What is at stake: the very failures that people report, which no shape and no dtype shows."""
    weight = draw_weight(256, 512)
    parts = WRITERS[name][1](weight)
    assert error(decode_weight("layer", scheme, parts, (256, 512), note), weight) > 0.5


def test_a_pre_quant_scale_is_applied_to_the_columns() -> None:
    weight, pre = draw_weight(128, 64), torch.linspace(0.5, 2, 64)
    parts = modelopt_nvfp4(weight / pre) | {"pre_quant_scale": pre.bfloat16()}
    assert error(decode_weight("layer", "nvfp4, modelopt", parts, (128, 64)), weight) < 0.2


def test_torchaos_zero_points_are_taken_off() -> None:
    weight = draw_weight(128, 64)
    parts = torchao_weight(weight, Int8WeightOnlyConfig())
    shifted = {
        **parts,
        "_weight_qdata": parts["_weight_qdata"].clamp(-120, 120) + 5,
        "_weight_zero_point": torch.full((128, 1), 5).to(torch.int8),
    }
    clamped = {**parts, "_weight_qdata": parts["_weight_qdata"].clamp(-120, 120)}
    torch.testing.assert_close(decode_weight("x", "torchao", shifted, (128, 64)), decode_weight("x", "torchao", clamped, (128, 64)))


@pytest.mark.parametrize("suffix", ["alpha", "input_global_scale"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0, 0.0])
def test_the_factors_of_a_calibrated_scale_are_checked(suffix: str, bad: float) -> None:
    parts = lightx2v_calibrated(draw_weight(128, 64)) | {suffix: torch.tensor(bad)}
    with pytest.raises(CheckpointError, match=rf"layer\.{suffix} holds scales"):
        decode_weight("layer", "nvfp4, lightx2v calibrated", parts, (128, 64))


def test_a_calibrated_scale_is_the_one_that_was_not_stored() -> None:
    weight = draw_weight(128, 64)
    usual = decode_weight("x", "nvfp4, lightx2v", lightx2v_nvfp4(weight), (128, 64))
    calibrated = decode_weight("x", "nvfp4, lightx2v calibrated", lightx2v_calibrated(weight), (128, 64))
    torch.testing.assert_close(calibrated, usual, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["comfy old", "lightx2v fp8"])
def test_scaled_fp8_without_its_scale_is_refused(name: str) -> None:
    parts = WRITERS[name][1](draw_weight(128, 64))
    with pytest.raises(CheckpointError, match="reaches 448: scaled FP8 whose scales are missing"):
        decode_weight("layer", "raw fp8", {"weight": parts["weight"]}, (128, 64))


@pytest.mark.parametrize(("value", "is_refused"), [(192.0, False), (208.0, True), (-208.0, True)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_is_too_large_for_a_weight(value: float, is_refused: bool, dtype: torch.dtype) -> None:
    weight = draw_weight(128, 64)
    weight[3, 5] = value * (1.1 if dtype == torch.float8_e5m2 and is_refused else 1)
    parts = {"weight": weight.to(dtype)}
    if is_refused:
        with pytest.raises(CheckpointError, match="scales are missing"):
            decode_weight("layer", "raw fp8", parts, (128, 64))
    else:
        assert decode_weight("layer", "raw fp8", parts, (128, 64))[3, 5] == value


BLOCKS = {block.name: block for block in BLOCK_TYPES.values() if block.values > 1}


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_ggufs_own_blocks_come_back(name: str) -> None:
    weight = draw_weight(64, 512)
    stored = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    parts = {"weight": torch.from_numpy(stored).flatten()}
    decoded = decode_weight("layer", f"gguf {name}", parts, (64, 512))
    assert error(decoded, weight) < (0.01 if name == "Q8_0" else 0.12)
    assert np.array_equal(decoded.numpy(), gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_gguf_reads_are_read_as_gguf_reads_them(name: str) -> None:
    """K types have no writer in Python: any bytes are a block, as long as its scales are finite."""
    block = BLOCKS[name]
    data = np.random.default_rng(0).integers(0, 48, (64, 512 // block.values * block.block_bytes), np.uint8)
    decoded = decode_weight("layer", f"gguf {name}", {"weight": torch.from_numpy(data).flatten()}, (64, 512))
    assert np.array_equal(decoded.numpy(), gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]))
    assert decoded.norm() > 0


def test_gguf_blocks_that_are_cut_short_or_not_finite_are_refused() -> None:
    stored = gguf.quants.quantize(draw_weight(64, 256).numpy(), gguf.GGMLQuantizationType.Q8_0)
    data = torch.from_numpy(stored).flatten()
    with pytest.raises(CheckpointError, match="bytes were wanted"):
        decode_weight("layer", "gguf Q8_0", {"weight": data[:-1]}, (64, 256))
    data[:2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)  # infinity in FP16
    with pytest.raises(CheckpointError, match="not finite"):
        decode_weight("layer", "gguf Q8_0", {"weight": data}, (64, 256))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4_bits_equal_bitsandbytes(kind: str, nested: bool) -> None:
    weight = draw_weight(64, 256)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    scheme = f"bitsandbytes {kind}{', nested' if nested else ''}"
    decoded = decode_weight("layer", scheme, bitsandbytes_4bit(weight, kind, nested), (64, 256))
    torch.testing.assert_close(decoded, bnb.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-9)


def with_state(parts: Parts, kind: str = "nf4", **fields: Any) -> Parts:
    key = f"weight.quant_state.bitsandbytes__{kind}"
    state = json.loads(bytes(parts[key].tolist())) | fields
    return parts | {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def test_a_quant_state_that_contradicts_the_layer_is_refused() -> None:
    plain, nested = (bitsandbytes_4bit(draw_weight(64, 256), "nf4", nested) for nested in (False, True))
    with pytest.raises(CheckpointError, match=r"of nf4 \(256, 64\); the network has \(64, 256\)"):
        decode_weight("layer", "bitsandbytes nf4", with_state(plain, shape=[256, 64]), (64, 256))
    with pytest.raises(CheckpointError, match="named nf4 is of fp4"):
        decode_weight("layer", "bitsandbytes nf4", with_state(plain, quant_type="fp4"), (64, 256))
    fields = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    with pytest.raises(CheckpointError, match="says that its scales are quantized, but they are not"):
        decode_weight("layer", "bitsandbytes nf4", with_state(plain, **fields), (64, 256))
    key = "weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(CheckpointError, match="says that its scales are not quantized, but they are"):
        decode_weight("layer", "bitsandbytes nf4, nested", nested | {key: plain[key]}, (64, 256))
    with pytest.raises(CheckpointError, match="is no JSON"):
        decode_weight("layer", "bitsandbytes nf4", plain | {key: plain[key][:-1]}, (64, 256))
    with pytest.raises(CheckpointError, match="scales of a 4-bit weight"):
        decode_weight("layer", "bitsandbytes nf4", with_state(plain, blocksize=128), (64, 256))


@pytest.mark.parametrize("suffix", ["weight.absmax", "SCB", "weight.nested_absmax"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_a_magnitude_that_is_none_is_refused(suffix: str, bad: float) -> None:
    name = {"weight.absmax": "bitsandbytes nf4", "SCB": "bitsandbytes int8"}.get(suffix, "bitsandbytes nf4 nested")
    scheme, write, *_ = WRITERS[name]
    parts = write(draw_weight(128, 64))
    parts[suffix] = parts[suffix].clone()
    parts[suffix][0] = bad
    with pytest.raises(CheckpointError, match=rf"layer\.{suffix} holds magnitudes"):
        decode_weight("layer", scheme, parts, (128, 64))


def test_a_block_of_zeros_has_a_magnitude_of_zero() -> None:
    weight = draw_weight(128, 64)
    weight[5] = 0
    for name in ("bitsandbytes nf4", "bitsandbytes int8"):
        scheme, write, *_ = WRITERS[name]
        assert not decode_weight("layer", scheme, write(weight), (128, 64))[5].any()


def test_bitsandbytes_tiled_orders_are_refused() -> None:
    parts = bitsandbytes_int8(draw_weight(128, 64))
    assert int(parts["weight_format"]) == 0
    for tiled in (torch.tensor(1, dtype=torch.uint8), torch.tensor([2])):
        for read in (decode_stored, read_codes):
            with pytest.raises(CheckpointError, match=rf"weight_format {int(tiled)}; wanted 0"):
                read("layer", stored_as("bitsandbytes int8", parts, {}), parts | {"weight_format": tiled})


def stored_as(scheme: str, parts: Parts, note: dict[str, Any], shape: tuple[int, int] = (128, 64)) -> StoredMatrix:
    return StoredMatrix(BY_NAME[scheme], shape, infos(parts), ("layer.weight",), note)


@pytest.mark.parametrize("name", IDS)
def test_a_stored_matrix_yields_its_weight_by_name(name: str) -> None:
    scheme, write, note, _ = WRITERS[name]
    parts = write(draw_weight(128, 64))
    decoded = decode_stored("layer", stored_as(scheme, parts, note), parts)
    assert list(decoded) == ["layer.weight"]
    assert torch.equal(decoded["layer.weight"], decode_weight("layer", scheme, parts, (128, 64), note))


KEPT = {
    *("comfy old", "lightx2v comfy", "musubi rows", "musubi two levels", "modelopt fp8", "lightx2v fp8", "per channel"),
    *("lightx2v int8", "comfy int8 rows", "comfy int8 tensor", "torchao fp8", "torchao int8", "quanto int8", "quanto fp8"),
    "bitsandbytes int8",
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", IDS)
def test_codes_and_scales_are_the_weight_exactly_or_are_not_kept(name: str, shape: tuple[int, int]) -> None:
    scheme, write, note, _ = WRITERS[name]
    parts = write(draw_weight(*shape))
    stored = stored_as(scheme, parts, note, shape)
    kept = read_codes("layer", stored, parts)
    is_one_block_a_row = name == "musubi blocks" and shape[1] == 64
    assert (kept is not None) == (name in KEPT or is_one_block_a_row)
    if kept is not None:
        codes, scales = kept
        assert codes.shape == shape
        assert codes.dtype in (torch.float8_e4m3fn, torch.int8)
        assert scales.dtype == torch.float32
        assert scales.shape in ((shape[0], 1), (1, 1))
        assert torch.equal(codes.float() * scales, decode_stored("layer", stored, parts)["layer.weight"])


def test_every_scheme_that_can_be_kept_is_kept_here() -> None:
    assert {WRITERS[name][0] for name in KEPT} == set(KEEPABLE)


def test_what_only_looks_like_codes_and_scales_is_not_kept() -> None:
    weight = draw_weight(128, 64)
    scale = weight.abs().max() / 57344
    e5m2 = {"weight": fp8(weight, scale, torch.float8_e5m2), "weight_scale": scale}
    assert read_codes("x", stored_as("fp8 per tensor", e5m2, {}), e5m2) is None
    torchao = torchao_weight(weight, Int8WeightOnlyConfig())
    zero, five = (torch.full((128, 1), value).to(torch.int8) for value in (0, 5))
    asymmetric = torchao | {"_weight_zero_point": five}
    assert read_codes("x", stored_as("torchao", asymmetric, {}), asymmetric) is None
    symmetric = torchao | {"_weight_zero_point": zero}
    assert read_codes("x", stored_as("torchao", symmetric, {}), symmetric) is not None
    rotated = comfy_convrot(weight)
    assert read_codes("x", stored_as("int8 per row", rotated, {"convrot": True}), rotated) is None
    assert read_codes("x", stored_as("int8 per row", rotated, {"convrot": False}), rotated) is not None


def test_a_grid_of_as_many_scales_as_rows_is_still_a_grid() -> None:
    """64 scales for 64 rows, but 8 x 8 of them."""
    weight = draw_weight(64, 64)
    grid, spread = grid_of(weight, 8)
    parts = {"weight": fp8(weight, spread), "scale_weight": grid}
    assert read_codes("x", stored_as("musubi scaled fp8", parts, {}, (64, 64)), parts) is None
    assert error(decode_weight("x", "musubi scaled fp8", parts, (64, 64)), weight) < 0.05


@pytest.mark.parametrize("name", sorted(KEPT))
def test_kept_codes_are_checked_as_decoded_ones_are(name: str) -> None:
    scheme, write, note, _ = WRITERS[name]
    parts = write(draw_weight(128, 64))
    code_suffix, scale_suffix = KEEPABLE[scheme]
    stored = stored_as(scheme, parts, note)
    for bad in (torch.nan, torch.inf, -1.0):
        broken = parts[scale_suffix].clone()
        broken.view(-1)[0] = bad
        with pytest.raises(CheckpointError, match=r"holds (scales|magnitudes) that are not finite"):
            read_codes("layer", stored, parts | {scale_suffix: broken})
    if parts[code_suffix].dtype == torch.float8_e4m3fn:
        broken = parts[code_suffix].clone()
        broken.view(torch.uint8).view(-1)[7] = 0xFF
        with pytest.raises(CheckpointError, match="no numbers"):
            read_codes("layer", stored, parts | {code_suffix: broken})
    if scale_suffix == "SCB":
        return  # FP32 holds any magnitude that FP32 holds
    with pytest.raises(CheckpointError, match="values that are not finite"):
        read_codes("layer", stored, parts | {scale_suffix: torch.full_like(parts[scale_suffix].float(), 3e38)})


def test_every_scheme_is_decoded_here_but_ggufs_and_nunchakus() -> None:
    rest = set(BY_NAME) - {scheme for scheme, *_ in WRITERS.values()}
    assert {scheme for scheme in rest if not scheme.startswith("gguf ")} == {
        "svdquant int4", "svdquant fp4", "svdquant fp4, rows", "nunchaku awq",
    }  # fmt: skip
    assert {scheme.removeprefix("gguf ") for scheme in rest if scheme.startswith("gguf ")} == set(BLOCKS)
