"""How a whole file stores its network: every tensor of it given to a parameter, every matrix a scheme, nothing left over.

Works on a header, without the tensors. The maker is told by marks: ComfyUI's notes and its `scaled_fp8`, a
quantization_config in the folder or in the metadata. Where several schemes fit a matrix and no mark decides, the file is
refused: a wrong guess draws static. ComfyUI's note for a layer is a contract: the layer is stored as the note says, or refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from millicent.checkpoint import nunchaku
from millicent.checkpoint.folder import show_some
from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.marks import Marks
from millicent.checkpoint.schemes import CODE_PARTS, FLOATS, Scheme, Wanted, fitting_schemes, foreign_layout, near_misses
from millicent.errors import CheckpointError, WeightsMismatchError

PLAIN_DTYPES = ("F32", "BF16", "F16", "F64")
RAW_FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
OLD_COMFY_MARKER = "scaled_fp8"
# what a file may hold beside its weights
ALLOWED_LEFTOVERS = ("__index_timestep_zero__", OLD_COMFY_MARKER)
ALLOWED_ENDINGS = (".comfy_attention.config",)
ALLOWED_BEGINNINGS = ("lm_head.",)
# schemes whose numbers are as they were, with no scale that could be lost
_UNSCALED = ("plain", "raw fp8")
_FIX = "Fetch the file again, or use another file of this model."

Parts = Mapping[str, TensorInfo]
Decide = Callable[[str, Parts, tuple[Scheme, ...]], Scheme | None]


@dataclass(frozen=True, slots=True)
class ComfyFormat:
    """What a note's "format" promises. narrowed: the tensors of which the schemes take more than the format has."""

    schemes: tuple[str, ...]
    narrowed: Mapping[str, Wanted] = field(default_factory=dict)


