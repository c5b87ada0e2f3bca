"""The encoder's linears joined and quantized, against transformers' own and against products in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import draw_picture
from test_reading import RELATIVE, load_encoder
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLModel

from millicent.engine.fast_encoder import quantize_encoder
from millicent.engine.reading import Reader
from millicent.formats.bf16 import BF16Linear
from millicent.formats.fp8 import FP8Linear, quantize
from millicent.formats.scaled import ScaledLinear
from millicent.model.qwen_vl import encode_vision, plan_vision

CPU = torch.device("cpu")
PICTURES = [draw_picture(56, 84), draw_picture(112, 56, seed=1)]
PROMPT = "make the shirt navy blue"


def make_network(intermediate: int = 60) -> Any:
    """A vision tower whose MLPs' inner width 16 does not divide; every side besides is a multiple of 16."""
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": intermediate, "num_heads": 2, "out_hidden_size": 64}
    torch.manual_seed(7)
    config = Qwen2_5_VLConfig(
        text_config={**text, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "fullatt_block_indexes": [1], "window_size": 56},
    )
    network = Qwen2_5_VLModel(config).requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) / 4)
    return network


def see(network: Any) -> Tensor:
    pixels = torch.randn(60, 1176, generator=torch.Generator().manual_seed(5))
    plan = plan_vision([(1, 6, 10)], network.config.vision_config)
    return encode_vision(network.visual, pixels, plan)[0]


def linears(network: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


def test_joined_products_read_what_transformers_reads(tiny_folder: Path) -> None:
    encoder = load_encoder(tiny_folder)
    expected, _ = encoder.encode([PROMPT], [PICTURES])
    quantize_encoder(encoder.network, CPU, "bf16")
    found = Reader(encoder, 0).read(PROMPT, PICTURES)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=RELATIVE * expected.abs().max().item())
    # 2 layers of qkv, o, gate and up, down; 2 blocks of the same; the merger's two
    assert len(linears(encoder.network, BF16Linear)) == 2 * 4 + 2 * 4 + 2
    assert not linears(encoder.network, nn.Linear)


def test_zeros_that_widen_an_mlp_change_nothing() -> None:
    network = make_network(intermediate=60)
    expected = see(network)
    quantize_encoder(network, CPU, "bf16")
    assert network.visual.blocks[0].mlp.down_proj.weight.shape == (32, 64)
    torch.testing.assert_close(see(network), expected, rtol=0.0, atol=RELATIVE * expected.abs().max().item())


@pytest.mark.parametrize("vision", [False, True])
def test_fp8_takes_every_linear_that_it_can(vision: bool) -> None:
    network = make_network()
    untouched = {name: copy.deepcopy(parameter) for name, parameter in network.named_parameters() if parameter.ndim != 2}
    quantize_encoder(network, CPU, "fp8", vision=vision)
    assert len(linears(network, FP8Linear)) == 2 * 4 + vision * (2 * 4 + 2)
    assert len(linears(network, BF16Linear)) == (not vision) * (2 * 4 + 2)
    for name in ("visual.patch_embed.proj.weight", "language_model.norm.weight", "visual.merger.ln_q.weight"):
        assert torch.equal(network.get_parameter(name), untouched[name])


def test_fp8_is_near_in_the_measure_of_its_codes(tiny_folder: Path) -> None:
    encoder = load_encoder(tiny_folder)
    expected, _ = encoder.encode([PROMPT], [PICTURES])
    quantize_encoder(encoder.network, CPU)
    found = Reader(encoder, 0).read(PROMPT, PICTURES)
    # e4m3 has 3 bits after the leading one: each side of each product is off by up to 2^-4, on average by 2^-5.4; a dozen
    # products lie one behind another, and add up as their squares do
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-3 < error < 2**-5.4 * (2 * 12) ** 0.5


def test_a_joined_product_is_the_product_of_the_codes_of_each() -> None:
    network = make_network()
    layer = network.language_model.layers[0].self_attn
    parts = [copy.deepcopy(part) for part in (layer.q_proj, layer.k_proj, layer.v_proj)]
    quantize_encoder(network, CPU)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    codes, scales = quantize(x)
    rows = codes.double() * scales
    expected = [F.linear(rows, (c := quantize(part.weight))[0].double() * c[1], part.bias.double()) for part in parts]
    # rounded to BF16 on the way out, and the bias before
    torch.testing.assert_close(layer.qkv_proj(x).double(), torch.cat(expected, 1), rtol=2**-8, atol=2**-8)


def test_codes_of_a_file_are_kept_bit_for_bit() -> None:
    network = make_network()
    kept: dict[str, ScaledLinear] = {}
    for name, linear in [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]:
        codes, scales = quantize(linear.weight)
        kept[name] = ScaledLinear(codes, scales.amax().reshape(1, 1) if "k_proj" in name else scales, linear.bias)
        network.set_submodule(name, kept[name])
    expected = see(network)
    quantize_encoder(network, CPU)
    layer, block = network.language_model.layers[1], network.visual.blocks[1]
    for made, names in (
        (layer.self_attn.qkv_proj, [f"language_model.layers.1.self_attn.{part}_proj" for part in "qkv"]),
        (layer.mlp.gate_up_proj, [f"language_model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]),
        (layer.mlp.down_proj, ["language_model.layers.1.mlp.down_proj"]),
    ):
        assert isinstance(made, FP8Linear)
        parts = [kept[name] for name in names]
        assert torch.equal(made.weight.view(torch.uint8), torch.cat([part.weight for part in parts]).view(torch.uint8))
        assert torch.equal(made.weight_scale, torch.cat([part.weight_scale.expand(part.out_features, 1) for part in parts]))
    # gate's 60 rows and 4 of zeros, then up's
    gate, up = block.mlp.gate_up_proj.weight.float().split(64)
    assert torch.equal(gate[:60], kept["visual.blocks.1.mlp.gate_proj"].weight.float())
    assert torch.equal(up[:60], kept["visual.blocks.1.mlp.up_proj"].weight.float())
    assert not gate[60:].any()
    assert not up[60:].any()
    assert ((see(network) - expected).norm() / expected.norm()).item() < 2**-5.4 * 12**0.5  # of the activations alone


def test_other_codes_become_numbers_first() -> None:
    network = make_network()
    linear = network.language_model.layers[0].mlp.down_proj
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    codes = (linear.weight / scale).round().to(torch.int8)
    network.language_model.layers[0].mlp.down_proj = ScaledLinear(codes, scale, None)
    quantize_encoder(network, CPU)
    wanted, scales = quantize(codes.float() * scale)
    made = network.language_model.layers[0].mlp.down_proj
    assert torch.equal(made.weight.float(), wanted.float())
    assert torch.equal(made.weight_scale, scales)
