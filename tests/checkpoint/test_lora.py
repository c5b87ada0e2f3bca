"""LoRA files in the Lightning style, fused or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from millicent.checkpoint.lora import fuse_lora
from millicent.errors import CheckpointError, WeightsMismatchError

RANK = 2


def make_module(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    module = nn.ModuleDict({"to_q": nn.Linear(3, 4), "to_out": nn.ModuleList([nn.Linear(4, 3)]), "norm": nn.LayerNorm(3)})
    return module.to(dtype).requires_grad_(False)


def make_lora(alpha: float | None = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, (rows, columns) in {"to_q": (4, 3), "to_out.0": (3, 4)}.items():
        state[f"{name}.lora_down.weight"] = torch.randn(RANK, columns, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(rows, RANK, generator=generator)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def fuse(module: nn.Module, tmp_path: Path, state: dict[str, Tensor], strength: float = 1.0) -> int:
    save_file(state, tmp_path / "lora.safetensors")
    return fuse_lora(module, tmp_path / "lora.safetensors", strength)


@pytest.mark.parametrize(("alpha", "scale"), [(1.0, 0.5), (8.0, 4.0), (None, 1.0)])
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_the_change_is_added_in_fp32(tmp_path: Path, alpha: float | None, scale: float, strength: float) -> None:
    module, before, state = make_module(), make_module(), make_lora(alpha)
    assert fuse(module, tmp_path, state, strength) == 2
    for name in ("to_q", "to_out.0"):
        delta = state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]
        expected = before.get_submodule(name).weight + strength * scale * delta
        # one FP32 rounding in another place
        torch.testing.assert_close(module.get_submodule(name).weight.data, expected, atol=1e-6, rtol=0.0)
        assert torch.equal(module.get_submodule(name).bias, before.get_submodule(name).bias)


def test_bf16_weights_are_rounded_once(tmp_path: Path) -> None:
    module, before = make_module(torch.bfloat16), make_module(torch.bfloat16)
    state = {key: tensor.bfloat16() for key, tensor in make_lora().items()}
    fuse(module, tmp_path, state)
    delta = state["to_q.lora_up.weight"].float() @ state["to_q.lora_down.weight"].float()
    expected = (before["to_q"].weight.float() + 0.5 * delta).bfloat16()
    assert torch.equal(module["to_q"].weight.data, expected)


def test_the_layers_output_is_that_of_the_low_rank_branch(tmp_path: Path) -> None:
    module, state = make_module(), make_lora()
    x = torch.randn(5, 3)
    branch = (x @ state["to_q.lora_down.weight"].T) @ state["to_q.lora_up.weight"].T
    expected = module["to_q"](x) + 0.5 * branch
    fuse(module, tmp_path, state)
    torch.testing.assert_close(module["to_q"](x), expected, atol=1e-5, rtol=0.0)  # FP32, summed in another order


@pytest.mark.parametrize(
    ("remove", "add", "told"),
    [
        (["to_q.lora_up.weight"], {}, "lacks lora_up for to_q"),
        (["to_q.lora_down.weight"], {}, "lacks lora_down for to_q"),
        ([], {"to_k.alpha": torch.tensor(1.0)}, "lacks lora_down for to_k"),
        ([], {"to_q.lora_A.weight": torch.ones(2, 3)}, r"unknown to_q\.lora_A\.weight"),
        ([], {"to_q.dora_scale": torch.ones(4, 1)}, r"unknown to_q\.dora_scale"),
        ([], {"to_q.lora_up.weight": torch.ones(4, 3)}, "do not pair for to_q"),
        ([], {"to_q.alpha": torch.ones(2)}, "do not pair for to_q"),
        ([], {"to_q.lora_up.weight": torch.ones(5, 2)}, r"to_q as \(5, 3\); the model has \(4, 3\)"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, remove: list[str], add: dict[str, Tensor], told: str
) -> None:
    module, state = make_module(), {**make_lora(), **add}
    for key in remove:
        del state[key]
    with pytest.raises(WeightsMismatchError, match=told):
        fuse(module, tmp_path, state)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), make_module().parameters(), strict=True))


def test_a_layer_that_the_model_lacks_is_named_with_the_nearest(tmp_path: Path) -> None:
    state = {key.replace("to_out.0", "to_out.9"): tensor for key, tensor in make_lora().items()}
    module = make_module()
    with pytest.raises(WeightsMismatchError, match=r"1 of 2 layers.*to_out\.9 \(nearest: to_out\.0\)"):
        fuse(module, tmp_path, state)
    assert torch.equal(module["to_q"].weight, make_module()["to_q"].weight)


def test_a_norm_is_no_layer_to_change(tmp_path: Path) -> None:
    state = {key.replace("to_q", "norm"): tensor for key, tensor in make_lora().items()}
    with pytest.raises(WeightsMismatchError, match="norm"):
        fuse(make_module(), tmp_path, state)


def test_an_empty_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsMismatchError, match="no keys"):
        fuse(make_module(), tmp_path, {})


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = make_lora()
    state["to_q.lora_up.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        fuse(make_module(), tmp_path, state)
