"""Millicent beside diffusers' best recipes, at the 20B model's true size and on random weights. `python -m benchmarks.peers`.

One card, one run: first what the card itself can do, then every system's step, stages, whole edit and memory. A system whose
velocity is not the reference's reports no speed. Millicent's own systems come from benchmarks.systems where that file exists:
`millicent_systems(pipeline, job)` returns openers by name, so that each system is built, measured and closed before the next.
Of the peers torchao comes last: it quantizes the pipeline's transformer in place, and it tunes torch.compile for the process.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import describe_machine
from benchmarks.reference import mended_positions, picture_areas
from benchmarks.true_size import SIZES, Size, make_pipeline
from millicent.engine.loading import choose_device
from millicent.errors import InputError, MachineError

# Relative L2 error of one step's velocity against diffusers' eager BF16. They rest on 60-block, 384-channel networks of
# benchmarks.true_size on a CPU, against FP32: eager BF16 itself is 0.020 to 0.023 off, so that a more exact system is too,
# and another order of BF16 sums is 0.014 to 0.020 from it; FP8 row-wise is 0.04 to 0.09 off, INT8 row-wise without a rotation
# 0.08 to 0.11. One block's attention left out is 0.06 off or more, one block's MLP 0.05 or more.
BOUNDS = {"bf16": 0.03, "fp8": 0.12, "int8": 0.12}
SIGMA = 0.75  # the step that is measured, of Lightning's 1, 0.9, 0.75 and 0.5
SEED = 7
WARMUPS = 2
STEP_REPEATS = 10
STAGE_REPEATS = 5
STREAMED_IMAGES = 32
CEILING_REPEATS = 20
GEMM_SHAPES = ((8192, 9216, 3072), (8192, 12288, 3072), (8192, 3072, 12288))  # (M, N, K): QKV, MLP up, MLP down
ATTENTION_SHAPE = (1, 24, 8448, 128)  # (B, H, S, d): 4096 + 4096 picture tokens and 256 of text
COPY_BYTES = 4 * 1024**3
STAGES = ("prepare", "text", "vae_encode", "denoise", "vae_decode", "to_pil")
Figures = dict[str, Any]

_began = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _began:6.1f} s] {text}", flush=True)


@dataclass(frozen=True, slots=True)
class Job:
    """The edit that every system does, and the inputs of the one step that is compared and timed.

    steps: Lightning steps, without guidance. img: the target's packed latents, then the reference's, (1, 2 tokens, 64).
    txt: hidden states (1, T, C). timestep: (1,), in [0, 1]. img_shapes: (height, width) in tokens of target and reference.
    """

    size: Size
    picture: Image.Image
    prompt: str
    steps: int
    seed: int
    img: Tensor
    txt: Tensor
    timestep: Tensor
    img_shapes: tuple[tuple[int, int], tuple[int, int]]

    @property
    def target_tokens(self) -> int:
        height, width = self.img_shapes[0]
        return height * width


@dataclass(frozen=True, slots=True)
class System:
    """One way to run the model.

    format: a key of BOUNDS. step: the transformer alone on the job's inputs -> velocity (1, target tokens, 64).
    edit: the whole job. stages: the whole job once more -> ms of each of STAGES that it tells apart.
    stream: so many jobs of different pictures in a row, where a system has more to offer for that than one edit after another.
    close: free what only this system holds, and leave the pipeline as it was.
    """

    name: str
    format: str
    step: Callable[[], Tensor]
    edit: Callable[[], Image.Image]
    stages: Callable[[], dict[str, float]]
    close: Callable[[], None]
    stream: Callable[[int], None] | None = None


Opener = Callable[[], System]


def draw_picture(side_px: int) -> Image.Image:
    """Smooth colored noise, a square of side_px."""
    rows = np.random.default_rng(SEED).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rows).resize((side_px, side_px), Image.Resampling.BICUBIC)


@torch.no_grad()
def make_job(pipeline: diffusers.QwenImageEditPlusPipeline, size: Size, steps: int) -> Job:
    picture = draw_picture(size.picture_px)
    prompt, txt = make_prompt(pipeline, size, picture)
    side = size.picture_px // (2 * pipeline.vae_scale_factor)
    generator = torch.Generator("cpu").manual_seed(SEED)
    pixels = pipeline.image_processor.preprocess(picture, size.picture_px, size.picture_px).unsqueeze(2)
    noise, reference = pipeline.prepare_latents([pixels], 1, 16, size.picture_px, size.picture_px, txt.dtype, txt.device, generator)
    timestep = torch.tensor([1000 * SIGMA], device=txt.device).to(txt.dtype) / 1000  # rounded as both pipelines do
    return Job(size, picture, prompt, steps, SEED, torch.cat([noise, reference], 1), txt, timestep, ((side, side), (side, side)))


def make_prompt(pipeline: diffusers.QwenImageEditPlusPipeline, size: Size, picture: Image.Image) -> tuple[str, Tensor]:
    """A prompt that fills the text stream to size.text_tokens exactly, and its hidden states (1, T, C)."""
    small = pipeline.image_processor.resize(picture, size.encoder_px, size.encoder_px)

    def encode(prompt: str) -> Tensor:
        with mended_positions(pipeline):
            return pipeline.encode_prompt(prompt=prompt, image=[small])[0]

    prompt = "make the shirt navy blue"
    # the missing words, one token each: the demo's vocabulary has few words, and a repeated one is as long as any other
    prompt += " blue" * (size.text_tokens - encode(prompt).shape[1])
    txt = encode(prompt)
    assert txt.shape[1] == size.text_tokens, f"the text stream has {txt.shape[1]} tokens"
    return prompt, txt


def diffusers_system(
    name: str, number_format: str, pipeline: diffusers.QwenImageEditPlusPipeline, job: Job, close: Callable[[], None]
) -> System:
    @torch.no_grad()  # as the pipeline runs it, so that a compiled block is the same block there and here
    def step() -> Tensor:
        shapes = [[(1, height, width) for height, width in job.img_shapes]]
        velocity = pipeline.transformer(
            hidden_states=job.img,
            encoder_hidden_states=job.txt,
            timestep=job.timestep,
            img_shapes=shapes,
            attention_kwargs={},
            return_dict=False,
        )[0]
        return velocity[:, : job.target_tokens]

    def edit() -> Image.Image:
        generator = torch.Generator("cpu").manual_seed(job.seed)
        with mended_positions(pipeline), picture_areas(job.size.picture_px**2, job.size.encoder_px**2):
            drawn = pipeline(
                image=[job.picture], prompt=job.prompt, num_inference_steps=job.steps, true_cfg_scale=1.0, generator=generator
            )
        picture: Image.Image = drawn.images[0]
        return picture

    return System(name, number_format, step, edit, lambda: diffusers_stages(pipeline, edit), close)


def diffusers_stages(pipeline: diffusers.QwenImageEditPlusPipeline, edit: Callable[[], object]) -> dict[str, float]:
    """ms of each stage of one edit, told apart by when the pipeline's own methods begin and end."""
    times: dict[str, tuple[float, float]] = {}

    def watched(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = _synchronized(pipeline.device)
            result = method(*args, **kwargs)
            times[stage] = begin, _synchronized(pipeline.device)
            return result

        return run

    methods = {
        "text": (pipeline, "encode_prompt"),
        "vae_encode": (pipeline, "_encode_vae_image"),
        "vae_decode": (pipeline.vae, "decode"),
        "to_pil": (pipeline.image_processor, "postprocess"),
    }
    patches = [mock.patch.object(owner, name, watched(stage, getattr(owner, name))) for stage, (owner, name) in methods.items()]
    for patch in patches:
        patch.start()
    try:
        begin = _synchronized(pipeline.device)
        edit()
    finally:
        for patch in patches:
            patch.stop()
    times["prepare"] = begin, times["text"][0]
    times["denoise"] = times["vae_encode"][1], times["vae_decode"][0]
    return {stage: 1000 * (times[stage][1] - times[stage][0]) for stage in STAGES}


def _synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_openers(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job) -> dict[str, Opener]:
    """Every system of this machine by name, in the order to measure. On a CPU diffusers runs eager only."""
    openers: dict[str, Opener] = {"diffusers-bf16": lambda: make_eager(pipeline, job)}
    on_card = pipeline.device.type == "cuda"
    if on_card:
        openers["diffusers-bf16-compiled"] = lambda: open_compiled(pipeline, job)
    if importlib.util.find_spec("benchmarks.systems") is not None:
        openers |= importlib.import_module("benchmarks.systems").millicent_systems(pipeline, job)
    if on_card:
        openers["diffusers-torchao-fp8"] = lambda: open_torchao(pipeline, job)
    return openers


def make_eager(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job) -> System:
    return diffusers_system("diffusers-bf16", "bf16", pipeline, job, lambda: None)


def open_compiled(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job) -> System:
    pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    return diffusers_system("diffusers-bf16-compiled", "bf16", pipeline, job, lambda: undo_compile(pipeline.transformer))


def open_torchao(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job) -> System:
    quantize_blocks(pipeline.transformer)
    pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    return diffusers_system("diffusers-torchao-fp8", "fp8", pipeline, job, lambda: undo_compile(pipeline.transformer))


def undo_compile(transformer: nn.Module) -> None:
    for module in transformer.modules():
        module._compiled_call_impl = None  # what nn.Module.compile sets; torch has no public way back
    torch._dynamo.reset()


def quantize_blocks(transformer: nn.Module) -> None:
    """FP8 with a scale a row for the blocks' attention and MLP linears, in place; the modulation's see one row only."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(transformer.transformer_blocks, config, filter_fn=is_quantized)


def is_quantized(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "_mod." not in name


def measure(open_system: Opener, reference: Tensor, device: torch.device, images: int) -> Figures:
    """One system's figures; no speeds where its velocity is further from the reference, (1, tokens, 64), than its bound."""
    held_before_bytes = _held_bytes(device)
    began = time.perf_counter()
    system = open_system()
    try:
        error = relative_error(system.step(), reference)
        figures: Figures = {
            "format": system.format,
            "open_and_first_step_s": round(time.perf_counter() - began, 1),
            "velocity_error": round(error, 5),
            "bound": BOUNDS[system.format],
        }
        say(f"{system.name}: velocity {error:.4f} from the reference, opened in {figures['open_and_first_step_s']} s")
        if not error <= BOUNDS[system.format]:  # so that NaN fails too
            return {**figures, "refused": "its velocity is beyond the bound"}
        return {**figures, **speeds(system, device, images), **_memory(device, held_before_bytes)}
    finally:
        system.close()


def speeds(system: System, device: torch.device, images: int) -> Figures:
    """ms of a step, of each stage and of a whole edit; medians. The peak of memory counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_ms = median_ms(system.step, device, STEP_REPEATS)
    say(f"{system.name}: {step_ms:.1f} ms a step")
    system.edit()  # the first one compiles, allocates and picks its algorithms
    edits_ms = []
    for _ in range(images):
        began = _synchronized(device)
        system.edit()
        edits_ms.append(1000 * (_synchronized(device) - began))
    stages = [system.stages() for _ in range(min(STAGE_REPEATS, images))]
    say(f"{system.name}: {statistics.median(edits_ms):.1f} ms an edit, median of {images}")
    per_second, streamed = 1000 / statistics.mean(edits_ms), images
    if system.stream is not None:
        began, streamed = _synchronized(device), STREAMED_IMAGES
        system.stream(streamed)
        per_second = streamed / (_synchronized(device) - began)
        say(f"{system.name}: {per_second:.3f} images/s over {streamed} in a row")
    return {
        "images_per_s": round(per_second, 3),
        "images_in_a_row": streamed,
        "step_ms": round(step_ms, 2),
        "stages_ms": {stage: round(statistics.median(s[stage] for s in stages), 2) for stage in stages[0]},
        "edit_ms": round(statistics.median(edits_ms), 1),
        "images": images,
    }


def _held_bytes(device: torch.device) -> int:
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _memory(device: torch.device, held_before_bytes: int) -> Figures:
    """The peak while it ran, and what lay on the card before it opened: the pipeline's own weights are in both."""
    if device.type != "cuda":
        return {}
    peak_bytes = torch.cuda.max_memory_allocated(device)
    return {"peak_gib": round(peak_bytes / 1024**3, 2), "held_before_gib": round(held_before_bytes / 1024**3, 2)}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, in FP64."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def median_ms(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """By CUDA events on a card, so that the host's own time counts only where the card waits for it."""
    for _ in range(WARMUPS):
        work()
    if device.type != "cuda":
        return statistics.median(_timed_ms(work) for _ in range(repeats))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def _timed_ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def measure_ceilings(device: torch.device) -> Figures:
    """What the card gives a single GEMM, attention or copy: TFLOP/s and GB/s."""
    figures: Figures = {}
    for m, n, k in GEMM_SHAPES:
        flop = 2 * m * n * k
        for name, work in (("bf16", bf16_gemm(m, n, k, device)), ("fp8", fp8_gemm(m, n, k, device))):
            figures[f"{name}_gemm_{m}x{n}x{k}_tflops"] = round(flop / median_ms(work, device, CEILING_REPEATS) / 1e9, 1)
    batch, heads, tokens, width = ATTENTION_SHAPE
    q, k_, v = torch.randn(3, *ATTENTION_SHAPE, device=device, dtype=torch.bfloat16).unbind()
    flop = 4 * batch * heads * tokens**2 * width
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            ms = median_ms(lambda: F.scaled_dot_product_attention(q, k_, v), device, CEILING_REPEATS)
        figures[f"{name}_attention_tflops"] = round(flop / ms / 1e9, 1)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # each byte is read once and written once
    figures["copy_gb_per_s"] = round(2 * COPY_BYTES / median_ms(lambda: target.copy_(source), device, CEILING_REPEATS) / 1e6)
    return figures


def bf16_gemm(m: int, n: int, k: int, device: torch.device) -> Callable[[], Tensor]:
    a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    return lambda: a @ b.t()


def fp8_gemm(m: int, n: int, k: int, device: torch.device) -> Callable[[], Tensor]:
    """One scale a row of either factor, as row-wise quantization has it."""
    a = torch.randn(m, k, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    scale_a, scale_b = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)


def with_ratios(rows: Mapping[str, Figures]) -> dict[str, Figures]:
    """Each system's figures, and how many times faster it is than the best of diffusers' recipes in the same run."""
    peers = [row for name, row in rows.items() if name.startswith("diffusers") and "step_ms" in row]
    return {name: {**row, **_ratios(row, peers)} for name, row in rows.items()}


def _ratios(row: Figures, peers: list[Figures]) -> Figures:
    if not peers or "step_ms" not in row:
        return {}
    return {
        f"best_peer_{figure}_over_this": round(min(peer[f"{figure}_ms"] for peer in peers) / row[f"{figure}_ms"], 3)
        for figure in ("step", "edit")
    }


def measure_all(openers: Mapping[str, Opener], reference: Tensor, device: torch.device, images: int) -> dict[str, Figures]:
    """Figures by system; one that breaks is a row that says so."""
    rows: dict[str, Figures] = {}
    for name, opener in openers.items():
        say(f"{name} ...")
        try:
            rows[name] = measure(opener, reference, device, images)
        except Exception as error:  # one system, out of memory perhaps, must not lose the others' figures
            traceback.print_exc()
            rows[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        say(f"{name}: {json.dumps(rows[name])}")
    return rows


def show(rows: Mapping[str, Figures]) -> None:
    titles = ("velocity", "step ms", "edit ms", "images/s", "peak GiB")
    print(f"\n{'system':40}" + "".join(f" {title:>9}" for title in titles) + f" {'x step':>7} {'x edit':>7}")
    for name, row in rows.items():
        if "step_ms" not in row:
            print(f"{name:40} {row.get('velocity_error', '-'):>9} no speed: {row.get('refused') or row.get('failed')}")
            continue
        ratios = [row.get(f"best_peer_{figure}_over_this", "-") for figure in ("step", "edit")]
        print(
            f"{name:40} {row['velocity_error']:9.4f} {row['step_ms']:9.1f} {row['edit_ms']:9.1f} {row['images_per_s']:9.3f} "
            f"{row.get('peak_gib', '-'):>9} {ratios[0]:>7} {ratios[1]:>7}"
        )
    for name, row in rows.items():
        if "stages_ms" in row:
            print(f"{name:40} " + "  ".join(f"{stage} {ms:.1f}" for stage, ms in row["stages_ms"].items()))


def choose(openers: Mapping[str, Opener], only: str | None) -> dict[str, Opener]:
    """Those named in `only`, a list with commas, in the openers' order; all without it. Raises InputError for a stranger."""
    if only is None:
        return dict(openers)
    names = only.split(",")
    if strangers := [name for name in names if name not in openers]:
        raise InputError(f"There is no system {', '.join(strangers)} here.", f"Choose among {', '.join(openers)}.")
    return {name: opener for name, opener in openers.items() if name in names}


def make_rows(args: argparse.Namespace, device: torch.device) -> dict[str, Figures]:
    """The card's ceilings, then every system's figures with its ratios."""
    rows: dict[str, Figures] = {}
    if device.type == "cuda":
        rows["card"] = measure_ceilings(device)
        say(f"the card: {json.dumps(rows['card'])}")
    size = SIZES[args.size]
    pipeline = make_pipeline(size, device)
    say(f"weights made, {size.name} size")
    job = make_job(pipeline, size, args.steps)
    say(f"job made: {job.img.shape[1]} picture tokens, {job.txt.shape[1]} of text")
    openers = choose(make_openers(pipeline, job), args.only)
    reference = make_eager(pipeline, job).step()
    assert bool(reference.isfinite().all())
    return {**rows, **with_ratios(measure_all(openers, reference, device, args.images))}


def read_arguments(description: str | None, rows: str, images: int) -> tuple[argparse.Namespace, torch.device]:
    """The command line of a benchmark at true size. rows: what `--only` names; images: how many edits without being told.

    Raises InputError, and MachineError for the true size without a card.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--only", help=f"names of {rows}, with commas between")
    parser.add_argument("--images", type=int, default=images, help="edits that the median is taken of")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="append a JSON line for each row")
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.size == "true" and device.type != "cuda":
        raise MachineError("The true size needs a card with 141 GB: two models lie on it at a time.", "Use --size tiny.")
    if min(args.images, args.steps) < 1:
        raise InputError("Nothing is drawn with no images or no steps.", "Give at least 1 of each.")
    return args, device


def main() -> None:
    args, device = read_arguments(__doc__, "systems", images=32)
    rows = make_rows(args, device)
    told = {"benchmark": "peers", "size": args.size, "steps": args.steps}
    lines = [json.dumps({**told, "system": name, **row, **describe_machine(device)}) for name, row in rows.items()]
    print("\n".join(lines))
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    show({name: row for name, row in rows.items() if name != "card"})


if __name__ == "__main__":
    main()
