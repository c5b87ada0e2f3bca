"""LoRA files of every style and kind, fused or refused.

What is fused is compared with the equations, computed here in float64, and with the libraries that write and read such
files: diffusers with PEFT, and LyCORIS.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from conftest import draw_weights, make_transformer
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from millicent.checkpoint.lora import Change, fuse_loras, lightning_steps
from millicent.checkpoint.lora_keys import layer_table, split_key
from millicent.errors import CheckpointError, InputError, MachineError, WeightsMismatchError
from millicent.model.config import MMDiTConfig
from millicent.model.mmdit import MMDiT

BLOCK = "transformer_blocks.0"
SQUARE = f"{BLOCK}.attn.to_q"  # (48, 48)
TALL = f"{BLOCK}.img_mlp.net.0.proj"  # (192, 48)
# a name with a number, one with a dot that kohya flattens, one outside of the blocks
LAYERS = (SQUARE, TALL, "transformer_blocks.1.attn.to_out.0", "transformer_blocks.1.txt_mod.1", "norm_out.linear", "img_in")
RANK = 4
# FP32's own rounding of products of a few dozen terms of order 1
FP32 = {"atol": 2e-5, "rtol": 1e-5}

State = dict[str, Tensor]


def make_module(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The transformer, tiny, in each test's own copy."""
    config = MMDiTConfig.from_dict(reference_config())
    return draw_weights(MMDiT(config), seed=1).to(dtype).requires_grad_(False)


@functools.cache
def reference_config() -> dict[str, Any]:
    return dict(make_transformer(zero_cond_t=True).config)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shape_of(layer: str) -> tuple[int, int]:
    rows, columns = make_module().get_submodule(layer).weight.shape
    return rows, columns


def factors(layer: str, rank: int = RANK, seed: int = 0) -> tuple[Tensor, Tensor]:
    """up (N, r) and down (r, K)."""
    rows, columns = shape_of(layer)
    return draw(seed + 1, rows, rank), draw(seed + 2, rank, columns)


def save(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata)
    return path


def fuse(module: nn.Module, tmp_path: Path, state: State, strength: float = 1.0, metadata: dict[str, str] | None = None) -> int:
    return fuse_loras(module, [(save(tmp_path / "lora.safetensors", state, metadata), strength)])


