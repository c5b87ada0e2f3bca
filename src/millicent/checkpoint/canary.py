"""A few weights of a file against the same weights of its base model: the proof that they are decoded as they were encoded.

Relative error and the ratio of norms together. Cosine alone stays near 1 where a scale is missing, applied twice or along the
wrong axis; the norm alone does not see swapped nibbles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from millicent.checkpoint.decode import decode_stored
from millicent.checkpoint.files import JoinedSource, open_weights
from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.layout import Decide, Layout, StoredMatrix
from millicent.checkpoint.load import MappedFiles, read_matrix
from millicent.checkpoint.recognize import Component
from millicent.checkpoint.schemes import Scheme
from millicent.errors import CheckpointError, WeightsMismatchError

# of ||W' - W|| / ||W||, by number format; measured over several distributions of weights, with room for outliers
MAX_ERROR = {
    "bf16": 0.01,
    "fp8": 0.05,
    "mxfp8": 0.05,
    "int8": 0.05,
    "q8_0": 0.02,
    "q6_k": 0.05,
    "q5_k": 0.08,
    "q5_0": 0.08,
    "q5_1": 0.08,
}
MAX_ERROR_4_BIT = 0.20
MAX_ERROR_UNROTATED_INT8 = 0.12  # one scale for a whole matrix with outliers
MAX_ERROR_E5M2 = 0.10
MAX_NORM_RATIO = 1.02
# std sqrt(K) of an attention weight, which is near 1 in trained transformers; the upper end is a std of 0.5 at K = 3072
MIN_GAIN, MAX_GAIN = 0.05, 28
# a fine-tune, or a LoRA that is fused in, moves weights by this much more; a wrong swizzle moves them further
FINE_TUNED_ERROR = 0.10
FINE_TUNED_NORM_RATIO = 1.25


Verdict = Literal["the same", "fine-tuned", "another"]


@dataclass(frozen=True, slots=True)
class Match:
    """One layer: error is ||W' - W|| / ||W||, norm_ratio ||W'|| / ||W||."""

    layer: str
    error: float
    norm_ratio: float
    verdict: Verdict


def compare_with_base(component: Component, source: JoinedSource, base: Component, base_source: JoinedSource) -> Match:
    """Compare the first and the last block with those of a base model; returns the layer that is furthest from it.

    Raises CheckpointError where one differs by more than its format and a fine-tune can explain.
    """
    assert component.layout is not None
    assert base.layout is not None
    files, base_files = MappedFiles(source), MappedFiles(base_source)
    matches = []
    for layer, stored in _ends(component.layout).items():
        for key, weight in read_matrix(layer, stored, files).items():
            name = key.removesuffix(".weight")
            if name in base.layout.matrices:
                truth = read_matrix(name, base.layout.matrices[name], base_files)[key]
                if weight.shape != truth.shape:
                    shapes = f"{tuple(weight.shape)}, and in the model {tuple(truth.shape)}"
                    raise WeightsMismatchError(f"In {source.name} {name} is {shapes}.", "Use a file of this model's size.")
                matches.append(measure(name, weight, truth, max_error(stored)))
                if matches[-1].verdict == "another":
                    raise _refusal(source.name, matches[-1])
    return max(matches, key=lambda match: match.error)


def check_magnitudes(component: Component, source: JoinedSource) -> None:
    """Without a base to compare with: refuse attention weights that no trained network holds.

    A lost scale of a whole matrix is off by 36 and more, one in the wrong unit by 127.
    Raises CheckpointError for a matrix of the first or last block.
    """
    assert component.layout is not None
    files = MappedFiles(source)
    for layer, stored in _ends(component.layout).items():
        for key, weight in read_matrix(layer, stored, files).items():
            gain = float(weight.float().std()) * weight.shape[-1] ** 0.5
            if ".attn." in key and weight.ndim == 2 and not MIN_GAIN <= gain <= MAX_GAIN:
                raise CheckpointError(
                    f"{key} of {source.name} makes its input {gain:.2g} times as large; {MIN_GAIN} to {MAX_GAIN} is usual.",
                    "Its scales are not what they seem: use another file.",
                )


def measure(layer: str, weight: Tensor, base: Tensor, limit: float) -> Match:
    """How far `weight` is from `base`; limit: of the relative error, for its number format."""
    weight, base = weight.float(), base.float()
    norm = float(base.norm())
    error, ratio = (float((weight - base).norm()) / norm, float(weight.norm()) / norm) if norm else (float(weight.norm()), 1.0)
    verdict: Verdict = "another"
    if error <= limit and 1 / MAX_NORM_RATIO <= ratio <= MAX_NORM_RATIO:
        verdict = "the same"
    elif error <= limit + FINE_TUNED_ERROR and 1 / FINE_TUNED_NORM_RATIO <= ratio <= FINE_TUNED_NORM_RATIO:
        verdict = "fine-tuned"
    return Match(layer, error, ratio, verdict)


def _ends(layout: Layout) -> Mapping[str, StoredMatrix]:
    """The first and the last block's matrices, or all that is quantized where there are no blocks."""
    blocks = sorted({int(layer.split(".")[1]) for layer in layout.matrices if layer.startswith("transformer_blocks.")})
    ends = tuple(f"transformer_blocks.{blocks[i]}." for i in (0, -1)) if blocks else ("",)
    return {layer: stored for layer, stored in layout.matrices.items() if layer.startswith(ends)}


def max_error(stored: StoredMatrix) -> float:
    name = stored.scheme.name
    if name == "int8 per tensor" and not stored.note.get("convrot"):
        return MAX_ERROR_UNROTATED_INT8
    if any(info.dtype == "F8_E5M2" for info in stored.parts.values()):
        return MAX_ERROR_E5M2
    formats = stored.scheme.format.split(" or ")
    return max(MAX_ERROR.get(each, MAX_ERROR_4_BIT) for each in formats)


def _refusal(name: str, match: Match) -> CheckpointError:
    found = f"relative error {match.error:.2f}, norm {match.norm_ratio:.3g} times as large"
    return CheckpointError(
        f"{match.layer} of {name} is no version of the base model's: {found}.",
        "It belongs to another model, or its layout is not what it seems: use another file.",
    )


def decide_by_base(where: str | Path, base: Component, base_source: JoinedSource) -> Decide:
    """For `recognize(where, decide=...)`: of several readings, the one that gives the base's weight; None for none or several."""
    assert base.layout is not None
    matrices, files, base_files = base.layout.matrices, MappedFiles(open_weights(where).source), MappedFiles(base_source)
    decided: dict[frozenset[str], Scheme | None] = {}

    def fits(layer: str, scheme: Scheme, parts: Mapping[str, TensorInfo], truth: Tensor) -> bool:
        key = f"{layer}.weight"
        stored = StoredMatrix(scheme, matrices[layer].shape, parts, (key,), {})
        try:
            weight = decode_stored(layer, stored, files.parts(stored))[key]
        except CheckpointError:
            return False
        return measure(layer, weight, truth, max_error(stored)).verdict != "another"

    def decide(layer: str, parts: Mapping[str, TensorInfo], readings: tuple[Scheme, ...]) -> Scheme | None:
        # one maker wrote the whole file: what the first layer shows holds for all
        names = frozenset(scheme.name for scheme in readings)
        if names not in decided and layer in matrices:
            truth = read_matrix(layer, matrices[layer], base_files)[f"{layer}.weight"]
            fitting = [scheme for scheme in readings if fits(layer, scheme, parts, truth)]
            decided[names] = fitting[0] if len(fitting) == 1 else None
        return decided.get(names)

    return decide
