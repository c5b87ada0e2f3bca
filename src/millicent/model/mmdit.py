"""Qwen-Image-Edit's transformer: two streams, picture and text, that meet in every attention.

It sees packed latents (the noisy target's tokens, then each reference's) and the encoder's hidden states, and returns
the velocity of the target. Reference: arXiv 2508.02324; behavior and names as diffusers' QwenImageTransformer2DModel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from millicent.model.config import MMDiTConfig
from millicent.model.layers import Block, FinalNorm, RMSNorm, TimeEmbedding, make_rope
from millicent.model.modulation import TimestepRows


class MMDiT(nn.Module):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.time_text_embed: TimeEmbedding | TimestepRows = TimeEmbedding(dim)
        self.txt_norm = RMSNorm(config.joint_attention_dim)
        self.img_in = nn.Linear(config.in_channels, dim)
        self.txt_in = nn.Linear(config.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(Block(dim, config.num_attention_heads) for _ in range(config.num_layers))
        self.norm_out = FinalNorm(dim)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.out_channels)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        timestep: Tensor,
        img_shapes: list[tuple[int, int]],
        txt_mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity of the target at `timestep`.

        img: packed latents (B, L, 64), the target's tokens first, then each reference's.
        txt: the encoder's hidden states (B, T, joint_attention_dim), padded on the right.
        timestep: the noise level in [0, 1], (B,), or (1,) for the whole batch: then what depends on it alone is computed once,
            in the same order of sums whatever B is.
        img_shapes: (height, width) in tokens of the target and of each reference, the same for the whole batch.
        txt_mask: (B, T), true for tokens and false for padding; None where nothing is padded.
        Returns (B, target tokens, 64).
        """
        height, width = img_shapes[0]
        target_tokens = height * width
        assert sum(h * w for h, w in img_shapes) == img.shape[1], "img_shapes must cover every image token"
        img = self.img_in(img)
        txt = self.txt_in(self.txt_norm(txt))
        img_vec, txt_vec = self.embed(timestep, img.dtype)
        rope = make_rope(img_shapes, txt.shape[1], self.config.axes_dims_rope, img.device)
        mask = joint_mask(txt_mask, img.shape[1])
        for block in self.transformer_blocks:
            img, txt = block(img, txt, img_vec, txt_vec, rope, mask, target_tokens)
        return self.proj_out(self.norm_out(img[:, :target_tokens], txt_vec))

    def embed(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """timestep (B,) -> what modulates the picture's tokens (B, 1 or 2, D), and what modulates the text's (B, 1, D).

        With a modulation table attached (modulation.py) both are the table's rows (B,) in place of vectors.
        """
        if isinstance(self.time_text_embed, TimestepRows):
            rows = self.time_text_embed(timestep, dtype)
            return rows, rows
        txt_vec = self.embed_time(timestep, dtype)[:, None]
        if not self.config.zero_cond_t:
            return txt_vec, txt_vec
        return torch.cat([txt_vec, self.embed_time(timestep * 0, dtype)[:, None]], 1), txt_vec

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """timestep (B,) -> (B, D). Rounded to the compute dtype first, as the weights saw it in training."""
        return self.time_text_embed(timestep.to(dtype), dtype)


def joint_mask(txt_mask: Tensor | None, img_tokens: int) -> Tensor | None:
    """(B, T) over text -> (B, 1, 1, T + L) over the keys of the joint attention; pictures are never padded."""
    if txt_mask is None:
        return None
    img_mask = txt_mask.new_ones((txt_mask.shape[0], img_tokens), dtype=torch.bool)
    return torch.cat([txt_mask.bool(), img_mask], 1)[:, None, None]
