"""Sizes by arithmetic: equal to those of the real modules, laid out as the engine lays them out, on no device at all."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from millicent import demo
from millicent.engine.blocks import FastBlock, make_block
from millicent.engine.fast_encoder import quantize_encoder
from millicent.engine.linears import LINEARS
from millicent.engine.planner import FORMAT_BYTES, Plan
from millicent.engine.settings import Format
from millicent.errors import CheckpointError
from millicent.formats import nvfp4
from millicent.formats.nvfp4 import NVFP4Linear
from millicent.model import sizes
from millicent.model.config import MMDiTConfig, VAEConfig
from millicent.model.layers import Block
from millicent.model.mmdit import MMDiT
from millicent.model.modulation import FINAL, table_shapes
from millicent.model.sizes import QwenVLSizes, Workload
from millicent.model.text_encoder import build_network
from millicent.model.vae import VAE

META = torch.device("meta")
TRUE = MMDiTConfig()
QWEN: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


def tensors_of(found: nn.Module) -> Iterator[Tensor]:
    yield from found.parameters()
    yield from found.buffers()


def size_bytes(found: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(found))


@cache
def true_mmdit() -> MMDiT:
    with META:
        return MMDiT(TRUE).to(torch.bfloat16)


def plan_of(number_format: Format, down: bool = False, edges: int = 0) -> Plan:
    return Plan(number_format, "bf16", "math", False, down, edges, ())


def laid_out(number: int, plan: Plan) -> FastBlock:
    """A block as engine/linears.py makes it; NVFP4's own quantization looks at values, which are nowhere here."""
    block = true_mmdit().transformer_blocks[number]
    assert isinstance(block, Block)

    def make(name: str, modules: Any) -> Any:
        wanted = plan.format_of(name, TRUE.num_layers)
        weight, bias = torch.cat([m.weight for m in modules]), torch.cat([m.bias for m in modules])
        if wanted != "nvfp4":
            return LINEARS[wanted].from_weight(weight, bias)
        rows, columns = weight.shape
        scales = nvfp4.swizzle(torch.empty(rows, columns // 16).to(torch.float8_e4m3fn))
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=META)
        return NVFP4Linear(codes, scales, bias, torch.empty((), device=META))

    return make_block(block, f"transformer_blocks.{number}", make, META)


@pytest.mark.parametrize("number_format", get_args(Format))
def test_a_block_is_as_large_as_the_real_one(number_format: Format) -> None:
    plan = plan_of(number_format)
    assert sizes.block_bytes(TRUE, 7, plan.format_of) == size_bytes(laid_out(7, plan))


@pytest.mark.parametrize(("down", "edges", "number"), [(True, 0, 7), (False, 2, 1), (False, 2, 58), (True, 2, 2)])
def test_a_block_of_two_formats_is_as_large_as_the_real_one(down: bool, edges: int, number: int) -> None:
    plan = plan_of("fp8", down, edges)
    assert sizes.block_bytes(TRUE, number, plan.format_of) == size_bytes(laid_out(number, plan))


@pytest.mark.parametrize("number_format", get_args(Format))
def test_a_format_takes_the_bytes_that_the_loader_counts_with(number_format: Format) -> None:
    """engine/planner.py's share of a weight leaves out scales and biases, some thousandths."""
    matrix = sizes.Matrix("any", 3072, 12288, has_bias=False)
    assert matrix.size_bytes(number_format) == pytest.approx(matrix.values * FORMAT_BYTES[number_format], rel=1e-3)


def test_the_transformer_has_as_many_parameters_as_the_real_one() -> None:
    assert sizes.transformer_parameters(TRUE) == sum(p.numel() for p in true_mmdit().parameters())


def test_the_edges_and_the_modulation_are_as_large_as_the_real_ones() -> None:
    network = true_mmdit()
    edges = [network.img_in, network.txt_in, network.txt_norm, network.proj_out, network.time_text_embed]
    assert sizes.edge_bytes(TRUE) == sum(size_bytes(part) for part in edges)
    seen = [p for name, p in network.named_parameters() if "_mod." in name or "norm_out" in name]
    assert sizes.modulation_parameters(TRUE) == sum(p.numel() for p in seen)


@pytest.mark.parametrize("timesteps", [1, 4, 8])
def test_the_table_has_a_row_for_each_timestep(timesteps: int) -> None:
    """In 2511's variant references have vectors of their own, and the engine keeps room for them in every variant."""
    with META:
        network = MMDiT(MMDiTConfig(zero_cond_t=True, num_layers=3))
    shapes = table_shapes(network, timesteps)
    # the last norm sees the target alone
    values = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name != FINAL)
    final = timesteps * 2 * TRUE.dim
    assert sizes.table_bytes(MMDiTConfig(num_layers=3), timesteps) == 2 * (values + final)


