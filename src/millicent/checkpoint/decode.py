"""A stored weight back to numbers: one function for each scheme of schemes.py, FP32 out.

Scales are used in FP32 whatever they are stored in: rounding them to BF16 alone costs more than the codes do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from millicent.errors import CheckpointError
from millicent.formats.float_blocks import dequantize_blocks, dequantize_mxfp8, dequantize_nvfp4
from millicent.formats.hadamard import DEFAULT_GROUP, largest_group, rotate
from millicent.formats.packed import decode_int4, unpack_nibbles

Parts = Mapping[str, Tensor]
Shape = tuple[int, int]
Note = Mapping[str, Any]
FINE_GRAINED_BLOCK = 128
E4M3_NAN = 0x7F  # and 0xFF; e4m3 has no infinity
_FIX = "Fetch the file again, or use another quantization of this model."


def decode_weight(layer: str, scheme: str, parts: Parts, shape: Shape, note: Note | None = None) -> Tensor:
    """The layer's weight, FP32 (N, K).

    parts: the tensors as the file holds them, by what follows "X." in their names. note: ComfyUI's JSON for the layer.
    Raises CheckpointError for a scale that is not finite or not positive, a code that is NaN, a result that is not finite.
    """
    for suffix, tensor in parts.items():
        _check_values(f"{layer}.{suffix}", suffix, tensor)
    weight = _DECODERS[scheme](parts, shape, note or {})
    if tuple(weight.shape) != shape:
        raise CheckpointError(f"{layer} decodes to {tuple(weight.shape)}; the network has {shape}.", _FIX)
    if not bool(weight.isfinite().all()):
        raise CheckpointError(f"{layer} holds values that are not finite.", _FIX)
    return weight


def _check_values(name: str, suffix: str, tensor: Tensor) -> None:
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        if bool(tensor.float().isnan().any()):
            raise CheckpointError(f"{name} holds codes that are no numbers.", _FIX)
        if "scale" in suffix and bool((tensor.float() < 0).any()):
            raise CheckpointError(f"{name} holds negative scales.", _FIX)
    elif "scale" in suffix and tensor.is_floating_point() and tensor.element_size() > 1:
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
    return _scaled(parts["weight"], scale) if scale.numel() == shape[0] else dequantize_blocks(parts["weight"], scale, shape)


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
    "nvfp4, lightx2v": _nvfp4_divided("weight", swizzled=True),
    "nvfp4, compressed-tensors": _nvfp4_divided("weight_packed", swizzled=False),
    "torchao": _torchao,
    "quanto": lambda parts, shape, note: _scaled(parts["weight._data"], parts["weight._scale"]),
    "int4 convrot": _int4_convrot,
}
