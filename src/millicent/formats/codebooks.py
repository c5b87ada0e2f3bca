"""bitsandbytes' weights: 4-bit codes that index a table of 16 numbers (NF4, FP4), and INT8 with one scale per row.

Source: bitsandbytes 0.50, `bitsandbytes.functional`. Weights are quantized flat, in the order of their memory, so a block
may begin in one row and end in the next. The larger scales of a file may be quantized again ("double quantization",
`compress_statistics`), by a table of 256 numbers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from millicent.errors import CheckpointError
from millicent.formats.packed import unpack_nibbles

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_DTYPES = ("bfloat16", "float16", "float32")
_FIELDS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
_NESTED_FIELDS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})
_Value = TypeVar("_Value", str, int)

_FIX = "Fetch the file again, or use another quantization of this model."


@dataclass(frozen=True, slots=True)
class QuantState:
    """What `.quant_state.bitsandbytes__nf4` or `__fp4` says of one weight.

    shape: the weight's. block_size: how many neighbors share a scale. dtype: that of the weight before, as a name.
    nested_block_size, nested_offset: how its scales are quantized; None if they are not.
    """

    quant_type: str
    shape: tuple[int, ...]
    block_size: int
    dtype: str
    nested_block_size: int | None
    nested_offset: float | None


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """How to read scales that are codes: absmax = quant_map[code] * absmax of its block + offset.

    absmax: FP32, one for each `block_size` codes. quant_map: FP32 (256,).
    """

    absmax: Tensor
    quant_map: Tensor
    offset: float
    block_size: int


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, quant_map: Tensor, shape: tuple[int, ...], block_size: int, nested: NestedAbsmax | None = None
) -> Tensor:
    """FP32 of `shape`: w = quant_map[code] * absmax, a block being `block_size` neighbors of the flattened weight.

    packed: uint8 of any shape, as stored (bytes, 1): two codes to a byte, the earlier one in the high nibble. If the weight
    has an odd number of values, the last nibble means nothing.
    absmax: one for each block, the last of which may be short: FP32, or with `nested` its codes, uint8.
    quant_map: FP32 (16,), stored beside the weight; NF4 and FP4 differ only in it.
    Raises CheckpointError for other types, shapes or numbers of bytes.
    """
    count = math.prod(shape)
    _check_block_size("A 4-bit weight", block_size)
    _check("Packed 4-bit codes", packed, torch.uint8)
    if packed.numel() != -(-count // 2):
        raise CheckpointError(f"Packed 4-bit codes: found {packed.numel()} bytes; a {shape} weight wants {-(-count // 2)}.", _FIX)
    _check("The table of 4-bit codes", quant_map, torch.float32, (16,))
    blocks = -(-count // block_size)
    if nested is None:
        _check("The scales of a 4-bit weight", absmax, torch.float32, (blocks,))
        scales = absmax
    else:
        scales = _dequantize_absmax(absmax, blocks, nested)
    codes = unpack_nibbles(packed.flatten(), high_first=True)[:count]
    return _look_up(codes, quant_map, scales, block_size).reshape(shape)


def read_quant_state(data: bytes | Tensor) -> QuantState:
    """The JSON of `.quant_state.bitsandbytes__nf4` or `__fp4`, as bytes or as the file's uint8 (bytes,).

    Raises CheckpointError for what is no JSON object, for fields that are missing, unknown or of another kind, and for
    values that bitsandbytes cannot have written.
    """
    fields = _parse(data)
    _check_names(frozenset(fields))
    nested = "nested_offset" in fields
    state = QuantState(
        quant_type=_one_of(fields, "quant_type", QUANT_TYPES),
        shape=_read_shape(fields["shape"]),
        block_size=_one_of(fields, "blocksize", BLOCK_SIZES),
        dtype=_one_of(fields, "dtype", _DTYPES),
        nested_block_size=_one_of(fields, "nested_blocksize", BLOCK_SIZES) if nested else None,
        nested_offset=_read_offset(fields["nested_offset"]) if nested else None,
    )
    if nested:
        _one_of(fields, "nested_dtype", ("float32",))
    return state


def dequantize_int8_rows(codes: Tensor, scb: Tensor) -> Tensor:
    """FP32 (N, K): w = code * scb / 127, row by row.

    codes: INT8 (N, K), in the plain order, which `weight_format` calls "row" or 0.
    scb: FP32 (N,), the largest magnitude of each row, stored as `SCB`.
    Raises CheckpointError for other types or shapes.
    """
    _check("8-bit codes", codes, torch.int8)
    if codes.ndim != 2:
        raise CheckpointError(f"8-bit codes: found {tuple(codes.shape)}; wanted two dimensions.", _FIX)
    _check("SCB", scb, torch.float32, (codes.shape[0],))
    return codes.float().mul_((scb / 127)[:, None])


def _dequantize_absmax(codes: Tensor, blocks: int, nested: NestedAbsmax) -> Tensor:
    _check_block_size("The scales of a 4-bit weight", nested.block_size)
    _check("The codes of a 4-bit weight's scales", codes, torch.uint8, (blocks,))
    _check("The table of the scales' codes", nested.quant_map, torch.float32, (256,))
    _check("The scales of a 4-bit weight's scales", nested.absmax, torch.float32, (-(-blocks // nested.block_size),))
    # rounded between product and sum, as the producer does
    return _look_up(codes, nested.quant_map, nested.absmax, nested.block_size).add_(nested.offset)


def _look_up(codes: Tensor, table: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """codes (n,), uint8 -> FP32 (n,), each block times its scale."""
    # bytes would index as a mask
    values = table[codes.int()]
    whole = codes.numel() - codes.numel() % block_size
    values[:whole].view(-1, block_size).mul_(scales[: whole // block_size, None])
    values[whole:].mul_(scales[whole // block_size :])
    return values


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> None:
    if tensor.dtype != dtype:
        found, wanted = (str(name).removeprefix("torch.") for name in (tensor.dtype, dtype))
        raise CheckpointError(f"{what}: found {found}; wanted {wanted}.", _FIX)
    if shape is not None and tuple(tensor.shape) != shape:
        raise CheckpointError(f"{what}: found {tuple(tensor.shape)}; wanted {shape}.", _FIX)


def _check_block_size(what: str, block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise CheckpointError(f"{what} has blocks of {block_size}; wanted one of {BLOCK_SIZES}.", _FIX)


def _parse(data: bytes | Tensor) -> dict[str, object]:
    if isinstance(data, Tensor):
        _check("The bytes of a quant_state", data, torch.uint8)
        data = bytes(data.flatten().tolist())
    try:
        fields = json.loads(data)
    # a file may nest brackets deeper than the parser's stack
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"A quant_state of {len(data)} bytes is no JSON: {error}.", _FIX) from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"A quant_state is a JSON {type(fields).__name__}; wanted an object.", _FIX)
    return fields


def _check_names(names: frozenset[str]) -> None:
    # a scale that is quantized again has all three, another none
    wanted = _FIELDS | _NESTED_FIELDS if names & _NESTED_FIELDS else _FIELDS
    missing, unknown = sorted(wanted - names), sorted(names - wanted)
    if missing:
        raise CheckpointError(f"A quant_state lacks {', '.join(missing)}.", _FIX)
    if unknown:
        fix = "It may be of a newer bitsandbytes: use another quantization of this model."
        raise CheckpointError(f"A quant_state has fields that we do not know: {', '.join(unknown)}.", fix)


def _one_of(fields: dict[str, object], name: str, known: tuple[_Value, ...]) -> _Value:
    found = fields[name]
    for value in known:
        # True equals 1, and 64.0 equals 64
        if type(found) is type(value) and found == value:
            return value
    raise CheckpointError(f"A quant_state has the {name} {found!r}; wanted one of {known}.", _FIX)


def _read_shape(found: object) -> tuple[int, ...]:
    if isinstance(found, list) and found and all(type(size) is int and size > 0 for size in found):
        return tuple(found)
    raise CheckpointError(f"A quant_state has the shape {found!r}; wanted a list of sizes above 0.", _FIX)


def _read_offset(found: object) -> float:
    if type(found) is float and math.isfinite(found):
        return found
    raise CheckpointError(f"A quant_state has the nested_offset {found!r}; wanted a finite number.", _FIX)
