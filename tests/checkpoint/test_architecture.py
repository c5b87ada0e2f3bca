"""Which network a file holds, against the networks themselves and the names that the makers write."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from conftest import make_transformer
from diffusers import QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from millicent import demo
from millicent.checkpoint.architecture import (
    PREFIXES,
    Found,
    find_part,
    strip_prefix,
    text_encoder_name,
    text_encoder_tensors,
    transformer_config,
    transformer_tensors,
)
from millicent.checkpoint.header import TensorInfo, read_header
from millicent.errors import CheckpointError
from millicent.model.config import MMDiTConfig, VAEConfig
from millicent.model.mmdit import MMDiT
from millicent.model.vae import VAE


def infos(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> dict[str, TensorInfo]:
    return {f"{prefix}{key}": TensorInfo("BF16", shape, 0, 0) for key, shape in shapes.items()}


def as_json(config: MMDiTConfig) -> dict[str, Any]:
    """The config as diffusers' config.json writes it, without what no shape tells."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()}
    return {key: value for key, value in values.items() if key != "zero_cond_t"}


def test_the_published_transformer_has_1933_tensors_and_20_billion_parameters() -> None:
    expected = transformer_tensors(as_json(MMDiTConfig()))
    with torch.device("meta"):
        network, diffusers = MMDiT(MMDiTConfig()), QwenImageTransformer2DModel()
    assert expected == {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert expected == {key: tuple(tensor.shape) for key, tensor in diffusers.state_dict().items()}
    assert len(expected) == 1933
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == pytest.approx(20.43e9, rel=1e-3)


@pytest.mark.parametrize("config", [MMDiTConfig(), MMDiTConfig(num_layers=43)])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_transformer_is_found_behind_its_prefix_and_measured(config: MMDiTConfig, prefix: str) -> None:
    tensors = infos(transformer_tensors(as_json(config)), prefix)
    assert find_part(tensors.keys()) == Found("transformer", prefix)
    bare = strip_prefix(tensors, prefix, "x")
    assert MMDiTConfig.from_dict(transformer_config(bare, "x")) == config


def test_diffusers_own_small_transformer_is_found() -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in make_transformer(False).state_dict().items()}
    assert find_part(shapes.keys()) == Found("transformer")
    config = transformer_config(infos(shapes), "x")
    assert (config["num_layers"], config["attention_head_dim"], config["num_attention_heads"]) == (2, 16, 3)


def test_vaes_of_both_namings() -> None:
    with torch.device("meta"):
        assert find_part(VAE(VAEConfig()).state_dict().keys()) == Found("vae")
    assert find_part(["decoder.middle.0.residual.0.gamma", "conv1.weight"]) == Found("vae")


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", ""])
def test_text_encoders_of_each_naming(prefix: str) -> None:
    assert find_part([f"{prefix}layers.0.self_attn.k_proj.bias", "visual.patch_embed.proj.weight"]) == Found("text_encoder")


LAYER = "transformer_blocks.0.attn.to_q"
LORAS = {
    "peft": [f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight"],
    "adapter": [f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight"],
    "comfy": [f"diffusion_model.{LAYER}.lora_down.weight", f"diffusion_model.{LAYER}.lora_up.weight"],
    "lightning": [f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight", f"{LAYER}.alpha"],
    "kohya": [
        "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight",
        "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight",
    ],
    "lycoris": ["lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "lycoris_transformer_blocks_0_attn_to_q.lokr_w2_a"],
    "loha": [f"{LAYER}.hada_w1_a", f"{LAYER}.hada_w1_b", f"{LAYER}.hada_w2_a", f"{LAYER}.hada_w2_b"],
    "old": [f"{LAYER}.lora_linear_layer.down.weight", f"{LAYER}.lora_linear_layer.up.weight"],
    "full": [f"diffusion_model.{LAYER}.diff", f"diffusion_model.{LAYER}.diff_b"],
}


@pytest.mark.parametrize("keys", LORAS.values(), ids=LORAS.keys())
def test_a_lora_is_no_base_model(keys: list[str]) -> None:
    assert find_part(keys) == Found("lora")


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("model.diffusion_model.txt_in.text_norm.weight", "Qwen-Image-2.1"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("model.diffusion_model.blocks.0.self_attn.q.weight", "Wan"),
        ("something.weight", "an unknown network"),
    ],
)
def test_other_families_are_named(key: str, family: str) -> None:
    found = find_part([key])
    assert (found.part, found.family) == ("other", family)


def test_an_all_in_one_file() -> None:
    transformer = [f"model.diffusion_model.{key}" for key in transformer_tensors(as_json(MMDiTConfig(num_layers=1)))]
    others = ["text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.k_proj.bias", "vae.conv1.weight"]
    assert find_part([*transformer, *others]) == Found("all-in-one")


def test_what_is_not_whole_is_refused() -> None:
    shapes = transformer_tensors(as_json(MMDiTConfig(num_layers=4)))
    without_block = {key: shape for key, shape in shapes.items() if not key.startswith("transformer_blocks.2.")}
    with pytest.raises(CheckpointError, match="has a block 3, but no block 2"):
        transformer_config(infos(without_block), "x")
    with pytest.raises(CheckpointError, match=r"img_in\.bias is missing"):
        transformer_config(infos({k: s for k, s in shapes.items() if k != "img_in.bias"}), "x")
    with pytest.raises(CheckpointError, match="256 values a patch"):
        transformer_config(infos(shapes | {"proj_out.bias": (256,)}), "x")
    with pytest.raises(CheckpointError, match="without the prefix"):
        strip_prefix(infos(shapes, "model.") | infos({"other.weight": (1,)}), "model.", "x")


def test_the_published_text_encoder_is_listed_as_transformers_builds_it() -> None:
    """Qwen2.5-VL-7B's shape: 28 layers of 3584, a vision tower of 32 blocks of 1280."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
    )  # fmt: skip
    with torch.device("meta"):
        network = Qwen2_5_VLModel(config)
    expected = text_encoder_tensors(config.to_dict())
    assert expected == {key: tuple(tensor.shape) for key, tensor in network.named_parameters()}
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == pytest.approx(7.75e9, rel=0.01)


def test_the_demos_text_encoder_is_listed_too() -> None:
    folder = demo.folder() / "text_encoder"
    expected = text_encoder_tensors(json.loads((folder / "config.json").read_text()))
    held = read_header(folder / "model.safetensors").tensors
    assert expected == {text_encoder_name(key): info.shape for key, info in held.items()}
