"""A pool of encoded training pairs on the device, refreshed while training runs.

Drawing and encoding a pair costs about as much as training on it, so each pair is used several times, every time with
other noise, another noise level and another wording.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from millicent.model.vae import VAE
from recipes.demo.encoder import shrink
from recipes.demo.scenes import Edit, Scenes

TOKEN_PX = 16  # 8 pixels a latent, 2x2 latents a token


def pack(latents: Tensor) -> Tensor:
    """(B, 16, h, w) -> (B, h w / 4, 64)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, height width, 64) -> (B, 16, 2 height, 2 width)."""
    b, _, c = tokens.shape
    return tokens.view(b, height, width, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * height, 2 * width)


@dataclass
class Batch:
    """reference, target (B, 256, 64) latents; small (B, 3, 112, 112) uint8; weight (B, 256, 1) of each token's loss."""

    reference: Tensor
    target: Tensor
    small: Tensor
    weight: Tensor
    edit: Edit


class Pool:
    def __init__(self, size: int, scenes: Scenes, vae: VAE, edit_weight: float) -> None:
        """`edit_weight`: how much more a token inside the edit counts than one outside."""
        device, self.dtype = scenes.device, vae.quant_conv.weight.dtype
        self.size, self.scenes, self.vae, self.edit_weight = size, scenes, vae, edit_weight
        self.reference = torch.zeros(size, 256, 64, device=device, dtype=self.dtype)
        self.target = torch.zeros_like(self.reference)
        self.small = torch.zeros(size, 3, 112, 112, device=device, dtype=torch.uint8)
        self.edited = torch.zeros(size, 256, device=device, dtype=torch.bool)
        self.edit = torch.zeros(size, 4, device=device, dtype=torch.int64)
        self.next, self.drawn, self.dropped = 0, 0, 0
        self.filled = torch.zeros((), device=device)  # on the device, so that a captured step sees it grow

    @torch.no_grad()
    def refill(self, pairs: int, generator: torch.Generator) -> None:
        """Draw and encode `pairs` new pairs in place of the oldest; `pairs` must divide the pool's size.

        A batch with a latent that is not finite is dropped and counted: it would stay for many steps.
        """
        source, target, mask, edit = self.scenes.pairs(pairs, generator)
        pixels = torch.cat([source, target]) * 2 - 1
        latents = pack(self.vae.encode(pixels.to(self.dtype, memory_format=torch.channels_last)))
        if not bool(latents.isfinite().all()):
            self.dropped += pairs
            return
        at = slice(self.next, self.next + pairs)
        self.reference[at], self.target[at] = latents.chunk(2)
        self.small[at] = shrink(source)
        self.edited[at] = F.max_pool2d(mask.float()[:, None], TOKEN_PX).flatten(1) > 0
        self.edit[at] = torch.stack(tuple(edit), 1)
        self.next = (self.next + pairs) % self.size
        self.drawn += pairs
        self.filled.fill_(min(self.drawn, self.size))

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        i = (torch.rand(size, device=self.target.device, generator=generator) * self.filled).long()
        weight = 1 + self.edit_weight * self.edited[i, :, None].float()
        edit = Edit(*self.edit[i].unbind(1))
        return Batch(self.reference[i], self.target[i].float(), self.small[i], weight / weight.mean(), edit)
