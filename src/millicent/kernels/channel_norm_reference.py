"""The VAE's norm in plain PyTorch: the specification that the Triton twin in channel_norm.py is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def channel_norm_silu(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """x / max(||x||, 1e-12) sqrt(C) gamma over the channels of each pixel, then SiLU where asked.

    x (B, C, H, W); gamma holds C values in any shape. FP32 inside, rounded once to x's dtype; channels-last out.
    """
    channels = x.shape[1]
    y = F.normalize(x.float(), dim=1, eps=1e-12) * channels**0.5 * gamma.float().view(1, channels, 1, 1)
    return (F.silu(y) if silu else y).to(x.dtype, memory_format=torch.channels_last)
