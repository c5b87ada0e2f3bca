"""Our modules of Qwen2.5-VL against transformers' own."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from conftest import make_text_encoder, make_tokenizer
from transformers import Qwen2_5_VLConfig

from millicent import demo
from millicent.checkpoint.folder import read_json
from millicent.errors import CheckpointError
from millicent.model.qwen_vl_config import QwenVLConfig
from millicent.model.sizes import QwenVLSizes
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

# as transformers 4.5x writes it: the language model's numbers twice, with a "null" here and there
FLAT_AND_NESTED: dict[str, Any] = {
    **TRUE,
    "text_config": {
        **{key: value for key, value in TRUE.items() if key not in ("vision_config", "num_key_value_heads")},
        "model_type": "qwen2_5_vl_text",
        "num_key_value_heads": None,
        "layer_types": ["full_attention"] * 28,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    "image_token_id": 151655,
    "vision_end_token_id": 151653,
    "vision_config": {**TRUE["vision_config"], "in_chans": 3, "spatial_patch_size": 14},
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


@pytest.mark.parametrize("config", [TRUE, FLAT_AND_NESTED, DEMO, random_config()], ids=["true", "newer", "demo", "random"])
def test_the_config_is_what_transformers_reads(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    ours, theirs = QwenVLConfig.from_dict(config), Qwen2_5_VLConfig.from_dict(copy.deepcopy(config))
    assert config == before
    for found, wanted in ((ours, theirs), (ours.text_config, theirs.text_config), (ours.vision_config, theirs.vision_config)):
        for field in dataclasses.fields(found):
            if field.name not in ("text_config", "vision_config", "rope_parameters"):
                told = getattr(wanted, field.name)
                assert getattr(found, field.name) == (tuple(told) if isinstance(told, list) else told), field.name
    assert QwenVLConfig.from_dict(ours.to_dict()) == ours
    assert QwenVLSizes.from_dict(ours.to_dict()) == QwenVLSizes.from_dict(theirs.to_dict())
    for part in ("text_config", "vision_config"):
        rope, read = getattr(ours, part).rope_parameters, getattr(theirs, part).rope_parameters
        assert rope.items() <= read.items(), part
    assert ours.text_config.rope_parameters.keys() >= {"rope_type", "rope_theta", "mrope_section"}


def test_what_slides_is_seen_as_transformers_sees_it() -> None:
    for changes in ({"sliding_window": 64}, {"max_window_layers": 5}, {"max_window_layers": None}):
        config = {**TRUE, "use_sliding_window": True, **changes}
        if changes.get("max_window_layers", 0) is None:
            del config["max_window_layers"]
        wanted = Qwen2_5_VLConfig.from_dict(copy.deepcopy(config)).text_config.layer_types
        assert QwenVLConfig.from_dict(config).text_config.layer_types == tuple(wanted)


BAD_CONFIGS = {
    "hidden_size": (None, "lacks hidden_size"),
    "num_hidden_layers": ("28", "num_hidden_layers = '28'"),
    "vocab_size": (0, "vocab_size = 0"),
    "rms_norm_eps": (float("nan"), "rms_norm_eps = nan"),
    "num_key_value_heads": (5, "5 of keys and values"),
    "layer_types": ([28], "words was wanted"),
    "rope_theta": (-1.0, "rope_theta = -1.0"),
    "rope_scaling": ({"type": "mrope"}, "mrope_section is None"),
    "vision_config": ({}, "lacks depth"),
    "text_config": ([1], "an object was wanted"),
    "image_token_id": (True, "image_token_id = True"),
}


@pytest.mark.parametrize("key", BAD_CONFIGS)
def test_a_config_that_cannot_be_is_refused(key: str) -> None:
    value, told = BAD_CONFIGS[key]
    with pytest.raises(CheckpointError, match=told):
        build_network({**TRUE, key: value})


def test_a_vision_tower_that_cannot_be_is_refused() -> None:
    for changes, told in (
        ({"num_heads": 3}, "for 3 heads"),
        ({"window_size": 100}, "windows of 100"),
        ({"patch_size": [14, 14]}, "patch_size"),
        ({"fullatt_block_indexes": 7}, "whole numbers"),
    ):
        with pytest.raises(CheckpointError, match=told):
            build_network({**TRUE, "vision_config": {**TRUE["vision_config"], **changes}})


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_another_activation_is_refused(part: str) -> None:
    config = copy.deepcopy(DEMO)
    config[part]["hidden_act"] = "gelu"
    with pytest.raises(CheckpointError, match="'gelu'"):
        build_network(config)