def check(module: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """The parameters in `expected` (float64) are as told, all others as they were, bit for bit."""
    old = make_module().state_dict()
    for name, tensor in module.state_dict().items():
        if name in expected:
            assert not torch.equal(tensor, old[name])
            torch.testing.assert_close(tensor.double(), expected[name], **FP32)
        else:
            assert torch.equal(tensor, old[name])


def lightning(state: State, layer: str, up: Tensor, down: Tensor) -> State:
    return state | {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}


def make_lora(alpha: float | None = 1.0, seed: int = 0, layers: Sequence[str] = (SQUARE, TALL)) -> State:
    """A LoRA in the Lightning style."""
    state: State = {}
    for layer in layers:
        state = lightning(state, layer, *factors(layer, seed=seed))
        if alpha is not None:
            state[f"{layer}.alpha"] = torch.tensor(alpha)
    return state


def lora_delta(state: State, layer: str, scale: float = 1.0) -> Tensor:
    up, down = state[f"{layer}.lora_up.weight"], state[f"{layer}.lora_down.weight"]
    return scale * (up.double() @ down.double())


def weight64(layer: str) -> Tensor:
    return make_module().get_submodule(layer).weight.double()


# style -> its name of a layer, what its down and up matrices end in, and whether .alpha goes with it
STYLES: dict[str, tuple[Callable[[str], str], str, str, bool]] = {
    "PEFT": (lambda name: f"transformer.{name}", ".lora_A.weight", ".lora_B.weight", False),
    "PEFT with an adapter's name": (lambda name: f"transformer.{name}", ".lora_A.my-own.weight", ".lora_B.my-own.weight", False),
    "bare": (lambda name: name, ".lora_A.weight", ".lora_B.weight", True),
    "ComfyUI, PEFT's letters": (lambda name: f"diffusion_model.{name}", ".lora_A.weight", ".lora_B.weight", True),
    "ComfyUI, no alpha": (lambda name: f"diffusion_model.{name}", ".lora_down.weight", ".lora_up.weight", False),
    "ComfyUI": (lambda name: f"diffusion_model.{name}", ".lora_down.weight", ".lora_up.weight", True),
    "Lightning": (lambda name: name, ".lora_down.weight", ".lora_up.weight", True),
    "kohya": (lambda name: "lora_unet_" + name.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", True),
    "LyCORIS": (lambda name: "lycoris_" + name.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", True),
    "old diffusers, _lora": (lambda name: f"transformer.{name}", "_lora.down.weight", "_lora.up.weight", False),
    "old diffusers, .lora": (lambda name: name, ".lora.down.weight", ".lora.up.weight", False),
    "old diffusers, linear": (lambda name: name, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", False),
    "DiffSynth": (lambda name: name, ".lora_A.default.weight", ".lora_B.default.weight", False),
    "DiffSynth's trainer": (lambda name: f"pipe.dit.{name}", ".lora_A.default.weight", ".lora_B.default.weight", False),
}
# diffusers has no reader for the rest, or changes nothing and says nothing
BY_DIFFUSERS = ("PEFT", "bare", "ComfyUI", "ComfyUI, PEFT's letters", "Lightning", "kohya", "DiffSynth")


def write_style(style: str, layers: Sequence[str] = LAYERS) -> State:
    name, down_end, up_end, has_alpha = STYLES[style]
    state: State = {}
    for layer in layers:
        up, down = factors(layer)
        state |= {name(layer) + up_end: up, name(layer) + down_end: down}
        if has_alpha:
            state[f"{name(layer)}.alpha"] = torch.tensor(6.0)
    return state


@pytest.mark.parametrize("style", STYLES)
def test_each_style_finds_its_layers(tmp_path: Path, style: str) -> None:
    module = make_module()
    assert fuse(module, tmp_path, write_style(style)) == len(LAYERS)
    scale = 6 / RANK if STYLES[style][3] else 1.0
    plain = make_lora(layers=LAYERS)
    check(module, {f"{layer}.weight": weight64(layer) + lora_delta(plain, layer, scale) for layer in LAYERS})


def test_every_linear_is_found_in_every_style() -> None:
    module = make_module()
    table = layer_table(module)
    linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for style, (name, down_end, up_end, _) in STYLES.items():
        for layer in linears:
            for end, part in ((down_end, "down"), (up_end, "up")):
                key = split_key(name(layer) + end)
                assert key is not None
                assert (table[key.layer], key.part) == ((layer,), part), style


def test_a_flattened_name_of_two_layers_stands_for_neither() -> None:
    module = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "a_b": nn.Linear(2, 2)})
    table = layer_table(module)
    assert "lora_unet_a_b" not in table
    assert (table["a.b"], table["a_b"]) == (("a.b",), ("a_b",))


@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["save_lora_adapter", "save_lora_weights"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_metadata_gives_alpha(tmp_path: Path, prefix: str, use_rslora: bool) -> None:
    config = {
        "r": RANK,
        "lora_alpha": 6,
        "use_rslora": use_rslora,
        "rank_pattern": {"norm_out.linear": 2},
        "alpha_pattern": {"attn.to_q": 10, "^img_in$": 3, "^linear": 99},
        "target_modules": ["to_q"],
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({prefix + key: value for key, value in config.items()})}
    state: State = {}
    ranks = {layer: 2 if layer == "norm_out.linear" else RANK for layer in LAYERS}
    for layer, rank in ranks.items():
        up, down = factors(layer, rank)
        state |= {f"transformer.{layer}.lora_B.weight": up, f"transformer.{layer}.lora_A.weight": down}
    module = make_module()
    fuse(module, tmp_path, state, metadata=metadata)
    alphas = dict.fromkeys(LAYERS, 6) | {SQUARE: 10, "img_in": 3}
    expected = {}
    for layer in LAYERS:
        scale = alphas[layer] / (math.sqrt(ranks[layer]) if use_rslora else ranks[layer])
        up, down = factors(layer, ranks[layer])
        expected[f"{layer}.weight"] = weight64(layer) + scale * (up.double() @ down.double())
    check(module, expected)


@pytest.mark.parametrize(("alpha", "scale"), [(1.0, 0.25), (8.0, 2.0), (None, 1.0)])
@pytest.mark.parametrize("strength", [1.0, 0.25, -0.5])
def test_the_change_is_added_in_fp32(tmp_path: Path, alpha: float | None, scale: float, strength: float) -> None:
    module, state = make_module(), make_lora(alpha)
    assert fuse(module, tmp_path, state, strength) == 2
    check(module, {f"{layer}.weight": weight64(layer) + lora_delta(state, layer, strength * scale) for layer in (SQUARE, TALL)})


@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0).half()], ids=["int", "[1]", "half"])
def test_alpha_is_one_number_of_any_plain_type(tmp_path: Path, alpha: Tensor) -> None:
    module, state = make_module(), make_lora(None, layers=[SQUARE]) | {f"{SQUARE}.alpha": alpha}
    fuse(module, tmp_path, state)
    check(module, {f"{SQUARE}.weight": weight64(SQUARE) + lora_delta(state, SQUARE, 2 / RANK)})


def test_a_strength_of_0_checks_the_file_and_changes_nothing(tmp_path: Path) -> None:
    module = make_module()
    assert fuse(module, tmp_path, make_lora(), 0.0) == 0
    check(module, {})
    with pytest.raises(WeightsMismatchError, match="lacks"):
        fuse(module, tmp_path, {f"{SQUARE}.lora_up.weight": factors(SQUARE)[0]}, 0.0)


def test_bf16_weights_are_rounded_once(tmp_path: Path) -> None:
    module, before = make_module(torch.bfloat16), make_module(torch.bfloat16)
    state = {key: tensor.bfloat16() for key, tensor in make_lora().items()}
    fuse(module, tmp_path, state)
    delta = state[f"{SQUARE}.lora_up.weight"].float() @ state[f"{SQUARE}.lora_down.weight"].float()
    expected = (before.get_submodule(SQUARE).weight.float() + 0.25 * delta).bfloat16()
    assert torch.equal(module.get_submodule(SQUARE).weight, expected)


