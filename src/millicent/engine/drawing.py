"""Drawing: from noise to latents, one picture or several that take their steps together.

Noise, packing and rounding are those of diffusers' pipelines, so that the same weights and the same seed give the same picture.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from millicent.engine.laying_out import FastDrawing
from millicent.engine.loading import Model
from millicent.engine.sampler import denoise, denoising, guide
from millicent.engine.transformer import Drawing, FastMMDiT

OnStep = Callable[[int, int], None]  # the step's number and how many there are

PATCH = 2  # latents a side of one token


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the transformer is told.

    positive, negative: hidden states (1, T, C); negative is None without guidance.
    references: packed latents (1, tokens, 64).
    img_shapes: (height, width) in tokens of the target, then of each reference.
    """

    positive: Tensor
    negative: Tensor | None
    references: Tensor
    img_shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Latents:
    """Denoised latents, one row a variant: (B, 16, h, w), standardized."""

    tensor: Tensor


def draw(
    conditioning: Conditioning,
    model: Model,
    sigmas: Sequence[float],
    seeds: Sequence[int],
    true_cfg: float,
    on_step: OnStep | None = None,
) -> Latents:
    """Denoise one variant for each seed; with a negative prompt, two forwards a step."""
    if model.fast is not None:
        return draw_together([Told(conditioning, sigmas, seeds, true_cfg)], model, on_step)[0]
    height, width = conditioning.img_shapes[0]
    noise = pack(make_noise(seeds, model, PATCH * height, PATCH * width))
    steps = len(sigmas) - 1
    tell = None if on_step is None else lambda number: on_step(number, steps)
    drawn = denoise(_plain_step(conditioning, model, len(seeds), true_cfg), noise, sigmas, tell)
    return Latents(unpack(drawn, height, width))


@dataclass(frozen=True, slots=True)
class Told:
    """All that a drawing is told: as draw's arguments."""

    conditioning: Conditioning
    sigmas: Sequence[float]
    seeds: Sequence[int]
    true_cfg: float


def draw_together(edits: Sequence[Told], model: Model, on_step: OnStep | None = None) -> list[Latents]:
    """As draw of each, bit for bit. Where blocks are streamed, several pictures take their steps together: network.abreast passes.

    Elsewhere one after another: at these sizes one picture fills a card.
    """
    assert model.fast is not None
    rows = [(told, noise) for told in edits for noise in _noise_rows(told, model)]
    passes = max(1 if told.conditioning.negative is None else 2 for told in edits)
    group = max(1, model.fast.network.abreast // passes)
    drawn: list[Tensor] = []
    for begin in range(0, len(rows), group):
        together = [_begin_row(*row, model.fast, 2 * place) for place, row in enumerate(rows[begin : begin + group])]
        drawn += _draw_rows(together, model.fast.network, on_step)
    pictures = iter(drawn)
    made = [torch.cat([next(pictures) for _ in told.seeds]) for told in edits]
    return [Latents(unpack(each, *told.conditioning.img_shapes[0])) for each, told in zip(made, edits, strict=True)]


def _noise_rows(told: Told, model: Model) -> Sequence[Tensor]:
    """(1, tokens, 64) for each variant."""
    height, width = told.conditioning.img_shapes[0]
    return pack(make_noise(told.seeds, model, PATCH * height, PATCH * width)).split(1)


Step = Callable[[Tensor, Tensor], Tensor]


def _plain_step(conditioning: Conditioning, model: Model, count: int, true_cfg: float) -> Step:
    shapes = list(conditioning.img_shapes)
    references = conditioning.references.expand(count, -1, -1)

    def velocity(txt: Tensor, img: Tensor, timestep: Tensor) -> Tensor:
        # one for the whole batch: what depends on it alone is computed once, and is the same for one variant as for several
        return model.mmdit(img, txt.expand(count, -1, -1), timestep[:1], shapes)

    def step(latents: Tensor, timestep: Tensor) -> Tensor:
        img = torch.cat([latents, references], 1)
        positive = velocity(conditioning.positive, img, timestep)
        if conditioning.negative is None:
            return positive
        return guide(positive, velocity(conditioning.negative, img, timestep), true_cfg)

    return step


@dataclass(slots=True)
class _Row:
    """One picture under way. drawings: one for each of its texts. numbers: of its timesteps, in the table. euler: denoising's."""

    drawings: Sequence[Drawing]
    numbers: Sequence[int]
    true_cfg: float
    euler: Generator[tuple[Tensor, Tensor], Tensor, Tensor]
    latents: Tensor

    def asks(self, step: int) -> list[tuple[Drawing, Tensor, int]]:
        return [(drawing, self.latents, self.numbers[step]) for drawing in self.drawings]

    def take(self, velocities: Sequence[Tensor]) -> None:
        """One of each drawing."""
        velocity = velocities[0] if len(velocities) == 1 else guide(velocities[0], velocities[1], self.true_cfg)
        try:
            self.latents, _ = self.euler.send(velocity)
        except StopIteration as ended:
            self.latents = ended.value


def _draw_rows(rows: Sequence[_Row], network: FastMMDiT, on_step: OnStep | None) -> list[Tensor]:
    """Latents (1, tokens, 64) of each, all a step at a time; those with fewer steps end before the others."""
    steps = max(len(row.numbers) for row in rows)
    for step in range(steps):
        if on_step is not None:
            on_step(step, steps)
        going = [row for row in rows if step < len(row.numbers)]
        velocities = iter(network.step([one for row in going for one in row.asks(step)]))
        for row in going:
            row.take([next(velocities) for _ in row.drawings])
    for row in rows:
        for one in row.drawings:
            one.end()
    return [row.latents for row in rows]


def _begin_row(told: Told, noise: Tensor, fast: FastDrawing, first_slot: int) -> _Row:
    """first_slot: as FastMMDiT.start's, of one or two."""
    mods, numbers = fast.modulation.mods(told.sigmas)
    of = told.conditioning
    texts = [of.positive, *([] if of.negative is None else [of.negative])]
    drawings = [fast.network.start(txt, of.references, of.img_shapes, mods, slot) for slot, txt in enumerate(texts, first_slot)]
    euler = denoising(noise, told.sigmas)
    latents, _ = next(euler)
    return _Row(drawings, numbers, told.true_cfg, euler, latents)


def make_noise(seeds: Sequence[int], model: Model, height: int, width: int) -> Tensor:
    """(B, 16, height, width) of latents; each row from its own CPU generator, in the compute dtype, as in diffusers."""
    shape = (1, model.vae.config.z_dim, height, width)
    rows = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=model.dtype) for seed in seeds]
    noise = torch.cat(rows)
    # from pinned memory, or the copy would wait for the picture that is drawn before
    return noise.pin_memory().to(model.device, non_blocking=True) if model.device.type == "cuda" else noise


def pack(latents: Tensor) -> Tensor:
    """(B, 16, h, w) -> (B, h/2 w/2, 64): each 2x2 patch becomes one token."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, height width, 64) -> (B, 16, 2 height, 2 width)."""
    patches = tokens.reshape(tokens.shape[0], height, width, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
