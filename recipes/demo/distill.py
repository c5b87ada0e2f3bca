"""Step 3: train a LoRA through all four Lightning steps. `python -m recipes.demo.distill --work build/demo`.

The weights of step 2 stay as they are; the gradient runs through the whole 4-step edit, and the loss compares its
result with the truth, in latents and in pixels. Writes lora.safetensors in Lightning's key style.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from millicent.model.vae import VAE
from recipes.demo.loop import Length, run
from recipes.demo.optimize import MasterWeights
from recipes.demo.pool import Batch, Pool, unpack
from recipes.demo.prompts import PromptTable
from recipes.demo.scenes import Scenes
from recipes.demo.train_editor import DemoEditor, build_editor, load_vae
from recipes.demo.train_vae import edges
from recipes.demo.validate import LIGHTNING_SIGMAS, rollout, show, validate

EARLY_WEIGHTS = (0.15, 0.2, 0.3)  # of what the first three steps already predict
TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")),
    *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
)


class LoraLinear(nn.Module):
    """y = x (W + up down)^T + b: the base is held still, the two factors are trained."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        device = base.weight.device
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(torch.randn(rank, base.in_features, device=device) * 0.5 / rank**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + (self.up @ self.down).to(self.weight.dtype), self.bias)


def add_lora(editor: DemoEditor, rank: int) -> dict[str, nn.Parameter]:
    """Put a LoraLinear in place of every target; returns the trained factors by Lightning's keys."""
    factors = {}
    for i, block in enumerate(editor.transformer.transformer_blocks):
        for target in TARGETS:
            linear = block.get_submodule(target)
            assert isinstance(linear, nn.Linear)
            lora = LoraLinear(linear, rank)
            block.set_submodule(target, lora)
            factors[f"transformer_blocks.{i}.{target}.lora_down.weight"] = lora.down
            factors[f"transformer_blocks.{i}.{target}.lora_up.weight"] = lora.up
    return factors


def rollout_loss(
    editor: DemoEditor, vae: VAE, prompts: PromptTable, batch: Batch, generator: torch.Generator, pixel_share: float
) -> Tensor:
    """Squared error of the latents, inside the edit weighted up, and the pixels' L1 and edges over a share of the batch."""
    ids, mask = prompts.of("training", batch.edit, generator)  # without noise: the factors learn steps, not words
    with torch.no_grad():
        txt = editor.encode(prompts, ids, batch.small)
    noise = torch.randn(batch.target.shape, device=txt.device, generator=generator)
    predicted = rollout(editor, noise, batch.reference, txt, mask, LIGHTNING_SIGMAS)
    weights = (*EARLY_WEIGHTS, 1.0)
    loss = sum(w * ((x - batch.target).square() * batch.weight).mean() for w, x in zip(weights, predicted, strict=True))
    shown = int(len(noise) * pixel_share)
    if shown:
        pixels = vae.decode(unpack(predicted[-1][:shown], 16, 16).to(txt.dtype)).float()
        with torch.no_grad():
            truth = vae.decode(unpack(batch.target[:shown], 16, 16).to(txt.dtype)).float()
        difference = pixels - truth
        loss = loss + difference.abs().mean() + 0.5 * edges(difference)
    return loss  # type: ignore[return-value]


def train(args: argparse.Namespace) -> dict[str, float]:
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    prompts = PromptTable(args.work, device)
    vae = load_vae(args.work, device, dtype)
    editor = build_editor(prompts, device, dtype)
    editor.load_state_dict({k: v.to(dtype) for k, v in load_file(args.work / "editor.safetensors").items()})
    editor.requires_grad_(False)
    factors = add_lora(editor, args.rank)
    weights = MasterWeights(factors, adam_lr=args.lr, ema_decay=0.995)
    if device.type == "cuda":
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
        for block in editor.transformer.transformer_blocks:
            block.compile(dynamic=False)
    drawing = torch.Generator(device).manual_seed(args.seed + 1000)
    pool = Pool(args.pool, Scenes(device), vae, args.edit_weight)
    for _ in range(args.prefill // args.refill_pairs):
        pool.refill(args.refill_pairs, drawing)

    def step() -> Tensor:
        loss = rollout_loss(editor, vae, prompts, pool.batch(args.batch, generator), generator, args.pixel_share)
        loss.backward()
        weights.step()
        return loss.detach()

    def refill() -> None:
        pool.refill(args.refill_pairs, drawing)

    length = Length(args.steps, args.minutes, warmup=50)
    record = run("lora", step, weights, generator, length, refill, args.refill_every, log_every=100)
    save_lora(args.work / "lora.safetensors", weights.averaged(), args.rank)
    weights.use_averaged()
    if args.validate:
        show(validate(editor, vae, prompts, pool.scenes, LIGHTNING_SIGMAS, args.validate))
    return {**record, "batch": args.batch, "pairs_drawn": pool.drawn, "pairs_dropped": pool.dropped}


def save_lora(path: Path, factors: dict[str, Tensor], rank: int) -> None:
    """Lightning's style: lora_down, lora_up and an alpha, here equal to the rank, for each linear."""
    tensors = {key: tensor.to(torch.bfloat16).contiguous().cpu() for key, tensor in factors.items()}
    for key in list(factors):
        tensors[key.replace(".lora_down.weight", ".alpha").replace(".lora_up.weight", ".alpha")] = torch.tensor(float(rank))
    save_file(tensors, path, metadata={"steps": str(len(LIGHTNING_SIGMAS) - 1), "schedule": "lightning"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=60.0, help="end the schedule early, after this long")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--edit-weight", type=float, default=1.0)
    parser.add_argument("--pixel-share", type=float, default=0.25)
    parser.add_argument("--pool", type=int, default=65536)
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--refill-pairs", type=int, default=512)
    parser.add_argument("--refill-every", type=int, default=4)
    parser.add_argument("--validate", type=int, default=512, help="held-out scenes to measure at the end")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(train(parser.parse_args())))


if __name__ == "__main__":
    main()
