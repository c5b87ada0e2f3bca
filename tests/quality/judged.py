"""Pictures to judge: the demo's held-out scenes, photographs, woven and knitted goods, static; and ways to spoil one."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy as np
import skimage.data
import torch
from PIL import Image

from millicent.engine.editor import Editor
from millicent.engine.settings import Settings
from recipes.demo.evaluate import to_image, to_pixels
from recipes.demo.scenes import Scenes
from recipes.demo.validate import SEED
from recipes.demo.world import OPS

torch.set_num_threads(1)
PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "cat",
    "rocket",
    "camera",
    "moon",
    "retina",
    "immunohistochemistry",
    "brick",
    "grass",
    "gravel",
)


@dataclass(frozen=True, slots=True)
class Edited:
    """A rendered scene, the same one edited by the renderer, and the mask of what that changed; 256 x 256."""

    op: str
    source: Image.Image
    target: Image.Image
    mask: Image.Image


@functools.cache
def scenes(count: int) -> tuple[Edited, ...]:
    pairs = Scenes(torch.device("cpu")).pairs(count, torch.Generator().manual_seed(SEED), held_out=True)
    source, target, mask, edit = pairs
    return tuple(
        Edited(
            OPS[int(edit.op[i])],
            to_image(source[i]),
            to_image(target[i]),
            Image.fromarray((mask[i].numpy() * 255).astype(np.uint8)),
        )
        for i in range(count)
    )


@functools.cache
def demo() -> Editor:
    return Editor.open("demo", device="cpu", settings=Settings(plain=True))


@torch.inference_mode()
def through_vae(image: Image.Image) -> Image.Image:
    """What the demo model's VAE makes of a picture that nothing was done to. Sides are cut to multiples of 16."""
    image = image.crop((0, 0, image.width // 16 * 16, image.height // 16 * 16))
    vae = demo()._model.vae
    decoded = vae.decode(vae.encode(to_pixels(image)[None] * 2 - 1))[0].float() / 2 + 0.5
    return to_image(decoded.clamp(0, 1))


@torch.inference_mode()
def decode_noise(side_px: int, seed: int, strength: float = 1.0) -> Image.Image:
    """The picture of latents that were never denoised: what a model draws that has learned nothing."""
    latents = torch.randn(1, 16, side_px // 8, side_px // 8, generator=torch.Generator().manual_seed(seed)) * strength
    return to_image((demo()._model.vae.decode(latents)[0].float() / 2 + 0.5).clamp(0, 1))


def photograph(name: str, width_px: int) -> Image.Image:
    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    return image.resize((width_px, round(width_px * image.height / image.width)), Image.Resampling.BICUBIC)


def to_picture(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def noise(kind: str, side_px: int, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    shape = (side_px, side_px, 3)
    if kind == "uniform":
        return to_picture(random.uniform(0, 255, shape))
    if kind == "gaussian":
        return to_picture(random.normal(128, 50, shape))
    if kind == "gray":
        return to_picture(np.repeat(random.normal(128, 50, (side_px, side_px, 1)), 3, 2))
    assert kind == "salt and pepper"
    return to_picture(np.repeat(random.integers(0, 2, (side_px, side_px, 1)) * 255, 3, 2))


def with_grain(image: Image.Image, sigma: float, seed: int) -> Image.Image:
    levels = np.asarray(image, dtype=np.float32)
    return to_picture(levels + np.random.default_rng(seed).normal(0, sigma, levels.shape))


def tweed(side_px: int, color: tuple[int, int, int], seed: int) -> Image.Image:
    """Herringbone of two yarns, with flecks, filling the frame."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side_px, :side_px]
    turned = np.where((x // 32) % 2 == 0, x, -x)
    light = np.where((turned + y) % 12 < 6, 1.0, 0.55)[..., None]
    flecks = (random.random((side_px, side_px, 1)) < 0.04) * random.uniform(-90, 90, (side_px, side_px, 3))
    yarn = random.normal(0, 9, (side_px, side_px, 1))
    return to_picture(np.array(color) * light + flecks + yarn)


def knit(side_px: int, color: tuple[int, int, int], seed: int) -> Image.Image:
    """Rows of V-shaped stitches with fuzz, filling the frame."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side_px, :side_px]
    stitch = np.cos(2 * np.pi * (y / 10 + np.abs((x % 14) / 14 - 0.5) * 1.6)) * 0.25
    column = np.cos(2 * np.pi * x / 14) * 0.12
    fuzz = random.normal(0, 8, (side_px, side_px, 1))
    return to_picture(np.array(color) * (0.75 + stitch + column)[..., None] + fuzz)


def tint(image: Image.Image, color: tuple[int, int, int], region: Image.Image | None = None) -> Image.Image:
    """A recoloring: light and shade stay. region: where, as a mask; None for everywhere."""
    gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    tinted = to_picture(gray * np.array(color) * 1.4)
    return tinted if region is None else Image.composite(tinted, image, region)


def in_oval(size: tuple[int, int]) -> Image.Image:
    """A product's place: an oval over the middle."""
    y, x = np.mgrid[: size[1], : size[0]]
    inside = ((x / size[0] - 0.5) / 0.3) ** 2 + ((y / size[1] - 0.5) / 0.36) ** 2 < 1
    return Image.fromarray(inside.astype(np.uint8) * 255)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def resampled(image: Image.Image) -> Image.Image:
    smaller = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC)
    return smaller.resize(image.size, Image.Resampling.BICUBIC)


def moved(image: Image.Image, zoom: float = 1.0, right: float = 0.0, down: float = 0.0) -> Image.Image:
    """Zoomed about its middle, then shifted by shares of its longer side; what comes into sight goes on as the border does."""
    width, height = image.size
    rim = max(width, height) // 4
    wide = Image.fromarray(np.pad(np.asarray(image), ((rim, rim), (rim, rim), (0, 0)), mode="edge"))
    back, side = 1 / zoom, max(width, height)
    coefficients = (
        *(back, 0, rim + width / 2 * (1 - back) - right * side * back),
        *(0, back, rim + height / 2 * (1 - back) - down * side * back),
    )
    return wide.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
