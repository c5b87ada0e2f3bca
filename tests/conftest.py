"""Tiny models with random weights, written by diffusers and transformers themselves, for our code to read.

The parts keep their real architecture; only the widths and depths are small. Fresh weights hardly carry a signal, so
they are drawn again with a gain: then each path matters to the picture, and a wrong one shows.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.reference import BASE_SCHEDULER, make_processor
from millicent.model.prompt import SYSTEM_TEXT

# the networks are tiny: more threads would only wait for each other
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
diffusers.logging.set_verbosity_error()

VAE_AREA_PX = 128 * 128
ENCODER_AREA_PX = 112 * 112
HIDDEN = 64
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]


def draw_weights(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Matrices and kernels keep the signal's size, times `gain`; norms stay near 1; biases are small, but not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if ("norm" in name and name.endswith(("weight", "gamma"))) or ".ln_q." in name:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * gain / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.2 * noise)
    return module.eval()


def make_transformer(zero_cond_t: bool) -> diffusers.QwenImageTransformer2DModel:
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    draw_weights(transformer, seed=1, gain=2.0)
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            # sharp attention, and much of it on the text, or a prompt drowns in the mean of all tokens
            for norm in (block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_q, block.attn.norm_added_k):
                norm.weight *= 1.5
            block.attn.add_v_proj.weight *= 8
        # velocities of order 1, as trained ones are, or the latents leave what the VAE can show
        transformer.proj_out.weight /= 64
    return transformer


def make_vae(base_dim: int = 8) -> diffusers.AutoencoderKLQwenImage:
    # the gain makes up for the two taps of three that a single frame never meets
    return draw_weights(diffusers.AutoencoderKLQwenImage(base_dim=base_dim), seed=2, gain=1.5)


def make_tokenizer() -> transformers.Qwen2Tokenizer:
    """Byte-level BPE, trained so far that each word of the template is one token, as in the real vocabulary."""
    texts = [SYSTEM_TEXT, "system", "user", "assistant", "Picture 1:", "make the shirt navy blue", "on a table"]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    made = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    made.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return made


def make_text_encoder(tokenizer: transformers.Qwen2Tokenizer) -> transformers.Qwen2_5_VLForConditionalGeneration:
    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return draw_weights(transformers.Qwen2_5_VLForConditionalGeneration(config), seed=3)


def make_pipeline(kind: str, zero_cond_t: bool, vae_base_dim: int = 8) -> diffusers.DiffusionPipeline:
    tokenizer = make_tokenizer()
    made = {"edit": diffusers.QwenImageEditPipeline, "edit-plus": diffusers.QwenImageEditPlusPipeline}[kind]
    return made(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**BASE_SCHEDULER),
        vae=make_vae(vae_base_dim),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=make_processor(tokenizer, Qwen2VLImageProcessorPil(min_pixels=28 * 28)),
        transformer=make_transformer(zero_cond_t),
    )


def save_pipeline(pipeline: diffusers.DiffusionPipeline, folder: Path) -> Path:
    """A diffusers-layout folder: every part through its own save_pretrained. No card.toml: that is ours."""
    for name, part in pipeline.components.items():
        # the processor's own save_pretrained insists on the video processor
        (part.image_processor if name == "processor" else part).save_pretrained(folder / name)
    pipeline.save_config(folder)
    return folder


def write_card(folder: Path, **changes: Any) -> None:
    """A card.toml whose areas keep the tests fast."""
    card = {
        "name": "tiny",
        "title": "Tiny",
        "pipeline": "edit-plus",
        "vae_area_px": VAE_AREA_PX,
        "encoder_area_px": ENCODER_AREA_PX,
        "steps": 4,
        "schedule": "base",
        "true_cfg": 1.0,
        "negative_prompt": " ",
        "max_prompt_tokens": 64,
        "license": "Apache-2.0",
        "source": "tests/conftest.py",
        **changes,
    }
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in card.items()]
    (folder / "card.toml").write_text("".join(lines) + "checked = 2026-11-23\n")


MakePipeline = Callable[[str, bool], diffusers.DiffusionPipeline]
MakeFolder = Callable[[str, bool], Path]


@pytest.fixture(scope="session")
def reference_pipeline() -> MakePipeline:
    """(kind, zero_cond_t) -> diffusers' pipeline with the tiny weights; made once, not to be changed."""
    return functools.cache(make_pipeline)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory, reference_pipeline: MakePipeline) -> MakeFolder:
    """(kind, zero_cond_t) -> a folder with the same weights and a card; made once, not to be changed."""

    @functools.cache
    def make(kind: str, zero_cond_t: bool) -> Path:
        folder = save_pipeline(reference_pipeline(kind, zero_cond_t), tmp_path_factory.mktemp("tiny"))
        write_card(folder, pipeline=kind, encoder_area_px=VAE_AREA_PX if kind == "edit" else ENCODER_AREA_PX)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_folder(tiny_folders: MakeFolder) -> Path:
    return tiny_folders("edit-plus", True)


@pytest.fixture
def own_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder that a test may break."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def draw_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colored noise."""
    rows = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(rows).resize((width, height), Image.Resampling.BICUBIC)
