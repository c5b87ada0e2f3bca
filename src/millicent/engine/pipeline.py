"""The stages of an edit before and after its drawing, each a function from one frozen value to the next:

    request -> prepare -> Prepared -> encode -> Conditioning -> draw (drawing.py) -> Latents -> decode -> pictures

Sizes and rounding are those of diffusers' QwenImageEditPipeline and QwenImageEditPlusPipeline, so that
the same weights and the same seed give the same picture.
"""

from __future__ import annotations

import math
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from millicent.edits import EditRequest
from millicent.engine.caches import image_key, size_bytes
from millicent.engine.drawing import PATCH, Conditioning, Latents, OnStep, pack
from millicent.engine.loading import Model
from millicent.engine.modulation import check_schedule
from millicent.engine.output import Sent, to_uint8
from millicent.engine.sampler import base_sigmas, lightning_sigmas
from millicent.errors import CheckpointError, InputError, SizeError
from millicent.facts.models import ModelCard
from millicent.images import fit_to, flatten
from millicent.model.sizes import Workload

_MAX_ASPECT = 200  # Qwen2-VL's image processor takes no longer ones
_DRAWN_SEEDS = 2**32  # a random seed is short enough to type again


@dataclass(frozen=True, slots=True)
class Reference:
    """A picture as the VAE sees it: levels (H, W, 3) uint8 on the host, and its key for Model.latents, where there are any."""

    levels: Tensor
    key: str | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """The pictures as the two encoders want them, and the size to draw, in pixels.

    encoder_images: for the text encoder. references: for the VAE.
    """

    encoder_images: tuple[Image.Image, ...]
    references: tuple[Reference, ...]
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Course:
    """What a request left open, decided.

    seeds: one for each variant. sigmas: the final 0 included. negative_prompt: None without guidance.
    """

    seeds: tuple[int, ...]
    sigmas: tuple[float, ...]
    schedule: str
    true_cfg: float
    negative_prompt: str | None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def prepare(request: EditRequest, model: Model) -> Prepared:
    """Bring every picture to its two sizes. Raises SizeError for a shape no size suits, InputError for too many."""
    card = model.card
    if card.pipeline == "edit" and len(request.images) > 1:
        raise InputError(
            f"{len(request.images)} pictures were given; {card.title} edits one.",
            "Give one picture, or use a model of the 2509 or 2511 kind.",
        )
    images = [flatten(image) for image in request.images]
    areas = (card.encoder_area_px, card.vae_area_px)
    sizes = [tuple(size_for_area(area, image.height, image.width) for area in areas) for image in images]
    # in Edit both encoders get the same picture, resized once
    wanted = dict.fromkeys((number, size) for number, pair in enumerate(sizes) for size in pair)
    with ThreadPoolExecutor(len(wanted)) as pool:  # Pillow lets other threads run while it resizes
        resized = dict(zip(wanted, pool.map(lambda job: resize(images[job[0]], *job[1]), wanted), strict=True))
    height, width = drawn_size(request, card, model.pixels_per_token)
    return Prepared(
        tuple(resized[number, size] for number, (size, _) in enumerate(sizes)),
        tuple(_refer(resized[number, size], model) for number, (_, size) in enumerate(sizes)),
        height,
        width,
    )


def _refer(image: Image.Image, model: Model) -> Reference:
    levels = torch.from_numpy(np.array(image))
    if model.device.type == "cuda":  # an upload from pinned memory waits for nothing
        levels = levels.pin_memory()
    return Reference(levels, None if model.latents is None else image_key(image))


def settle(request: EditRequest, model: Model, height: int, width: int) -> Course:
    """Decide on what the request left to the model's card, for a picture of height x width pixels; a seed is drawn."""
    card = model.card
    first_seed = secrets.randbelow(_DRAWN_SEEDS) if request.seed is None else request.seed
    sigmas, schedule = make_sigmas(request, model, height, width)
    true_cfg = card.true_cfg if request.true_cfg is None else request.true_cfg
    negative_prompt = card.negative_prompt if request.negative_prompt is None else request.negative_prompt
    return Course(
        seeds=tuple(first_seed + variant for variant in range(request.variants)),
        sigmas=tuple(sigmas),
        schedule=schedule,
        true_cfg=true_cfg,
        negative_prompt=negative_prompt if true_cfg > 1 else None,
    )


def weigh_request(request: EditRequest, model: Model) -> Workload:
    """What it comes to, by its sizes. Of a request that has been prepared, which raises nothing."""
    card, encoder = model.card, model.text_encoder
    height, width = drawn_size(request, card, model.pixels_per_token)
    course = settle(request, model, height, width)
    texts = [request.prompt, *([] if course.negative_prompt is None else [course.negative_prompt])]
    tokens = max(len(encoder.tokenize(encoder.fill_template(text, len(request.images)))) for text in texts)
    return Workload(
        width=width,
        height=height,
        references=len(request.images),
        steps=course.steps,
        reference_px=card.vae_area_px,
        encoder_px=card.encoder_area_px,
        prompt_tokens=tokens - encoder.prefix_tokens,
        guided=course.negative_prompt is not None,
    )