def test_many_small_changes_survive_bf16_together(tmp_path: Path) -> None:
    """Each is below half a step of BF16 and would be lost alone; eight are two steps of it."""
    module = nn.ModuleDict({"a": nn.Linear(2, 2)}).bfloat16().requires_grad_(False)
    module["a"].weight.fill_(1.0)
    path = save(tmp_path / "small.safetensors", {"a.diff": torch.full((2, 2), 2.0**-9)})
    fuse_loras(module, [(path, 1.0)] * 8)
    assert torch.equal(module["a"].weight, torch.full((2, 2), 1 + 2.0**-6, dtype=torch.bfloat16))


def test_the_layers_output_is_that_of_the_low_rank_branch(tmp_path: Path) -> None:
    module, state = make_module(), make_lora()
    x = draw(9, 5, 48)
    branch = (x @ state[f"{SQUARE}.lora_down.weight"].T) @ state[f"{SQUARE}.lora_up.weight"].T
    expected = module.get_submodule(SQUARE)(x) + 0.25 * branch
    fuse(module, tmp_path, state)
    torch.testing.assert_close(module.get_submodule(SQUARE)(x), expected, atol=1e-4, rtol=0.0)  # summed in another order


def test_old_weights_are_let_go_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, alive, make = make_module(), [], Change.make
    old = [weakref.ref(module.get_submodule(layer).weight) for layer in LAYERS]

    def watch(change: Change, weights: Sequence[Tensor]) -> Tensor:
        alive.append(sum(ref() is not None for ref in old))
        return make(change, weights)

    monkeypatch.setattr(Change, "make", watch)
    fuse(module, tmp_path, make_lora(layers=LAYERS))
    assert alive == [6, 5, 4, 3, 2, 1]


def test_the_old_weight_is_not_written_to(tmp_path: Path) -> None:
    module = make_module()
    old = module.get_submodule(SQUARE).weight
    fuse(module, tmp_path, make_lora())
    assert torch.equal(old, make_module().get_submodule(SQUARE).weight)


def test_nothing_is_changed_where_there_is_no_room_for_it(tmp_path: Path) -> None:
    path, module = save(tmp_path / "lora.safetensors", make_lora(layers=[SQUARE, TALL])), make_module()
    told: list[int] = []

    def refuse(size_bytes: int) -> None:
        told.append(size_bytes)
        raise MachineError("There is no room.", "Make some.")

    with pytest.raises(MachineError, match="no room"):
        fuse_loras(module, [(path, 1.0)], refuse)
    assert told == [sum(module.get_submodule(layer).weight.nbytes for layer in (SQUARE, TALL))]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), make_module().parameters(), strict=True))


@settings(deadline=None, max_examples=15)
@given(
    strengths=st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_several_at_once_add_up_in_any_order(tmp_path_factory: pytest.TempPathFactory, strengths: list[float], order: Any) -> None:
    folder = tmp_path_factory.mktemp("loras")
    states = [make_lora(seed=10 * i, layers=[SQUARE] if i else [SQUARE, TALL]) for i in range(len(strengths))]
    loras = [(save(folder / f"{i}.safetensors", state), strengths[i]) for i, state in enumerate(states)]
    module, shuffled = make_module(), make_module()
    fuse_loras(module, loras)
    order.shuffle(loras)
    fuse_loras(shuffled, loras)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), shuffled.parameters(), strict=True))
    changes = [s * lora_delta(state, SQUARE, 1 / RANK) for state, s in zip(states, strengths, strict=True)]
    torch.testing.assert_close(module.get_submodule(SQUARE).weight.double(), weight64(SQUARE) + sum(changes), **FP32)


def test_two_kinds_at_once_are_each_made_from_the_weight_as_it_was(tmp_path: Path) -> None:
    plain, state = make_lora(None, layers=[SQUARE]), make_lora(None, layers=[SQUARE])
    state[f"{SQUARE}.dora_scale"] = draw(5, 48, 1)
    loras = [(save(tmp_path / "plain", plain), 0.5), (save(tmp_path / "dora", state), 0.75)]
    module = make_module()
    assert fuse_loras(module, loras) == 1
    weight, delta = weight64(SQUARE), lora_delta(plain, SQUARE)
    moved = weight + delta
    dora = state[f"{SQUARE}.dora_scale"].double() * moved / moved.norm(dim=1, keepdim=True)
    check(module, {f"{SQUARE}.weight": weight + 0.5 * delta + 0.75 * (dora - weight)})


