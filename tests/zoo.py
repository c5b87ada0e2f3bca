"""Every layout in which Qwen-Image-Edit's weights are published, written from one small model's weights.

Where the registry has the maker's own library, it writes, and reads back what it wrote. Where it has none (LightX2V,
musubi-tuner, ModelOpt, ComfyUI's old layout, DeepSeek's grids) the writer here follows the published equation in float64.
No code of millicent's takes part: what it reads is compared with what comes out of here.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy_kitchen as kitchen
import diffusers
import gguf
import numpy as np
import torch
from bitsandbytes import functional as bnb
from comfy_kitchen.backends import eager
from comfy_kitchen.float_utils import to_blocked
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from conftest import HIDDEN, draw_weights, make_pipeline, make_text_encoder, make_tokenizer, save_pipeline, write_card
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from optimum.quanto import freeze, qfloat8, qint8, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

DIM = 256  # the least that whole tiles of Nunchaku's, GGUF's blocks of 256 and rotations in groups of 256 fit into
COMFY_PREFIX = "model.diffusion_model."
ZERO_COND_T = {"__index_timestep_zero__": torch.empty(0)}  # ComfyUI's mark of 2511
GELU_SHIFT = 0.171875
RANK = 32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E2M1_EDGES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)  # between neighbors
E2M1_SIZES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)

State = dict[str, Tensor]
Parts = dict[str, Tensor]
# a matrix -> what is stored of it, by what follows "X." in the names, and what its maker reads back
Quantize = Callable[[Tensor], tuple[Parts, Tensor]]


# the model


def make_transformer() -> diffusers.QwenImageTransformer2DModel:
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(8, 28, 28),
        zero_cond_t=True,
    )
    draw_weights(transformer, seed=1, gain=1.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 2:
                # rows of unequal size and a few outliers, as training leaves them: then a scale in a wrong place shows
                parameter *= 0.5 + torch.rand(parameter.shape[0], 1, generator=generator)
                parameter[torch.rand(parameter.shape, generator=generator) < 0.001] *= 4
        # velocities of order 1, or the latents leave what the VAE can show
        transformer.proj_out.weight /= 4
    return transformer.to(torch.bfloat16)


@functools.cache
def make_folder(root: Path) -> Path:
    """A diffusers-layout folder in BF16 with a card, 2511's kind, whose edits take a tenth of a second; not to be changed."""
    pipeline = make_pipeline("edit-plus", True)
    pipeline.register_modules(transformer=make_transformer(), text_encoder=pipeline.text_encoder.to(torch.bfloat16))
    folder = save_pipeline(pipeline, root / "model")
    write_card(folder, vae_area_px=64 * 64, encoder_area_px=56 * 56, steps=2)
    return folder


def read_state(folder: Path) -> State:
    """The weights of one part as the folder holds them, in FP32."""
    return {key: tensor.float() for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def filled(state: State) -> diffusers.QwenImageTransformer2DModel:
    """A module for libraries that quantize modules."""
    transformer = make_transformer().float()
    transformer.load_state_dict(state)
    return transformer.requires_grad_(False)


# what a file holds


@dataclass(frozen=True)
class Stored:
    """tensors: by their names in the file, without a prefix. truth: every parameter as the file's maker reads it, FP32."""

    tensors: State
    truth: State
    metadata: dict[str, str] = field(default_factory=dict)


def is_matrix(key: str, tensor: Tensor) -> bool:
    return key.endswith(".weight") and tensor.ndim == 2


def in_blocks(key: str) -> bool:
    return key.startswith("transformer_blocks.")


def everywhere(key: str) -> bool:
    return True


def in_mlps(key: str) -> bool:
    return "_mlp." in key


def by_matrix(
    quantize_matrix: Quantize, where: Callable[[str], bool] = in_blocks, extra: Mapping[str, Tensor] | None = None
) -> Callable[[State], Stored]:
    """Matrices as `quantize_matrix` stores them, all else in BF16."""

    def store(state: State) -> Stored:
        tensors, truth = dict(extra or {}), {}
        for key, tensor in state.items():
            if is_matrix(key, tensor) and where(key):
                parts, truth[key] = quantize_matrix(tensor)
                tensors |= {f"{key.removesuffix('weight')}{suffix}": part for suffix, part in parts.items()}
            else:
                tensors[key] = tensor.bfloat16()
                truth[key] = tensors[key].float()
        return Stored(tensors, truth)

    return store


def cast(dtype: torch.dtype) -> Callable[[State], Stored]:
    """Every tensor, norms and biases too."""

    def store(state: State) -> Stored:
        tensors = {key: tensor.to(dtype) for key, tensor in state.items()}
        return Stored(tensors, {key: tensor.float() for key, tensor in tensors.items()})

    return store


# FP8 and INT8


def fp8_codes(weight: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    limit = torch.finfo(dtype).max
    return (weight.double() / scale.double()).clamp(-limit, limit).float().to(dtype)


def multiplied(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.double() * scale.double()).float()


def per_row(weight: Tensor, limit: float) -> Tensor:
    return weight.abs().amax(1, keepdim=True) / limit


def comfy_old(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().max() / 448
    codes = kitchen.quantize_per_tensor_fp8(weight, scale)
    return {"weight": codes, "scale_weight": scale}, kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32)


def comfy_old_calibrated(weight: Tensor) -> tuple[Parts, Tensor]:
    parts, read = comfy_old(weight)
    return {**parts, "scale_input": torch.tensor(0.02)}, read


def lightx2v_comfy(weight: Tensor) -> tuple[Parts, Tensor]:
    """Its scale is in the source's BF16, and the input's a placeholder."""
    scale = (weight.abs().max() / 448).bfloat16()
    codes = fp8_codes(weight, scale)
    return {"weight": codes, "scale_weight": scale, "scale_input": torch.tensor(1.0)}, multiplied(codes, scale)


def comfy_fp8(weight: Tensor, dtype: torch.dtype = E4M3) -> tuple[Parts, Tensor]:
    scale = weight.abs().max() / torch.finfo(dtype).max
    codes = kitchen.quantize_per_tensor_fp8(weight, scale, dtype)
    return {"weight": codes, "weight_scale": scale}, kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32)


def fp8_rows(weight: Tensor, suffix: str = "weight_scale") -> tuple[Parts, Tensor]:
    scale = per_row(weight, 448)
    codes = fp8_codes(weight, scale)
    return {"weight": codes, suffix: scale}, multiplied(codes, scale)


def modelopt_fp8(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().max() / 448
    codes = fp8_codes(weight, scale)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.02)}, multiplied(codes, scale)


