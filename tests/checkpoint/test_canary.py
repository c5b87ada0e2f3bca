"""A file beside its base: what a format, a fine-tune and a wrong decode look like."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from millicent import demo
from millicent.checkpoint.canary import check_magnitudes, compare_with_base, measure
from millicent.checkpoint.files import JoinedSource
from millicent.checkpoint.recognize import Component, recognize
from millicent.errors import CheckpointError, WeightsMismatchError

TRANSFORMER = demo.folder() / "transformer"
LAYER = "transformer_blocks.0.attn.to_q"
WEIGHT = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))


def opened(path: Path) -> tuple[Component, JoinedSource]:
    recognized = recognize(path)
    return recognized.components["transformer"], recognized.source


def changed(tmp_path: Path, factor: float, key: str = f"{LAYER}.weight") -> tuple[Component, JoinedSource]:
    (path,) = TRANSFORMER.glob("*.safetensors")
    state = load_file(path)
    state[key] = state[key] * factor
    save_file(state, tmp_path / "x.safetensors")
    return opened(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("weight", "verdict"),
    [
        (WEIGHT, "the same"),
        (WEIGHT * 1.01, "the same"),
        (WEIGHT * 1.1, "fine-tuned"),  # by its norm, which a lost scale moves, and cosine does not see
        (WEIGHT * 36, "another"),
        (WEIGHT * 0, "another"),
        (WEIGHT.roll(1, 1), "another"),  # neighbors swapped: the norm is the same
        (WEIGHT.flip(0), "another"),
    ],
)
def test_error_and_norm_decide_together(weight: torch.Tensor, verdict: str) -> None:
    assert measure("x", weight, WEIGHT, 0.05).verdict == verdict


def test_a_matrix_of_zeros_is_no_division_by_zero() -> None:
    assert measure("x", torch.zeros(2, 2), torch.zeros(2, 2), 0.05).verdict == "the same"
    assert measure("x", torch.ones(2, 2), torch.zeros(2, 2), 0.05).verdict == "another"


def test_a_file_is_compared_with_its_base(tmp_path: Path) -> None:
    base = opened(TRANSFORMER)
    assert compare_with_base(*base, *base).error == 0
    match = compare_with_base(*changed(tmp_path, 1.05), *base)
    assert (match.layer, match.verdict) == (LAYER, "fine-tuned")
    assert match.error == pytest.approx(0.05, abs=0.005)
    with pytest.raises(CheckpointError, match=rf"{LAYER} of .* relative error 1\.00, norm 2 times as large"):
        compare_with_base(*changed(tmp_path, 2.0), *base)


def test_without_a_base_only_what_is_beyond_reason_is_refused(tmp_path: Path) -> None:
    check_magnitudes(*opened(TRANSFORMER))
    check_magnitudes(*changed(tmp_path, 2.0))
    for lost in (36.0, 1 / 127):
        with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight of .* times as large"):
            check_magnitudes(*changed(tmp_path, lost))


def test_a_base_of_another_size_is_told(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(WeightsMismatchError, match=r"to_q is \(192, 192\), and in the model \(48, 48\)"):
        compare_with_base(*opened(TRANSFORMER), *opened(tiny_folder / "transformer"))