@pytest.mark.parametrize("strength", [1.0, 0.3, -1.0])
@pytest.mark.parametrize(
    ("layer", "key", "shape", "dim"),
    [
        (TALL, "dora_scale", (192, 1), 1),
        (TALL, "dora_scale", (1, 48), 0),
        (TALL, "dora_scale", (192,), 1),
        (TALL, "dora_scale", (48,), 0),
        (SQUARE, "dora_scale", (48, 1), 1),
        (SQUARE, "dora_scale", (1, 48), 0),
        (SQUARE, "lora_magnitude_vector", (48,), 1),
        (SQUARE, "lora_magnitude_vector.weight", (48,), 1),
    ],
)
def test_dora(tmp_path: Path, layer: str, key: str, shape: tuple[int, ...], dim: int, strength: float) -> None:
    up, down = factors(layer)
    module, magnitude = make_module(), draw(5, *shape)
    state = {f"{layer}.lora_B.weight": up, f"{layer}.lora_A.weight": down, f"{layer}.{key}": magnitude}
    fuse(module, tmp_path, state | {f"{layer}.alpha": torch.tensor(2.0)}, strength)
    moved = weight64(layer) + 2 / RANK * (up.double() @ down.double())
    placed = magnitude.double().reshape((-1, 1) if dim == 1 else (1, -1))
    fused = placed * moved / moved.norm(dim=dim, keepdim=True)
    check(module, {f"{layer}.weight": weight64(layer) + strength * (fused - weight64(layer))})


def test_dora_leaves_a_row_of_zeros(tmp_path: Path) -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 3)}).requires_grad_(False)
    module["a"].weight.zero_()
    state = {"a.lora_up.weight": torch.eye(3, 1), "a.lora_down.weight": torch.tensor([[3.0, 4.0]])}
    fuse(module, tmp_path, state | {"a.dora_scale": torch.full((3, 1), 2.0)})
    torch.testing.assert_close(module["a"].weight.data, torch.tensor([[1.2, 1.6], [0.0, 0.0], [0.0, 0.0]]))


def make_loha(layer: str = TALL, rank: int = RANK) -> State:
    rows, columns = shape_of(layer)
    shapes = {"hada_w1_a": (rows, rank), "hada_w1_b": (rank, columns), "hada_w2_a": (rows, rank), "hada_w2_b": (rank, columns)}
    return {f"{layer}.{part}": draw(i, *shape) for i, (part, shape) in enumerate(shapes.items())}