@pytest.mark.parametrize("number_format", ["bf16", "fp8"])
def test_the_text_encoder_is_as_large_as_the_real_one(number_format: Any) -> None:
    with META:
        network = build_network(QWEN).to(torch.bfloat16)
    quantize_encoder(network, META, number_format)
    table: Any = network.language_model
    embedding = size_bytes(table.embed_tokens)
    assert sizes.embedding_bytes(QwenVLSizes()) == embedding
    assert sizes.encoder_bytes(QwenVLSizes(), number_format) == size_bytes(network) - embedding


@pytest.mark.parametrize("config", [VAEConfig(), VAEConfig(base_dim=16), VAEConfig(dim_mult=(1, 2, 4), num_res_blocks=1)])
def test_the_vae_is_as_large_as_the_real_one(config: VAEConfig) -> None:
    with META:
        assert sizes.vae_bytes(config) == size_bytes(VAE(config).to(torch.bfloat16))


def test_the_demo_s_networks_are_as_large_as_its_files_say() -> None:
    folder = demo.folder()
    config = MMDiTConfig.from_dict(json.loads((folder / "transformer" / "config.json").read_text()))
    with META:
        assert sizes.transformer_parameters(config) == sum(p.numel() for p in MMDiT(config).parameters())
    described = json.loads((folder / "text_encoder" / "config.json").read_text())
    network: Any = build_network(described).to(torch.bfloat16)
    assert sizes.embedding_bytes(QwenVLSizes.from_dict(described)) == size_bytes(network.language_model.embed_tokens)


def test_both_layouts_of_an_encoder_s_config_are_read() -> None:
    flat = {**QWEN["text_config"], "vision_config": QWEN["vision_config"]}
    assert QwenVLSizes.from_dict(QWEN) == QwenVLSizes.from_dict(flat) == QwenVLSizes()
    with pytest.raises(CheckpointError, match="lacks num_hidden_layers"):
        QwenVLSizes.from_dict({"vision_config": {}})


def counted(run: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def test_the_vae_s_flop_are_those_that_torch_counts() -> None:
    config = VAEConfig(base_dim=16)
    with META:
        vae = VAE(config)
        encode = counted(lambda: vae.moments(torch.empty(1, 3, 64, 96)))
        decode = counted(lambda: vae.reconstruct(torch.empty(1, 16, 8, 12)))
    pixels = 64 * 96
    assert sizes.vae_flop(config, sizes.vae_encoder(config), pixels) == pytest.approx(encode, rel=0.01)
    assert sizes.vae_flop(config, sizes.vae_decoder(config), pixels) == pytest.approx(decode, rel=0.01)


def test_a_step_s_flop_are_those_that_torch_counts() -> None:
    """But for the edges, a thousandth, and the last block, of which the engine leaves out what nothing is drawn from."""
    config, work = MMDiTConfig(num_layers=4), Workload(width=256, height=256, reference_px=65536)
    shapes, tokens = [(16, 16), (16, 16)], work.target_tokens + work.reference_tokens
    with META:
        network = MMDiT(config)
        whole = counted(lambda: network(torch.empty(1, tokens, 64), torch.empty(1, work.text_tokens, 3584), torch.empty(1), shapes))
    flop = sizes.step_flop(config, work)
    last = 2 * 9 * config.dim**2 * (work.reference_tokens + work.text_tokens)
    last += 4 * config.dim * flop.tokens * (work.reference_tokens + work.text_tokens)
    mod = 2 * sizes.modulation_parameters(config)
    assert flop.total + last + mod == pytest.approx(whole, rel=0.01)


def test_a_step_is_as_the_budget_says() -> None:
    """diffusers' edit with one reference and 384 tokens of text: 111.3 and 5.2 TFLOP of products, 54.2 of attention."""
    flop = sizes.step_flop(TRUE, Workload(prompt_tokens=188))
    assert flop.linear / 1e12 == pytest.approx(116.5, rel=0.01)
    assert flop.attention / 1e12 == pytest.approx(54.2, rel=0.02)


def test_reuse_leaves_out_the_references() -> None:
    whole, later = (sizes.step_flop(TRUE, Workload(), reuses=reuses) for reuses in (False, True))
    assert later.tokens == whole.tokens - 4096
    assert 0.5 < later.total / whole.total < 0.55


def test_tokens_of_an_edit() -> None:
    work = Workload()
    assert (work.target_tokens, work.reference_tokens, work.picture_tokens, work.text_tokens) == (4096, 4096, 196, 256)
    assert Workload(encoder_px=1_048_576).picture_tokens == 1369
