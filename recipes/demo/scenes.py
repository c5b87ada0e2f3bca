"""Scenes drawn at random, each with one edit: source and target differ in one attribute, and in nothing else."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.demo.renderer import Renderer, Scene
from recipes.demo.world import CLASSES, COLOR_NAMES, COLORS, OP_SHARES, OPS

CALM_BACKDROPS = ("white", "beige", "gray", "sky blue", "lavender", "pink", "mint green")
MAY_BE_MIRRORED = tuple(CLASSES.index(name) for name in ("mug", "sneaker", "cap"))
CHANGED = 2.5 / 255  # a pixel that moves less than this is not part of the edit
TEXTURE_SEED = 0


class Edit(NamedTuple):
    """What changes, as indices (B,) into world.OPS, COLOR_NAMES, PATTERNS or LOGOS (aux), and CLASSES."""

    op: Tensor
    color: Tensor
    aux: Tensor
    cls: Tensor


class Scenes:
    """Draws pairs on one device. The last eighth of each class's outlines is held out of training."""

    def __init__(self, device: torch.device, variants: int = 32) -> None:
        self.device, self.variants = device, variants
        self.renderer = Renderer(device, variants, TEXTURE_SEED)
        self.palette = torch.tensor(list(COLORS.values()), device=device) / 255
        self.calm = torch.tensor([name in CALM_BACKDROPS for name in COLOR_NAMES], device=device)
        self.op_shares = torch.tensor(OP_SHARES, device=device)

    @torch.no_grad()
    def pairs(self, batch: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor, Tensor, Edit]:
        """Source and target (B, 3, 256, 256) in [0, 1], the changed pixels (B, 256, 256) and the edit."""
        source, target, edit = self.sample(batch, generator, held_out)
        geometry = self.renderer.geometry(source)
        before, after = self.renderer.compose(geometry, source), self.renderer.compose(geometry, target)
        return before, after, (before - after).abs().amax(1) > CHANGED, edit

    def sample(self, batch: int, generator: torch.Generator, held_out: bool) -> tuple[Scene, Scene, Edit]:
        op = torch.multinomial(self.op_shares, batch, replacement=True, generator=generator)
        source = self.sample_source(op, generator, held_out)
        target, edit = self.sample_target(source, op, generator)
        return source, target, edit

    def uniform(self, batch: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(batch, device=self.device, generator=generator) * (high - low) + low

    def integer(self, batch: int, generator: torch.Generator, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch,), device=self.device, generator=generator)

    def pick(self, allowed: Tensor, generator: torch.Generator) -> Tensor:
        """One color of those allowed, (B, colors) -> (B,); any where none is."""
        return torch.multinomial(allowed.float() + 1e-6, 1, generator=generator)[:, 0]

    def far_from(self, color: Tensor, distance: float) -> Tensor:
        """Which palette colors (B, colors) lie at least so far from `color` (B, 3) in RGB."""
        return torch.cdist(color[:, None], self.palette[None])[:, 0] > distance

    def jitter(self, color: Tensor, generator: torch.Generator, amount: float) -> Tensor:
        """Half of the colors moved a little, so that sources are not all of the palette."""
        moved = color + (torch.rand(color.shape, device=self.device, generator=generator) - 0.5) * amount
        stays = torch.rand(len(color), 1, device=self.device, generator=generator) < 0.5
        return torch.where(stays, color, moved).clamp(0.03, 0.98)

    def sample_source(self, op: Tensor, g: torch.Generator, held_out: bool) -> Scene:
        n = len(op)
        cls = self.integer(n, g, 0, len(CLASSES))
        held = self.variants // 8
        first, last = (self.variants - held, self.variants) if held_out else (0, self.variants - held)
        scale = self.uniform(n, g, 0.74, 0.94)
        room = (1.03 - scale).clamp(min=0.04)
        mirrored = torch.isin(cls, torch.tensor(MAY_BE_MIRRORED, device=self.device)) & (self.uniform(n, g) < 0.5)
        body, background = self.sample_grounds(n, g)
        pattern_color = self.jitter(self.palette[self.pick(self.far_from(body, 0.38), g)], g, 0.14)
        apart = self.far_from(body, 0.38) & self.far_from(pattern_color, 0.25)
        logo_color = self.jitter(self.palette[self.pick(apart, g)], g, 0.14)
        pattern, logo = self.sample_marks(op, g)
        end = (background + (torch.rand(n, 3, device=self.device, generator=g) - 0.5) * 0.45).clamp(0.03, 0.98)
        return Scene(
            cls=cls,
            variant=self.integer(n, g, first, last),
            scale=scale,
            aspect=self.uniform(n, g, 0.94, 1.06),
            angle=(torch.randn(n, device=self.device, generator=g) * 0.05).clamp(-0.11, 0.11),
            flip=torch.where(mirrored, -1.0, 1.0),
            cx=self.uniform(n, g, -1, 1) * room,
            cy=self.uniform(n, g, -1, 1) * room * 0.7,
            light=self.uniform(n, g, -0.14, 0.14),
            fold_phase=self.uniform(n, g, 0, 2 * math.pi),
            fold_depth=self.uniform(n, g, 0.01, 0.045),
            shadow=self.uniform(n, g, 0.15, 0.38),
            body=body,
            pattern=pattern,
            pattern_color=pattern_color,
            logo=logo,
            logo_color=logo_color,
            backdrop=torch.where(self.uniform(n, g) < 0.45, 0, self.integer(n, g, 1, 3)),
            background=background,
            background_end=end,
            backdrop_angle=self.uniform(n, g, 0, 2 * math.pi),
            grain=self.integer(n, g, 0, len(self.renderer.grains)),
        )

    def sample_grounds(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Colors of the product and of the backdrop, apart from each other."""
        free = torch.rand(n, 3, device=self.device, generator=g) * 0.92 + 0.05
        palette = self.jitter(self.palette[self.integer(n, g, 0, len(COLOR_NAMES))], g, 0.12)
        body = torch.where(self.uniform(n, g)[:, None] < 0.35, free, palette)
        calm = self.calm[None] | (self.uniform(n, g)[:, None] < 0.35)
        background = self.jitter(self.palette[self.pick(self.far_from(body, 0.3) & calm, g)], g, 0.14)
        return body, background

    def sample_marks(self, op: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pattern and logo of the source, there where the edit needs one; seldom both, since together they are busy."""
        n = len(op)
        needs_pattern = op == OPS.index("remove_pattern")
        needs_logo = (op == OPS.index("remove_logo")) | (op == OPS.index("recolor_logo"))
        pattern = torch.where(needs_pattern | (self.uniform(n, g) < 0.34), self.integer(n, g, 1, 4), 0)
        free_logo = (self.uniform(n, g) < 0.3) & (op != OPS.index("add_logo"))
        logo = torch.where(needs_logo | free_logo, self.integer(n, g, 1, 4), 0)
        busy = (logo > 0) & ~needs_pattern & (self.uniform(n, g) < 0.6)
        adds = (op == OPS.index("add_logo")) & (self.uniform(n, g) < 0.5)
        return torch.where(busy | adds, 0, pattern), logo

    def sample_target(self, s: Scene, op: Tensor, g: torch.Generator) -> tuple[Scene, Edit]:
        """One attribute changed to a palette color that stands out from what it was and from what it touches."""
        n = len(op)
        aux = self.integer(n, g, 0, 3)
        is_op = {name: op == i for i, name in enumerate(OPS)}
        aux = torch.where(is_op["remove_logo"] | is_op["recolor_logo"], s.logo - 1, aux)
        repeats = is_op["set_pattern"] & (s.pattern == aux + 1) & (self.uniform(n, g) < 0.6)
        aux = torch.where(repeats, (aux + 1) % 3, aux)
        color = self.pick(self.allowed_colors(s, op), g)
        rgb = self.palette[color]

        def put(ops: tuple[str, ...], new: Tensor | int, old: Tensor) -> Tensor:
            where = torch.stack([is_op[name] for name in ops]).any(0)
            return torch.where(where[:, None] if old.ndim == 2 else where, new, old)

        target = dataclasses.replace(
            s,
            body=put(("recolor",), rgb, s.body),
            background=put(("background",), rgb, s.background),
            backdrop=put(("background",), 0, s.backdrop),
            pattern=put(("remove_pattern",), 0, put(("set_pattern",), aux + 1, s.pattern)),
            pattern_color=put(("set_pattern",), rgb, s.pattern_color),
            logo=put(("remove_logo",), 0, put(("add_logo",), aux + 1, s.logo)),
            logo_color=put(("add_logo", "recolor_logo"), rgb, s.logo_color),
        )
        return target, Edit(op, color, aux, s.cls)

    def allowed_colors(self, s: Scene, op: Tensor) -> Tensor:
        """Palette colors (B, colors) that make this edit plain to see."""
        has_pattern, has_logo = (s.pattern > 0)[:, None], (s.logo > 0)[:, None]
        from_pattern = self.far_from(s.pattern_color, 0.3) | ~has_pattern
        from_logo = self.far_from(s.logo_color, 0.3) | ~has_logo
        any_color = torch.ones_like(from_logo)
        by_op = {
            "recolor": self.far_from(s.body, 0.22) & self.far_from(s.background, 0.16) & from_pattern & from_logo,
            "background": self.far_from(s.body, 0.24) & self.far_from(s.background, 0.22),
            "set_pattern": self.far_from(s.body, 0.36) & from_logo & (self.far_from(s.pattern_color, 0.15) | ~has_pattern),
            "remove_pattern": any_color,
            "add_logo": self.far_from(s.body, 0.36) & from_pattern,
            "remove_logo": any_color,
            "recolor_logo": self.far_from(s.body, 0.36) & self.far_from(s.logo_color, 0.24) & from_pattern,
        }
        stacked = torch.stack([by_op[name] for name in OPS])
        return stacked[op, torch.arange(len(op), device=op.device)]