_E4M3 = {"weight": Wanted(("F8_E4M3",), ("any",))}
_GRID = {"weight_scale": Wanted(FLOATS, ("a grid",))}
_ROW_BLOCKS = {"weight_scale": Wanted(FLOATS, ("blocks of a row",))}
# ComfyUI's own, then those of convert_to_quant (github.com/silveroxides/convert_to_quant)
COMFY_FORMATS = {
    "float8_e4m3fn": ComfyFormat(("fp8 per tensor", "fp8 per row"), _E4M3),
    "float8_e5m2": ComfyFormat(("fp8 per tensor", "fp8 per row"), {"weight": Wanted(("F8_E5M2",), ("any",))}),
    "mxfp8": ComfyFormat(("mxfp8, swizzled",)),
    "nvfp4": ComfyFormat(("nvfp4, comfy",)),
    "int8_tensorwise": ComfyFormat(("int8 per tensor", "int8 per row")),
    "convrot_w4a4": ComfyFormat(("int4 convrot",)),
    "float8_e4m3fn_rowwise": ComfyFormat(("fp8 per row",), _E4M3),
    "float8_e4m3fn_blockwise": ComfyFormat(("fp8 blocks",), _E4M3 | _GRID),
    "float8_e4m3fn_block3d": ComfyFormat(("fp8 blocks",), _E4M3 | _ROW_BLOCKS),
    "int8_blockwise": ComfyFormat(("int8 blocks",), _GRID),
    "int8_lodewise": ComfyFormat(("int8 blocks",), _ROW_BLOCKS),
}
# formats whose weights may be rotated; of the last all are
_ROTATABLE = ("int8_tensorwise", "int8_blockwise", "int8_lodewise", "convrot_w4a4")
_ALWAYS_ROTATED = "convrot_w4a4"


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One stored matrix: its scheme, its (N, K), and its tensors by what follows "X." in their names.

    parameters: the full names of what it yields: its weight, or where Nunchaku packs a linear, the weights whose rows it stacks
    and then their biases. note: ComfyUI's JSON for the layer.
    """

    scheme: Scheme
    shape: tuple[int, int]
    parts: Parts
    parameters: tuple[str, ...]
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Joined:
    """A parameter that is stored in pieces: stacked in this order along a new `axis`, then brought into its `shape`."""

    pieces: tuple[str, ...]
    axis: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """matrices: by the stored layer's name X. vectors: every other parameter, by its full name. leftovers: what is no weight.

    joined: by its full name, a parameter of which matrices or vectors yield the pieces.
    """

    matrices: dict[str, StoredMatrix]
    vectors: dict[str, TensorInfo]
    leftovers: tuple[str, ...]
    joined: Mapping[str, Joined] = field(default_factory=dict)

    @property
    def schemes(self) -> Counter[str]:
        """How many matrices have each scheme."""
        return Counter(matrix.scheme.name for matrix in self.matrices.values())

    @property
    def high_precision(self) -> tuple[str, ...]:
        """The matrices that are stored plain, in a file where others are quantized."""
        plain = tuple(layer for layer, matrix in self.matrices.items() if matrix.scheme.name == "plain")
        return () if len(plain) == len(self.matrices) else plain


def lay_out(
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    marks: Marks,
    name: str,
    decide: Decide | None = None,
) -> Layout:
    """Give every tensor of a file to the parameters of its network.

    tensors: by the network's own names, without a prefix. expected: every parameter with its shape. marks: of the same names.
    decide: asked for a layer that several schemes fit and no mark settles; None from it, or none of it, refuses the file.
    Raises WeightsMismatchError for a parameter that is missing and a tensor that is left over, CheckpointError for a matrix
    that fits no scheme, or several, or not the one that its note promises.
    """
    packed = nunchaku.find_packed(tensors, expected)
    within = {parameter for linear in packed.values() for parameter in linear.parameters}
    own = {key: shape for key, shape in expected.items() if key not in within}
    layers = {layer: linear.shape for layer, linear in packed.items()}
    layers |= {key.removesuffix(".weight"): (shape[0], shape[1]) for key, shape in own.items() if _is_matrix(key, shape)}
    vectors = {key: shape for key, shape in own.items() if not _is_matrix(key, shape)}
    parts, leftovers = _sort(tensors, layers, vectors)
    _check_closure(tensors, parts, layers, vectors, leftovers, name)
    _check_vectors(tensors, vectors, name)
    _check_notes(marks.notes, layers, name)
    matrices = {}
    for layer, shape in layers.items():
        scheme = _scheme(layer, parts[layer], shape, marks, name, decide)
        if layer in packed:
            nunchaku.check_kind(layer, scheme.name, name)
        parameters = packed[layer].parameters if layer in packed else (f"{layer}.weight",)
        matrices[layer] = StoredMatrix(scheme, shape, parts[layer], parameters, marks.notes.get(layer, {}))
    _check_scales_are_there(matrices, leftovers, name)
    _check_unnoted(matrices, leftovers, name)
    _check_one_maker(matrices, name)
    return Layout(matrices, {key: tensors[key] for key in vectors}, tuple(leftovers))


def _is_matrix(key: str, shape: tuple[int, ...]) -> bool:
    return key.endswith(".weight") and len(shape) == 2


def _sort(
    tensors: Mapping[str, TensorInfo], layers: Mapping[str, object], vectors: Mapping[str, object]
) -> tuple[dict[str, dict[str, TensorInfo]], list[str]]:
    """Each layer's tensors by suffix, and what belongs to none. A layer's bias is a parameter of its own."""
    parts: dict[str, dict[str, TensorInfo]] = {layer: {} for layer in layers}
    leftovers = []
    for key, info in tensors.items():
        if key in vectors:
            continue
        pieces = key.split(".")
        owners = (".".join(pieces[:end]) for end in range(len(pieces) - 1, 0, -1))
        owner = next((candidate for candidate in owners if candidate in layers), None)
        if owner is None:
            leftovers.append(key)
        else:
            parts[owner][key[len(owner) + 1 :]] = info
    return parts, leftovers


def _is_allowed(key: str) -> bool:
    return key in ALLOWED_LEFTOVERS or key.endswith(ALLOWED_ENDINGS) or key.startswith(ALLOWED_BEGINNINGS)


def _check_closure(
    tensors: Mapping[str, TensorInfo],
    parts: Mapping[str, Parts],
    layers: Mapping[str, object],
    vectors: Mapping[str, object],
    leftovers: list[str],
    name: str,
) -> None:
    missing = sorted([f"{layer}.weight" for layer in layers if not parts[layer]] + [key for key in vectors if key not in tensors])
    foreign = sorted(key for key in leftovers if not _is_allowed(key))
    if missing or foreign:
        faults = {"missing": missing, "not the network's": foreign}
        told = "; ".join(f"{len(keys)} {fault}: {show_some(keys)}" for fault, keys in faults.items() if keys)
        raise WeightsMismatchError(f"{name} is no whole network: {told}.", _FIX)


def _check_vectors(tensors: Mapping[str, TensorInfo], vectors: Mapping[str, tuple[int, ...]], name: str) -> None:
    for key, shape in vectors.items():
        info = tensors[key]
        if info.shape != shape:
            raise WeightsMismatchError(f"In {name} {key} is {list(info.shape)}; the network has {list(shape)}.", _FIX)
        if info.dtype not in PLAIN_DTYPES + RAW_FP8_DTYPES:
            raise CheckpointError(f"In {name} {key} is {info.dtype}; norms and biases are plain.", _FIX)


def _check_notes(notes: Mapping[str, Mapping[str, Any]], layers: Mapping[str, object], name: str) -> None:
    """Every note of a layer that is there, of a format that we read, with fields that mean something."""
    for layer, note in notes.items():
        if f"{layer}.".startswith(ALLOWED_BEGINNINGS):
            continue
        if layer not in layers:
            raise CheckpointError(f"{name} has a note for {layer}, which is no layer of it.", _FIX)
        if note["format"] not in COMFY_FORMATS:
            raise CheckpointError(
                f"In {name} {layer} is noted as {note['format']}, which this version does not read.",
                f"Use one of {', '.join(COMFY_FORMATS)}.",
            )
        _check_rotation(layer, note, name)


def _check_rotation(layer: str, note: Mapping[str, Any], name: str) -> None:
    convrot, group = note.get("convrot"), note.get("convrot_groupsize")
    is_power_of_4 = type(group) is int and group >= 4 and group & (group - 1) == 0 and group.bit_length() % 2 == 1
    if convrot not in (None, False, True) or not (group is None or is_power_of_4):
        raise CheckpointError(f"In {name} {layer} is noted with convrot {convrot!r} in groups of {group!r}.", _FIX)
    if convrot and note["format"] not in _ROTATABLE:
        raise CheckpointError(f"In {name} {layer} is noted as a rotated {note['format']}, which nobody writes.", _FIX)
    if convrot is False and note["format"] == _ALWAYS_ROTATED:
        raise CheckpointError(f"In {name} {layer} is noted as {note['format']}, and as not rotated.", _FIX)


def _scheme(layer: str, parts: Parts, shape: tuple[int, int], marks: Marks, name: str, decide: Decide | None) -> Scheme:
    fitting = fitting_schemes(parts, shape)
    if layer in marks.notes:
        return _promised(layer, parts, shape, marks.notes[layer], fitting, name)
    if not fitting:
        raise _no_scheme(layer, parts, shape, name)
    if len(fitting) == 1:
        return _agreed(layer, fitting[0], marks.maker, name)
    chosen = [scheme for scheme in fitting if marks.maker in scheme.makers]
    if len(chosen) == 1:
        return chosen[0]
    if decide is not None and (decided := decide(layer, parts, fitting)) is not None:
        assert decided in fitting, decided.name
        return decided
    readings = " or ".join(scheme.name for scheme in fitting)
    raise CheckpointError(
        f"In {name} {layer} ({_held(parts)}) can be read as {readings}, and nothing in the file says which.",
        "Say who made it, or use a file that names its layout.",
    )


def _promised(
    layer: str, parts: Parts, shape: tuple[int, int], note: Mapping[str, Any], fitting: tuple[Scheme, ...], name: str
) -> Scheme:
    promise = COMFY_FORMATS[note["format"]]
    fits = all(suffix in parts and wanted.fits(parts[suffix], *shape) for suffix, wanted in promise.narrowed.items())
    chosen = [scheme for scheme in fitting if fits and scheme.name in promise.schemes]
    if len(chosen) != 1:
        foreign = foreign_layout(parts)
        held = _held(parts) + (f", which is {foreign}" if foreign else "")
        raise CheckpointError(f"In {name} {layer} is noted as {note['format']}, but stored as {held}.", _FIX)
    if chosen[0].name.endswith(" blocks") and (size := note.get("group_size")) is not None:
        wanted_blocks = -(-shape[1] // size) if type(size) is int and size > 0 else None
        if parts["weight_scale"].shape[1] != wanted_blocks:
            raise CheckpointError(f"In {name} {layer} is noted in blocks of {size!r}, but stored as {_held(parts)}.", _FIX)
    return chosen[0]


def _agreed(layer: str, scheme: Scheme, maker: str | None, name: str) -> Scheme:
    """The only reading, where it is not another maker's than the one that the file names; and not a rotation that is unknown."""
    if maker is not None and scheme.makers and maker not in scheme.makers:
        found = f"{name} says that {maker} made it, but {layer} is stored as {' or '.join(scheme.makers)} does ({scheme.name})"
        raise CheckpointError(f"{found}.", "Use a file that says one thing.")
    file_name = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    is_named_so = scheme.name.startswith("int8 ") and "convrot" in file_name.lower()
    if is_named_so or scheme.name == "int4 convrot":
        raise CheckpointError(
            f"In {name} {layer} ({scheme.name}) is rotated, or may be, and has no note that says how: rotation unknown.",
            "Use a file with ComfyUI's notes (comfy_quant).",
        )
    return scheme


