"""Every scheme end to end: the maker's own quantizer writes, schemes.py recognizes, decode.py reads.

Where the registry has no maker (LightX2V, musubi-tuner, ComfyUI's old layout, ModelOpt, DeepSeek's grids) the writer in this
file follows the published equation, in float64 and the other way round from the decoder.
"""

from collections.abc import Callable
from typing import Any

import comfy_kitchen as kitchen
import pytest
import torch
from comfy_kitchen.backends import eager
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from optimum.quanto import freeze, qfloat8, qint8, quantize
from torch import Tensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from millicent.checkpoint.decode import decode_weight
from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.schemes import BY_NAME, fitting_schemes
from millicent.errors import CheckpointError
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
    ("comfy old", "raw fp8", {}),
]


@pytest.mark.parametrize(("name", "scheme", "note"), WRONG_READINGS)
def test_the_other_reading_is_static(name: str, scheme: str, note: dict[str, Any]) -> None:
    """What is at stake: the very failures that people report, which no shape and no dtype shows."""
    weight = draw_weight(256, 512)
    parts = WRITERS[name][1](weight)
    parts = {"weight": parts["weight"]} if scheme == "raw fp8" else parts
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


def test_every_scheme_is_decoded_here_but_those_that_say_so() -> None:
    assert set(BY_NAME) - {scheme for scheme, *_ in WRITERS.values()} == {
        "mxfp8, plain",
        "int8 blocks",
        "bitsandbytes 4-bit",
        "bitsandbytes int8",
    }
