"""Tensors that fit, and every way in which they may not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from millicent.checkpoint.weights import load_weights, read_weights
from millicent.errors import CheckpointError, WeightsMismatchError


def make_module() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def make_state() -> dict[str, torch.Tensor]:
    return {key: torch.randn(tensor.shape) for key, tensor in make_module().state_dict().items()}


def read(tmp_path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    save_file(state, tmp_path / "model.safetensors")
    return read_weights([tmp_path / "model.safetensors"], dtype)


def test_a_module_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    module, state = make_module(), make_state()
    load_weights(module, read(tmp_path, state), tmp_path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_plain_floats_are_cast(tmp_path: Path, stored: torch.dtype) -> None:
    state = {key: tensor.to(stored) for key, tensor in make_state().items()}
    weights = read(tmp_path, state, torch.bfloat16)
    assert all(torch.equal(tensor, state[key].bfloat16()) for key, tensor in weights.items())


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_quantized_tensors_are_refused_with_the_reason(tmp_path: Path, stored: torch.dtype) -> None:
    state = {**make_state(), "0.weight": torch.ones(4, 3).to(stored)}
    with pytest.raises(CheckpointError, match=rf"0\.weight .*{str(stored).removeprefix('torch.')}.*plain weights only"):
        read(tmp_path, state)


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
        load_weights(make_module(), state, tmp_path)
    told = str(caught.value)
    assert "1 missing: 0.bias" in told
    assert "7 not wanted: 2.scale_0, 2.scale_1, 2.scale_2, 2.scale_3, 2.scale_4, and 2 more" in told
    assert "1 of another shape: 1.weight (2, 5) for (2, 4)" in told


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 64])
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no whole safetensors file"):
        read_weights([tmp_path / "model.safetensors"], torch.float32)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_file(make_state(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        read_weights([tmp_path / "model.safetensors"], torch.float32)