def _no_scheme(layer: str, parts: Parts, shape: tuple[int, int], name: str) -> CheckpointError:
    if foreign := foreign_layout(parts):
        return CheckpointError(
            f"In {name} {layer} is stored as {foreign} ({_held(parts)}), which this version does not read.",
            "Use another quantization of this model.",
        )
    near = "; ".join(near_misses(parts, shape))
    return CheckpointError(
        f"In {name} {layer} is stored as {_held(parts)}, which is no layout that is known{near and f' ({near})'}.", _FIX
    )


def _held(parts: Parts) -> str:
    return ", ".join(f"{suffix} {info.dtype} {list(info.shape)}" for suffix, info in parts.items())


def _check_scales_are_there(matrices: Mapping[str, StoredMatrix], leftovers: list[str], name: str) -> None:
    """FP8 without scales is one thing in a file of nothing else, and a lost scale beside matrices that have theirs."""
    raw = [layer for layer, matrix in matrices.items() if matrix.scheme.name == "raw fp8"]
    scaled = [layer for layer, matrix in matrices.items() if matrix.scheme.name not in _UNSCALED]
    if raw and scaled:
        found = f"{len(scaled)} matrices have scales and {len(raw)} FP8 ones have none, such as {raw[0]}"
        raise CheckpointError(f"In {name} {found}: their scales are lost.", _FIX)
    if OLD_COMFY_MARKER in leftovers and not scaled:
        raise CheckpointError(f"{name} is marked as scaled FP8 ({OLD_COMFY_MARKER}), and no matrix of it has a scale.", _FIX)