def test_loha(tmp_path: Path) -> None:
    module, state = make_module(), make_loha() | {f"{TALL}.alpha": torch.tensor(2.0)}
    assert fuse(module, tmp_path, state, 0.5) == 1
    w1_a, w1_b, w2_a, w2_b = (state[f"{TALL}.hada_{part}"].double() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    delta = torch.einsum("nr,rk->nk", w1_a, w1_b) * torch.einsum("nr,rk->nk", w2_a, w2_b)
    check(module, {f"{TALL}.weight": weight64(TALL) + 0.5 * 2 / RANK * delta})


def make_lokr(w1_whole: bool, w2_whole: bool, rank: int = RANK) -> State:
    """TALL (192, 48) as kron of (8, 6) and (24, 8)."""
    shapes = {"lokr_w1": (8, 6)} if w1_whole else {"lokr_w1_a": (8, rank), "lokr_w1_b": (rank, 6)}
    shapes |= {"lokr_w2": (24, 8)} if w2_whole else {"lokr_w2_a": (24, rank), "lokr_w2_b": (rank, 8)}
    return {f"{TALL}.{part}": draw(i, *shape) for i, (part, shape) in enumerate(shapes.items())}


def whole(state: State, part: str) -> Tensor:
    if f"{TALL}.{part}" in state:
        return state[f"{TALL}.{part}"].double()
    return state[f"{TALL}.{part}_a"].double() @ state[f"{TALL}.{part}_b"].double()


@pytest.mark.parametrize("w1_whole", [True, False])
@pytest.mark.parametrize("w2_whole", [True, False])
def test_lokr(tmp_path: Path, w1_whole: bool, w2_whole: bool) -> None:
    # a trainer that keeps both whole may store any alpha: it is not used
    alpha = 1e10 if w1_whole and w2_whole else 2.0
    module, state = make_module(), make_lokr(w1_whole, w2_whole) | {f"{TALL}.alpha": torch.tensor(alpha)}
    fuse(module, tmp_path, state)
    # row a of w1 with row c of w2 gives row a 24 + c
    kron = torch.einsum("ab,cd->acbd", whole(state, "lokr_w1"), whole(state, "lokr_w2")).reshape(192, 48)
    scale = 1.0 if w1_whole and w2_whole else 2 / RANK
    check(module, {f"{TALL}.weight": weight64(TALL) + scale * kron})


def test_full_differences_of_weights_biases_and_norms(tmp_path: Path) -> None:
    norm = f"{BLOCK}.attn.norm_q"
    state = {
        f"diffusion_model.{TALL}.diff": draw(1, 192, 48),
        f"diffusion_model.{TALL}.diff_b": draw(2, 192),
        f"diffusion_model.{SQUARE}.diff_b": draw(3, 48),
        f"diffusion_model.{norm}.diff": draw(4, 16),
        "diffusion_model.txt_norm.w_norm": draw(5, 64),
    }
    module = make_module()
    assert fuse(module, tmp_path, state, 0.5) == 4
    old = {name: tensor.double() for name, tensor in make_module().state_dict().items()}
    names = (f"{TALL}.weight", f"{TALL}.bias", f"{SQUARE}.bias", f"{norm}.weight", "txt_norm.weight")
    check(module, {name: old[name] + 0.5 * tensor.double() for name, tensor in zip(names, state.values(), strict=True)})


def test_a_layernorm_of_lycoris(tmp_path: Path) -> None:
    module = nn.ModuleDict({"norm": nn.LayerNorm(3)}).requires_grad_(False)
    fuse(module, tmp_path, {"lycoris_norm.w_norm": torch.ones(3), "lycoris_norm.b_norm": torch.full((3,), 2.0)})
    assert torch.equal(module["norm"].weight, torch.full((3,), 2.0))
    assert torch.equal(module["norm"].bias, torch.full((3,), 2.0))


def test_a_bias_beside_a_low_rank_change(tmp_path: Path) -> None:
    module, state = make_module(), make_lora(None, layers=[SQUARE]) | {f"{SQUARE}.diff_b": draw(3, 48)}
    assert fuse(module, tmp_path, state) == 1
    bias = make_module().get_submodule(SQUARE).bias.double() + draw(3, 48).double()
    check(module, {f"{SQUARE}.weight": weight64(SQUARE) + lora_delta(state, SQUARE), f"{SQUARE}.bias": bias})


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_set_weight_replaces(tmp_path: Path, strength: float) -> None:
    module, new = make_module(), draw(1, 192, 48)
    fuse(module, tmp_path, {f"{TALL}.set_weight": new}, strength)
    check(module, {f"{TALL}.weight": (1 - strength) * weight64(TALL) + strength * new.double()})
    if strength == 1.0:
        assert torch.equal(module.get_submodule(TALL).weight, new)


@pytest.mark.parametrize(
    ("fused", "parts"),
    [("to_qkv", ("to_q", "to_k", "to_v")), ("add_qkv_proj", ("add_q_proj", "add_k_proj", "add_v_proj"))],
)
@pytest.mark.parametrize("kind", ["lora", "dora by rows", "dora by columns"])
@pytest.mark.parametrize("flat", [False, True])
def test_fused_projections_are_split(tmp_path: Path, fused: str, parts: tuple[str, ...], kind: str, flat: bool) -> None:
    up, down, magnitude = draw(1, 144, RANK), draw(2, RANK, 48), draw(3, *((144, 1) if kind == "dora by rows" else (1, 48)))
    layer = f"{BLOCK}.attn.{fused}"
    name = "lora_unet_" + layer.replace(".", "_") if flat else layer
    state = lightning({f"{name}.alpha": torch.tensor(2.0)}, name, up, down)
    if kind != "lora":
        state[f"{name}.dora_scale"] = magnitude
    module = make_module()
    assert fuse(module, tmp_path, state) == 3
    names = [f"{BLOCK}.attn.{part}" for part in parts]
    moved = torch.cat([weight64(each) for each in names]) + 2 / RANK * up.double() @ down.double()
    if kind != "lora":
        moved = magnitude.double() * moved / moved.norm(dim=1 if kind == "dora by rows" else 0, keepdim=True)
    check(module, {f"{each}.weight": rows for each, rows in zip(names, moved.split(48), strict=True)})


# refusals: each changes the plain LoRA of SQUARE and TALL, and says what it found
REFUSALS: dict[str, tuple[Callable[[State], Any], str]] = {
    "no up": (lambda s: s.pop(f"{SQUARE}.lora_up.weight"), "lacks up for transformer_blocks.0.attn.to_q"),
    "no down": (lambda s: s.pop(f"{SQUARE}.lora_down.weight"), "lacks down for"),
    "alpha alone": (lambda s: s.update({f"{BLOCK}.attn.to_k.alpha": torch.tensor(1.0)}), "nothing but alpha for .*to_k"),
    "half a LoHa": (
        lambda s: s.update({f"{BLOCK}.attn.to_k.hada_w1_a": torch.ones(48, 2)}),
        "lacks hada_w1_b, hada_w2_a, hada_w2_b",
    ),
    "half a LoKr": (lambda s: s.update({f"{BLOCK}.attn.to_k.lokr_w2": torch.ones(8, 8)}), "lacks lokr_w1 for"),
    "w1 twice": (
        lambda s: s.update({f"{BLOCK}.attn.to_k.{part}": torch.ones(2, 2) for part in ("lokr_w1", "lokr_w2", "lokr_w1_a")}),
        "holds lokr_w1_a for .* beside lokr_w1, lokr_w2",
    ),
    "unknown kind": (lambda s: s.update({f"{SQUARE}.oft_blocks": torch.ones(2)}), "1 of 7 keys of no kind .*oft_blocks"),
    "Tucker": (lambda s: s.update({f"{SQUARE}.lora_mid.weight": torch.ones(2, 2)}), "no kind .*lora_mid"),
    "PEFT's bias": (lambda s: s.update({f"{SQUARE}.lora_B.bias": torch.ones(48)}), "no kind .*lora_B.bias"),
    "a layer too many": (
        lambda s: s.update({f"{BLOCK}.attn.to_z.diff": torch.ones(48, 48)}),
        r"3 layers, of which the model has 2; .*attn\.to_z \(nearest: transformer_blocks\.0\.attn\.to_\w\)",
    ),
    "one flat layer too many": (
        lambda s: s.update({"lora_unet_transformer_blocks_0_img_mlp_net_0_pro.diff": torch.ones(48, 48)}),
        r"has 2; .*net_0_pro \(nearest: transformer_blocks\.0\.img_mlp\.net\.0\.proj\)",
    ),
    "a LoRA of a norm": (
        lambda s: s.update(lightning({}, "txt_norm", torch.ones(64, 2), torch.ones(2, 64))),
        r"txt_norm as \(64, 64\)",
    ),
    "ranks that do not pair": (
        lambda s: s.update({f"{SQUARE}.lora_up.weight": torch.ones(48, 3)}),
        r"do not pair for .*\(4, 48\), up \(48, 3\)",
    ),
    "a matrix of no dimension": (lambda s: s.update({f"{SQUARE}.lora_up.weight": torch.tensor(1.0)}), "do not pair"),
    "a convolution": (lambda s: s.update({f"{SQUARE}.lora_up.weight": torch.ones(48, 4, 1, 1)}), "do not pair"),
    "rows": (lambda s: s.update({f"{SQUARE}.lora_up.weight": torch.ones(50, 4)}), r"to_q as \(50, 48\); the model has \(48, 48\)"),
    "columns": (lambda s: s.update({f"{SQUARE}.lora_down.weight": torch.ones(4, 1)}), r"as \(48, 1\)"),
    "a diff's shape": (lambda s: s.update({f"{BLOCK}.attn.to_k.diff": torch.ones(48)}), r"as \(48,\); the model has \(48, 48\)"),
    "a bias's shape": (lambda s: s.update({f"{SQUARE}.diff_b": torch.ones(1)}), r"bias of .* as \(1,\)"),
    "a bias that is not there": (lambda s: s.update({"txt_norm.diff_b": torch.ones(64)}), r"txt_norm\.bias, which the model lacks"),
    "a LoHa that would broadcast": (
        lambda s: s.update(
            {
                key.replace(TALL, "img_in"): torch.ones(1, 2) if key.endswith("w2_a") else torch.ones(tensor.shape)
                for key, tensor in make_loha("img_in", 2).items()
            }
        ),
        "do not pair for img_in",
    ),
    "two ranks": (
        lambda s: (
            [s.pop(key) for key in list(s) if TALL in key]
            and s.update({**make_lokr(False, False), f"{TALL}.lokr_w2_a": torch.ones(24, 2), f"{TALL}.lokr_w2_b": torch.ones(2, 8)})
        ),
        r"ranks \[2, 4\]",
    ),
    "fused, not 3 N": (
        lambda s: s.update(lightning({}, "transformer_blocks.1.attn.to_qkv", torch.ones(48, 2), torch.ones(2, 48))),
        r"to_qkv as \(48, 48\); the model has \(144, 48\)",
    ),
    "alpha of two numbers": (lambda s: s.update({f"{SQUARE}.alpha": torch.ones(2)}), r"alpha of shape \(2,\) .* wanted one number"),
    "NaN": (lambda s: s[f"{SQUARE}.lora_up.weight"].fill_(math.nan), "not finite in .*to_q.lora_up"),
    "infinite alpha": (lambda s: s.update({f"{SQUARE}.alpha": torch.tensor(math.inf)}), "not finite in .*alpha"),
    "an empty tensor": (lambda s: s.update({f"{SQUARE}.lora_up.weight": torch.ones(48, 0)}), "holds nothing in"),
    "bytes": (lambda s: s.update({f"{SQUARE}.lora_up.weight": torch.ones(48, 4, dtype=torch.uint8)}), "stores .* as uint8"),
    "two spellings": (
        lambda s: s.update({f"{SQUARE}.lora_A.weight": torch.ones(4, 48)}),
        "two styles for the layer .*: lora_A and lora_down",
    ),
    "two adapters": (
        lambda s: s.update({f"img_in.lora_{m}.{a}.weight": torch.ones(48, 48) for m, a in (("A", "one"), ("B", "two"))}),
        r"two styles for the layer img_in: lora_A\.one and lora_A\.two",
    ),
    "two prefixes": (lambda s: s.update({f"transformer.{SQUARE}.diff": torch.ones(48, 48)}), f"two styles for the layer {SQUARE}"),
    "fused and alone": (lambda s: s.update({f"{BLOCK}.attn.to_qkv.diff": torch.ones(144, 48)}), "two styles for the layer"),
    "two kinds": (lambda s: s.update({f"{SQUARE}.diff": torch.ones(48, 48)}), "two styles for the layer .*: diff and lora_down"),
    "two biases": (
        lambda s: s.update({f"{SQUARE}.diff_b": torch.ones(48), f"{SQUARE}.b_norm": torch.ones(48)}),
        "one thing twice for .*to_q: alpha, diff_b, diff_b, down, up",
    ),
    "two magnitudes": (
        lambda s: s.update(
            {
                "img_in.lora_A.weight": torch.ones(2, 64),
                "img_in.lora_B.weight": torch.ones(48, 2),
                "img_in.lora_magnitude_vector": torch.ones(48),
                "img_in.dora_scale": torch.ones(48, 1),
            }
        ),
        "one thing twice for img_in: dora_scale, down, magnitude, up",
    ),
    "a square dora_scale": (
        lambda s: s.update({f"{SQUARE}.dora_scale": torch.ones(48)}),
        r"by rows or by columns\. Use .*\(48, 1\) or \(1, 48\)",
    ),
    "a dora_scale of no axis": (lambda s: s.update({f"{SQUARE}.dora_scale": torch.ones(47, 1)}), r"magnitude \(47, 1\)"),
    "a DoRA of a vector": (
        lambda s: s.update({"txt_norm.diff": torch.ones(64), "txt_norm.dora_scale": torch.ones(64)}),
        "magnitude for txt_norm",
    ),
    "PEFT's magnitude by columns": (
        lambda s: s.update(
            {
                "img_in.lora_A.weight": torch.ones(2, 64),
                "img_in.lora_B.weight": torch.ones(48, 2),
                "img_in.lora_magnitude_vector": torch.ones(64),
            }
        ),
        r"magnitude \(64,\) for img_in",
    ),
    "a text encoder by kohya": (
        lambda s: s.update({"lora_te_layers_0_mlp.alpha": torch.tensor(1.0)}),
        "changes the text encoder: lora_te_layers_0",
    ),
    "a text encoder by diffusers": (
        lambda s: s.update({"text_encoder.layers.0.lora_A.weight": torch.ones(2, 2)}),
        "changes the text encoder",
    ),
    "no keys": (lambda s: s.clear(), "holds no keys"),
}


@pytest.mark.parametrize(("damage", "told"), REFUSALS.values(), ids=REFUSALS)
def test_a_lora_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, damage: Callable[[State], Any], told: str) -> None:
    module, state = make_module(), make_lora()
    damage(state)
    good = save(tmp_path / "good.safetensors", make_lora(layers=["img_in"]))
    bad = save(tmp_path / "the-bad.safetensors", state)
    with pytest.raises(WeightsMismatchError, match=told) as caught:
        fuse_loras(module, [(good, 1.0), (bad, 1.0)])
    assert "the-bad.safetensors" in caught.value.message
    assert caught.value.fix
    check(module, {})


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
def test_a_whole_model_is_no_lora(tmp_path: Path, prefix: str) -> None:
    module = make_module()
    state = {prefix + key: tensor for key, tensor in module.state_dict().items()}
    with pytest.raises(WeightsMismatchError, match=r"a whole model, not a LoRA: .*, and \d+ more"):
        fuse(module, tmp_path, state)


