"""The VAE's norm in Triton: each pixel's channels are read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS_PER_PROGRAM = 4096  # 32 a thread, as four accesses of 16 bytes in BF16
NUM_WARPS = 4


@triton.jit
def _channel_norm_silu(
    x_ptr: tl.tensor,
    gamma_ptr: tl.tensor,
    out_ptr: tl.tensor,
    pixels: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    # 64 bits: 96 channels of 22 million pixels are more than 2^31 numbers
    first = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS
    pixel = first + tl.arange(0, BLOCK_PIXELS)[:, None]
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    inside = (pixel < pixels) & (channel < CHANNELS)
    offset = pixel * CHANNELS + channel
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
    y = x * (tl.sqrt(CHANNELS * 1.0) / norm)[:, None] * gamma
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


def channel_norm_silu(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """x / max(||x||, 1e-12) sqrt(C) gamma over the channels of each pixel, then SiLU where asked.

    x (B, C, H, W) in channels-last memory, on a CUDA device; gamma holds C values in any shape. FP32 inside, rounded once
    to x's dtype; channels-last out. The twin in channel_norm_reference.py is the specification.
    """
    batch, channels, height, width = x.shape
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert gamma.numel() == channels
    assert gamma.is_contiguous()
    out = torch.empty_like(x, memory_format=torch.channels_last)
    block_channels = triton.next_power_of_2(channels)
    block_pixels = max(1, NUMBERS_PER_PROGRAM // block_channels)
    pixels = batch * height * width
    _channel_norm_silu[(triton.cdiv(pixels, block_pixels),)](
        x, gamma, out, pixels, channels, block_channels, block_pixels, silu, num_warps=NUM_WARPS
    )
    return out
