"""Time one edit, stage by stage, beside diffusers on the same weights. `python -m benchmarks.edit`.

First the two must draw the same picture; a speed is printed only then. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from benchmarks.machine import ROOT, describe_machine
from benchmarks.reference import mended_positions, open_pipeline, picture_areas
from millicent import Editor, EditRequest, open_image
from millicent.engine.editor import find_model
from millicent.engine.loading import choose_device, choose_dtype
from millicent.images import flatten

RESULTS = ROOT / "benchmarks" / "results" / "edit.jsonl"
MODEL = "demo-base"  # the LoRA is left out, so that both sides read the same files
STAGES = ("prepare_s", "encode_s", "denoise_s", "decode_s", "total_s")
FP32_LEVELS = 2  # of 255, anywhere: the same arithmetic in another order
BF16_MEAN_LEVELS = 3  # of 255, on average: BF16 rounds each layer's output to 8 bits, in another order on either side
SEED = 7


def diffusers_edit(pipeline: diffusers.QwenImageEditPlusPipeline, image: Image.Image, prompt: str, steps: int) -> Image.Image:
    card = find_model(MODEL)[2]
    with mended_positions(pipeline), picture_areas(card.vae_area_px, card.encoder_area_px):
        generator = torch.Generator("cpu").manual_seed(SEED)
        result = pipeline(image=[image], prompt=prompt, num_inference_steps=steps, true_cfg_scale=1.0, generator=generator)
    drawn: Image.Image = result.images[0]
    return drawn


def same_picture(ours: Image.Image, theirs: Image.Image, dtype: torch.dtype) -> bool:
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    print(f"against diffusers: at most {difference.max()} of 255 apart, {difference.mean():.3f} on average")
    return bool(difference.max() <= FP32_LEVELS if dtype == torch.float32 else difference.mean() <= BF16_MEAN_LEVELS)


def median_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure(args: argparse.Namespace) -> dict[str, object] | None:
    """The figures; None where the two pictures differ."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    image = flatten(open_image(args.image))
    started = time.perf_counter()
    editor = Editor.open(MODEL, device=args.device, dtype=args.dtype)
    open_s = time.perf_counter() - started
    request = EditRequest(images=(image,), prompt=args.prompt, steps=args.steps, schedule="lightning", seed=SEED)
    pipeline = open_pipeline(find_model(MODEL)[1], "lightning", dtype).to(device)
    if not same_picture(editor.edit(request).image, diffusers_edit(pipeline, image, args.prompt, args.steps), dtype):
        return None
    timings = [editor.edit(request).timings for _ in range(args.repeats)]
    stages = [{**dataclasses.asdict(t), "total_s": t.total_s} for t in timings]
    ours = {stage: round(statistics.median(s[stage] for s in stages), 4) for stage in STAGES}
    peer_s = median_seconds(lambda: diffusers_edit(pipeline, image, args.prompt, args.steps), args.repeats, device)
    return {
        "benchmark": "edit",
        "model": MODEL,
        "size": f"{image.width}x{image.height}",
        "steps": args.steps,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": args.repeats,
        "open_s": round(open_s, 3),
        **ours,
        "diffusers_total_s": round(peer_s, 4),
        "diffusers_over_ours": round(peer_s / ours["total_s"], 2),
        **describe_machine(device),
    }


def show(figures: dict[str, object]) -> None:
    print(f"\n{figures['card']}, {figures['dtype']}, {figures['size']}, {figures['steps']} steps, median of {figures['repeats']}")
    for name in ("open_s", *STAGES, "diffusers_total_s"):
        print(f"  {name.removesuffix('_s').replace('_', ' '):16} {figures[name]:8.3f} s")
    print(f"  {'diffusers / ours':16} {figures['diffusers_over_ours']:8.2f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "shirt.png")
    parser.add_argument("--prompt", default="make the shirt navy blue")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--save", action="store_true", help=f"append the JSON line to {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    figures = measure(args)
    if figures is None:
        sys.exit("The pictures differ, so no speed is reported.")
    show(figures)
    if args.save:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
