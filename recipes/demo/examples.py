"""Draw the pictures in examples/. `python -m recipes.demo.examples --out examples`.

Their outlines are among those held out of training.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from recipes.demo.scenes import Scenes
from recipes.demo.world import CLASSES, COLOR_NAMES, LOGOS, PATTERNS

SEED = 11
PATTERN_NAMES = ("", *(noun for noun, _ in PATTERNS))
LOGO_NAMES = ("", *LOGOS)
PLAIN, GRADIENT, TEXTURED = range(3)

# name: class, color, backdrop's color and kind, pattern and its color, logo and its color
EXAMPLES = {
    "shirt": ("t-shirt", "coral", "beige", TEXTURED, "", "white", "", "white"),
    "hoodie": ("hoodie", "gray", "white", PLAIN, "", "white", "star", "mustard yellow"),
    "dress": ("dress", "turquoise", "pink", PLAIN, "polka dots", "white", "", "white"),
    "trousers": ("trousers", "olive", "white", GRADIENT, "checks", "beige", "", "white"),
    "mug": ("mug", "white", "sky blue", GRADIENT, "", "white", "circle", "red"),
    "bag": ("bag", "mustard yellow", "gray", TEXTURED, "stripes", "navy blue", "", "white"),
    "sneaker": ("sneaker", "lavender", "white", PLAIN, "", "white", "", "white"),
    "cap": ("cap", "forest green", "mint green", GRADIENT, "", "white", "square", "white"),
}


def draw_examples() -> dict[str, Image.Image]:
    """Every example at 256x256."""
    scenes, generator = Scenes(torch.device("cpu")), torch.Generator().manual_seed(SEED)
    columns = list(zip(*EXAMPLES.values(), strict=True))
    n = len(EXAMPLES)

    def numbers(column: int, names: tuple[str, ...]) -> Tensor:
        return torch.tensor([names.index(value) for value in columns[column]])

    def colors(column: int) -> Tensor:
        return scenes.palette[numbers(column, COLOR_NAMES)]

    sampled = scenes.sample_source(torch.zeros(n, dtype=torch.long), generator, held_out=True)
    scene = dataclasses.replace(
        sampled,
        cls=numbers(0, CLASSES),
        body=colors(1),
        background=colors(2),
        background_end=(colors(2) + 0.12).clamp(max=0.98),
        backdrop=torch.tensor(columns[3]),
        pattern=numbers(4, PATTERN_NAMES),
        pattern_color=colors(5),
        logo=numbers(6, LOGO_NAMES),
        logo_color=colors(7),
        flip=torch.ones(n),
        scale=torch.full((n,), 0.88),
        cx=torch.zeros(n),
        cy=torch.zeros(n),
    )
    pixels = scenes.renderer.compose(scenes.renderer.geometry(scene), scene)
    levels = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return {name: Image.fromarray(picture) for name, picture in zip(EXAMPLES, levels, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, picture in draw_examples().items():
        picture.save(args.out / f"{name}.png", optimize=True)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
