"""The demo model's networks: Qwen-Image-Edit-2511's architecture at a size that fits inside the package.

About 28 MB in BF16 altogether: transformer 8.2M parameters, VAE 3.6M (of which 2.3M are temporal taps that a single
frame never meets and that stay zero), text encoder 1.4M.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from millicent.model.config import MMDiTConfig, VAEConfig
from millicent.model.mmdit import MMDiT
from millicent.model.vae import VAE

TRANSFORMER = MMDiTConfig(
    num_layers=6,
    attention_head_dim=64,
    num_attention_heads=3,
    joint_attention_dim=128,
    axes_dims_rope=(8, 28, 28),
    zero_cond_t=True,
)
VAE_SHAPE = VAEConfig(base_dim=16, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
ENCODER_HEADS = 4
ENCODER_LAYERS = 4
VISION_DIM = 96
VISION_LAYERS = 2


def build_vae() -> VAE:
    """A VAE that starts as a nearly deterministic autoencoder: unit gain along the skip path, small residual branches."""
    vae = VAE(VAE_SHAPE)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            gain = 0.3 if name.endswith(("conv2", "proj")) else 1.4 if name.endswith("conv1") else 1.0
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=gain / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():  # with unit posterior noise from the start it would learn far more slowly
        vae.quant_conv.weight[VAE_SHAPE.z_dim :] *= 0.1
        log_variance = vae.quant_conv.get_parameter("bias")[VAE_SHAPE.z_dim :]
        log_variance.fill_(-6.0)
    return vae


def build_transformer() -> MMDiT:
    """A transformer whose blocks start close to the identity and whose output starts at zero."""
    transformer = MMDiT(TRANSFORMER)
    dim = TRANSFORMER.dim
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            for stream in ("img_mod", "txt_mod"):
                block.get_parameter(f"{stream}.1.weight").mul_(0.1)
                bias = block.get_parameter(f"{stream}.1.bias").zero_().view(6, dim)
                bias[2::3] = 0.25  # the two gates
        for layer in (transformer.norm_out.linear, transformer.proj_out):
            layer.weight.zero_()
            layer.bias.zero_()
    return transformer


def encoder_config(vocab_size: int, special: dict[str, int]) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL's configuration at the demo's size; `special` maps special tokens to their ids."""
    dim = TRANSFORMER.joint_attention_dim
    half = dim // ENCODER_HEADS // 2
    side = half * 3 // 8
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": 3 * dim,
        "num_hidden_layers": ENCODER_LAYERS,
        "num_attention_heads": ENCODER_HEADS,
        "num_key_value_heads": ENCODER_HEADS // 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_theta": 1e6,
            "rope_type": "default",
            "mrope_section": [half - 2 * side, side, side],
        },
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
    }
    vision: dict[str, Any] = {
        "depth": VISION_LAYERS,
        "hidden_size": VISION_DIM,
        "intermediate_size": 2 * VISION_DIM,
        "num_heads": VISION_DIM // 32,
        "out_hidden_size": dim,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [VISION_LAYERS - 1],
        "in_channels": 3,
        "initializer_range": 0.05,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def build_encoder(vocab_size: int, special: dict[str, int]) -> Qwen2_5_VLModel:
    return Qwen2_5_VLModel(encoder_config(vocab_size, special))
