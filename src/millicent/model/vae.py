"""The VAE as plain 2-D convolutions.

Qwen-Image's VAE is Wan 2.1's video VAE run on one frame. Its convolutions are causal in time: the frame is padded with
zeros in front, so of each kernel only the last temporal tap ever meets the picture, and the temporal resamplers are
skipped on the first frame. Keeping that tap alone is therefore exact, and several times faster.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millicent.model.config import VAEConfig


class ChannelNorm(nn.Module):
    """x / ||x|| sqrt(C) gamma over the channels of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1).to(x.dtype) * x.shape[1] ** 0.5 * self.gamma


class NormSiLU(ChannelNorm):
    """The norm and the SiLU after it, as one module, so that one kernel can stand in for both."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = NormSiLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # one by one: what a step has read is let go before the next one allocates
        update = self.norm1(x)
        update = self.conv1(update)
        update = self.norm2(update)
        update = self.conv2(update)
        return self.conv_shortcut(x) + update


class SelfAttention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H W, 3 C)
        q, k, v = (t.contiguous() for t in qkv.chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj(out)


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])
        self.attentions = nn.ModuleList([SelfAttention(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        upsample = nn.Upsample(scale_factor=2.0, mode="nearest-exact")
        self.resample = nn.Sequential(upsample, nn.Conv2d(channels, channels // 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = nn.Conv2d(config.input_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (in_channels, out_channels) in enumerate(itertools.pairwise(widths)):
            self.down_blocks.append(ResidualBlock(in_channels, out_channels))
            self.down_blocks.extend(ResidualBlock(out_channels, out_channels) for _ in range(config.num_res_blocks - 1))
            if level < len(config.dim_mult) - 1:
                self.down_blocks.append(Downsample(out_channels))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.norm_out(self.mid_block(x)))


class UpBlock(nn.Module):
    """Layers that the decoder runs one by one: in a pass of its own, whoever calls it would hold what came in until its end."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(in_channels, out_channels)])
        self.resnets.extend(ResidualBlock(out_channels, out_channels) for _ in range(num_res_blocks))
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.upsamplers]


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.conv_in = nn.Conv2d(config.z_dim, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for level, (in_channels, out_channels) in enumerate(itertools.pairwise(widths)):
            halved = in_channels if level == 0 else in_channels // 2  # each upsampler halves the channels
            upsample = level < len(config.dim_mult) - 1
            self.up_blocks.append(UpBlock(halved, out_channels, config.num_res_blocks, upsample))
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.input_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            assert isinstance(block, UpBlock)
            for layer in block.layers:
                x = layer(x)
        return self.conv_out(self.norm_out(x))


class VAE(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> mean and log-variance of the posterior, each (B, 16, H/8, W/8)."""
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, 1)
        return mean, log_variance

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Raw latents (B, 16, h, w), as `moments` gives them -> pixels (B, 3, 8 h, 8 w), not clamped."""
        return self.decoder(self.post_quant_conv(latents))

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> the posterior's mode, standardized for the transformer: (B, 16, H/8, W/8)."""
        mean, deviation = self._statistics(pixels)
        return (self.moments(pixels)[0] - mean) / deviation

    def decode(self, latents: Tensor) -> Tensor:
        """Standardized latents (B, 16, h, w) -> pixels (B, 3, 8 h, 8 w) in [-1, 1]."""
        mean, deviation = self._statistics(latents)
        return self.reconstruct(latents * deviation + mean).clamp(-1, 1)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return (
            _per_channel(config.latents_mean, like.dtype, like.device),
            _per_channel(config.latents_std, like.dtype, like.device),
        )


@cache  # no buffers of the module, since its parameters may be built on no device; no copy per call either
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """values (C,) -> (1, C, 1, 1)."""
    with torch.inference_mode(False):  # it outlives the call that made it, and may meet a gradient later
        return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as files hold them (diffusers' or Wan's names, 5-D kernels) -> this module's names and shapes.

    Wan-native files are told by their first norm's name. Temporal convolutions are dropped: one frame never meets them.
    """
    if "decoder.middle.0.residual.0.gamma" in state:
        state = {rename_wan_key(key): tensor for key, tensor in state.items()}
    return {key: _to_2d(tensor) for key, tensor in state.items() if ".time_conv." not in key}


def _to_2d(tensor: Tensor) -> Tensor:
    if tensor.ndim == 5:
        return tensor[:, :, -1].contiguous()
    return tensor[..., 0] if tensor.ndim == 4 and tensor.shape[1:] == (1, 1, 1) else tensor


_WAN_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_WAN_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_WAN_UP_BLOCK_LAYERS = 4  # three residual blocks and an upsampler; the last block has no upsampler


def rename_wan_key(key: str) -> str:
    """Wan's own name of a VAE parameter -> diffusers' name."""
    key = re.sub(r"^conv1\.", "quant_conv.", key)
    key = re.sub(r"^conv2\.", "post_quant_conv.", key)
    key = re.sub(r"^(encoder|decoder)\.conv1\.", r"\1.conv_in.", key)
    key = re.sub(r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out.", key)
    key = re.sub(r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out.", key)
    key = re.sub(r"\.middle\.(\d)\.", lambda m: f".mid_block.{_WAN_MIDDLE[m[1]]}.", key)
    key = re.sub(r"^encoder\.downsamples\.", "encoder.down_blocks.", key)
    key = re.sub(r"^decoder\.upsamples\.(\d+)\.", _wan_up_block, key)
    return re.sub(r"\.(residual\.[0236]|shortcut)\.", lambda m: f".{_WAN_RESIDUAL[m[1]]}.", key)


def _wan_up_block(match: re.Match[str]) -> str:
    block, layer = divmod(int(match[1]), _WAN_UP_BLOCK_LAYERS)
    part = "upsamplers.0" if layer == _WAN_UP_BLOCK_LAYERS - 1 else f"resnets.{layer}"
    return f"decoder.up_blocks.{block}.{part}."
