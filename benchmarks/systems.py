"""Millicent's side of benchmarks.peers: each format, attention and reuse as a system that is opened, measured and closed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

import diffusers
import torch
from PIL import Image, ImageChops
from torch import Tensor

from benchmarks.peers import Job, Opener, System
from benchmarks.true_size import make_card, to_millicent
from millicent.edits import EditRequest
from millicent.engine import drawing
from millicent.engine import pipeline as stages_of
from millicent.engine.editor import Editor
from millicent.engine.loading import Model, speed_up_model
from millicent.engine.planner import plan
from millicent.engine.settings import Settings
from millicent.errors import MillicentError

SYSTEMS = {
    "millicent bf16": Settings(format="bf16"),
    "millicent fp8": Settings(format="fp8"),
    "millicent fp8 + 8-bit attention": Settings(format="fp8", attention="int8"),
    "millicent fp8 + reuse": Settings(format="fp8", reuse_reference=True),
    "millicent fp8 + 8-bit attention + reuse": Settings(format="fp8", attention="int8", reuse_reference=True),
    "millicent int8": Settings(format="int8"),
}


def millicent_systems(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job) -> dict[str, Opener]:
    """Openers by name; on a CPU the exact ones, for their pictures."""
    device = pipeline.transformer.device
    shown = SYSTEMS if device.type == "cuda" else {"millicent bf16": SYSTEMS["millicent bf16"]}

    def opener(name: str, settings: Settings) -> Opener:
        return lambda: open_system(pipeline, job, name, settings)

    return {name: opener(name, settings) for name, settings in shown.items()}


@torch.inference_mode()
def open_system(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job, name: str, settings: Settings) -> System:
    model = to_millicent(pipeline, make_card(job.size))
    device = model.device
    is_cuda = device.type == "cuda"
    chosen = plan(settings, torch.cuda.get_device_capability() if is_cuda else None, "this card")
    assert chosen is not None
    model = speed_up_model(model, chosen)
    editor = Editor(name, model)
    request = EditRequest(images=(job.picture,), prompt=job.prompt, steps=job.steps, schedule="lightning", seed=job.seed)

    def edit() -> Image.Image:
        forget(model)
        return editor.edit(request).image

    def stream(count: int) -> None:
        # no two pictures alike, so that nothing is remembered
        pictures = [ImageChops.offset(job.picture, 8 * number, 0) for number in range(1, count + 1)]
        draw_together(editor, (dataclasses.replace(request, images=(picture,)) for picture in pictures))

    return System(
        name=name,
        format=settings.format or "bf16",
        step=make_step(model, job),
        edit=edit,
        stages=lambda: _stages(model, request, job),
        close=lambda: None,
        stream=stream,
    )


def make_step(model: Model, job: Job) -> Callable[[], Tensor]:
    """A step at the job's timestep -> velocity (1, target tokens, 64); with reuse a later one, after a first."""
    assert model.fast is not None
    network, target = model.fast.network, job.target_tokens
    mods, rows = model.fast.modulation.mods([float(job.timestep), 0.0])

    def start() -> Callable[[], Tensor]:
        begun = network.start(job.txt, job.img[:, target:], job.img_shapes, mods)
        begun.step(job.img[:, :target], rows[0])
        return lambda: begun.step(job.img[:, :target], rows[0])

    start()
    return torch.inference_mode()(start())  # a shape that comes again is captured


def draw_together(editor: Editor, requests: Iterable[EditRequest]) -> None:
    for result in editor.edit_many(requests):
        if isinstance(result, MillicentError):
            raise result


@torch.inference_mode()
def _stages(model: Model, request: EditRequest, job: Job) -> dict[str, float]:
    """Milliseconds of one edit's stages."""
    forget(model)
    marks = [_now(model)]
    prepared = stages_of.prepare(request, model)
    marks.append(_now(model))
    stages_of.read(request.prompt, prepared, model)
    marks.append(_now(model))
    for reference in prepared.references:
        stages_of.encode_picture(reference, model)
    marks.append(_now(model))
    conditioning = stages_of.encode(prepared, model, request.prompt, None)
    sigmas, _ = stages_of.make_sigmas(request, model, prepared.height, prepared.width)
    began = _now(model)
    latents = drawing.draw(conditioning, model, sigmas, (job.seed,), 1.0)
    drawn = _now(model)
    sent = stages_of.send(latents.tensor, model)
    decoded = _now(model)
    assert stages_of.receive(sent, request).size
    done = time.perf_counter()
    return {
        "prepare": 1e3 * (marks[1] - marks[0]),
        "text": 1e3 * (marks[2] - marks[1]),
        "vae_encode": 1e3 * (marks[3] - marks[2]),
        "denoise": 1e3 * (drawn - began),
        "vae_decode": 1e3 * (decoded - drawn),
        "to_pil": 1e3 * (done - decoded),
    }


def forget(model: Model) -> None:
    """The peers remember nothing from one edit to the next, so nor do we where we are compared. Graphs stay: they hold none."""
    reader = model.reader
    for cache in (model.latents, *(() if reader is None else (reader.pictures, reader.openings, reader.embeddings))):
        if cache is not None:
            cache.clear()


def _now(model: Model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