def test_a_lora_of_another_network_is_refused(tmp_path: Path) -> None:
    state = {key.replace("transformer_blocks", "double_blocks"): tensor for key, tensor in make_lora().items()}
    with pytest.raises(WeightsMismatchError, match=r"2 layers, of which the model has none; .* \(nearest: transformer_blocks"):
        fuse(make_module(), tmp_path, state)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{", "cannot read"),
        ("[]", "not an object"),
        ('{"r": 8}', "rank 4 .* and 8 in its metadata"),
        ('{"lora_alpha": 3}', "alpha 1 .* and 3 in its metadata"),
        ('{"lora_alpha": "3"}', "lora_alpha is '3'"),
        ('{"lora_alpha": true}', "lora_alpha is True"),
        ('{"lora_alpha": Infinity}', "lora_alpha is inf"),
        ('{"peft_type": "LOHA"}', "peft_type is 'LOHA'"),
        ('{"transformer.init_lora_weights": "pissa_niter_4"}', "init_lora_weights is 'pissa_niter_4'"),
        ('{"use_rslora": 1}', "use_rslora is 1"),
        ('{"alpha_pattern": {"to_q": "1"}}', "alpha_pattern is"),
        ('{"alpha_pattern": {"(a+)+$": 1}}', "no plain name"),
    ],
)
def test_metadata_that_contradicts_the_file_is_refused(tmp_path: Path, config: str, told: str) -> None:
    module = make_module()
    with pytest.raises(WeightsMismatchError, match=told):
        fuse(module, tmp_path, make_lora(), metadata={"lora_adapter_metadata": config})
    check(module, {})