def _check_unnoted(matrices: Mapping[str, StoredMatrix], leftovers: list[str], name: str) -> None:
    """ComfyUI takes a layer without a note for plain: one that is not has lost its note, unless the old marker speaks for it."""
    noted = [layer for layer, matrix in matrices.items() if matrix.note or "comfy_quant" in matrix.parts]
    for layer, matrix in matrices.items():
        is_old = matrix.scheme.name == "comfy scaled fp8" and OLD_COMFY_MARKER in leftovers
        if noted and not (matrix.note or matrix.scheme.name == "plain" or is_old):
            raise CheckpointError(
                f"In {name} {layer} is quantized ({matrix.scheme.name}) and has no note, where {noted[0]} has one.", _FIX
            )


def _check_one_maker(matrices: Mapping[str, StoredMatrix], name: str) -> None:
    """Schemes that only some makers write, in one file: they must have a maker in common. Likewise the names of scales.

    A note is its layer's own word: ComfyUI's files mix what they note.
    """
    unnoted = {matrix.scheme.name: matrix.scheme for matrix in matrices.values() if not matrix.note}
    spellings = {scheme.name: scheme.needed.keys() - CODE_PARTS for scheme in unnoted.values()}
    spellings = {scheme: suffixes for scheme, suffixes in spellings.items() if suffixes}
    for (a, own), (b, others) in combinations(spellings.items(), 2):
        if not own & others:
            raise CheckpointError(f"In {name} matrices are stored as {a} and as {b}: no maker writes both.", _FIX)
    claims = {matrix.scheme.name: matrix.scheme.makers for matrix in matrices.values() if matrix.scheme.makers}
    if claims and not set.intersection(*map(set, claims.values())):
        raise CheckpointError(f"In {name} matrices are stored as {' and as '.join(sorted(claims))}: no maker writes both.", _FIX)
