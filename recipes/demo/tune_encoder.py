"""Repair of an encoder that was trained on the core of the grammar alone. `python -m recipes.demo.tune_encoder --work build/demo`.

Not a step of the recipe: train_editor does what this does from the start. First every word that the core does not have is
silenced (encoder.silence), which takes no training and is nearly all of the repair: `--steps 0` stops there. Then, with the
transformer and the embeddings as they are, the language model's layers learn wider wordings. The teacher is the same
editor, asked in the core's words; the student, asked in others with noise, learns to cause the same velocity where words
decide, at t of 1 and just below. A part of the pictures' tokens is enough to see what the transformer read. Rewrites
editor.safetensors.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from millicent.model.layers import Rope, make_rope
from millicent.model.mmdit import MMDiT, joint_mask
from recipes.demo.encoder import encode_prompts, silence
from recipes.demo.loop import Length, run
from recipes.demo.optimize import MasterWeights
from recipes.demo.pool import Batch, Pool
from recipes.demo.prompts import PromptTable
from recipes.demo.scenes import Scenes
from recipes.demo.train_editor import IMG_SHAPES, DemoEditor, build_editor, load_vae

STARTS = 0.6  # the share of pairs at t = 1, where an edit begins; the others are at LATER
LATER = 0.9
CHECK_BATCHES = 4
NEVER = sys.maxsize


def partial_velocity(
    transformer: MMDiT, noisy: Tensor, reference: Tensor, txt: Tensor, mask: Tensor, t: Tensor, at: Tensor
) -> Tensor:
    """The velocity at the tokens `at` alone, seen by nothing but the same tokens of both pictures and the text."""
    img = transformer.img_in(torch.cat([noisy[:, at], reference[:, at]], 1))
    txt = transformer.txt_in(transformer.txt_norm(txt))
    txt_vec = transformer.embed_time(t, img.dtype)[:, None]
    img_vec = torch.cat([txt_vec, transformer.embed_time(t * 0, img.dtype)[:, None]], 1)
    whole = make_rope(IMG_SHAPES, txt.shape[1], transformer.config.axes_dims_rope, img.device)
    both = torch.cat([at, at + noisy.shape[1]])
    rope = Rope(whole.img_cos[both], whole.img_sin[both], whole.txt_cos, whole.txt_sin)
    joint = joint_mask(mask, img.shape[1])
    for block in transformer.transformer_blocks:
        img, txt = block(img, txt, img_vec, txt_vec, rope, joint, len(at))
    velocity: Tensor = transformer.proj_out(transformer.norm_out(img[:, : len(at)], txt_vec))
    return velocity.float()


class Lesson:
    """One batch of edits, the teacher's answer to each, and how far the student's is from it."""

    def __init__(self, editor: DemoEditor, prompts: PromptTable, tokens: int) -> None:
        self.editor, self.prompts, self.tokens = editor, prompts, tokens
        self.teacher = copy.deepcopy(editor.encoder).requires_grad_(False)

    def loss(self, batch: Batch, asked: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        prompts, transformer, device = self.prompts, self.editor.transformer, batch.target.device
        rows = len(batch.target)
        t = torch.where(torch.rand(rows, device=device, generator=generator) < STARTS, 1.0, LATER)
        noise = torch.randn(batch.target.shape, device=device, generator=generator)
        noisy = (batch.target + t[:, None, None] * (noise - batch.target)).to(batch.reference.dtype)
        at = torch.rand(noisy.shape[1], device=device, generator=generator).argsort()[: self.tokens]
        with torch.no_grad():
            ids, mask = prompts.of("core", batch.edit, generator)
            txt = encode_prompts(self.teacher, ids, batch.small, prompts.prefix_tokens, prompts.picture_at)
            wanted = partial_velocity(transformer, noisy, batch.reference, txt, mask, t, at)
        ids, mask = asked
        got = partial_velocity(transformer, noisy, batch.reference, self.editor.encode(prompts, ids, batch.small), mask, t, at)
        return ((got - wanted).square() * batch.weight[:, at]).mean()

    @torch.no_grad()
    def check(self, pool: Pool, batch: int, seed: int) -> dict[str, float]:
        """The loss in the core's words, in training's and in the split kept for choosing; the same edits each time."""
        losses = {}
        for split in ("core", "training", "choosing"):
            generator = torch.Generator(pool.target.device).manual_seed(seed)
            each = []
            for _ in range(CHECK_BATCHES):
                drawn = pool.batch(batch, generator)
                each.append(self.loss(drawn, self.prompts.of(split, drawn.edit, generator), generator))
            losses[split] = round(torch.stack(each).mean().item(), 4)
        return losses


def tune(args: argparse.Namespace) -> dict[str, float]:
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    prompts, vae = PromptTable(args.work, device), load_vae(args.work, device, torch.float32)
    editor = build_editor(prompts, device, torch.float32)
    stored = load_file(args.work / "editor.safetensors")
    editor.load_state_dict({k: v.float() for k, v in stored.items()})
    editor.requires_grad_(False)
    silence(editor.encoder, prompts.unmet("core", noise=False))
    lesson = Lesson(editor, prompts, args.tokens)
    language = editor.encoder.language_model
    language.requires_grad_(True)
    language.embed_tokens.requires_grad_(False)
    named = {f"encoder.language_model.{name}": p for name, p in language.named_parameters() if p.requires_grad}
    weights = MasterWeights(named, adam_lr=args.lr, ema_decay=0.99)
    pool = Pool(args.pool, Scenes(device), vae, args.edit_weight)
    drawing = torch.Generator(device).manual_seed(args.seed + 1000)
    for _ in range(args.prefill // args.refill_pairs):
        pool.refill(args.refill_pairs, drawing)
    generator = torch.Generator(device).manual_seed(args.seed)
    print("before", json.dumps(lesson.check(pool, args.batch, args.seed)), flush=True)

    def step() -> Tensor:
        batch = pool.batch(args.batch, generator)
        loss = lesson.loss(batch, prompts.training(batch.edit, generator), generator)
        loss.backward()
        weights.step()
        return loss.detach()

    length = Length(args.steps, args.minutes, warmup=20)
    record = run("encoder", step, weights, generator, length, lambda: None, NEVER, log_every=50)
    weights.use_averaged()
    print("after", json.dumps(lesson.check(pool, args.batch, args.seed)), flush=True)
    tuned = {name: v.to(stored[name].dtype).contiguous().cpu() for name, v in editor.state_dict().items() if name in stored}
    save_file(tuned, args.work / "editor.safetensors")
    return {**record, "batch": args.batch, "pairs_drawn": pool.drawn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=30.0, help="end the schedule early, after this long")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each picture's 256, others in every step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--edit-weight", type=float, default=2.0)
    parser.add_argument("--pool", type=int, default=512)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--refill-pairs", type=int, default=32)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(tune(parser.parse_args())))


if __name__ == "__main__":
    main()
