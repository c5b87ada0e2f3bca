"""The 20B model's true shapes with random weights, made on the card itself in seconds: speeds without a download of 58 GB.

Nothing is read or written but the demo model's tokenizer and processor, and no weight ever lies on the host. The outliers
are those that the real weights have: a few residual channels 40 times the others, up to 1e6, and a few channels of each
MLP whose activations are 100 times their neighbors'. Random weights pass errors on as trained ones do only roughly, so a
velocity made with them says whether a kernel is right, never how good a number format is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import diffusers
import torch
import transformers
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.reference import SCHEDULERS, make_processor
from millicent import demo
from millicent.engine.editor import find_model
from millicent.engine.loading import Model
from millicent.engine.sampler import BaseSchedule
from millicent.facts.models import ModelCard, find_card
from millicent.model.config import MMDiTConfig, VAEConfig
from millicent.model.mmdit import MMDiT
from millicent.model.picture_processor import PictureProcessor
from millicent.model.text_encoder import TextEncoder, build_plain_network
from millicent.model.tokenizer import read_tokenizer
from millicent.model.vae import VAE, convert_state


@dataclass(frozen=True, slots=True)
class Size:
    """How large every part is, and what an edit of it looks like; the defaults are Qwen-Image-Edit-2511's.

    picture_px, encoder_px: a side of the square picture as the VAE and as the text encoder see it.
    text_tokens: of the pictures, the prompt and the template together, the system prefix cut off.
    """

    name: str = "true"
    layers: int = 60
    heads: int = 24
    head_dim: int = 128
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    vae_base_dim: int = 96
    text_layers: int = 28
    text_hidden: int = 3584
    text_intermediate: int = 18944
    text_heads: int = 28
    text_kv_heads: int = 4
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    vocab: int = 152064
    vision_depth: int = 32
    vision_hidden: int = 1280
    vision_intermediate: int = 3420
    vision_heads: int = 16
    vision_window_px: int = 112
    vision_full_attention: tuple[int, ...] = (7, 15, 23, 31)
    picture_px: int = 1024
    encoder_px: int = 384
    text_tokens: int = 256


TRUE = Size()
TINY = Size(
    name="tiny",
    layers=2,
    heads=3,
    head_dim=32,
    axes_dims_rope=(8, 12, 12),
    vae_base_dim=8,
    text_layers=2,
    text_hidden=64,
    text_intermediate=96,
    text_heads=4,
    text_kv_heads=2,
    mrope_section=(2, 3, 3),
    vocab=1024,
    vision_depth=2,
    vision_hidden=32,
    vision_intermediate=48,
    vision_heads=2,
    vision_window_px=56,
    vision_full_attention=(1,),
    picture_px=128,
    encoder_px=112,
    text_tokens=64,
)
SIZES = {size.name: size for size in (TRUE, TINY)}

RESIDUAL = 1e4  # an ordinary channel of the residual; an outlying one is 40 times it, and its largest values near 1e6
OUTLYING = 40.0
CHANNELS_PER_OUTLIER = 768  # 4 of the residual's 3072 channels, 16 of an MLP's 12288
MLP_OUTLIERS = (40.0, 100.0)
# logits of deviation 2, where a query looks at dozens of keys; at 1 it sees the mean of all 8448, and no error in it
QK_GAIN = 1.5
# the gates are near 0.2, and attention's mean of dozens of values near 0.2: each branch adds about a tenth of the residual
ATTENTION_GAIN = 2.0
MLP_GAIN = 0.5


def make_transformer(
    size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> diffusers.QwenImageTransformer2DModel:
    """diffusers' transformer in 2511's variant (`zero_cond_t`); velocities of order 1."""
    with _build_on(device, dtype):
        transformer = diffusers.QwenImageTransformer2DModel(
            num_layers=size.layers,
            attention_head_dim=size.head_dim,
            num_attention_heads=size.heads,
            joint_attention_dim=size.text_hidden,
            axes_dims_rope=size.axes_dims_rope,
            zero_cond_t=True,
        )
    # its angles are no buffers: made on the host, where every pipeline makes them, they are the same to the last bit
    transformer.pos_embed = QwenEmbedRope(theta=10000, axes_dim=list(size.axes_dims_rope), scale_rope=True)
    generator = _draw(transformer, seed=1)
    _add_outliers(transformer, generator)
    return transformer


def make_vae(size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> diffusers.AutoencoderKLQwenImage:
    """diffusers' VAE with Qwen-Image's own means and deviations."""
    with _build_on(device, dtype):
        vae = diffusers.AutoencoderKLQwenImage(base_dim=size.vae_base_dim)
    _draw(vae, seed=2)
    return vae


def make_text_encoder(
    size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with its LM head, which diffusers runs too. The special tokens are those of the demo's tokenizer."""
    with _build_on(device, dtype):
        encoder = transformers.Qwen2_5_VLForConditionalGeneration(_text_encoder_config(size))
    _draw(encoder, seed=3)
    return encoder


