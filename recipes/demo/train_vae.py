"""Step 1: train the VAE on drawn pictures. `python -m recipes.demo.train_vae --work build/demo`.

Writes vae.safetensors (this package's 2-D names) with the latents' statistics in its metadata.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from millicent.model.vae import VAE
from recipes.demo.networks import build_vae
from recipes.demo.optimize import MasterWeights, cosine
from recipes.demo.scenes import Scenes

KL_WEIGHT = 2e-4
STATISTICS_PICTURES = 2048
STATISTICS_BATCH = 64


def edges(x: Tensor) -> Tensor:
    """Mean absolute gradient of x at full, half and quarter size: what keeps outlines sharp."""
    total = x.new_zeros(())
    for _ in range(3):
        total = total + x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
        x = F.avg_pool2d(x, 2)
    return total


def box_ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM over 8x8 boxes, cheap enough for a loss."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 8, 4)

    a, b = a * 0.5 + 0.5, b * 0.5 + 0.5
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    return ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma * ma + mb * mb + 1e-4) * (va + vb + 9e-4))).mean()


def loss_of(vae: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) in [-1, 1] -> the loss and the mean absolute error, both FP32 scalars."""
    mean, log_variance = (t.float() for t in vae.moments(x))
    log_variance = log_variance.clamp(-12, 6)
    latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    difference = vae.reconstruct(latents.to(x.dtype)).float() - x.float()
    absolute = difference.abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    similarity = box_ssim(x.float() + difference, x.float())
    return absolute + 0.5 * edges(difference) + 0.3 * (1 - similarity) + KL_WEIGHT * kl, absolute


def draw(scenes: Scenes, batch: int, generator: torch.Generator) -> Tensor:
    """`batch` pictures in [-1, 1], half of them sources and half targets."""
    source, target, _, _ = scenes.pairs(batch // 2, generator)
    return torch.cat([source, target]) * 2 - 1


@torch.no_grad()
def statistics(vae: VAE, scenes: Scenes, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (16,) of the latents over STATISTICS_PICTURES pictures."""
    counts = range(0, STATISTICS_PICTURES, STATISTICS_BATCH)
    batches = [vae.moments(draw(scenes, STATISTICS_BATCH, generator).to(dtype))[0].float() for _ in counts]
    latents = torch.cat(batches)
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def train(steps: int, batch: int, lr: float, seed: int, device: torch.device, compiled: bool) -> tuple[VAE, dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    scenes = Scenes(device)
    vae = build_vae().to(device, dtype)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = MasterWeights(dict(vae.named_parameters()), adam_lr=lr, betas=(0.9, 0.99))
    if compiled:
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
    started, absolute = time.monotonic(), torch.zeros(())
    for step in range(steps):
        x = draw(scenes, batch, generator).to(dtype, memory_format=torch.channels_last)
        loss, absolute = loss_of(vae, x)
        loss.backward()
        weights.prepare(cosine(step, step / steps, warmup=100))
        weights.step()
        if step % 100 == 0 or step == steps - 1:
            elapsed = time.monotonic() - started
            print(f"vae {step:6d}/{steps} {elapsed:6.1f} s  loss {loss.item():.4f}  l1 {absolute.item():.4f}", flush=True)
    weights.use_averaged()
    figures = {"steps": steps, "batch": batch, "l1": absolute.item(), "seconds": time.monotonic() - started}
    mean, std = statistics(vae, scenes, generator, dtype)
    return vae, figures | {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    vae, figures = train(args.steps, args.batch, args.lr, args.seed, device, compiled=device.type == "cuda")
    args.work.mkdir(parents=True, exist_ok=True)
    state = {k: v.float().contiguous().cpu() for k, v in vae.state_dict().items()}
    save_file(state, args.work / "vae.safetensors", metadata={"figures": json.dumps(figures)})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