def check_sigmas(course: Course, model: Model) -> None:
    """Raises ScheduleError for sigmas that the model's modulation table lacks; makes the table where there is none yet."""
    if model.fast is None:
        check_schedule(model.mmdit, course.sigmas)
    else:
        model.fast.modulation.mods(course.sigmas)


def size_for_area(area_px: int, height: int, width: int, multiple: int = 32) -> tuple[int, int]:
    """(height, width) of about `area_px` in the shape of height x width, each side rounded to the multiple."""
    ratio = width / height
    wide = math.sqrt(area_px * ratio)
    sized = round(wide / ratio / multiple) * multiple, round(wide / multiple) * multiple
    if 0 in sized or max(sized) > _MAX_ASPECT * min(sized):
        raise SizeError(
            f"A picture of {width}x{height} pixels is too long for this model.",
            "Crop it so that the longer side is at most 16 times the shorter.",
        )
    return sized


def drawn_size(request: EditRequest, card: ModelCard, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels that the model draws: the last picture's shape, or the asked one with fit="fit"."""
    if request.height is None or request.width is None or request.fit != "fit":
        last = request.images[-1]
        return size_for_area(card.vae_area_px, last.height, last.width)
    area_px = min(card.vae_area_px, request.height * request.width)
    return size_for_area(area_px, request.height, request.width, multiple)


def encode(prepared: Prepared, model: Model, prompt: str, negative_prompt: str | None) -> Conditioning:
    """Read the prompts with the pictures, and encode the pictures. `negative_prompt` is None without guidance."""
    # first, as a card does it by itself while the host tokenizes
    latents = [encode_picture(reference, model) for reference in prepared.references]
    positive = read(prompt, prepared, model)
    negative = None if negative_prompt is None else read(negative_prompt, prepared, model)
    target = prepared.height // model.pixels_per_token, prepared.width // model.pixels_per_token
    shapes = [target, *((z.shape[2] // PATCH, z.shape[3] // PATCH) for z in latents)]
    return Conditioning(positive, negative, torch.cat([pack(z) for z in latents], 1), tuple(shapes))


def encode_picture(reference: Reference, model: Model) -> Tensor:
    """(1, 16, h, w), from the cache where there is one; not to be changed in place."""
    latents = None if model.latents is None or reference.key is None else model.latents.get(reference.key)
    if latents is None:
        levels = reference.levels.to(model.device, non_blocking=True)
        latents = model.vae.encode(to_pixels(levels, model.dtype))
        if model.latents is not None and reference.key is not None:
            model.latents.put(reference.key, latents, size_bytes(latents))
    return latents


def read(prompt: str, prepared: Prepared, model: Model) -> Tensor:
    """The encoder's hidden states (1, T, C) of a prompt with the pictures."""
    if model.reader is not None:
        return model.reader.read(prompt, prepared.encoder_images)
    return model.text_encoder.encode([prompt], [prepared.encoder_images])[0]


def make_sigmas(request: EditRequest, model: Model, height: int, width: int) -> tuple[list[float], str]:
    """The sigmas of a picture of height x width pixels, the final 0 included, and the schedule's name."""
    if request.sigmas is not None:
        return [*request.sigmas, 0.0], "sigmas"
    schedule = request.schedule or model.card.schedule
    steps = request.steps or model.card.steps
    if schedule == "lightning":
        return lightning_sigmas(steps), schedule
    tokens = (height // model.pixels_per_token) * (width // model.pixels_per_token)
    return base_sigmas(steps, tokens, model.schedule), schedule


def decode(latents: Latents, request: EditRequest, model: Model, on_step: OnStep | None = None) -> list[Image.Image]:
    """Latents to pictures of the asked size, one at a time to hold memory down.

    Raises CheckpointError where the weights have drawn no finite values.
    """
    images = []
    count = latents.tensor.shape[0]
    for number in range(count):
        if on_step is not None:
            on_step(number, count)
        images.append(receive(send(latents.tensor[number : number + 1], model), request))
    return images


def send(latents: Tensor, model: Model) -> Sent:
    """Decode latents (1, 16, h, w), and start their picture's way to the host; on a card nothing is waited for."""
    pixels = model.vae.decode(latents)
    return Sent(to_uint8(pixels[0]), pixels.isfinite().all())


def receive(sent: Sent, request: EditRequest) -> Image.Image:
    """Wait for a picture and bring it to the asked size. Raises CheckpointError where its values were not finite."""
    levels, finite = sent.wait()
    if not bool(finite):
        raise CheckpointError("The model drew values that are not finite.", "Check its weights, or try fp32.")
    image = Image.fromarray(levels.numpy())
    if request.height is not None and request.width is not None:
        image = fit_to(image, request.width, request.height, request.fit)
    return image


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.LANCZOS)


def to_pixels(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """levels (H, W, 3) uint8 -> (1, 3, H, W) in [-1, 1] on the same device, computed in FP32, then cast."""
    # by a table from the host: a card would multiply by 1 / 255 where a CPU divides, and differ in the last bit
    table = (2.0 * (torch.arange(256, dtype=torch.float32) / 255.0) - 1.0).to(dtype)
    indices = levels.permute(2, 0, 1).reshape(-1).int()
    pixels = table.to(levels.device, non_blocking=True).index_select(0, indices)
    return pixels.view(1, 3, *levels.shape[:2])