def _text_encoder_config(size: Size) -> transformers.Qwen2_5_VLConfig:
    tokenizer = _read_tokenizer()
    assert len(tokenizer) <= size.vocab
    names = ("image_pad", "video_pad", "vision_start", "vision_end", "endoftext", "im_end")
    tokens = {name: int(tokenizer.convert_tokens_to_ids(f"<|{name}|>")) for name in names}
    text = {
        "vocab_size": size.vocab,
        "hidden_size": size.text_hidden,
        "intermediate_size": size.text_intermediate,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_heads,
        "num_key_value_heads": size.text_kv_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(size.mrope_section)},
        "bos_token_id": tokens["endoftext"],
        "eos_token_id": tokens["im_end"],
    }
    vision = {
        "depth": size.vision_depth,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_intermediate,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.text_hidden,
        "window_size": size.vision_window_px,
        "fullatt_block_indexes": list(size.vision_full_attention),
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokens["image_pad"],
        video_token_id=tokens["video_pad"],
        vision_start_token_id=tokens["vision_start"],
        vision_end_token_id=tokens["vision_end"],
        tie_word_embeddings=False,
    )


def _read_tokenizer() -> transformers.Qwen2Tokenizer:
    tokenizer: transformers.Qwen2Tokenizer = transformers.Qwen2Tokenizer.from_pretrained(demo.folder() / "tokenizer")
    return tokenizer


