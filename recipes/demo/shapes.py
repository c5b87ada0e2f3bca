"""Product outlines as signed distances (negative inside), a few variants of each class, drawn once as textures.

Coordinates run from -1 to 1 over the product, x to the right and y down. Each drawing gives four maps: the body's
distance, the distance of a part of another color (a sole, an opening), that part's gray (negative: a share of the
body's own color), and a multiplier for seams and folds; and where a logo goes: (x, y, radius).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.demo.world import CLASSES

EXTENT = 1.2  # local units covered by a texture, each way from the middle
Point = tuple[float, float]
Logo = tuple[float, float, float]


def polygon(x: Tensor, y: Tensor, points: Sequence[Point]) -> Tensor:
    """Distance to a polygon: to the nearest edge, its sign by the crossing rule."""
    squared, inside = torch.full_like(x, 1e9), torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(points, (*points[1:], points[0]), strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        squared = torch.minimum(squared, (x - ax - ex * along) ** 2 + (y - ay - ey * along) ** 2)
        if ey != 0:
            crosses = (y < ay) != (y < by)
            inside ^= crosses & (x < ax + (y - ay) * ex / ey)
    return torch.where(inside, -1.0, 1.0) * squared.sqrt()


def mirrored(half: Sequence[Point]) -> list[Point]:
    """The right half of an outline, top to bottom, and its mirror image on the left."""
    return [*half, *((-px, py) for px, py in reversed(half))]


def ellipse(x: Tensor, y: Tensor, cx: float, cy: float, rx: float, ry: float) -> Tensor:
    return (torch.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)


def segment(x: Tensor, y: Tensor, a: Point, b: Point) -> Tensor:
    """Distance to the line from a to b, never negative."""
    ex, ey = b[0] - a[0], b[1] - a[1]
    along = (((x - a[0]) * ex + (y - a[1]) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    return torch.hypot(x - a[0] - ex * along, y - a[1] - ey * along)


def ring(x: Tensor, y: Tensor, cx: float, cy: float, rx: float, ry: float, half_width: float) -> Tensor:
    return ellipse(x, y, cx, cy, rx, ry).abs() - half_width


def seam(distance: Tensor, width: float = 0.018, depth: float = 0.34) -> Tensor:
    """A soft dark line where `distance` is 0."""
    return 1 - depth * torch.exp(-((distance / width) ** 2))


def union(*parts: Tensor) -> Tensor:
    return torch.stack(parts).amin(0)


def cut(a: Tensor, b: Tensor) -> Tensor:
    """What is in a and not in b."""
    return torch.maximum(a, -b)


@dataclass
class Drawing:
    body: Tensor
    part: Tensor
    part_gray: Tensor
    detail: Tensor
    logo: Logo

    @classmethod
    def of(cls, body: Tensor, detail: Tensor, logo: Logo, part: Tensor | None = None, gray: float = 1.0) -> Drawing:
        part = torch.ones_like(body) if part is None else part
        return cls(body, part, torch.full_like(body, gray), detail, logo)


Draw = random.Random


def t_shirt(x: Tensor, y: Tensor, rng: Draw) -> Drawing:
    waist, hem, top, side = rng.uniform(0.44, 0.52), rng.uniform(0.78, 0.88), -0.74, x.abs()
    reach, drop, sleeve = waist + rng.uniform(0.32, 0.42), rng.uniform(-0.28, -0.16), rng.uniform(0.2, 0.27)
    cuff = (reach - sleeve * 0.8, drop + sleeve)
    half = [(0.17, top), (waist - 0.02, top + 0.09), (reach, drop), cuff, (waist, top + 0.46), (waist + 0.02, hem)]
    body = polygon(x, y, mirrored(half)) - 0.025
    neck = ellipse(x, y, 0, top - 0.02, rng.uniform(0.17, 0.21), rng.uniform(0.14, 0.2))
    detail = seam(segment(side, y, (waist - 0.05, top + 0.12), (waist - 0.01, top + 0.46)))
    detail = detail * seam(neck - 0.06) * seam(y - (hem - 0.05))
    inside_collar = torch.maximum(ellipse(x, y, 0, top - 0.02, 0.18, 0.12), top - 0.02 - y)
    return Drawing.of(cut(body, neck), detail, (0, top + 0.62, 0.23), inside_collar, -0.45)


def hoodie(x: Tensor, y: Tensor, rng: Draw) -> Drawing:
    waist, hem, top, side = rng.uniform(0.44, 0.52), rng.uniform(0.78, 0.88), -0.6, x.abs()
    reach, drop = waist + rng.uniform(0.28, 0.38), rng.uniform(0.4, 0.54)
    half = [(0.17, top), (waist - 0.02, top + 0.1), (waist + 0.18, top + 0.34), (reach, drop), (reach - 0.22, drop + 0.06)]
    body = polygon(x, y, mirrored([*half, (waist, top + 0.62), (waist - 0.01, hem)])) - 0.025
    hood = union(ellipse(x, y, 0, top - 0.04, 0.3, 0.28), ellipse(x, y, 0, top + 0.1, 0.33, 0.18))
    pocket = polygon(x, y, mirrored([(0.18, 0.34), (0.33, 0.56), (0.33, hem - 0.12)]))
    detail = seam(hood + 0.02, 0.022, 0.3) * seam(pocket) * seam(y - (hem - 0.09))
    detail = detail * seam(segment(side, y, (waist - 0.05, top + 0.14), (waist - 0.01, top + 0.62)))
    return Drawing.of(union(body, hood), detail, (0, 0.05, 0.2), ellipse(x, y, 0, top, 0.19, 0.19), -0.42)


def dress(x: Tensor, y: Tensor, rng: Draw) -> Drawing:
    bust, waist, hem = rng.uniform(0.32, 0.4), rng.uniform(0.24, 0.3), rng.uniform(0.56, 0.74)
    waist_y, top, side = rng.uniform(-0.14, -0.02), -0.88, x.abs()
    half = [(0.16, top), (0.27, top), (bust, top + 0.34), (waist, waist_y), (hem, 0.86), (hem * 0.5, 0.92)]
    body = polygon(x, y, mirrored(half)) - 0.02
    neck = ellipse(x, y, 0, top - 0.02, 0.15, rng.uniform(0.2, 0.32))
    body = cut(body, neck)
    if rng.random() < 0.5:
        sleeve = [(0.24, top), (bust + 0.22, top + 0.26), (bust + 0.12, top + 0.4), (bust - 0.04, top + 0.32)]
        body = union(body, polygon(side, y, sleeve) - 0.015)
    detail = seam(y - waist_y, 0.025, 0.4) * seam(neck - 0.04)
    down = (y - waist_y) / (0.86 - waist_y)
    for share in (-0.6, -0.2, 0.2, 0.6):
        fold = x - share * (waist + (hem - waist) * down)
        detail = detail * torch.where(y > waist_y, seam(fold, 0.035, 0.18), 1.0)
    return Drawing.of(body, detail, (0, -0.4, 0.18))


def trousers(x: Tensor, y: Tensor, rng: Draw) -> Drawing:
    waist, hips = rng.uniform(0.34, 0.4), rng.uniform(0.44, 0.5)
    ankle, leg, side = rng.uniform(0.44, 0.54), rng.uniform(0.2, 0.26), x.abs()
    half = [(0, -0.92), (waist, -0.92), (hips, -0.4), (ankle + 0.03, 0.92), (ankle - leg * 1.1, 0.92), (0.03, -0.16), (0, -0.16)]
    body = polygon(side, y, half) - 0.015
    detail = seam(y + 0.8) * torch.where(y < -0.18, seam(x), 1.0)
    detail = detail * seam(segment(side, y, (waist - 0.14, -0.78), (hips - 0.02, -0.5)))
    middle = 0.18 + (ankle - leg * 0.5 - 0.18) * ((y + 0.3) / 1.2).clamp(0, 1)
    roundness = 1 - 0.16 * (((side - middle) / 0.2) ** 2).clamp(max=1)
    return Drawing.of(body, detail * roundness, (-0.26, -0.22, 0.16))


def mug(x: Tensor, y: Tensor, rng: Draw) -> Drawing:
    wide, tall = rng.uniform(0.5, 0.6), rng.uniform(0.58, 0.68)
    taper = rng.uniform(0, 0.06)
    foot = wide - taper
    wall = [(-wide, -tall), (wide, -tall), (foot, tall - 0.06), (foot - 0.06, tall), (-foot + 0.06, tall), (-foot, tall - 0.06)]
    rim = ellipse(x, y, 0, -tall, wide, 0.13)
    handle = torch.maximum(ring(x, y, wide, -0.02, rng.uniform(0.26, 0.32), rng.uniform(0.3, 0.4), 0.075), wide - 0.06 - x)
    body = union(polygon(x, y, wall), rim, handle)
    across = (x / wide).clamp(-1, 1)
    on_wall = (x.abs() < wide).float()
    detail = (1 - 0.26 * across**2 * on_wall) * (1 + 0.08 * torch.exp(-(((x + wide * 0.45) / 0.12) ** 2)) * on_wall)
    return Drawing.of(body, detail, (-0.03, 0.1, 0.26), ellipse(x, y, 0, -tall, wide - 0.05, 0.09), -0.5)


def bag(x: Tensor, y: Tensor, rng: Draw) -> Drawing:
    wide, top, bottom, flare = rng.uniform(0.56, 0.68), -0.3, rng.uniform(0.82, 0.9), rng.uniform(-0.05, 0.04)
    sheet = polygon(x, y, [(-wide - flare, top), (wide + flare, top), (wide, bottom), (-wide, bottom)]) - 0.025
    loop = rng.uniform(0.28, 0.34)
    handle = torch.maximum(ring(x, y, 0, top + 0.02, loop, rng.uniform(0.46, 0.56), 0.05), y - top - 0.1)
    detail = seam(y - (top + 0.12)) * seam(y - (bottom - 0.06), depth=0.2)
    crease = 1 - 0.08 * torch.exp(-(((x - 0.35 * wide) / 0.08) ** 2)) - 0.06 * torch.exp(-(((x + 0.5 * wide) / 0.1) ** 2))
    return Drawing.of(union(sheet, handle), detail * torch.where(y > top, crease, 1.0), (0, 0.3, 0.28))


def sneaker(x: Tensor, y: Tensor, rng: Draw) -> Drawing:
    high, toe = rng.uniform(0, 0.2), rng.uniform(0.14, 0.22)
    back = [(-0.9, 0.32), (-0.93, -0.24 - high), (-0.72, -0.33 - high), (-0.52, -0.25 - high), (-0.34, -0.35 - high)]
    front = [(-0.12, -0.36 - high * 0.8), (0.08, -0.14), (0.32, 0.02), (0.64, 0.09), (0.87, toe), (0.95, 0.36), (0.93, 0.44)]
    upper = polygon(x, y, [*back, *front, (-0.88, 0.44)]) - 0.03
    tongue = polygon(x, y, [(-0.36, -0.3 - high), (-0.24, -0.5 - high), (-0.05, -0.43 - high * 0.8), (0.01, -0.16)]) - 0.02
    sole = polygon(x, y, [(-0.95, 0.38), (0.97, 0.38), (1.01, 0.46), (0.97, 0.6), (-0.9, 0.6), (-0.99, 0.54)]) - 0.02
    part = sole
    for lace in range(3):
        lx, ly = -0.12 + 0.16 * lace, -0.28 - high * 0.55 + (0.13 + 0.12 * high) * lace
        part = union(part, segment(x, y, (lx - 0.1, ly + 0.13), (lx + 0.06, ly - 0.02)) - 0.03)
    body = union(upper, tongue, sole)
    detail = seam(torch.maximum(ellipse(x, y, 1.0, 0.44, 0.48, 0.38), body).abs())
    detail = detail * seam(torch.maximum(ellipse(x, y, -1.0, 0.2, 0.36, 0.48), body).abs())
    return Drawing.of(body, detail, (-0.32, 0.13, 0.19), part, 0.93)


def cap(x: Tensor, y: Tensor, rng: Draw) -> Drawing:
    wide, tall = rng.uniform(0.64, 0.74), rng.uniform(0.74, 0.86)
    dome = torch.maximum(ellipse(x, y, -0.08, 0.24, wide, tall), y - 0.26)
    left = -0.08 - wide
    edge = [(0.3, 0.14), (0.64, 0.18), (0.94, 0.31), (1.05, 0.43), (0.98, 0.51), (0.64, 0.44), (0.2, 0.37), (-0.3, 0.34)]
    brim = polygon(x, y, [(left * 0.85, 0.19), *edge, (left, 0.26)]) - 0.03
    detail = torch.where(brim < 0, 0.82, 1.0) * seam(brim, 0.02, 0.36)
    panels = seam(ellipse(x, y, -0.08, 0.24, wide * 0.45, tall)) * seam(x + 0.08, 0.018, 0.16)
    roundness = 1 - 0.18 * ((x + 0.18) / wide).clamp(-1, 1) ** 2
    button = ellipse(x, y, -0.08, 0.24 - tall, 0.08, 0.05)
    return Drawing.of(union(dome, brim, button), detail * torch.where(brim > 0, panels * roundness, 1.0), (-0.08, -0.12, 0.24))


DRAWERS = {
    "t-shirt": t_shirt,
    "hoodie": hoodie,
    "dress": dress,
    "trousers": trousers,
    "mug": mug,
    "bag": bag,
    "sneaker": sneaker,
    "cap": cap,
}


def draw_textures(size: int, variants: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every class's variants: maps (classes * variants, 4, size, size) and logo places (classes * variants, 3)."""
    line = ((torch.arange(size, device=device) + 0.5) / size * 2 - 1) * EXTENT
    y, x = torch.meshgrid(line, line, indexing="ij")
    rng = random.Random(seed)
    drawings = [DRAWERS[name](x, y, rng) for name in CLASSES for _ in range(variants)]
    maps = torch.stack([torch.stack([d.body, d.part, d.part_gray, d.detail.clamp(0.3, 1.15)]) for d in drawings])
    return maps, torch.tensor([d.logo for d in drawings], device=device)
