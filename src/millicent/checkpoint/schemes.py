"""How one weight matrix can be stored, told by the names, formats and shapes of its tensors alone.

A matrix X is stored as `X.weight` or its replacement and the side tensors beside it. A scheme says which tensors those are; a
layer has a scheme only if each of them is there, fits, and nothing else is. Several schemes may fit one layer: NVFP4 looks the
same from ComfyUI and from ModelOpt. Then the file's maker decides, and without a maker nobody does.

Every scale multiplies, except weight_global_scale, which divides. N, K: the matrix's rows and columns, never the stored ones.
In a GGUF file a dtype is ggml's name of the type, and the shape the tensor's own; elsewhere they are safetensors'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from millicent.checkpoint.header import TensorInfo
from millicent.formats.gguf_types import BLOCK_TYPES

Shape = tuple[int, ...]

FLOATS = ("F32", "BF16", "F16")
FP8 = ("F8_E4M3", "F8_E5M2")
E4M3_BYTES = ("F8_E4M3", "U8")
E8M0_BYTES = ("F8_E8M0", "U8")
BYTES = ("U8", "I8")
HALVES = ("BF16", "F16")


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _is_grid(shape: Shape, n: int, k: int) -> bool:
    """Square blocks of a power of 2, the last ones cut off; more than one block, or it would be one value."""
    sizes = (1 << power for power in range(3, 13))
    return shape != (1, 1) and any(shape == (-(-n // size), -(-k // size)) for size in sizes)


def _is_one_per_block(shape: Shape, n: int, k: int) -> bool:
    """bitsandbytes' blocks run on from one row into the next, the last one cut off."""
    return len(shape) == 1 and any(shape == (-(-n * k // (1 << power)),) for power in range(5, 13))


def _is_svdquant(n: int, k: int) -> bool:
    """Nunchaku's tensors hold whole tiles of 128 x 128; their shapes say nothing of the order inside."""
    return n % 128 == 0 and k % 128 == 0


def _is_low_rank(shape: Shape, side: int) -> bool:
    return len(shape) == 2 and shape[0] == side and shape[1] > 0 and shape[1] % 16 == 0


def _is_row_blocks(shape: Shape, n: int, k: int) -> bool:
    return len(shape) in (2, 3) and shape[0] == n and 1 < shape[1] < k and k % shape[1] == 0 and shape[2:] in ((), (1,))


# what a stored tensor's shape may be for a matrix of N rows and K columns
SHAPES: dict[str, Callable[[Shape, int, int], bool]] = {
    "(N, K)": lambda shape, n, k: shape == (n, k),
    "(N, K/2)": lambda shape, n, k: k % 2 == 0 and shape == (n, k // 2),
    "(K,)": lambda shape, n, k: shape == (k,),
    "(N,)": lambda shape, n, k: shape == (n,),
    "(N, K), K by 32": lambda shape, n, k: shape == (n, k) and k % 32 == 0,
    "(N, K), K by 256": lambda shape, n, k: shape == (n, k) and k % 256 == 0,
    "one value": lambda shape, n, k: shape in ((), (1,), (1, 1)),
    "one per row": lambda shape, n, k: shape in ((n,), (n, 1), (n, 1, 1)),
    "a grid": _is_grid,
    "blocks of a row": _is_row_blocks,
    "nvfp4 codes": lambda shape, n, k: shape in {(rows, round_up(k, 16) // 2) for rows in (n, round_up(n, 16))},
    "nvfp4 scales, plain": lambda shape, n, k: shape in {(rows, -(-k // 16)) for rows in (n, round_up(n, 16))},
    "nvfp4 scales, swizzled": lambda shape, n, k: shape == (round_up(n, 128), round_up(-(-k // 16), 4)),
    "mxfp8 codes": lambda shape, n, k: shape in {(rows, round_up(k, 32)) for rows in (n, round_up(n, 32))},
    "mxfp8 scales, plain": lambda shape, n, k: shape in {(rows, -(-k // 32)) for rows in (n, round_up(n, 32))},
    "mxfp8 scales, swizzled": lambda shape, n, k: shape == (round_up(n, 128), round_up(-(-k // 32), 4)),
    "half the values": lambda shape, n, k: shape in ((-(-n * k // 2), 1), (-(-n * k // 2),)),
    "one per block": _is_one_per_block,
    "16 values": lambda shape, n, k: shape == (16,),
    "256 values": lambda shape, n, k: shape == (256,),
    "svdquant codes": lambda shape, n, k: _is_svdquant(n, k) and shape == (n, k // 2),
    "(K/64, N)": lambda shape, n, k: k % 64 == 0 and shape == (k // 64, n),
    "(K/16, N)": lambda shape, n, k: k % 16 == 0 and shape == (k // 16, n),
    "(K, rank)": lambda shape, n, k: _is_low_rank(shape, k),
    "(N, rank)": lambda shape, n, k: _is_low_rank(shape, n),
    "awq codes": lambda shape, n, k: n % 4 == 0 and k % 64 == 0 and shape == (n // 4, k // 2),
    "one dimension": lambda shape, n, k: len(shape) == 1,
    "any": lambda shape, n, k: True,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One tensor of a scheme: the dtypes and shapes that it may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[str, ...]

    def fits(self, info: TensorInfo, n: int, k: int) -> bool:
        return info.dtype in self.dtypes and any(SHAPES[shape](info.shape, n, k) for shape in self.shapes)


@dataclass(frozen=True, slots=True)
class Scheme:
    """name: unique. format: the number format. needed, optional: by what follows "X." in a tensor's name.

    makers: whose mark settles it where several schemes fit; none where this is the only reading.
    """

    name: str
    format: str
    needed: Mapping[str, Wanted]
    optional: Mapping[str, Wanted] = field(default_factory=dict)
    makers: tuple[str, ...] = ()


_VALUE = Wanted(FLOATS, ("one value",))
_ROW = Wanted(FLOATS, ("one per row",))
_MATRIX_FP8 = Wanted(FP8, ("(N, K)",))
_MATRIX_INT8 = Wanted(("I8",), ("(N, K)",))
_COMFY_NOTE = {"comfy_quant": Wanted(("U8",), ("any",))}
_STATIC_INPUT = {"input_scale": _VALUE, **_COMFY_NOTE}
_NVFP4_CODES = Wanted(BYTES, ("nvfp4 codes",))
_PRE_SCALE = {"pre_quant_scale": Wanted(FLOATS, ("(K,)",))}
_BLOCKS = Wanted(FLOATS, ("a grid", "blocks of a row"))
_NVFP4_SWIZZLED = {"weight": _NVFP4_CODES, "weight_scale": Wanted(E4M3_BYTES, ("nvfp4 scales, swizzled",))}
_ABSMAX_RECORD = {"input_absmax": Wanted(FLOATS, ("any",))}


def _bitsandbytes(kind: str, nested: bool) -> Scheme:
    """nf4 or fp4. nested: the scales are codes themselves, and have scales and a table of their own."""
    needed = {
        "weight": Wanted(("U8",), ("half the values",)),
        "weight.absmax": Wanted(("U8",) if nested else ("F32",), ("one per block",)),
        "weight.quant_map": Wanted(("F32",), ("16 values",)),
        f"weight.quant_state.bitsandbytes__{kind}": Wanted(("U8",), ("one dimension",)),
    }
    if nested:
        needed["weight.nested_absmax"] = Wanted(("F32",), ("one dimension",))
        needed["weight.nested_quant_map"] = Wanted(("F32",), ("256 values",))
    return Scheme(f"bitsandbytes {kind}{', nested' if nested else ''}", kind, needed)


def _svdquant(name: str, number_format: str, scales: Mapping[str, Wanted], optional: Mapping[str, Wanted]) -> Scheme:
    """A linear of Nunchaku's, its bias in the order of its codes. smooth_factor_orig is a record."""
    needed = {
        **scales,
        "qweight": Wanted(("I8",), ("svdquant codes",)),
        "smooth_factor": Wanted(HALVES, ("(K,)",)),
        "proj_down": Wanted(HALVES, ("(K, rank)",)),
        "proj_up": Wanted(HALVES, ("(N, rank)",)),
        "bias": Wanted(HALVES, ("(N,)",)),
    }
    return Scheme(name, number_format, needed, {"smooth_factor_orig": Wanted(HALVES, ("(K,)",)), **optional})


_AWQ_GROUPS = Wanted(HALVES, ("(K/64, N)",))
_FP4_SCALES = {"wscales": Wanted(("F8_E4M3",), ("(K/16, N)",))}
_OUTER_VALUE = {"wtscale": Wanted(FLOATS, ("one value",))}
_OUTER_ROWS = {"wcscales": Wanted(HALVES, ("(N,)",))}
_NUNCHAKU = (
    _svdquant("svdquant int4", "int4", {"wscales": _AWQ_GROUPS}, {}),
    _svdquant("svdquant fp4", "nvfp4", _FP4_SCALES | _OUTER_VALUE, _OUTER_ROWS),
    # DeepCompressor writes one scale for all, or one for each row where several linears are fused
    _svdquant("svdquant fp4, rows", "nvfp4", _FP4_SCALES | _OUTER_ROWS, {}),
    Scheme(
        "nunchaku awq",
        "int4",
        {
            "qweight": Wanted(("I32",), ("awq codes",)),
            "wscales": _AWQ_GROUPS,
            "wzeros": _AWQ_GROUPS,
            "bias": Wanted(FLOATS, ("(N,)",)),
        },
    ),
)

SCHEMES = (
    Scheme("plain", "bf16", {"weight": Wanted((*FLOATS, "F64"), ("(N, K)",))}),
    Scheme("raw fp8", "fp8", {"weight": _MATRIX_FP8}),
    Scheme("comfy scaled fp8", "fp8", {"weight": _MATRIX_FP8, "scale_weight": _VALUE}, {"scale_input": _VALUE}),
    Scheme(
        "musubi scaled fp8",
        "fp8",
        {"weight": _MATRIX_FP8, "scale_weight": Wanted(FLOATS, ("one per row", "blocks of a row", "a grid"))},
        {"scale_weight_tensor": _VALUE},
    ),
    Scheme("fp8 per tensor", "fp8", {"weight": _MATRIX_FP8, "weight_scale": _VALUE}, _STATIC_INPUT),
    Scheme("fp8 per row", "fp8", {"weight": _MATRIX_FP8, "weight_scale": _ROW}, _STATIC_INPUT),
    Scheme("fp8 blocks", "fp8", {"weight": _MATRIX_FP8, "weight_scale": _BLOCKS}, _STATIC_INPUT),
    Scheme("fine-grained fp8", "fp8", {"weight": _MATRIX_FP8, "weight_scale_inv": Wanted(FLOATS, ("a grid", "one value"))}),
    Scheme("int8 per tensor", "int8", {"weight": _MATRIX_INT8, "weight_scale": _VALUE}, _STATIC_INPUT),
    Scheme("int8 per row", "int8", {"weight": _MATRIX_INT8, "weight_scale": _ROW}, _STATIC_INPUT),
    Scheme("int8 blocks", "int8", {"weight": _MATRIX_INT8, "weight_scale": _BLOCKS}, _STATIC_INPUT),
    Scheme(
        "mxfp8, swizzled",
        "mxfp8",
        {"weight": Wanted(("F8_E4M3",), ("mxfp8 codes",)), "weight_scale": Wanted(E8M0_BYTES, ("mxfp8 scales, swizzled",))},
        _STATIC_INPUT,
        makers=("comfy",),
    ),
    Scheme(
        "mxfp8, plain",
        "mxfp8",
        {"weight": Wanted(("F8_E4M3",), ("mxfp8 codes",)), "weight_scale": Wanted(E8M0_BYTES, ("mxfp8 scales, plain",))},
        makers=("modelopt", "compressed-tensors"),
    ),
    Scheme(
        "nvfp4, comfy",
        "nvfp4",
        {**_NVFP4_SWIZZLED, "weight_scale_2": _VALUE},
        {**_STATIC_INPUT, **_PRE_SCALE},
        makers=("comfy",),
    ),
    Scheme(
        "nvfp4, modelopt",
        "nvfp4",
        {"weight": _NVFP4_CODES, "weight_scale": Wanted(("F8_E4M3",), ("nvfp4 scales, plain",)), "weight_scale_2": _VALUE},
        {"input_scale": _VALUE, **_PRE_SCALE},
        makers=("modelopt",),
    ),
    Scheme(
        "nvfp4, lightx2v",
        "nvfp4",
        {**_NVFP4_SWIZZLED, "weight_global_scale": _VALUE},
        {"input_global_scale": _VALUE, "alpha": _VALUE, **_ABSMAX_RECORD},
    ),
    Scheme(
        "nvfp4, lightx2v calibrated",
        "nvfp4",
        {**_NVFP4_SWIZZLED, "input_global_scale": _VALUE, "alpha": _VALUE},
        _ABSMAX_RECORD,
    ),
    Scheme(
        "nvfp4, compressed-tensors",
        "nvfp4",
        {
            "weight_packed": Wanted(("U8",), ("(N, K/2)",)),
            "weight_scale": Wanted(("F8_E4M3",), ("nvfp4 scales, plain",)),
            "weight_global_scale": _VALUE,
        },
        {"input_global_scale": _VALUE},
    ),
    Scheme(
        "torchao",
        "fp8 or int8",
        {"_weight_qdata": Wanted((*FP8, "I8"), ("(N, K)",)), "_weight_scale": Wanted(FLOATS, ("one per row", "one value"))},
        {"_weight_zero_point": Wanted(("I8",), ("one per row", "one value"))},
    ),
    *(_bitsandbytes(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)),
    Scheme(
        "bitsandbytes int8",
        "int8",
        {"weight": _MATRIX_INT8, "SCB": Wanted(("F32",), ("one per row",))},
        {"weight_format": Wanted(("U8", "I8", "I64"), ("one value",))},
    ),
    Scheme(
        "quanto",
        "int8 or fp8",
        {"weight._data": Wanted((*FP8, "I8"), ("(N, K)",)), "weight._scale": Wanted(FLOATS, ("one per row", "one value"))},
        {"input_scale": _VALUE, "output_scale": _VALUE},
    ),
    Scheme(
        "int4 convrot", "int4", {"weight": Wanted(("I8",), ("(N, K/2)",)), "weight_scale": _ROW}, _COMFY_NOTE, makers=("comfy",)
    ),
    *_NUNCHAKU,
    *(
        Scheme(f"gguf {block.name}", block.name.lower(), {"weight": Wanted((block.name,), (f"(N, K), K by {block.values}",))})
        for block in BLOCK_TYPES.values()
        if block.values > 1
    ),
)
BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
# schemes that may hold FP8 or INT8 codes with one scale or one for each row, which are formats of ours too: where both stand
KEEPABLE = {
    "comfy scaled fp8": ("weight", "scale_weight"),
    "musubi scaled fp8": ("weight", "scale_weight"),
    "fp8 per tensor": ("weight", "weight_scale"),
    "fp8 per row": ("weight", "weight_scale"),
    "int8 per tensor": ("weight", "weight_scale"),
    "int8 per row": ("weight", "weight_scale"),
    "torchao": ("_weight_qdata", "_weight_scale"),
    "bitsandbytes int8": ("weight", "SCB"),
    "quanto": ("weight._data", "weight._scale"),
}
# by their names, the tensors of a layer that are no scales: codes, what is packed with them, and notes
CODE_PARTS = frozenset({"weight", "qweight", "weight_packed", "_weight_qdata", "weight._data", "bias", "comfy_quant"})
_KEPT_DTYPES = ("F8_E4M3", "I8")
# tensors that identify a layout which this version does not read, by the last piece of their names
FOREIGN_PARTS = {
    "weight_s_rel": "comfy-kitchen's asym_w4a8_int8",
    "weight_s_channel": "comfy-kitchen's asym_w4a8_int8",
    "weight_codebook": "comfy-kitchen's asym_w4a8_int8",
    "weight_correction": "comfy-kitchen's asym_w4a8_int8",
    "weight_zeros": "comfy-kitchen's awq_w4a16",
    "weight_proj_down": "comfy-kitchen's svdquant_w4a4",
    "weight_proj_up": "comfy-kitchen's svdquant_w4a4",
    "weight_smooth_factor": "comfy-kitchen's svdquant_w4a4",
    "svdquant_lora_a": "ModelOpt's NVFP4 SVDQuant",
    "svdquant_lora_b": "ModelOpt's NVFP4 SVDQuant",
    "_amax": "ModelOpt's fake quantization",
    "weight_shape": "compressed-tensors' pack-quantized",
    "weight_zero_point": "compressed-tensors' asymmetric quantization",
    "_shift": "quanto's int4 or int2",
    "svd_up": "SDNQ",
    "svd_down": "SDNQ",
    "zero_point": "SDNQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "W_q": "HQQ",
    "encoded_exponent": "DFloat11",
    "sign_mantissa": "DFloat11",
    "scales": "MLX, GPTQ or AWQ",
    "biases": "MLX",
}


def fitting_schemes(parts: Mapping[str, TensorInfo], shape: tuple[int, int]) -> tuple[Scheme, ...]:
    """Every scheme that a layer's tensors fit; parts: by what follows "X." in their names; shape: the matrix's (N, K)."""
    return _fitting(frozenset((suffix, info.dtype, info.shape) for suffix, info in parts.items()), shape)


@lru_cache(maxsize=1024)  # a file has 846 matrices of a few kinds
def _fitting(parts: frozenset[tuple[str, str, Shape]], shape: tuple[int, int]) -> tuple[Scheme, ...]:
    infos = {suffix: TensorInfo(dtype, stored, 0, 0) for suffix, dtype, stored in parts}
    return tuple(scheme for scheme in SCHEMES if _fits(scheme, infos, shape))


def _fits(scheme: Scheme, parts: Mapping[str, TensorInfo], shape: tuple[int, int]) -> bool:
    wanted = {**scheme.needed, **scheme.optional}
    if not scheme.needed.keys() <= parts.keys() <= wanted.keys():
        return False
    return all(wanted[suffix].fits(info, *shape) for suffix, info in parts.items())


def keeps_codes(scheme: str, parts: Mapping[str, TensorInfo], shape: tuple[int, int], is_rotated: bool) -> bool:
    """Whether a matrix stays as it is stored when it is loaded, as far as a header tells: a zero point it does not."""
    if scheme not in KEEPABLE or is_rotated:
        return False
    codes, scale = (parts[suffix] for suffix in KEEPABLE[scheme])
    return codes.dtype in _KEPT_DTYPES and any(SHAPES[each](scale.shape, *shape) for each in ("one per row", "one value"))


def foreign_layout(parts: Mapping[str, TensorInfo]) -> str | None:
    """The layout that one of a layer's tensors identifies and this version does not read."""
    last_pieces = (suffix.rsplit(".", 1)[-1] for suffix in parts)
    return next((FOREIGN_PARTS[piece] for piece in last_pieces if piece in FOREIGN_PARTS), None)


def near_misses(parts: Mapping[str, TensorInfo], shape: tuple[int, int]) -> list[str]:
    """Why a layer fits no scheme: for each scheme that shares its weight's name, what is missing, foreign or misshapen."""
    told = []
    for scheme in SCHEMES:
        wanted = {**scheme.needed, **scheme.optional}
        faults = [f"{suffix} is missing" for suffix in scheme.needed if suffix not in parts]
        faults += [f"{suffix} does not belong" for suffix in parts if suffix not in wanted]
        for suffix, info in parts.items():
            if suffix in wanted and not wanted[suffix].fits(info, *shape):
                faults.append(f"{suffix} is {info.dtype} {list(info.shape)}")
        if len(faults) == 1:
            told.append(f"{scheme.name}: {faults[0]}")
    return told
