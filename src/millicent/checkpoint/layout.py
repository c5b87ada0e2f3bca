"""How a whole file stores its network: every tensor of it given to a parameter, every matrix a scheme, nothing left over.

Works on a header, without the tensors. The maker is told by marks: ComfyUI's notes and its `scaled_fp8`, a
quantization_config in the folder or in the metadata. Where several schemes fit a matrix and no mark decides, the file is
refused: a wrong guess draws static.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from millicent.checkpoint.folder import show_some
from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.schemes import Scheme, fitting_schemes, near_misses
from millicent.errors import CheckpointError, WeightsMismatchError

PLAIN_DTYPES = ("F32", "BF16", "F16", "F64")
RAW_FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
# what a file may hold beside its weights
ALLOWED_LEFTOVERS = ("__index_timestep_zero__", "scaled_fp8")
ALLOWED_ENDINGS = (".comfy_attention.config",)
ALLOWED_BEGINNINGS = ("lm_head.",)
_FIX = "Fetch the file again, or use another file of this model."


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One weight matrix: its scheme, and its tensors by what follows "X." in their names."""

    scheme: Scheme
    shape: tuple[int, int]
    parts: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Layout:
    """matrices: by the layer's name X. vectors: every other parameter, by its full name. schemes: how many matrices have each."""

    matrices: dict[str, StoredMatrix]
    vectors: dict[str, TensorInfo]
    leftovers: tuple[str, ...]

    @property
    def schemes(self) -> Counter[str]:
        return Counter(matrix.scheme.name for matrix in self.matrices.values())

    @property
    def high_precision(self) -> tuple[str, ...]:
        """The matrices that are stored plain, in a file where others are quantized."""
        plain = tuple(layer for layer, matrix in self.matrices.items() if matrix.scheme.name == "plain")
        return () if len(plain) == len(self.matrices) else plain


def lay_out(tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], maker: str | None, name: str) -> Layout:
    """Give every tensor of a file to a parameter of its network.

    tensors: by the network's own names, without a prefix. expected: every parameter with its shape. maker: "comfy", "modelopt",
    "compressed-tensors", or None where no mark tells.
    Raises WeightsMismatchError for a parameter that is missing and a tensor that is left over, CheckpointError for a matrix
    that fits no scheme, or several.
    """
    layers = {key.removesuffix(".weight"): (shape[0], shape[1]) for key, shape in expected.items() if _is_matrix(key, shape)}
    vectors = {key: shape for key, shape in expected.items() if not _is_matrix(key, shape)}
    parts, leftovers = _sort(tensors, layers, vectors)
    _check_closure(tensors, parts, layers, vectors, leftovers, name)
    _check_vectors(tensors, vectors, name)
    matrices = {
        layer: StoredMatrix(_scheme(layer, parts[layer], shape, maker, name), shape, parts[layer])
        for layer, shape in layers.items()
    }
    _check_pairing(matrices, name)
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
    parts: Mapping[str, Mapping[str, TensorInfo]],
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


def _scheme(layer: str, parts: Mapping[str, TensorInfo], shape: tuple[int, int], maker: str | None, name: str) -> Scheme:
    fitting = fitting_schemes(parts, shape)
    chosen = [scheme for scheme in fitting if maker in scheme.makers] if len(fitting) > 1 else list(fitting)
    if len(chosen) == 1:
        return chosen[0]
    held = ", ".join(f"{suffix} {info.dtype} {list(info.shape)}" for suffix, info in parts.items())
    if fitting:
        readings = " or ".join(scheme.name for scheme in fitting)
        raise CheckpointError(
            f"In {name} {layer} ({held}) can be read as {readings}, and nothing in the file says which.",
            "Say who made it, or use a file that names its layout.",
        )
    near = "; ".join(near_misses(parts, shape))
    raise CheckpointError(f"In {name} {layer} is stored as {held}, which is no layout that is known{near and f' ({near})'}.", _FIX)


def _check_pairing(matrices: Mapping[str, StoredMatrix], name: str) -> None:
    """FP8 without scales is one thing in a file of nothing else, and a lost scale beside matrices that have theirs."""
    raw = [layer for layer, matrix in matrices.items() if matrix.scheme.name == "raw fp8"]
    scaled = [layer for layer, matrix in matrices.items() if matrix.scheme.name not in ("raw fp8", "plain")]
    if raw and scaled:
        found = f"{len(scaled)} matrices have scales and {len(raw)} FP8 ones have none, such as {raw[0]}"
        raise CheckpointError(f"In {name} {found}: their scales are lost.", _FIX)