def musubi_one(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().amax().reshape(1) / 448
    codes = fp8_codes(weight, scale)
    return {"weight": codes, "scale_weight": scale}, multiplied(codes, scale)


def musubi_rows(weight: Tensor) -> tuple[Parts, Tensor]:
    return fp8_rows(weight, "scale_weight")


def row_blocks(weight: Tensor, suffix: str) -> tuple[Parts, Tensor]:
    """64 along K."""
    blocks = weight.unflatten(1, (-1, 64))
    scale = blocks.abs().amax(-1, keepdim=True) / 448
    codes = fp8_codes(blocks, scale)
    return {"weight": codes.flatten(1), suffix: scale}, multiplied(codes, scale).flatten(1)


def musubi_two_levels(weight: Tensor) -> tuple[Parts, Tensor]:
    whole = weight.abs().max() / 448
    rows = per_row(weight, 448) / whole
    codes = fp8_codes(weight, rows.double() * whole.double())
    read = multiplied(codes, rows.double() * whole.double())
    return {"weight": codes, "scale_weight": rows, "scale_weight_tensor": whole.reshape(1)}, read


def spread(grid: Tensor, block: int, shape: torch.Size) -> Tensor:
    return grid.repeat_interleave(block, 0)[: shape[0]].repeat_interleave(block, 1)[:, : shape[1]]


def squares(weight: Tensor, block: int, limit: float) -> Tensor:
    """The largest magnitude of each square of `block`, over `limit`."""
    padded = nn.functional.pad(weight.abs(), (0, -weight.shape[1] % block, 0, -weight.shape[0] % block))
    return padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).amax((1, 3)) / limit


def fp8_squares(weight: Tensor, block: int, suffix: str) -> tuple[Parts, Tensor]:
    grid = squares(weight, block, 448)
    codes = fp8_codes(weight, spread(grid, block, weight.shape))
    return {"weight": codes, suffix: grid}, multiplied(codes, spread(grid, block, weight.shape))