def test_a_quantized_weight_is_refused(tmp_path: Path) -> None:
    module = make_module()
    layer = module.get_submodule(SQUARE)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(WeightsMismatchError, match=r"to_q\.weight, which is quantized"):
        fuse(module, tmp_path, make_lora())


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_a_strength_is_a_number(tmp_path: Path, strength: float) -> None:
    with pytest.raises(InputError, match="strength"):
        fuse(make_module(), tmp_path, make_lora(), strength)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"PK\x03\x04")
    for read in (lightning_steps, lambda path: fuse_loras(make_module(), [(path, 1.0)])):
        with pytest.raises(CheckpointError, match="no whole safetensors file"):
            read(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    ("name", "metadata", "steps"),
    [
        ("a.safetensors", {"schedule": "lightning", "steps": "4"}, 4),
        ("Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors", {}, 8),
        ("Qwen-Image-Edit-Lightning-4steps-V1.0.safetensors", None, 4),
        # the file knows better than its name
        ("Qwen-Image-Edit-Lightning-8steps-V1.0.safetensors", {"schedule": "lightning", "steps": "4"}, 4),
        ("a-4steps.safetensors", {}, None),
        ("lightning.safetensors", {}, None),
        # what a trainer notes of its own run
        ("a.safetensors", {"steps": "20"}, None),
        ("lightning-strikes-20000steps.safetensors", {"steps": "20000"}, None),
    ],
)
def test_lightning_files_are_told(tmp_path: Path, name: str, metadata: dict[str, str] | None, steps: int | None) -> None:
    assert lightning_steps(save(tmp_path / name, make_lora(), metadata)) == steps


