"""Step 5: measure the shipped model as a user runs it. `python -m recipes.demo.evaluate --scenes 512`.

Held-out shapes, scenes and wordings, through `Editor.edit` on 8-bit pictures. Prints a table and, last, one line of
JSON. On two CPU cores 512 scenes take about ten minutes for each of the two ways to draw.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from millicent.edits import EditRequest
from millicent.engine.editor import Editor
from recipes.demo.metrics import measure
from recipes.demo.scenes import Edit, Scenes
from recipes.demo.validate import SEED, show
from recipes.demo.wordings import held_out_wording
from recipes.demo.world import OPS

BATCH = 16


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> an 8-bit picture."""
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def average(rows: list[dict[str, float]], ops: list[int], label: str) -> dict[str, dict[str, float]]:
    """Means over all rows, and over those of each operation."""
    groups = {f"{label}/all": rows}
    groups |= {f"{label}/{op}": [r for r, o in zip(rows, ops, strict=True) if o == i] for i, op in enumerate(OPS)}
    return {
        name: {k: round(float(np.nanmean([r[k] for r in group])), 4) for k in group[0]} for name, group in groups.items() if group
    }


def edit_numbers(edit: Edit, i: int) -> tuple[int, int, int, int]:
    return int(edit.op[i]), int(edit.color[i]), int(edit.aux[i]), int(edit.cls[i])


def evaluate(model: str, without_lora: str, scenes_wanted: int, device: str) -> dict[str, dict[str, float]]:
    """The figures of no edit, of the model with its LoRA and of the same weights without it, all at 4 Lightning steps."""
    editors = {"lora": Editor.open(model, device=device), "base": Editor.open(without_lora, device=device)}
    scenes, generator = Scenes(torch.device("cpu")), torch.Generator().manual_seed(SEED)
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    ops: list[int] = []
    while len(ops) < scenes_wanted:
        source, target, mask, edit = scenes.pairs(BATCH, generator, held_out=True)
        for i in range(min(BATCH, scenes_wanted - len(ops))):
            request = EditRequest(
                images=(to_image(source[i]),),
                prompt=held_out_wording(*edit_numbers(edit, i), len(ops)),
                steps=4,
                schedule="lightning",
                seed=len(ops),
            )
            drawn = {name: to_pixels(editor.edit(request).image) for name, editor in editors.items()}
            for name, pixels in {"none": source[i], **drawn}.items():
                measured = measure(pixels[None], target[i][None], mask[i][None])
                rows[name].append({k: v.item() for k, v in measured.items()})
            ops.append(int(edit.op[i]))
        print(f"{len(ops)} of {scenes_wanted} scenes", file=sys.stderr, flush=True)
    figures: dict[str, dict[str, float]] = {}
    for name, measured_rows in rows.items():
        figures |= average(measured_rows, ops, name)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--without-lora", default="demo-base")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    figures = evaluate(args.model, args.without_lora, args.scenes, args.device)
    show(figures)
    if args.save:
        args.save.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
