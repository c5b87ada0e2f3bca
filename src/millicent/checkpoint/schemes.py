"""How one weight matrix can be stored, told by the names, formats and shapes of its tensors alone.

A matrix X is stored as `X.weight` or its replacement and the side tensors beside it. A scheme says which tensors those are; a
layer has a scheme only if each of them is there, fits, and nothing else is. Several schemes may fit one layer: NVFP4 looks the
same from ComfyUI and from ModelOpt. Then the file's maker decides, and without a maker nobody does.

Every scale multiplies, except weight_global_scale, which divides. N, K: the matrix's rows and columns, never the stored ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from millicent.checkpoint.header import TensorInfo

Shape = tuple[int, ...]

FLOATS = ("F32", "BF16", "F16")
FP8 = ("F8_E4M3", "F8_E5M2")
E4M3_BYTES = ("F8_E4M3", "U8")
E8M0_BYTES = ("F8_E8M0", "U8")
BYTES = ("U8", "I8")


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _is_grid(shape: Shape, n: int, k: int) -> bool:
    """Square blocks of a power of 2, the last ones cut off; more than one block, or it would be one value."""
    sizes = (1 << power for power in range(3, 13))
    return shape != (1, 1) and any(shape == (-(-n // size), -(-k // size)) for size in sizes)


def _is_row_blocks(shape: Shape, n: int, k: int) -> bool:
    return len(shape) in (2, 3) and shape[0] == n and 1 < shape[1] < k and k % shape[1] == 0 and shape[2:] in ((), (1,))


# what a stored tensor's shape may be for a matrix of N rows and K columns
SHAPES: dict[str, Callable[[Shape, int, int], bool]] = {
    "(N, K)": lambda shape, n, k: shape == (n, k),
    "(N, K/2)": lambda shape, n, k: k % 2 == 0 and shape == (n, k // 2),
    "(K,)": lambda shape, n, k: shape == (k,),
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
    Scheme("int8 blocks", "int8", {"weight": _MATRIX_INT8, "weight_scale": _BLOCKS}, _COMFY_NOTE),
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
        {"weight": _NVFP4_CODES, "weight_scale": Wanted(E4M3_BYTES, ("nvfp4 scales, swizzled",)), "weight_scale_2": _VALUE},
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
        {"weight": _NVFP4_CODES, "weight_scale": Wanted(E4M3_BYTES, ("nvfp4 scales, swizzled",)), "weight_global_scale": _VALUE},
        {"input_global_scale": _VALUE, "input_absmax": Wanted(FLOATS, ("any",)), "alpha": _VALUE},
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
    Scheme(
        "bitsandbytes 4-bit",
        "nf4 or fp4",
        {
            "weight": Wanted(("U8",), ("half the values",)),
            "weight.absmax": Wanted((*FLOATS, "U8"), ("any",)),
            "weight.quant_map": Wanted(("F32",), ("any",)),
        },
        {
            "weight.nested_absmax": Wanted(("F32",), ("any",)),
            "weight.nested_quant_map": Wanted(("F32",), ("any",)),
            "weight.quant_state.bitsandbytes__nf4": Wanted(("U8",), ("any",)),
            "weight.quant_state.bitsandbytes__fp4": Wanted(("U8",), ("any",)),
        },
    ),
    Scheme(
        "bitsandbytes int8",
        "int8",
        {"weight": _MATRIX_INT8, "SCB": Wanted(("F32",), ("one per row",))},
        {"weight_format": Wanted(("U8", "I8", "I64"), ("any",))},
    ),
    Scheme(
        "quanto",
        "int8 or fp8",
        {"weight._data": Wanted((*FP8, "I8"), ("(N, K)",)), "weight._scale": Wanted(FLOATS, ("one per row", "one value"))},
        {"input_scale": _VALUE, "output_scale": _VALUE},
    ),
    Scheme(
        "int4 convrot", "int4", {"weight": Wanted(("I8",), ("(N, K/2)",)), "weight_scale": _ROW, **_COMFY_NOTE}, makers=("comfy",)
    ),
)
BY_NAME = {scheme.name: scheme for scheme in SCHEMES}


def fitting_schemes(parts: Mapping[str, TensorInfo], shape: tuple[int, int]) -> tuple[Scheme, ...]:
    """Every scheme that a layer's tensors fit; parts: by what follows "X." in their names; shape: the matrix's (N, K)."""
    return tuple(scheme for scheme in SCHEMES if _fits(scheme, parts, shape))


def _fits(scheme: Scheme, parts: Mapping[str, TensorInfo], shape: tuple[int, int]) -> bool:
    wanted = {**scheme.needed, **scheme.optional}
    if not scheme.needed.keys() <= parts.keys() <= wanted.keys():
        return False
    return all(wanted[suffix].fits(info, *shape) for suffix, info in parts.items())


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
