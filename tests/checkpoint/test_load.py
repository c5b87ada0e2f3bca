"""Tensors that fit, and every way in which they may not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from millicent.checkpoint.files import open_weights
from millicent.checkpoint.load import fill, read_parameters
from millicent.checkpoint.marks import Marks
from millicent.checkpoint.recognize import Component
from millicent.errors import CheckpointError, WeightsMismatchError


def make_module() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def make_state() -> dict[str, torch.Tensor]:
    return {key: torch.randn(tensor.shape) for key, tensor in make_module().state_dict().items()}


def read(tmp_path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a part whose tensors are all plain, which the VAE is."""
    save_file(state, tmp_path / "model.safetensors")
    files = open_weights(tmp_path)
    return dict(read_parameters(Component("vae", "", {}, files.header.tensors, None, Marks(None)), files.source))


def test_a_module_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    module, state = make_module(), make_state()
    fill(module, read(tmp_path, state), str(tmp_path))
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_plain_tensors_stay_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in make_state().items()} | {"empty": torch.empty(0, 3, dtype=dtype)}
    held = read(tmp_path, state)
    assert held.keys() == state.keys()
    assert all(held[key].dtype == dtype and torch.equal(held[key], tensor) for key, tensor in state.items())


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    state = make_state()
    read(tmp_path, state)["0.weight"].zero_()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["0.weight"], state["0.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in make_state().items()}
    state["1.bias"][1] = value
    with pytest.raises(CheckpointError, match=r"1\.bias .*not finite"):
        read(tmp_path, state)


def test_missing_unwanted_and_misshapen_tensors_are_told_at_once(tmp_path: Path) -> None:
    state = make_state()
    del state["0.bias"]
    state["1.weight"] = torch.ones(2, 5)
    state.update({f"2.scale_{number}": torch.ones(1) for number in range(7)})
    with pytest.raises(WeightsMismatchError) as caught:
        fill(make_module(), state, str(tmp_path))
    told = str(caught.value)
    assert "1 missing: 0.bias" in told
    assert "7 not wanted: 2.scale_0, 2.scale_1, 2.scale_2, 2.scale_3, 2.scale_4, and 2 more" in told
    assert "1 of another shape: 1.weight (2, 5) for (2, 4)" in told