# --- against the libraries


def load_reference() -> QwenImageTransformer2DModel:
    reference = make_transformer(zero_cond_t=True)
    reference.load_state_dict(make_module().state_dict())
    return reference


def check_reference(module: nn.Module, reference: nn.Module) -> None:
    expected = reference.state_dict()
    assert module.state_dict().keys() == expected.keys()
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], **FP32)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("style", BY_DIFFUSERS)
def test_each_style_is_fused_as_by_diffusers(tmp_path: Path, style: str, strength: float) -> None:
    path = save(tmp_path / "lora.safetensors", write_style(style))
    module, reference = make_module(), load_reference()
    assert fuse_loras(module, [(path, strength)]) == len(LAYERS)
    state = QwenImageLoraLoaderMixin.lora_state_dict(path)
    QwenImageLoraLoaderMixin.load_lora_into_transformer(state, reference, adapter_name="default")
    reference.fuse_lora(lora_scale=strength)
    reference.unload_lora()
    check_reference(module, reference)
    assert not torch.equal(reference.img_in.weight, make_module().get_submodule("img_in").weight)


def train(reference: nn.Module, seed: int = 7) -> None:
    """Every tensor of the adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def make_config(peft: ModuleType, **fields: Any) -> Any:
    targets = ["to_q", "to_out.0", "img_mlp.net.0.proj", "norm_out.linear"]
    patterns = {"rank_pattern": {"norm_out.linear": 2}, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 16}}
    return peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=targets, init_lora_weights=False, **patterns, **fields)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
def test_what_diffusers_saves_is_fused_as_peft_merges_it(tmp_path: Path, fields: dict[str, bool]) -> None:
    reference = load_reference()
    reference.add_adapter(make_config(peft, **fields))
    train(reference)
    reference.save_lora_adapter(tmp_path)
    module = make_module()
    assert fuse_loras(module, [(tmp_path / "pytorch_lora_weights.safetensors", 1.0)]) == 7
    reference.fuse_lora()
    reference.unload_lora()
    check_reference(module, reference)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_saves_has_its_alpha_beside_it(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(load_reference(), make_config(peft))
    train(wrapped)
    wrapped.save_pretrained(tmp_path)
    module = make_module()
    assert fuse_loras(module, [(tmp_path / "adapter_model.safetensors", 1.0)]) == 7
    check_reference(module, wrapped.merge_and_unload())
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(WeightsMismatchError, match=r"alpha is in adapter_config\.json"):
        fuse_loras(module, [(tmp_path / "adapter_model.safetensors", 1.0)])


LYCORIS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LoCon": ("locon", "LoConModule", {}),
    "rsLoRA": ("locon", "LoConModule", {"rs_lora": True}),
    "DoRA by rows": ("locon", "LoConModule", {"weight_decompose": True}),
    "DoRA by columns": ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "LoHa": ("loha", "LohaModule", {}),
    "LoHa, decomposed": ("loha", "LohaModule", {"weight_decompose": True}),
    "LoKr": ("lokr", "LokrModule", {"factor": 4}),
    "LoKr, both products": ("lokr", "LokrModule", {"factor": 16, "decompose_both": True}),
    "LoKr, both whole": ("lokr", "LokrModule", {"factor": 4, "full_matrix": True}),
    "LoKr, decomposed": ("lokr", "LokrModule", {"factor": 4, "weight_decompose": True}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", [SQUARE, TALL], ids=["square", "tall"])
# of a DoRA, LyCORIS leaves D at full strength; ours is ComfyUI's reading
@pytest.mark.parametrize(
    ("kind", "strength"),
    [(kind, s) for kind, (_, _, fields) in LYCORIS.items() for s in (1.0, 0.5) if s == 1.0 or "weight_decompose" not in fields],
)
def test_each_kind_is_fused_as_lycoris_computes_it(tmp_path: Path, kind: str, layer: str, strength: float) -> None:
    """With what its layers compute in training: its own merging (4.1.3) scales LoHa and LoKr twice."""
    file, name, fields = LYCORIS[kind]
    made = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)
    flat = "lycoris_" + layer.replace(".", "_")
    linear = make_module().get_submodule(layer)
    adapter = made(flat, linear, multiplier=strength, lora_dim=3, alpha=2.0, **fields).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        state = {f"{flat}.{key}": torch.as_tensor(tensor) for key, tensor in adapter.custom_state_dict().items()}
        adapter.apply_to()
        expected = (linear(torch.eye(48)) - linear.bias).T
    module = make_module()
    fuse(module, tmp_path, state, strength)
    check(module, {f"{layer}.weight": expected.double()})