def int8_squares(weight: Tensor) -> tuple[Parts, Tensor]:
    grid = squares(weight, 128, 127)
    codes = (weight.double() / spread(grid, 128, weight.shape)).round().clamp(-127, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": grid}, multiplied(codes, spread(grid, 128, weight.shape))


def lightx2v_int8(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = per_row(weight, 127)
    codes = (weight.double() / scale).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, multiplied(codes, scale)


def comfy_int8(weight: Tensor, rows: bool) -> tuple[Parts, Tensor]:
    codes, scale = (kitchen.quantize_int8_rowwise if rows else kitchen.quantize_int8_tensorwise)(weight)
    return {"weight": codes, "weight_scale": scale}, kitchen.dequantize_int8_simple(codes, scale)


def comfy_int8_convrot(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, scale = eager.quantize_int8_convrot_weight(weight, 256)
    return {"weight": codes, "weight_scale": scale}, eager.dequantize_int8_convrot_weight(codes, scale, 256)


def comfy_w4a4(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, scale = kitchen.quantize_convrot_w4a4_weight(weight)
    return {"weight": codes, "weight_scale": scale}, kitchen.dequantize_convrot_w4a4_weight(codes, scale)


def bitsandbytes_int8(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, scb, _ = bnb.int8_vectorwise_quant(weight.half())
    parts = {"weight": codes, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, bnb.int8_vectorwise_dequant(codes, scb)


def bitsandbytes_4bit(weight: Tensor, kind: str, nested: bool) -> tuple[Parts, Tensor]:
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    if weight.shape[1] % 64:
        # one block to a row: where a block ends amid a row, its AVX-512 kernel takes wrong scales
        state.shape = torch.Size((weight.numel() // 64, 64))
    return {"weight": codes, **parts}, bnb.dequantize_4bit(codes, state).reshape(weight.shape)


# blocks of 16 and 32


def comfy_mxfp8(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, scales = kitchen.quantize_mxfp8(weight, pad_32x=True)
    read = kitchen.dequantize_mxfp8(codes, scales, torch.float32)[: weight.shape[0], : weight.shape[1]]
    return {"weight": codes, "weight_scale": scales.view(torch.uint8)}, read


def comfy_nvfp4(weight: Tensor) -> tuple[Parts, Tensor]:
    whole = weight.abs().max() / 2688
    codes, scales = kitchen.quantize_nvfp4(weight, whole, pad_16x=True)
    read = kitchen.dequantize_nvfp4(codes, whole, scales, torch.float32)[: weight.shape[0], : weight.shape[1]]
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}, read


def nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes with the even element in the low nibble, block scales in rows, the global scale, and what they stand for."""
    blocks = weight.double().unflatten(1, (-1, 16))
    whole = weight.double().abs().max() / 2688
    scales = (blocks.abs().amax(-1) / 6 / whole).float().to(E4M3)
    steps = scales.double() * whole
    sizes = E2M1_SIZES[torch.bucketize((blocks / steps[..., None]).abs(), E2M1_EDGES)]
    values = torch.where(blocks < 0, -sizes, sizes)
    return pack_fp4_to_uint8(values.flatten(1).float()), scales, whole.float(), (values * steps[..., None]).flatten(1).float()


def modelopt_nvfp4(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, scales, whole, read = nvfp4(weight)
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": whole, "input_scale": torch.tensor(0.01)}, read


def blocked(scales: Tensor) -> Tensor:
    """The order in which tensor cores read block scales, by comfy-kitchen."""
    return to_blocked(scales.view(torch.uint8), flatten=False).view(scales.dtype)


def lightx2v_nvfp4(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, scales, whole, read = nvfp4(weight)
    return {"weight": codes, "weight_scale": blocked(scales), "weight_global_scale": 1 / whole}, read


def lightx2v_calibrated(weight: Tensor) -> tuple[Parts, Tensor]:
    """alpha is what a kernel multiplies by: 1 / (input_global_scale * weight_global_scale)."""
    codes, scales, whole, read = nvfp4(weight)
    calibrated = {"alpha": whole / 37.5, "input_global_scale": torch.tensor(37.5), "input_absmax": torch.tensor(71.68)}
    return {"weight": codes, "weight_scale": blocked(scales), **calibrated}, read


# ComfyUI's notes


def note(**fields: Any) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def noted(quantize_matrix: Quantize, **fields: Any) -> Quantize:
    def store(weight: Tensor) -> tuple[Parts, Tensor]:
        parts, read = quantize_matrix(weight)
        return {**parts, "comfy_quant": note(**fields)}, read

    return store


def noted_in_metadata(quantize_matrix: Quantize, **fields: Any) -> Callable[[State], Stored]:
    def store(state: State) -> Stored:
        stored = by_matrix(quantize_matrix)(state)
        layers = {key.removesuffix(".weight"): fields for key, tensor in state.items() if is_matrix(key, tensor) and in_blocks(key)}
        notes = {"format_version": "1.0", "layers": layers}
        return Stored(stored.tensors, stored.truth, {"_quantization_metadata": json.dumps(notes)})

    return store


# libraries that quantize whole modules


def torchao(config: Any) -> Callable[[State], Stored]:
    def store(state: State) -> Stored:
        module = filled(state)
        quantize_(module, config)
        tensors, metadata = flatten_tensor_state_dict(module.state_dict())
        truth = {key: t.dequantize() if hasattr(t, "qdata") else t for key, t in module.state_dict().items()}
        return Stored(tensors, truth, metadata)

    return store


def quanto(kind: Any) -> Callable[[State], Stored]:
    def store(state: State) -> Stored:
        module = filled(state)
        quantize(module, weights=kind)
        freeze(module)
        truth = {key: t.dequantize() if hasattr(t, "qtype") else t for key, t in module.named_parameters()}
        return Stored(dict(module.state_dict()), {key: truth[key].detach() for key in state}, {})

    return store


def compressed(preset: str, make_module: Callable[[State], nn.Module] = filled, ignore: tuple[str, ...] = ()) -> Any:
    """As llm-compressor does: the preset's arguments, scales from the weights, compressed by the library itself."""

    def store(state: State) -> Stored:
        module = make_module(state)
        groups = {"group_0": preset_name_to_scheme(preset, targets=["Linear"])}
        apply_quantization_config(module, QuantizationConfig(config_groups=groups, ignore=list(ignore)))
        for linear in module.modules():
            if getattr(linear, "quantization_scheme", None) is not None:
                _calibrate(linear)
        compressor = ModelCompressor.from_pretrained_model(module)
        assert compressor is not None
        compressor.compress_model(module)
        tensors = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        compressor.decompress_model(module)
        read = module.state_dict()
        return Stored(tensors, {key: read[key].clone().float() for key in state})

    return store


def _calibrate(linear: Any) -> None:
    weight, args = linear.weight.data, linear.quantization_scheme.weights
    if args.strategy == "channel":
        linear.weight_scale.data = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)[0]
        return
    whole = generate_gparam(weight.amin(), weight.amax())
    blocks = weight.unflatten(1, (-1, 16))
    linear.weight_global_scale.data.copy_(whole)
    linear.input_global_scale.data.fill_(30.0)
    linear.weight_scale.data = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=whole)[0]


# GGUF


def _f16(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Rounded to F16, and its two bytes."""
    half = values.astype(np.float16)
    return half.astype(np.float64), half[..., None].view(np.uint8)


def _quantize_k45(blocks: NDArray[np.float64], bits: int) -> NDArray[np.uint8]:
    """Q4_K and Q5_K without llama.cpp's search for better scales: (blocks, 8, 32) -> bytes."""
    low = np.minimum(blocks.min(-1), 0)
    steps = (blocks.max(-1) - low) / (2**bits - 1)
    d, d_bytes = _f16(steps.max(-1) / 63)
    dmin, dmin_bytes = _f16(-low.min(-1) / 63)
    scales = np.clip(np.round(steps / d[:, None]), 1, 63).astype(np.uint8)
    mins = np.clip(np.round(-low / dmin[:, None]), 0, 63).astype(np.uint8)
    offsets = (dmin[:, None] * mins)[..., None]
    codes = np.clip(np.round((blocks + offsets) / (d[:, None] * scales)[..., None]), 0, 2**bits - 1).astype(np.uint8)
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = mins[:, :4] | (mins[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4
    nibbles = ((codes[:, ::2] & 15) | (codes[:, 1::2] & 15) << 4).reshape(len(blocks), -1)
    high = (codes >> 4 << np.arange(8, dtype=np.uint8)[None, :, None]).sum(1, dtype=np.uint8)
    return np.concatenate([d_bytes, dmin_bytes, first, second, third, *([high] if bits == 5 else []), nibbles], -1)


def _quantize_k6(blocks: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Q6_K: (blocks, 16, 16) -> bytes."""
    steps = np.abs(blocks).max(-1) / 31
    d, d_bytes = _f16(steps.max(-1) / 127)
    scales = np.clip(np.round(steps / d[:, None]), 1, 127)
    codes = (np.clip(np.round(blocks / (d[:, None] * scales)[..., None]), -32, 31) + 32).astype(np.uint8)
    quarters = codes.reshape(-1, 2, 4, 32)
    low = (quarters[:, :, :2] & 15) | (quarters[:, :, 2:] & 15) << 4
    high = (quarters >> 4 << (2 * np.arange(4, dtype=np.uint8))[:, None]).sum(2, dtype=np.uint8)
    flat = [part.reshape(len(blocks), -1) for part in (low, high, scales.astype(np.int8).view(np.uint8))]
    return np.concatenate([*flat, d_bytes], -1)


def gguf_bytes(weight: Tensor, kind: str) -> NDArray[np.uint8]:
    values = weight.double().numpy()
    if kind == "Q6_K":
        stored = _quantize_k6(values.reshape(-1, 16, 16))
    elif kind in ("Q4_K", "Q5_K"):
        stored = _quantize_k45(values.reshape(-1, 8, 32), int(kind[1]))
    else:
        return gguf.quants.quantize(weight.numpy(), GGMLQuantizationType[kind]).view(np.uint8)
    return stored.reshape(weight.shape[0], -1)


@dataclass(frozen=True)
class StoredGguf:
    """tensors: bytes of rows, and ggml's type."""

    tensors: dict[str, tuple[NDArray[Any], GGMLQuantizationType]]
    truth: State


def in_gguf(kind: str) -> Callable[[State], StoredGguf]:
    """As city96's converter: blocks in `kind`, what is sensitive in BF16 or F32."""

    def store(state: State) -> StoredGguf:
        tensors, truth = {}, {}
        for key, tensor in state.items():
            quantized = is_matrix(key, tensor) and in_blocks(key)
            name = kind if quantized else "BF16" if tensor.ndim == 2 else "F32"
            stored = gguf_bytes(tensor, name)
            ggml_type = GGMLQuantizationType[name]
            tensors[key] = (stored.view(np.float32) if name == "F32" else stored, ggml_type)
            truth[key] = torch.from_numpy(gguf.quants.dequantize(stored, ggml_type).reshape(tensor.shape).copy())
        return StoredGguf(tensors, truth)

    return store


def write_gguf(stored: StoredGguf, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "qwen_image")
    for key, (data, ggml_type) in stored.tensors.items():
        writer.add_tensor(key, data, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Nunchaku

FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj")}
NUNCHAKU_NAMES = {
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}


def nunchaku(state: State) -> Stored:
    """SVDQuant INT4 and AWQ modulations, packed by DeepCompressor, under the names that nunchaku gives them."""
    packer = importlib.import_module("deepcompressor.backend.nunchaku.convert")
    tensors, truth, packed = {}, {}, set()
    with warnings.catch_warnings():
        # its padding indexes in a way that PyTorch deprecates
        warnings.filterwarnings("ignore", "Using a non-tuple sequence", UserWarning)
        for block in sorted({".".join(key.split(".")[:2]) for key in state if in_blocks(key)}):
            linears = {f"attn.{name}": [f"attn.{part}" for part in parts] for name, parts in FUSED.items()}
            linears |= {name: [name] for name in ("attn.to_out.0", "attn.to_add_out")}
            linears |= {
                f"{stream}_mlp.net.{end}": [f"{stream}_mlp.net.{end}"] for stream in ("img", "txt") for end in ("0.proj", "2")
            }
            for name, parts in linears.items():
                names = [f"{block}.{part}" for part in parts]
                weight, bias = (torch.cat([state[f"{part}.{end}"] for part in names]) for end in ("weight", "bias"))
                stored, read = _svdquant(packer, weight, bias, is_behind_gelu=name.endswith("net.2"))
                tensors |= {f"{block}.{name}.{suffix}": tensor for suffix, tensor in stored.items()}
                truth |= dict(zip([f"{part}.weight" for part in names], read.chunk(len(names)), strict=True))
                packed |= {f"{part}.{end}" for part in names for end in ("weight", "bias")}
                truth |= dict(zip([f"{part}.bias" for part in names], bias.chunk(len(names)), strict=True))
            for name in ("img_mod.1", "txt_mod.1"):
                weight, bias = (state[f"{block}.{name}.{end}"] for end in ("weight", "bias"))
                codes, scales = _int4(weight)
                read = (codes * scales.float()[..., None]).flatten(1)
                stored = packer.convert_to_nunchaku_w4x16_adanorm_zero_state_dict(
                    read.bfloat16(), scales[:, None, :, None], bias.bfloat16()
                )
                # scales are padded to 16 groups, which the 48 of Qwen-Image's own width never need
                stored |= {suffix: stored[suffix][: weight.shape[1] // 64] for suffix in ("wscales", "wzeros")}
                tensors |= {f"{block}.{name}.{suffix}": tensor for suffix, tensor in stored.items()}
                truth[f"{block}.{name}.weight"] = read
                truth[f"{block}.{name}.bias"] = bias
                packed |= {f"{block}.{name}.{end}" for end in ("weight", "bias")}
    for key in state.keys() - packed:
        tensors[key] = state[key].bfloat16()
        truth[key] = tensors[key].float()
    quantization = {"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "rank": RANK}
    metadata = {
        "model_class": "NunchakuQwenImageTransformer2DModel",
        "config": json.dumps({"num_layers": 2, "zero_cond_t": True}),
        "quantization_config": json.dumps(quantization),
    }
    return Stored(tensors, truth, metadata)


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes from -7 to 7 in groups of 64, and scales that are powers of 2: DeepCompressor wants their products in BF16."""
    groups = weight.unflatten(1, (-1, 64))
    scales = (groups.abs().amax(-1) / 7).log2().ceil().exp2().bfloat16()
    return (groups / scales.float()[..., None]).round(), scales


def _svdquant(packer: Any, weight: Tensor, bias: Tensor, is_behind_gelu: bool) -> tuple[Parts, Tensor]:
    """Outliers go from x to the weight, the largest singular values to a low-rank pair, the rest to INT4 in groups of 64."""
    smooth = (1 / weight.abs().amax(0).sqrt()).bfloat16()
    u, s, v = torch.linalg.svd(weight * smooth.float(), full_matrices=False)
    up, down = (u[:, :RANK] * s[:RANK]).bfloat16(), v[:RANK].bfloat16()
    codes, scales = _int4(weight * smooth.float() - up.float() @ down.float())
    rest = (codes * scales.float()[..., None]).flatten(1)
    read = rest / smooth.float() + up.float() @ (down.float() / smooth.float())
    # what its pipeline hands over: a bias that undoes the shift for the whole weight
    shifted = (bias - GELU_SHIFT * read.sum(1) if is_behind_gelu else bias).bfloat16()
    stored = packer.convert_to_nunchaku_w4x4y16_linear_state_dict(
        rest.bfloat16(),
        scales[:, None, :, None],
        bias=shifted,
        smooth=smooth,
        lora=(down, up),
        shift=torch.tensor([GELU_SHIFT]) if is_behind_gelu else None,
    )
    return {NUNCHAKU_NAMES.get(name, name): tensor for name, tensor in stored.items()}, read


# the layouts


@dataclass(frozen=True)
class Layout:
    """One layout of the transformer.

    schemes: how many matrices are stored in each way, by the names of millicent's schemes. maker: whose marks the file bears.
    bound: on the relative error of a matrix. tolerance: between our numbers and the maker's own, 0 for the same bits.
    config: a folder's config.json beside the weights; None for a file. kept: whether FP8 and INT8 codes stay as they are.
    """

    store: Callable[[State], Any]
    schemes: dict[str, int]
    bound: float
    maker: str | None = None
    tolerance: float = 0.0
    prefix: str = ""
    config: dict[str, Any] | None = None
    kept: bool = False
    files: str = "one"


IN_BLOCKS, ELSEWHERE, IN_MLPS = 28, 6, 8
ROUNDED = 2**-21  # where two FP32 products are taken in another order


def blocks(scheme: str) -> dict[str, int]:
    return {scheme: IN_BLOCKS, "plain": ELSEWHERE}


def quantized_by(method: str, **fields: Any) -> dict[str, Any]:
    return {"_class_name": "QwenImageTransformer2DModel", "quantization_config": {"quant_method": method, **fields}}


MARKER_0 = {"scaled_fp8": torch.empty(0).to(E4M3)}
MARKER_2 = {"scaled_fp8": torch.zeros(2).to(E4M3)}
WHOLE = {"plain": IN_BLOCKS + ELSEWHERE}
FP8, INT8, FOUR_BITS = 0.05, 0.05, 0.20
NOT_IN_BLOCKS = ("img_in", "txt_in", "proj_out", "re:.*time_text.*", "re:.*norm_out.*")

LAYOUTS: dict[str, Layout] = {
    "bf16": Layout(cast(torch.bfloat16), WHOLE, 0.003),
    "bf16, prefix": Layout(cast(torch.bfloat16), WHOLE, 0.003, prefix=COMFY_PREFIX),
    "f16": Layout(cast(torch.float16), WHOLE, 0.003),
    "f32": Layout(cast(torch.float32), WHOLE, 0.003),
    "bf16 folder": Layout(cast(torch.bfloat16), WHOLE, 0.003, config={"zero_cond_t": True}),
    "bf16 shards": Layout(cast(torch.bfloat16), WHOLE, 0.003, config={"zero_cond_t": True}, files="shards"),
    "raw e4m3": Layout(cast(E4M3), {"raw fp8": IN_BLOCKS + ELSEWHERE}, FP8),
    "raw e5m2": Layout(cast(E5M2), {"raw fp8": IN_BLOCKS + ELSEWHERE}, 0.10),
    "comfy old": Layout(
        by_matrix(comfy_old, extra=MARKER_0 | ZERO_COND_T), blocks("comfy scaled fp8"), FP8, "comfy", prefix=COMFY_PREFIX, kept=True
    ),
    "comfy old, full precision": Layout(
        by_matrix(comfy_old_calibrated, extra=MARKER_2), blocks("comfy scaled fp8"), FP8, "comfy", kept=True
    ),
    "lightx2v comfy": Layout(
        by_matrix(lightx2v_comfy, everywhere, MARKER_2), {"comfy scaled fp8": 34}, FP8, "comfy", prefix=COMFY_PREFIX, kept=True
    ),
    "comfy fp8": Layout(
        by_matrix(noted(comfy_fp8, format="float8_e4m3fn"), extra=ZERO_COND_T),
        blocks("fp8 per tensor"), FP8, "comfy", prefix=COMFY_PREFIX, kept=True,
    ),
    "comfy fp8, metadata": Layout(
        noted_in_metadata(comfy_fp8, format="float8_e4m3fn"), blocks("fp8 per tensor"), FP8, "comfy", kept=True
    ),
    "comfy fp8, mixed": Layout(
        by_matrix(noted(comfy_fp8, format="float8_e4m3fn", full_precision_matrix_mult=True), in_mlps),
        {"fp8 per tensor": IN_MLPS, "plain": IN_BLOCKS - IN_MLPS + ELSEWHERE}, FP8, "comfy", kept=True,
    ),
    "comfy e5m2": Layout(
        by_matrix(noted(functools.partial(comfy_fp8, dtype=E5M2), format="float8_e5m2")), blocks("fp8 per tensor"), 0.10, "comfy"
    ),
    "comfy mxfp8": Layout(by_matrix(noted(comfy_mxfp8, format="mxfp8"), everywhere), {"mxfp8, swizzled": 34}, FP8, "comfy"),
    "comfy nvfp4": Layout(
        by_matrix(noted(comfy_nvfp4, format="nvfp4"), everywhere, ZERO_COND_T),
        {"nvfp4, comfy": 34}, FOUR_BITS, "comfy", ROUNDED, COMFY_PREFIX,
    ),
    "comfy int8": Layout(
        by_matrix(noted(functools.partial(comfy_int8, rows=False), format="int8_tensorwise")),
        blocks("int8 per tensor"), 0.12, "comfy", kept=True,
    ),
    "comfy int8 rows": Layout(
        by_matrix(noted(functools.partial(comfy_int8, rows=True), format="int8_tensorwise")),
        blocks("int8 per row"), INT8, "comfy", kept=True,
    ),
    "comfy int8 convrot": Layout(
        by_matrix(noted(comfy_int8_convrot, format="int8_tensorwise", convrot=True, convrot_groupsize=256)),
        blocks("int8 per row"), INT8, "comfy", 2**-18,
    ),
    "comfy convrot w4a4": Layout(
        by_matrix(noted(comfy_w4a4, format="convrot_w4a4", convrot_groupsize=256)), blocks("int4 convrot"), FOUR_BITS, "comfy",
        2**-18,
    ),
    "lightx2v fp8": Layout(by_matrix(fp8_rows), blocks("fp8 per row"), FP8, kept=True),
    "lightx2v fp8 by block": Layout(by_matrix(fp8_rows), blocks("fp8 per row"), FP8, config={}, kept=True, files="blocks"),
    "lightx2v int8": Layout(by_matrix(lightx2v_int8), blocks("int8 per row"), INT8, kept=True),
    "lightx2v nvfp4": Layout(by_matrix(lightx2v_nvfp4), blocks("nvfp4, lightx2v"), FOUR_BITS, tolerance=ROUNDED),
    "lightx2v nvfp4, calibrated": Layout(
        by_matrix(lightx2v_calibrated), blocks("nvfp4, lightx2v calibrated"), FOUR_BITS, tolerance=ROUNDED
    ),
    "musubi [1]": Layout(by_matrix(musubi_one), blocks("comfy scaled fp8"), FP8, kept=True),
    "musubi [N, 1]": Layout(by_matrix(musubi_rows), blocks("musubi scaled fp8"), FP8, kept=True),
    "musubi [N, nb, 1]": Layout(
        by_matrix(functools.partial(row_blocks, suffix="scale_weight")), blocks("musubi scaled fp8"), FP8
    ),
    "musubi, two levels": Layout(by_matrix(musubi_two_levels), blocks("musubi scaled fp8"), FP8, tolerance=ROUNDED, kept=True),
    "convert_to_quant 2-D": Layout(
        by_matrix(noted(functools.partial(fp8_squares, block=64, suffix="weight_scale"), format="float8_e4m3fn_blockwise")),
        blocks("fp8 blocks"), FP8, "comfy",
    ),
    "convert_to_quant 3-D": Layout(
        by_matrix(noted(functools.partial(row_blocks, suffix="weight_scale"), format="float8_e4m3fn_block3d", group_size=64)),
        blocks("fp8 blocks"), FP8, "comfy",
    ),
    "convert_to_quant int8": Layout(
        by_matrix(noted(int8_squares, format="int8_blockwise", group_size=128)), blocks("int8 blocks"), INT8, "comfy"
    ),
    "modelopt fp8": Layout(
        by_matrix(modelopt_fp8), blocks("fp8 per tensor"), FP8, "modelopt", kept=True,
        config=quantized_by("modelopt", quant_algo="FP8") | {"zero_cond_t": True},
    ),
    "modelopt nvfp4": Layout(
        by_matrix(modelopt_nvfp4), blocks("nvfp4, modelopt"), FOUR_BITS, "modelopt", ROUNDED,
        config=quantized_by("modelopt", quant_algo="NVFP4"),
    ),
    "modelopt nvfp4, older config": Layout(
        by_matrix(modelopt_nvfp4), blocks("nvfp4, modelopt"), FOUR_BITS, "modelopt", ROUNDED, config={}, files="hf_quant_config"
    ),
    "compressed-tensors fp8": Layout(
        compressed("FP8_DYNAMIC", ignore=NOT_IN_BLOCKS), blocks("fp8 per row"), FP8, "compressed-tensors", kept=True,
        config=quantized_by("compressed-tensors"),
    ),
    "compressed-tensors int8": Layout(
        compressed("W8A8", ignore=NOT_IN_BLOCKS), blocks("int8 per row"), INT8, "compressed-tensors", kept=True,
        config=quantized_by("compressed-tensors"),
    ),
    "compressed-tensors nvfp4": Layout(
        compressed("NVFP4", ignore=NOT_IN_BLOCKS), blocks("nvfp4, compressed-tensors"), FOUR_BITS, "compressed-tensors",
        tolerance=2**-8,  # it reads back in BF16
        config=quantized_by("compressed-tensors"),
    ),
    "fine-grained fp8": Layout(
        by_matrix(functools.partial(fp8_squares, block=128, suffix="weight_scale_inv")), blocks("fine-grained fp8"), FP8,
        "fine-grained", config=quantized_by("fp8", weight_block_size=[128, 128]),
    ),
    "torchao fp8": Layout(torchao(Float8WeightOnlyConfig()), {"torchao": 34}, FP8, "torchao", kept=True),
    "torchao int8": Layout(torchao(Int8WeightOnlyConfig()), {"torchao": 34}, INT8, "torchao", kept=True),
    "bitsandbytes nf4": Layout(
        by_matrix(functools.partial(bitsandbytes_4bit, kind="nf4", nested=False)), blocks("bitsandbytes nf4"), FOUR_BITS
    ),
    "bitsandbytes nf4, nested": Layout(
        by_matrix(functools.partial(bitsandbytes_4bit, kind="nf4", nested=True)), blocks("bitsandbytes nf4, nested"), FOUR_BITS,
        "bitsandbytes", config=quantized_by("bitsandbytes", load_in_4bit=True),
    ),
    "bitsandbytes fp4": Layout(
        by_matrix(functools.partial(bitsandbytes_4bit, kind="fp4", nested=False)), blocks("bitsandbytes fp4"), FOUR_BITS
    ),
    "bitsandbytes int8": Layout(
        by_matrix(bitsandbytes_int8), blocks("bitsandbytes int8"), INT8, "bitsandbytes", ROUNDED,
        config=quantized_by("bitsandbytes", load_in_8bit=True), kept=True,
    ),
    "quanto int8": Layout(quanto(qint8), {"quanto": 34}, INT8, kept=True),
    "quanto fp8": Layout(quanto(qfloat8), {"quanto": 34}, FP8, kept=True),
    "nunchaku int4": Layout(
        nunchaku, {"svdquant int4": 16 - 4 + 4, "nunchaku awq": 4, "plain": ELSEWHERE}, FOUR_BITS, "nunchaku", 2**-7
    ),
    **{
        f"gguf {kind}": Layout(in_gguf(kind), blocks(f"gguf {kind}"), bound, files="gguf")
        for kind, bound in {
            "Q8_0": 0.02, "Q6_K": 0.05, "Q5_0": 0.08, "Q5_1": 0.08, "Q5_K": 0.08, "Q4_0": 0.20, "Q4_1": 0.20, "Q4_K": 0.20,
        }.items()
    },
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """path: what a user gives: a file or a folder. files: that hold tensors."""

    layout: Layout
    path: Path
    files: tuple[Path, ...]
    stored: Any


def write(layout: Layout, state: State, folder: Path, stem: str = "transformer") -> Written:
    """One layout, into a folder of its own; stem: what the file is called, where it is a file."""
    stored = layout.store(state)
    if layout.files == "gguf":
        path = folder / f"{stem}.gguf"
        write_gguf(stored, path)
        return Written(layout, path, (path,), stored)
    # libraries leave views into one storage behind
    tensors = {f"{layout.prefix}{key}": tensor.detach().clone().contiguous() for key, tensor in stored.tensors.items()}
    if layout.config is None:
        path = folder / f"{stem}.safetensors"
        save_file(tensors, path, stored.metadata)
        return Written(layout, path, (path,), stored)
    if layout.files == "shards":
        write_shards(tensors, folder)
    elif layout.files == "blocks":
        write_blocks(tensors, folder)
    else:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", stored.metadata)
    if layout.files == "hf_quant_config":
        producer = {"producer": {"name": "modelopt", "version": "0.33"}, "quantization": {"quant_algo": "NVFP4"}}
        (folder / "hf_quant_config.json").write_text(json.dumps(producer))
    (folder / "config.json").write_text(json.dumps(layout.config))
    return Written(layout, folder, tuple(sorted(folder.glob("*.safetensors"))), stored)


@functools.cache
def written(name: str, root: Path) -> Written:
    """One layout of the folder's transformer, written once for all tests; not to be changed."""
    folder = root / f"layout{list(LAYOUTS).index(name)}"
    folder.mkdir()
    return write(LAYOUTS[name], read_state(make_folder(root) / "transformer"), folder)


def write_shards(tensors: State, folder: Path, count: int = 3) -> None:
    keys = sorted(tensors)
    weight_map = {}
    for number in range(count):
        shard = f"diffusion_pytorch_model-{number + 1:05}-of-{count:05}.safetensors"
        own = {key: tensors[key] for key in keys[number::count]}
        save_file(own, folder / shard)
        weight_map |= dict.fromkeys(own, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_blocks(tensors: State, folder: Path) -> None:
    """LightX2V's save_by_block."""
    by_file: dict[str, State] = {}
    for key, tensor in tensors.items():
        name = f"block_{key.split('.')[1]}" if in_blocks(key) else "non_block"
        by_file.setdefault(name, {})[key] = tensor
    for name, own in by_file.items():
        save_file(own, folder / f"{name}.safetensors")


# the text encoder, whose own names here are those that transformers has in memory, without "model."

LINEARS, EMBEDDING = 26, 1  # 7 in each of two layers, 5 in each of two vision blocks, 2 in the merger


def read_text_encoder(folder: Path) -> State:
    state = read_state(folder / "text_encoder")
    names = {key: key.removeprefix("model.") for key in state}
    hub = ("layers.", "embed_tokens.", "norm.")
    return {f"language_model.{name}" if name.startswith(hub) else name: state[key] for key, name in names.items()}


def is_text_linear(key: str) -> bool:
    return "embed_tokens" not in key and "lm_head" not in key


def is_text_layer(key: str) -> bool:
    return key.startswith("language_model.layers.")


def by_hub_names(store: Callable[[State], Stored]) -> Callable[[State], Stored]:
    """As Qwen published it, and ComfyUI has it: model.layers, visual."""

    def renamed(state: State) -> Stored:
        stored = store(state)
        tensors = {key.replace("language_model.", "model.", 1): tensor for key, tensor in stored.tensors.items()}
        return Stored(tensors, _of_encoder(stored.truth), stored.metadata)

    return renamed


def by_memory_names(store: Callable[[State], Stored]) -> Callable[[State], Stored]:
    """As newer transformers have it in memory: model.language_model, model.visual."""

    def renamed(state: State) -> Stored:
        stored = store(state)
        tensors = {key if key.startswith("lm_head.") else f"model.{key}": tensor for key, tensor in stored.tensors.items()}
        return Stored(tensors, _of_encoder(stored.truth), stored.metadata)

    return renamed


def _of_encoder(truth: State) -> State:
    """Without the head, which no edit needs."""
    return {key: tensor for key, tensor in truth.items() if not key.startswith("lm_head.")}


class _Holder(nn.Module):
    """A bare encoder: the modules that hold a state, by its names."""

    def __init__(self, state: State) -> None:
        super().__init__()
        encoder = make_text_encoder(make_tokenizer()).float()
        self.language_model, self.visual, self.lm_head = encoder.model.language_model, encoder.model.visual, encoder.lm_head
        self.load_state_dict(state)
        self.requires_grad_(False)


def text_linears(scheme: str) -> dict[str, int]:
    return {scheme: LINEARS, "plain": EMBEDDING}


def without_head(store: Callable[[State], Stored]) -> Callable[[State], Stored]:
    return lambda state: store(_of_encoder(state))


TEXT_ENCODERS: dict[str, Layout] = {
    "bf16, hub names": Layout(by_hub_names(cast(torch.bfloat16)), {"plain": LINEARS + EMBEDDING}, 0.003),
    "bf16, memory names": Layout(by_memory_names(cast(torch.bfloat16)), {"plain": LINEARS + EMBEDDING}, 0.003),
    "bf16, no head": Layout(by_hub_names(without_head(cast(torch.bfloat16))), {"plain": LINEARS + EMBEDDING}, 0.003),
    "comfy old": Layout(
        by_hub_names(by_matrix(comfy_old, is_text_linear, MARKER_0)), text_linears("comfy scaled fp8"), FP8, "comfy", kept=True
    ),
    "comfy old, memory names": Layout(
        by_memory_names(by_matrix(comfy_old, is_text_linear)), text_linears("comfy scaled fp8"), FP8, kept=True
    ),
    "comfy fp8": Layout(
        by_hub_names(by_matrix(noted(comfy_fp8, format="float8_e4m3fn"), is_text_linear)),
        text_linears("fp8 per tensor"), FP8, "comfy", kept=True,
    ),
    "comfy nvfp4": Layout(
        by_hub_names(by_matrix(noted(comfy_nvfp4, format="nvfp4"), is_text_linear)),
        text_linears("nvfp4, comfy"), FOUR_BITS, "comfy", ROUNDED,
    ),
    "compressed-tensors fp8": Layout(
        by_memory_names(compressed("FP8_DYNAMIC", _Holder, ("lm_head", "re:.*visual.*"))),
        {"fp8 per row": 14, "plain": 12 + EMBEDDING}, FP8, "compressed-tensors", kept=True,
        config={"quantization_config": {"quant_method": "compressed-tensors"}},
    ),
    "bitsandbytes nf4": Layout(
        by_hub_names(by_matrix(functools.partial(bitsandbytes_4bit, kind="nf4", nested=True), is_text_layer)),
        {"bitsandbytes nf4, nested": 14, "plain": 12 + EMBEDDING}, FOUR_BITS,
    ),
    "bitsandbytes int8": Layout(
        by_memory_names(by_matrix(bitsandbytes_int8, is_text_layer)),
        {"bitsandbytes int8": 14, "plain": 12 + EMBEDDING}, INT8, tolerance=ROUNDED, kept=True,
    ),
}  # fmt: skip


# the VAE, as ComfyUI has it


def to_wan_key(key: str) -> str:
    """diffusers' name of a VAE parameter -> the Wan file's: the published table, read from right to left."""
    key = key.replace("post_quant_conv.", "conv2.") if key.startswith("post_") else key.replace("quant_conv.", "conv1.")
    for half in ("encoder", "decoder"):
        key = key.replace(f"{half}.conv_in.", f"{half}.conv1.")
        key = key.replace(f"{half}.norm_out.", f"{half}.head.0.").replace(f"{half}.conv_out.", f"{half}.head.2.")
    for block, layer in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        key = key.replace(f"mid_block.{block}.", f"middle.{layer}.")
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}.", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"upsamples.{4 * int(m[1]) + 3}.", key)
    key = key.replace("down_blocks.", "downsamples.")
    blocks = {
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "conv_shortcut": "shortcut",
    }
    inside = re.search(r"(samples\.\d+|middle\.[02])\.(norm1|conv1|norm2|conv2|conv_shortcut)\.", key)
    return key.replace(f".{inside[2]}.", f".{blocks[inside[2]]}.") if inside else key


def all_in_one(folder: Path, quantize_matrix: Quantize = comfy_old) -> State:
    """One file with three prefixes, as Rapid-AIO and the like are: transformer and encoder quantized, the VAE in Wan's names."""
    transformer = by_matrix(quantize_matrix)(read_state(folder / "transformer")).tensors
    encoder = by_hub_names(by_matrix(quantize_matrix, is_text_linear))(read_text_encoder(folder)).tensors
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    whole = {f"{COMFY_PREFIX}{key}": tensor for key, tensor in transformer.items()}
    whole |= {f"text_encoders.qwen25_7b.transformer.{key}": tensor for key, tensor in encoder.items()}
    return whole | {f"vae.{to_wan_key(key)}": tensor for key, tensor in vae.items()}
