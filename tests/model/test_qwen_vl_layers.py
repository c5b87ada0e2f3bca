"""Our modules of Qwen2.5-VL against transformers' own."""

import copy
from typing import Any

import pytest
import torch
from conftest import make_text_encoder, make_tokenizer

from millicent import demo
from millicent.checkpoint.folder import read_json
from millicent.errors import CheckpointError
from millicent.model.text_encoder import build_network, build_plain_network

DEMO = read_json(demo.folder() / "text_encoder" / "config.json")
# text_encoder/config.json of the published model, what is transformers' default left out
TRUE: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24], "rope_type": "default"},
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
}


def random_config() -> dict[str, Any]:
    config: dict[str, Any] = make_text_encoder(make_tokenizer()).config.to_dict()
    # so that no number of the language model's norms is the vision tower's
    config["text_config"]["rms_norm_eps"] = 3e-5
    return config


@pytest.mark.parametrize("config", [TRUE, DEMO, random_config()], ids=["true", "demo", "random"])
def test_parameters_are_transformers_own(config: dict[str, Any]) -> None:
    ours, theirs = build_network(copy.deepcopy(config)), build_plain_network(copy.deepcopy(config))
    for network in (ours, theirs):
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not network.training
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert list(found) == list(wanted)
    assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
        key: (value.shape, value.dtype) for key, value in wanted.items()
    }


@pytest.mark.parametrize("config", [TRUE, DEMO, random_config()], ids=["true", "demo", "random"])
def test_what_is_no_parameter_is_transformers_own(config: dict[str, Any]) -> None:
    ours, theirs = build_network(copy.deepcopy(config)), build_plain_network(copy.deepcopy(config))
    epsilons = [
        {name: module.variance_epsilon for name, module in network.named_modules() if hasattr(module, "variance_epsilon")}
        for network in (ours, theirs)
    ]
    assert epsilons[0] == epsilons[1]
    modules = dict(theirs.named_modules())
    x = torch.linspace(-4, 4, 100)
    activations = [name for name, _ in ours.named_modules() if name.endswith("act_fn") or name == "visual.merger.mlp.1"]
    assert len(activations) == ours.config.vision_config.depth + ours.config.text_config.num_hidden_layers + 1
    for name in activations:
        assert torch.equal(ours.get_submodule(name)(x), modules[name](x))
    for name in ("", "visual", "language_model"):
        assert ours.get_submodule(name).config.to_dict() == modules[name].config.to_dict()  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_another_activation_is_refused(part: str) -> None:
    config = copy.deepcopy(DEMO)
    config[part]["hidden_act"] = "gelu"
    with pytest.raises(CheckpointError, match="'gelu'"):
        build_network(config)
