"""Scenes to pictures: batched tensor arithmetic on any device, the same numbers in giving the same picture out.

A product's outline is looked up in its texture through an affine map; everything else is color arithmetic, so a batch
costs a few dozen elementwise operations and no Python loop over pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.demo.shapes import EXTENT, draw_textures
from recipes.demo.world import CLASSES

SIZE_PX = 256
STANDING = ("mug", "bag", "sneaker", "cap")  # these cast a shadow on the ground they stand on
GROUND_Y = {"mug": 0.66, "bag": 0.88, "sneaker": 0.6, "cap": 0.48}
PATTERN_PERIOD = 0.42  # local units; a product spans about 2
# of every pattern less than half is in its own color, so that it can be told which color lies below
STRIPE_HALF = 0.084
DOT_RADIUS = 0.125
CHECK_HALF = 0.094
STAR_OUTER, STAR_INNER = 1.2, 0.54


@dataclass
class Scene:
    """One product before a backdrop; every field is a tensor over the batch (B,), colors are (B, 3) in [0, 1].

    pattern, logo: 0 for none, else 1 + the index in world.PATTERNS or LOGOS.
    backdrop: 0 plain, 1 a gradient between its two colors, 2 textured with noise field `grain`.
    """

    cls: Tensor
    variant: Tensor
    scale: Tensor
    aspect: Tensor
    angle: Tensor
    flip: Tensor
    cx: Tensor
    cy: Tensor
    light: Tensor
    fold_phase: Tensor
    fold_depth: Tensor
    shadow: Tensor
    body: Tensor
    pattern: Tensor
    pattern_color: Tensor
    logo: Tensor
    logo_color: Tensor
    backdrop: Tensor
    background: Tensor
    background_end: Tensor
    backdrop_angle: Tensor
    grain: Tensor


@dataclass
class Geometry:
    """What an edit leaves alone: coverages (B, H, W) in [0, 1] and shading multipliers, shared by source and target."""

    body: Tensor
    part: Tensor
    part_gray: Tensor
    shade: Tensor
    shadow: Tensor
    patterns: Tensor  # (B, 3, H, W)
    logos: Tensor  # (B, 3, H, W)


def over_picture(x: Tensor) -> Tensor:
    return x[:, None, None]


def distance_to_lattice(x: Tensor, period: float) -> Tensor:
    """Distance to the nearest multiple of `period`."""
    return ((x / period + 0.5) % 1 - 0.5).abs() * period


def pattern_distances(x: Tensor, y: Tensor) -> Tensor:
    """Signed distances to stripes, dots and checks, (B, 3, H, W)."""
    row, column = distance_to_lattice(y, PATTERN_PERIOD), distance_to_lattice(x, PATTERN_PERIOD)
    between_rows, between_columns = PATTERN_PERIOD / 2 - row, PATTERN_PERIOD / 2 - column
    dots = torch.hypot(row, column) - DOT_RADIUS
    checks = torch.minimum(torch.maximum(row, column), torch.maximum(between_rows, between_columns)) - CHECK_HALF
    return torch.stack([row - STRIPE_HALF, dots, checks], 1)


def logo_distances(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distances to a circle, a square and a five-pointed star around the origin, (B, 3, H, W)."""
    circle = torch.hypot(x, y) - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    tip = math.pi / 5
    turned = torch.atan2(x, -y) % (2 * tip)
    folded = torch.minimum(turned, 2 * tip - turned)  # every tip and notch brought onto one half of one tip
    px, py = torch.hypot(x, y) * folded.cos(), torch.hypot(x, y) * folded.sin()
    outer, inner = STAR_OUTER * radius, STAR_INNER * radius
    ex, ey = inner * math.cos(tip) - outer, inner * math.sin(tip)
    star = ((px - outer) * ey - py * ex) / torch.hypot(ex, ey)
    return torch.stack([circle, square, star], 1)


