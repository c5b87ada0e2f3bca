"""Held-out scenes in batches, on the device, for a look while training; the figures that count are evaluate.py's."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from millicent.model.vae import VAE
from recipes.demo.encoder import shrink
from recipes.demo.metrics import measure
from recipes.demo.pool import pack, unpack
from recipes.demo.prompts import PromptTable
from recipes.demo.scenes import Scenes
from recipes.demo.world import OPS

LIGHTNING_SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
SEED = 90001
BATCH = 64


class SupportsVelocity(Protocol):
    """What a rollout asks of train_editor's DemoEditor."""

    def encode(self, prompts: PromptTable, ids: Tensor, small: Tensor) -> Tensor: ...

    def velocity(self, noisy: Tensor, reference: Tensor, txt: Tensor, mask: Tensor, t: Tensor) -> Tensor: ...


def rollout(
    editor: SupportsVelocity, noise: Tensor, reference: Tensor, txt: Tensor, mask: Tensor, sigmas: tuple[float, ...]
) -> list[Tensor]:
    """Euler steps from noise (B, 256, 64): what each predicts as the final latents; the last one's is the result."""
    x, predicted = noise, []
    for sigma, following in itertools.pairwise(sigmas):
        t = torch.full((len(x),), sigma, device=x.device)
        velocity = editor.velocity(x, reference, txt, mask, t)
        predicted.append(x - sigma * velocity)
        x = x + (following - sigma) * velocity
    return predicted


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # a few batches without gradients are not worth another compilation
def validate(
    editor: SupportsVelocity, vae: VAE, prompts: PromptTable, scenes: Scenes, sigmas: tuple[float, ...], pictures: int = 512
) -> dict[str, dict[str, float]]:
    """Mean figures by operation over held-out shapes and wordings; "vae" is what the VAE alone would reach."""
    device = scenes.device
    generator = torch.Generator(device).manual_seed(SEED)
    dtype = vae.quant_conv.weight.dtype
    rows: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
    ops = []
    for _ in range(pictures // BATCH):
        source, target, mask, edit = scenes.pairs(BATCH, generator, held_out=True)
        ids, txt_mask = prompts.held_out(edit, generator)
        reference, truth = (vae.encode((x * 2 - 1).to(dtype)) for x in (source, target))
        txt = editor.encode(prompts, ids, shrink(source))
        noise = torch.randn(BATCH, 256, 64, device=device, generator=generator)
        drawn = unpack(rollout(editor, noise, pack(reference), txt, txt_mask, sigmas)[-1], 16, 16)
        for name, latents in (("edit", drawn), ("vae", truth)):
            pixels = (vae.decode(latents.to(dtype)).float() + 1) / 2
            rows[name].append(measure(pixels, target, mask))
        ops.append(edit.op)
    op = torch.cat(ops)
    figures = {}
    for name, measured in rows.items():
        columns = {k: torch.cat([m[k] for m in measured]) for k in measured[0]}
        for label, chosen in [("all", torch.ones_like(op, dtype=torch.bool)), *((o, op == i) for i, o in enumerate(OPS))]:
            if label == "all" or name == "edit":
                figures[f"{name}/{label}"] = {k: round(v[chosen].nanmean().item(), 4) for k, v in columns.items()}
    return figures


def show(figures: dict[str, dict[str, float]]) -> None:
    columns: Sequence[str] = list(next(iter(figures.values())))
    print(f"{'':24s}" + "".join(f"{c:>12s}" for c in columns))
    for label, row in figures.items():
        print(f"{label:24s}" + "".join(f"{row[c]:12.3f}" for c in columns), flush=True)
