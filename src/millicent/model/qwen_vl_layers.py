"""Qwen2.5-VL's parameters, by the names and in the shapes that transformers gives them, for model/qwen_vl.py to run.

There is no forward pass here: model/qwen_vl.py has it, and takes these modules or transformers' own. That transformers' need
not be imported for them saves a cold start seconds: its modeling code brings torch's compiler and SciPy along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from millicent.errors import CheckpointError

# transformers writes it down for the vision tower alone, as no config has it
VISION_NORM_EPS = 1e-6


class QwenVL(nn.Module):
    """Qwen2.5-VL without its LM head, as transformers' Qwen2_5_VLModel has it.

    config: transformers' Qwen2_5_VLConfig. Raises CheckpointError for an activation other than SiLU.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision_config)
        self.language_model = LanguageModel(config.text_config)


class VisionTower(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)


class PatchEmbed(nn.Module):
    """proj.weight: (C, channels, frames, patch, patch), whose stride is its kernel."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)


class VisionBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm1 = Norm(config.hidden_size, VISION_NORM_EPS)
        self.norm2 = Norm(config.hidden_size, VISION_NORM_EPS)
        self.attn = VisionAttention(config.hidden_size)
        self.mlp = GatedMLP(config, bias=True)


class VisionAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class PatchMerger(nn.Module):
    """merge x merge patches become one token of the language model."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = Norm(config.hidden_size, VISION_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, config.out_hidden_size))


class LanguageModel(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        # from values: to draw its own on the meta device torch imports its compiler
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(LanguageLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class LanguageLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = LanguageAttention(config)
        self.mlp = GatedMLP(config, bias=False)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)


class LanguageAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        head_dim = dim // heads
        self.q_proj = nn.Linear(dim, heads * head_dim)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)


class GatedMLP(nn.Module):
    def __init__(self, config: Any, *, bias: bool) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise CheckpointError(
                f"The text encoder's config asks for the activation {config.hidden_act!r}; Qwen-Image-Edit has silu.",
                "Use the text encoder of a Qwen-Image-Edit, -2509 or -2511 folder.",
            )
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act_fn = nn.SiLU()


class Norm(nn.Module):
    """An RMSNorm's weight; variance_epsilon: what is added to the mean of the squares."""

    def __init__(self, dim: int, variance_epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.variance_epsilon = variance_epsilon