class Renderer:
    def __init__(self, device: torch.device, variants: int = 16, seed: int = 0) -> None:
        self.device, self.variants = device, variants
        self.textures, self.logo_places = draw_textures(SIZE_PX, variants, seed, device)
        line = (torch.arange(SIZE_PX, device=device) + 0.5) / SIZE_PX * 2 - 1
        self.rows, self.columns = line[None, :, None], line[None, None, :]
        self.grains = grain_fields(seed).to(device)
        self.stands = torch.tensor([float(name in STANDING) for name in CLASSES], device=device)
        self.ground = torch.tensor([GROUND_Y.get(name, 0.9) for name in CLASSES], device=device)

    def geometry(self, s: Scene) -> Geometry:
        dx, dy = self.columns - over_picture(s.cx), self.rows - over_picture(s.cy)
        cos, sin = over_picture(s.angle.cos()), over_picture(s.angle.sin())
        x = (dx * cos + dy * sin) / over_picture(s.scale * s.aspect) * over_picture(s.flip)
        y = (dy * cos - dx * sin) / over_picture(s.scale)
        index = s.cls * self.variants + s.variant
        textures = self.textures[index]
        outside = (torch.maximum(x.abs(), y.abs()) - EXTENT).clamp(min=0)
        body, part, gray, detail = sample(textures, x, y).unbind(1)
        body = body + outside
        pixel = over_picture(2.0 / SIZE_PX / s.scale)  # in local units

        def coverage(distance: Tensor) -> Tensor:
            step = pixel[:, None] if distance.ndim == 4 else pixel
            return (0.5 - distance / step).clamp(0, 1)

        place = self.logo_places[index]
        logo_x, logo_y, logo_radius = (over_picture(place[:, i]) for i in range(3))
        return Geometry(
            body=coverage(body),
            part=coverage(part) * coverage(body),
            part_gray=gray,
            shade=self.shade(s, x, y, body, detail),
            shadow=self.shadow(s, textures, x, y, outside),
            patterns=coverage(pattern_distances(x, y)),
            logos=coverage(logo_distances(x - logo_x, y - logo_y, logo_radius)),
        )

    def shade(self, s: Scene, x: Tensor, y: Tensor, body: Tensor, detail: Tensor) -> Tensor:
        """Seams, darker rims, soft folds and light from one side, as one multiplier."""
        rim = 1 - 0.16 * torch.exp((body * 14).clamp(-20, 0))
        cloth = over_picture((s.cls != CLASSES.index("mug")).float() * s.fold_depth)
        phase = over_picture(s.fold_phase)
        folds = 1 + cloth * (torch.sin(4 * x + 2.3 * y + phase) + torch.sin(2.6 * y - 1.7 * x + 2 * phase))
        return (detail * rim * folds * (1.02 + over_picture(s.light) * x - 0.06 * y)).clamp(0.25, 1.12)

    def shadow(self, s: Scene, textures: Tensor, x: Tensor, y: Tensor, outside: Tensor) -> Tensor:
        """How much of the backdrop's light is taken: a soft drop shadow, or one on the ground under what stands."""
        stands, ground = over_picture(self.stands[s.cls]), over_picture(self.ground[s.cls])
        drop = sample(textures[:, :1], x - 0.05 * over_picture(s.flip), y - 0.07)[:, 0] + outside
        lying = over_picture(s.shadow) * torch.exp(-((drop.clamp(min=0) / 0.12) ** 2))
        standing = torch.exp(-(1.6 * (x / 0.9) ** 2 + ((y - ground) / 0.12) ** 2)) * (over_picture(s.shadow) + 0.1)
        return (lying * (1 - 0.5 * stands) + standing * stands).clamp(0, 0.7)

    def compose(self, g: Geometry, s: Scene) -> Tensor:
        """The picture (B, 3, 256, 256) in [0, 1]."""
        backdrop = self.backdrop(s) * (1 - g.shadow)[:, None]
        color = s.body[:, :, None, None]
        for kind, coverages, over in ((s.pattern, g.patterns, s.pattern_color), (s.logo, g.logos, s.logo_color)):
            shown = chosen(coverages, kind)[:, None]
            color = color + (over[:, :, None, None] - color) * shown
        gray = g.part_gray[:, None]
        part = torch.where(gray < 0, s.body[:, :, None, None] * -gray, gray.clamp(min=0).expand(-1, 3, -1, -1))
        color = color + (part - color) * g.part[:, None]
        lit = color * g.shade[:, None] + 0.03 * (g.shade[:, None] - 0.55).clamp(min=0)
        return (backdrop + (lit - backdrop) * g.body[:, None]).clamp(0, 1)

    def backdrop(self, s: Scene) -> Tensor:
        angle = over_picture(s.backdrop_angle)
        ramp = (0.5 + 0.5 * (self.columns * angle.cos() + self.rows * angle.sin())).clamp(0, 1)
        ramp = ramp * over_picture((s.backdrop == 1).float())
        start, end = s.background[:, :, None, None], s.background_end[:, :, None, None]
        grain = 1 + self.grains[s.grain] * over_picture((s.backdrop == 2).float())
        return (start + (end - start) * ramp[:, None]) * grain[:, None]


def chosen(coverages: Tensor, kind: Tensor) -> Tensor:
    """Of coverages (B, K, H, W) the one that `kind` names; nothing where it is 0."""
    index = (kind - 1).clamp(min=0)[:, None, None, None].expand(-1, 1, *coverages.shape[2:])
    return coverages.gather(1, index)[:, 0] * over_picture((kind > 0).float())


def sample(textures: Tensor, x: Tensor, y: Tensor) -> Tensor:
    grid = torch.stack([x, y], -1) / EXTENT
    return F.grid_sample(textures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def grain_fields(seed: int) -> Tensor:
    """Relative brightness of 32 backdrop textures: paper and plaster, the same both ways, and wood, drawn out sideways."""
    generator = torch.Generator().manual_seed(seed + 1)
    fields = []
    for i in range(32):
        stretch = 1 if i % 2 == 0 else 6
        field = torch.zeros(1, 1, SIZE_PX, SIZE_PX)
        for cells, weight in ((5, 0.7), (12, 0.7), (28, 0.5)):
            noise = torch.randn(1, 1, cells, max(2, cells // stretch), generator=generator)
            field = field + weight * F.interpolate(noise, size=(SIZE_PX, SIZE_PX), mode="bicubic", align_corners=False)
        fields.append(0.035 * field[0, 0])
    return torch.stack(fields)
