"""The text encoder's forward pass for whole training batches, over the weights of transformers' own modules.

transformers walks over pictures one at a time. In training every prompt has one 112x112 picture in the same place, so
positions are the same for the whole batch and the vision tower runs on (B, patches, channels). A test holds it equal
to the package's encoder.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2_5_VLModel

PATCH_PX = 14
GRID = 8  # patches a side of a 112x112 picture
MERGED = GRID // 2
PICTURE_TOKENS = MERGED * MERGED
# cuDNN's gradient (9.x, torch 2.11, H200) turns to NaN as the vision tower's logits grow, where the others stay right
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def shrink(pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] -> what the encoder sees, uint8 (B, 3, 112, 112)."""
    side = GRID * PATCH_PX
    small = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return (small.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


@cache
def clip_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """CLIP's mean and standard deviation per channel, (1, 3, 1, 1)."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return mean, std


def to_patches(small: Tensor) -> Tensor:
    """uint8 (B, 3, 112, 112) -> (B, 64, 1176): patches in the order of the 2x2 merge, the frame twice as a video's."""
    mean, std = clip_statistics(small.device)
    x = (small.float() / 255 - mean) / std
    x = x.view(-1, 3, MERGED, 2, PATCH_PX, MERGED, 2, PATCH_PX).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(small.shape[0], GRID * GRID, -1)


@cache  # a captured step may not copy from the host
def vision_rotation(head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (64, head_dim) of the patches' rows and columns, in the order of the merge."""
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    merge_order = [t.reshape(MERGED, 2, MERGED, 2).permute(0, 2, 1, 3).flatten() for t in (rows, columns)]
    frequencies = 1.0 / (10000 ** (torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2)))
    angles = torch.cat([t[:, None] * frequencies for t in merge_order], -1)
    angles = torch.cat([angles, angles], -1).to(device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def encode_pictures(model: Qwen2_5_VLModel, patches: Tensor) -> Tensor:
    """patches (B, 64, 1176) -> picture tokens (B, 16, C)."""
    visual = model.visual
    heads = model.config.vision_config.num_heads
    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    cos, sin = vision_rotation(x.shape[-1] // heads, x.device)
    for block in visual.blocks:
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous())
        x = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    merged: Tensor = visual.merger.mlp(visual.merger.ln_q(x).reshape(x.shape[0], PICTURE_TOKENS, -1))
    return merged


@cache
def mrope_positions(tokens: int, picture_at: int, device: torch.device) -> Tensor:
    """(time, row, column) of each token, (3, 1, tokens): one picture at `picture_at`, text counting on from its side."""
    before = torch.arange(picture_at).expand(3, -1)
    rows, columns = torch.meshgrid(torch.arange(MERGED), torch.arange(MERGED), indexing="ij")
    picture = torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1) + picture_at
    after = torch.arange(tokens - picture_at - PICTURE_TOKENS).expand(3, -1) + picture_at + MERGED
    return torch.cat([before, picture, after], 1)[:, None].to(device)


@torch.no_grad()
def silence(model: Qwen2_5_VLModel, unmet: Tensor) -> None:
    """Zero the embeddings of ids that training never shows, `unmet` (vocabulary,): they get no gradient and stay silent.

    At random, the first norm makes each as loud as a trained word and a direction that no layer knows: the words that only
    held-out wordings have doubled the error of a whole edit.
    """
    model.get_input_embeddings().weight[unmet] = 0


@sdpa_kernel(ATTENTION)
def encode_prompts(model: Qwen2_5_VLModel, ids: Tensor, small: Tensor, prefix_tokens: int, picture_at: int) -> Tensor:
    """ids (B, tokens), padded on the right, and pictures (B, 3, 112, 112) -> hidden states after the system prefix.

    `picture_at` counts from the start of the prefix. Padding needs no mask: in a causal model nothing before it sees it.
    """
    embed = model.get_input_embeddings()
    pictures = encode_pictures(model, to_patches(small).to(embed.weight.dtype))
    before, after = ids[:, :picture_at], ids[:, picture_at + PICTURE_TOKENS :]
    x = torch.cat([embed(before), pictures, embed(after)], 1)
    positions = mrope_positions(ids.shape[1], picture_at, ids.device).expand(-1, ids.shape[0], -1)
    out = model.language_model(inputs_embeds=x, position_ids=positions, use_cache=False)
    hidden: Tensor = out.last_hidden_state[:, prefix_tokens:]
    return hidden
