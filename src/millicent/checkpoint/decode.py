"""A stored weight back to numbers: one function for each scheme of schemes.py, FP32 out.

Scales are used in FP32 whatever they are stored in: rounding them to BF16 alone costs more than the codes do. Tensors come
in the dtypes that the file gives them, E8M0 as itself or as bytes; of GGUF's block types the bytes, (bytes,) uint8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from millicent.checkpoint.layout import StoredMatrix
from millicent.checkpoint.nunchaku import AWQ_SCHEME, is_behind_gelu
from millicent.checkpoint.schemes import KEEPABLE, SHAPES
from millicent.errors import CheckpointError
from millicent.formats import gguf_blocks
from millicent.formats.codebooks import NestedAbsmax, dequantize_4bit, dequantize_int8_rows, read_quant_state
from millicent.formats.float_blocks import dequantize_blocks, dequantize_mxfp8, dequantize_nvfp4
from millicent.formats.gguf_types import BLOCK_TYPES
from millicent.formats.packed import decode_int4, unpack_nibbles
from millicent.formats.svdquant import (
    dequantize_awq,
    dequantize_svdq_fp4,
    dequantize_svdq_int4,
    restore_modulation,
    unpack_vector,
    unshift_bias,
)
from millicent.kernels.hadamard import DEFAULT_GROUP, largest_group, rotate

Parts = Mapping[str, Tensor]
Shape = tuple[int, int]
Note = Mapping[str, Any]
FINE_GRAINED_BLOCK = 128
# a weight that was cast to FP8 as it was stays far below; one that was scaled before reaches 448 in every row or matrix
LEAST_SCALED_FP8 = 200.0
# largest magnitudes of blocks or rows, which act as scales: 0 where all of them are
_MAGNITUDES = ("SCB", "weight.absmax", "weight.nested_absmax")
_MAX_CONTRADICTION = 0.02  # scales are stored in BF16 at worst
_KEPT_DTYPES = (torch.float8_e4m3fn, torch.int8)
_PIECE_BYTES = 4 << 20  # both passes over a piece find it in the processor's cache
_THREADS = 8
_FIX = "Fetch the file again, or use another quantization of this model."


def decode_stored(layer: str, stored: StoredMatrix, parts: Parts) -> dict[str, Tensor]:
    """What one stored matrix yields: FP32 tensors by their full parameter names.

    parts: the tensors as the file holds them, by what follows "X." in their names.
    Raises CheckpointError for a scale that is not finite or not positive, a code that is NaN, a result that is not finite.
    """
    if stored.scheme.name not in _PACKED_LINEARS:
        return {stored.parameters[0]: decode_weight(layer, stored.scheme.name, parts, stored.shape, stored.note)}
    _check_parts(layer, parts)
    weight, bias = _PACKED_LINEARS[stored.scheme.name](layer, parts)
    _check_result(layer, weight, stored.shape)
    _check_result(f"{layer}.bias", bias, stored.shape[:1])
    count = len(stored.parameters) // 2
    return dict(zip(stored.parameters, (*weight.chunk(count), *bias.chunk(count)), strict=True))


def read_codes(layer: str, stored: StoredMatrix, parts: Parts, *, checks: bool = True) -> tuple[Tensor, Tensor] | None:
    """Codes (N, K) as they are stored, FP8 e4m3 or INT8, and FP32 scales (N, 1) or (1, 1): code * scale is the weight, exactly.

    None where the matrix is stored in no such way: e5m2, rotated, with a zero point, in blocks, in 4 bits. checks: False leaves
    it to the caller to see that every code is a number.
    Raises CheckpointError as decode_stored does.
    """
    if stored.scheme.name not in KEEPABLE or stored.note.get("convrot"):
        return None
    codes, scale = (parts[suffix] for suffix in KEEPABLE[stored.scheme.name])
    is_row, is_value = (SHAPES[shape](tuple(scale.shape), *stored.shape) for shape in ("one per row", "one value"))
    has_zero_point = "_weight_zero_point" in parts and bool(parts["_weight_zero_point"].any())
    if codes.dtype not in _KEPT_DTYPES or has_zero_point or not (is_row or is_value):
        return None
    _check_parts(layer, parts if checks else {suffix: part for suffix, part in parts.items() if part is not codes})
    scales = scale.float().reshape(-1, 1)
    if "scale_weight_tensor" in parts:
        scales = scales * parts["scale_weight_tensor"].float().reshape(())
    if stored.scheme.name == "bitsandbytes int8":
        _check_row_order(parts)
        scales = scales / 127
    largest = torch.finfo(codes.dtype).max if codes.is_floating_point() else 128
    _check_result(layer, scales * largest, tuple(scales.shape))
    return codes, scales


def decode_weight(layer: str, scheme: str, parts: Parts, shape: Shape, note: Note | None = None) -> Tensor:
    """The layer's weight, FP32 (N, K), of a scheme that stores nothing else.

    parts: the tensors as the file holds them, by what follows "X." in their names. note: ComfyUI's JSON for the layer.
    Raises CheckpointError for a scale that is not finite or not positive, a code that is NaN, a result that is not finite.
    """
    _check_parts(layer, parts)
    try:
        weight = _DECODERS[scheme](parts, shape, note or {})
    except CheckpointError as error:
        raise type(error)(f"{layer}: {error.message}", error.fix) from error
    _check_result(layer, weight, shape)
    if scheme == "raw fp8":
        _refuse_lost_scale(layer, weight)
    return weight


def _refuse_lost_scale(layer: str, weight: Tensor) -> None:
    largest = float(weight.abs().amax())
    if largest >= LEAST_SCALED_FP8:
        found = f"{layer} is FP8 without a scale and reaches {largest:g}: scaled FP8 whose scales are missing"
        raise CheckpointError(f"{found}.", "Use a file that holds its scales.")


def _check_parts(layer: str, parts: Parts) -> None:
    for suffix, tensor in parts.items():
        _check_values(f"{layer}.{suffix}", suffix, tensor)
    if "SCB" in parts:
        _check_zeros(f"{layer}.SCB", parts["SCB"].flatten(), parts["weight"])


def _check_zeros(name: str, magnitudes: Tensor, codes: Tensor) -> None:
    """bitsandbytes gives a magnitude of 0 to zeros alone, which then all have one code. codes: a row for each magnitude."""
    of_zeros = codes[magnitudes == 0]
    if bool((of_zeros != of_zeros[:, :1]).any()):
        raise CheckpointError(f"{name} is 0 where the codes are not.", _FIX)


def _check_result(name: str, found: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(found.shape) != shape:
        raise CheckpointError(f"{name} decodes to {tuple(found.shape)}; the network has {shape}.", _FIX)
    if not bool(found.isfinite().all()):
        raise CheckpointError(f"{name} holds values that are not finite.", _FIX)


def has_special_codes(codes: Tensor) -> bool:
    """Whether FP8 codes hold a NaN, or in e5m2 an infinity: the highest codes of either sign, found without another tensor.

    Piece by piece in threads, as a mapped file's pages come one by one, and by NumPy, which finds extremes of bytes with vector
    instructions on every processor.
    """
    highest = 0x7C if codes.dtype == torch.float8_e5m2 else 0x7F
    values = codes.contiguous().view(-1).view(torch.uint8).numpy()
    pieces = [values[begin : begin + _PIECE_BYTES] for begin in range(0, len(values), _PIECE_BYTES)]
    if len(pieces) < 2:
        return any(_reaches(piece, highest) for piece in pieces)
    with ThreadPoolExecutor(min(len(pieces), _THREADS)) as pool:
        return any(pool.map(lambda piece: _reaches(piece, highest), pieces))


def _reaches(piece: np.ndarray[Any, np.dtype[np.uint8]], highest: int) -> bool:
    return int(piece.view(np.int8).max()) >= highest or int(piece.max()) >= 0x80 | highest


def _check_values(name: str, suffix: str, tensor: Tensor) -> None:
    is_scale = "scale" in suffix or suffix in ("alpha", "smooth_factor")
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        if has_special_codes(tensor):
            raise CheckpointError(f"{name} holds codes that are no numbers.", _FIX)
        if is_scale and bool((tensor.float() < 0).any()):
            raise CheckpointError(f"{name} holds negative scales.", _FIX)
    elif not tensor.is_floating_point() or tensor.element_size() == 1:
        return
    elif suffix in _MAGNITUDES and not bool((tensor.isfinite() & (tensor >= 0)).all()):
        raise CheckpointError(f"{name} holds magnitudes that are not finite or below 0.", _FIX)
    elif is_scale:
        # pre_quant_scale multiplies the input, where any sign is possible and zero is a pruned channel
        positive = tensor.isfinite() if suffix == "pre_quant_scale" else tensor.isfinite() & (tensor > 0)
        if not bool(positive.all()):
            raise CheckpointError(f"{name} holds scales that are not finite and above 0.", _FIX)


def _scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """codes (N, K) times one scale, or one for each row however it is shaped: never along K."""
    rows = scale.float().reshape(-1, 1)
    return codes.float() * rows


def _unrotated(weight: Tensor, note: Note) -> Tensor:
    if not note.get("convrot"):
        return weight
    wanted = int(note.get("convrot_groupsize") or DEFAULT_GROUP)
    return rotate(weight, largest_group(weight.shape[-1], wanted))


def _musubi(parts: Parts, shape: Shape, note: Note) -> Tensor:
    scale = parts["scale_weight"].float()
    scale = scale * parts["scale_weight_tensor"].float().reshape(()) if "scale_weight_tensor" in parts else scale
    # by the shape: a grid may have as many scales as there are rows
    is_row = SHAPES["one per row"](tuple(scale.shape), *shape)
    return _scaled(parts["weight"], scale) if is_row else dequantize_blocks(parts["weight"], scale, shape)


def _scaled_codes(parts: Parts, shape: Shape, note: Note) -> Tensor:
    return _unrotated(_scaled(parts["weight"], parts["weight_scale"]), note)


def _block_scaled(parts: Parts, shape: Shape, note: Note) -> Tensor:
    return _unrotated(dequantize_blocks(parts["weight"], parts["weight_scale"], shape), note)


def _fine_grained(parts: Parts, shape: Shape, note: Note) -> Tensor:
    grid = tuple(-(-side // FINE_GRAINED_BLOCK) for side in shape)
    if tuple(parts["weight_scale_inv"].shape) != grid:
        raise CheckpointError(f"weight_scale_inv is {tuple(parts['weight_scale_inv'].shape)}; a {shape} weight has {grid}.", _FIX)
    # despite its name it multiplies
    return dequantize_blocks(parts["weight"], parts["weight_scale_inv"], shape)


def _mxfp8(swizzled: bool) -> Callable[[Parts, Shape, Note], Tensor]:
    return lambda parts, shape, note: dequantize_mxfp8(parts["weight"], parts["weight_scale"], shape, swizzled)


def _nvfp4(high_first: bool, swizzled: bool) -> Callable[[Parts, Shape, Note], Tensor]:
    def decode(parts: Parts, shape: Shape, note: Note) -> Tensor:
        weight = dequantize_nvfp4(parts["weight"], parts["weight_scale"], parts["weight_scale_2"], shape, high_first, swizzled)
        return weight * parts["pre_quant_scale"].float() if "pre_quant_scale" in parts else weight

    return decode


def _nvfp4_divided(weight: str, swizzled: bool) -> Callable[[Parts, Shape, Note], Tensor]:
    """The global scale is stored as its inverse; the even element lies in the low nibble."""
    return lambda parts, shape, note: dequantize_nvfp4(
        parts[weight], parts["weight_scale"], 1 / parts["weight_global_scale"].float(), shape, high_first=False, swizzled=swizzled
    )


def _lightx2v_nvfp4(parts: Parts, shape: Shape, note: Note) -> Tensor:
    if "alpha" in parts and "input_global_scale" in parts:
        scales = (parts[name].float().reshape(()) for name in ("alpha", "input_global_scale", "weight_global_scale"))
        product = math.prod(map(float, scales))
        if abs(product - 1) > _MAX_CONTRADICTION:
            raise CheckpointError(f"alpha * input_global_scale * weight_global_scale is {product:.3g}; wanted 1.", _FIX)
    return _nvfp4_divided("weight", swizzled=True)(parts, shape, note)


def _nvfp4_calibrated(parts: Parts, shape: Shape, note: Note) -> Tensor:
    """LightX2V's alpha is 1 / (input_global_scale * weight_global_scale), and the latter is not stored."""
    global_scale = parts["alpha"].float() * parts["input_global_scale"].float().reshape(parts["alpha"].shape)
    return dequantize_nvfp4(parts["weight"], parts["weight_scale"], global_scale, shape, high_first=False, swizzled=True)


