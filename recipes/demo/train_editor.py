"""Step 2: train the transformer and the text encoder by flow matching. `python -m recipes.demo.train_editor --work build/demo`.

Needs vae.safetensors and what recipes.demo.prompts wrote. Writes editor.safetensors (the running average) and state.pt, from which
`--resume` goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLModel

from millicent.model.mmdit import MMDiT
from millicent.model.vae import VAE
from recipes.demo.encoder import encode_prompts, silence
from recipes.demo.loop import Length, run
from recipes.demo.networks import VAE_SHAPE, build_encoder, build_transformer
from recipes.demo.optimize import MasterWeights
from recipes.demo.pool import Batch, Pool
from recipes.demo.prompts import PromptTable
from recipes.demo.scenes import Scenes
from recipes.demo.validate import LIGHTNING_SIGMAS, show, validate

IMG_SHAPES = [(16, 16), (16, 16)]
MUON_PREFIXES = ("transformer.transformer_blocks.", "encoder.language_model.layers.", "encoder.visual.blocks.")
REFILL_PAIRS = 512


class DemoEditor(nn.Module):
    """Encoder and transformer as one module, so that they train as one."""

    def __init__(self, transformer: MMDiT, encoder: Qwen2_5_VLModel) -> None:
        super().__init__()
        self.transformer, self.encoder = transformer, encoder

    def encode(self, prompts: PromptTable, ids: Tensor, small: Tensor) -> Tensor:
        return encode_prompts(self.encoder, ids, small, prompts.prefix_tokens, prompts.picture_at)

    def velocity(self, noisy: Tensor, reference: Tensor, txt: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        """noisy, reference (B, 256, 64), txt (B, T, C), mask (B, T), t (B,) -> FP32 (B, 256, 64)."""
        img = torch.cat([noisy.to(txt.dtype), reference.to(txt.dtype)], 1)
        out: Tensor = self.transformer(img, txt, t, IMG_SHAPES, mask)
        return out.float()


def load_vae(work: Path, device: torch.device, dtype: torch.dtype) -> VAE:
    """The trained VAE, with the statistics that train_vae measured."""
    with safe_open(work / "vae.safetensors", "pt") as file:
        figures = json.loads(file.metadata()["figures"])
    shape = dataclasses.replace(VAE_SHAPE, latents_mean=tuple(figures["latents_mean"]), latents_std=tuple(figures["latents_std"]))
    vae = VAE(shape)
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae.to(device, dtype).eval().requires_grad_(False)


def build_editor(prompts: PromptTable, device: torch.device, dtype: torch.dtype) -> DemoEditor:
    encoder = build_encoder(prompts.vocab_size, prompts.special)
    return DemoEditor(build_transformer(), encoder).to(device, dtype)


def noise_levels(batch: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """t in (0, 1]: some exactly 1, where a 4-step edit begins, some uniform, most logit-normal around 0.73."""
    kind = torch.rand(batch, device=device, generator=generator)
    uniform = torch.rand(batch, device=device, generator=generator)
    normal = torch.sigmoid(torch.randn(batch, device=device, generator=generator) + 1)
    return torch.where(kind < 0.15, 1.0, torch.where(kind < 0.4, uniform, normal))


def flow_loss(editor: DemoEditor, prompts: PromptTable, batch: Batch, generator: torch.Generator) -> Tensor:
    """Rectified flow (Liu et al., 2022): x_t = x_0 + t (noise - x_0); the network predicts noise - x_0."""
    x0, device = batch.target, batch.target.device
    ids, mask = prompts.training(batch.edit, generator)
    t = noise_levels(len(x0), device, generator).to(batch.reference.dtype).float()
    noise = torch.randn(x0.shape, device=device, generator=generator)
    noisy = x0 + t[:, None, None] * (noise - x0)
    txt = editor.encode(prompts, ids, batch.small)
    velocity = editor.velocity(noisy, batch.reference, txt, mask, t)
    return ((velocity - (noise - x0)).square() * batch.weight).mean()


def train(args: argparse.Namespace) -> dict[str, float]:
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(args.seed)
    scenes = Scenes(device)
    prompts = PromptTable(args.work, device)
    vae = load_vae(args.work, device, dtype)
    editor = build_editor(prompts, device, dtype)
    silence(editor.encoder, prompts.unmet(prompts.training_ids()))
    weights = MasterWeights(
        dict(editor.named_parameters()), () if args.optimizer == "adamw" else MUON_PREFIXES, args.muon_lr, args.lr
    )
    if args.resume:
        weights.resume(torch.load(args.work / "state.pt", map_location=device))
    generator = torch.Generator(device).manual_seed(args.seed + weights.steps)  # a resumed run sees new pairs
    if device.type == "cuda":
        vae.encoder.compile(dynamic=False)
        for block in editor.transformer.transformer_blocks:
            block.compile(dynamic=False)
    drawing = torch.Generator(device).manual_seed(args.seed + 1000 + weights.steps)
    pool = Pool(args.pool, scenes, vae, args.edit_weight)
    for _ in range(args.prefill // args.refill_pairs):
        pool.refill(args.refill_pairs, drawing)

    def step() -> Tensor:
        loss = flow_loss(editor, prompts, pool.batch(args.batch, generator), generator)
        loss.backward()
        weights.step()
        return loss.detach()

    def refill() -> None:
        pool.refill(args.refill_pairs, drawing)

    length = Length(args.steps, args.minutes, args.stop_after)
    record = run("editor", step, weights, generator, length, refill, args.refill_every, log_every=200)
    averaged = {name: tensor.contiguous().cpu() for name, tensor in weights.averaged().items()}
    save_file(averaged, args.work / "editor.safetensors")
    torch.save(weights.state(), args.work / "state.pt")
    weights.use_averaged()
    if args.validate:
        show(validate(editor, vae, prompts, scenes, LIGHTNING_SIGMAS, args.validate))
    return {**record, "batch": args.batch, "pairs_drawn": pool.drawn, "pairs_dropped": pool.dropped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--minutes", type=float, default=60.0, help="end the schedule early, after this long")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="minutes; stop within the schedule, for --resume")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="AdamW's")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--edit-weight", type=float, default=2.0)
    parser.add_argument("--pool", type=int, default=131072)
    parser.add_argument("--prefill", type=int, default=16384)
    parser.add_argument("--refill-pairs", type=int, default=REFILL_PAIRS)
    parser.add_argument("--refill-every", type=int, default=20)
    parser.add_argument("--validate", type=int, default=512, help="held-out scenes to measure at the end")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(train(parser.parse_args())))


if __name__ == "__main__":
    main()