def make_pipeline(size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> diffusers.QwenImageEditPlusPipeline:
    """All of it, with Lightning's schedule. Draw within benchmarks.reference's mended_positions and picture_areas."""
    tokenizer = _read_tokenizer()
    pipeline = diffusers.QwenImageEditPlusPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS["lightning"]),
        vae=make_vae(size, device, dtype),
        text_encoder=make_text_encoder(size, device, dtype),
        tokenizer=tokenizer,
        processor=make_processor(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(demo.folder() / "processor")),
        transformer=make_transformer(size, device, dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_card(size: Size) -> ModelCard:
    """2511's card (the demo's for a tiny one) with Lightning's four steps and this size's picture areas."""
    card = find_card("qwen-image-edit-2511") if size == TRUE else find_model("demo-base")[2]
    return dataclasses.replace(
        card,
        vae_area_px=size.picture_px**2,
        encoder_area_px=size.encoder_px**2,
        steps=4,
        schedule="lightning",
        true_cfg=1.0,
        lora=None,
    )


def to_millicent(pipeline: diffusers.QwenImageEditPlusPipeline, card: ModelCard) -> Model:
    """Millicent's own networks around the pipeline's tensors; only the VAE's kernels, cut to one tap, are copies.

    All modules are its own, so that speeding it up leaves the pipeline as it was.
    """
    transformer, vae = pipeline.transformer, pipeline.vae
    with torch.device("meta"):
        mmdit = MMDiT(MMDiTConfig.from_dict(dict(transformer.config)))
        flat_vae = VAE(VAEConfig.from_dict(dict(vae.config)))
    mmdit.load_state_dict(transformer.state_dict(), assign=True)
    flat_vae.load_state_dict(convert_state(vae.state_dict()), assign=True)
    encoder = build_plain_network(pipeline.text_encoder.model.config.to_dict())
    encoder.load_state_dict(pipeline.text_encoder.model.state_dict(), assign=True)
    text_encoder = TextEncoder(
        encoder.requires_grad_(False).to(transformer.device),
        read_tokenizer(demo.folder() / "tokenizer"),
        PictureProcessor.from_dict(pipeline.processor.image_processor.to_dict()),
        template=card.pipeline,
        max_prompt_tokens=card.max_prompt_tokens,
    )
    return Model(
        card=card,
        mmdit=mmdit.requires_grad_(False).eval(),
        vae=flat_vae.requires_grad_(False).eval(),
        text_encoder=text_encoder,
        schedule=BaseSchedule.from_dict(dict(pipeline.scheduler.config)),
        device=transformer.device,
        dtype=transformer.dtype,
        wait_for_sha256=lambda: "0" * 64,  # no file to name
    )


@contextmanager
def _build_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What is built within lies on the device, in the dtype, from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _draw(module: nn.Module, seed: int) -> torch.Generator:
    """Matrices and kernels keep the signal's size, norms stay within a tenth of 1, biases are small, but not 0."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):  # the norms; the linears have matrices
            parameter.normal_(1.0, 0.1, generator=generator)
        elif "embed_tokens" in name:
            parameter.normal_(generator=generator)
        elif parameter.ndim >= 2:
            parameter.normal_(0.0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    module.requires_grad_(False).eval()
    return generator


def _add_outliers(transformer: diffusers.QwenImageTransformer2DModel, generator: torch.Generator) -> None:
    """The sizes of the residual, of its outlying channels and of the MLPs'; all scales, so that the norms undo them."""
    img_outliers, txt_outliers = (_scale_embedding(linear, generator) for linear in (transformer.img_in, transformer.txt_in))
    for block in transformer.transformer_blocks:
        attn = block.attn
        for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
            norm.weight *= QK_GAIN
        for linear in (attn.to_out[0], attn.to_add_out):
            linear.weight *= ATTENTION_GAIN * RESIDUAL
        for mlp, outliers in ((block.img_mlp, img_outliers), (block.txt_mlp, txt_outliers)):
            _scale_mlp(mlp, generator)
            # the outlying channels change as their neighbors do, in proportion
            mlp.net[2].weight[outliers] *= OUTLYING
    # else the few outlying channels would be most of the velocity, and the others' errors would drown
    transformer.proj_out.weight[:, img_outliers] /= OUTLYING


def _scale_embedding(linear: nn.Linear, generator: torch.Generator) -> Tensor:
    """Scale a stream's first linear; return its outlying channels."""
    channels = _pick(linear.out_features, generator)
    linear.weight *= RESIDUAL
    linear.weight[channels] *= OUTLYING
    return channels


def _scale_mlp(mlp: FeedForward, generator: torch.Generator) -> None:
    (gelu, _, down) = mlp.net
    up = gelu.proj
    channels = _pick(up.out_features, generator)
    low, high = MLP_OUTLIERS
    scales = torch.rand(len(channels), generator=generator, device=up.weight.device) * (high - low) + low
    up.weight[channels] *= scales[:, None].to(up.weight.dtype)
    # so that the many ordinary channels carry as much of the sum as the few outlying ones
    down.weight[:, channels] /= 4
    down.weight *= MLP_GAIN * RESIDUAL


def _pick(channels: int, generator: torch.Generator) -> Tensor:
    """Some of the channels, as indices: one of every 768, and at least one."""
    count = max(1, channels // CHANNELS_PER_OUTLIER)
    return torch.randperm(channels, generator=generator, device=generator.device)[:count]