def _gguf(ggml_type: int) -> Callable[[Parts, Shape, Note], Tensor]:
    return lambda parts, shape, note: gguf_blocks.dequantize(parts["weight"], ggml_type, shape)


def _bitsandbytes_4bit(kind: str, is_nested: bool) -> Callable[[Parts, Shape, Note], Tensor]:
    def decode(parts: Parts, shape: Shape, note: Note) -> Tensor:
        state = read_quant_state(parts[f"weight.quant_state.bitsandbytes__{kind}"])
        if state.quant_type != kind or state.shape != shape:
            found = f"A quant_state named {kind} is of {state.quant_type} {state.shape}"
            raise CheckpointError(f"{found}; the network has {shape}.", _FIX)
        if is_nested != (state.nested_block_size is not None):
            stored, said = ("are", "are not") if is_nested else ("are not", "are")
            raise CheckpointError(f"A quant_state says that its scales {said} quantized, but they {stored}.", _FIX)
        nested = None
        if state.nested_block_size is not None and state.nested_offset is not None:
            absmax, table = parts["weight.nested_absmax"], parts["weight.nested_quant_map"]
            nested = NestedAbsmax(absmax, table, state.nested_offset, state.nested_block_size)
        codes, absmax, table = parts["weight"], parts["weight.absmax"], parts["weight.quant_map"]
        weight = dequantize_4bit(codes, absmax, table, shape, state.block_size, nested)
        if nested is None:
            whole = codes.numel() // (state.block_size // 2)
            _check_zeros("weight.absmax", absmax[:whole], codes.flatten()[: whole * state.block_size // 2].view(whole, -1))
        return weight

    return decode


def _check_row_order(parts: Parts) -> None:
    """bitsandbytes once saved weights in the tile orders of its kernels: 0 is the plain one."""
    if "weight_format" in parts and int(parts["weight_format"].reshape(())) != 0:
        found = int(parts["weight_format"].reshape(()))
        raise CheckpointError(f"A bitsandbytes weight has the weight_format {found}; wanted 0, by rows.", "Save it again by rows.")


def _bitsandbytes_int8(parts: Parts, shape: Shape, note: Note) -> Tensor:
    _check_row_order(parts)
    return dequantize_int8_rows(parts["weight"], parts["SCB"].reshape(-1))


def _torchao(parts: Parts, shape: Shape, note: Note) -> Tensor:
    codes = parts["_weight_qdata"].float()
    if "_weight_zero_point" in parts:
        codes = codes - parts["_weight_zero_point"].float().reshape(-1, 1)
    return _scaled(codes, parts["_weight_scale"])


def _int4_convrot(parts: Parts, shape: Shape, note: Note) -> Tensor:
    codes = decode_int4(unpack_nibbles(parts["weight"], high_first=False))
    return _unrotated(_scaled(codes, parts["weight_scale"]), {"convrot": True, **note})


_DECODERS: dict[str, Callable[[Parts, Shape, Note], Tensor]] = {
    "plain": lambda parts, shape, note: parts["weight"].float(),
    "raw fp8": lambda parts, shape, note: parts["weight"].float(),
    "comfy scaled fp8": lambda parts, shape, note: _scaled(parts["weight"], parts["scale_weight"]),
    "musubi scaled fp8": _musubi,
    "fp8 per tensor": _scaled_codes,
    "fp8 per row": _scaled_codes,
    "fp8 blocks": _block_scaled,
    "fine-grained fp8": _fine_grained,
    "int8 per tensor": _scaled_codes,
    "int8 per row": _scaled_codes,
    "int8 blocks": _block_scaled,
    "mxfp8, swizzled": _mxfp8(swizzled=True),
    "mxfp8, plain": _mxfp8(swizzled=False),
    "nvfp4, comfy": _nvfp4(high_first=True, swizzled=True),
    "nvfp4, modelopt": _nvfp4(high_first=False, swizzled=False),
    "nvfp4, lightx2v": _lightx2v_nvfp4,
    "nvfp4, lightx2v calibrated": _nvfp4_calibrated,
    "nvfp4, compressed-tensors": _nvfp4_divided("weight_packed", swizzled=False),
    "torchao": _torchao,
    "quanto": lambda parts, shape, note: _scaled(parts["weight._data"], parts["weight._scale"]),
    "int4 convrot": _int4_convrot,
    "bitsandbytes nf4": _bitsandbytes_4bit("nf4", is_nested=False),
    "bitsandbytes nf4, nested": _bitsandbytes_4bit("nf4", is_nested=True),
    "bitsandbytes fp4": _bitsandbytes_4bit("fp4", is_nested=False),
    "bitsandbytes fp4, nested": _bitsandbytes_4bit("fp4", is_nested=True),
    "bitsandbytes int8": _bitsandbytes_int8,
    **{f"gguf {block.name}": _gguf(block.ggml_type) for block in BLOCK_TYPES.values() if block.values > 1},
}


def _svdquant_int4(layer: str, parts: Parts) -> tuple[Tensor, Tensor]:
    low_rank = parts["proj_down"], parts["proj_up"]
    weight = dequantize_svdq_int4(parts["qweight"], parts["wscales"], parts["smooth_factor"], *low_rank)
    bias = unpack_vector(parts["bias"])
    return weight, unshift_bias(bias, weight, *low_rank) if is_behind_gelu(layer) else bias


def _svdquant_fp4(layer: str, parts: Parts) -> tuple[Tensor, Tensor]:
    weight = dequantize_svdq_fp4(
        parts["qweight"],
        parts["wscales"],
        parts["smooth_factor"],
        parts["proj_down"],
        parts["proj_up"],
        parts.get("wtscale"),
        parts.get("wcscales"),
    )
    return weight, unpack_vector(parts["bias"])


# Nunchaku's linears, whose biases are stored changed too: weight (N, K), bias (N,)
_PACKED_LINEARS: dict[str, Callable[[str, Parts], tuple[Tensor, Tensor]]] = {
    "svdquant int4": _svdquant_int4,
    "svdquant fp4": _svdquant_fp4,
    "svdquant fp4, rows": _svdquant_fp4,
    AWQ_SCHEME: lambda layer, parts: restore_modulation(
        dequantize_awq(parts["qweight"], parts["wscales"], parts["wzeros"]), parts["bias"]
    ),
}
