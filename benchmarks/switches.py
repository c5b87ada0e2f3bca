"""What every optimization buys, at the 20B model's true size and on random weights. `python -m benchmarks.switches`.

The first row has everything on that is exact, in the format that the card runs fastest. "off" rows lack one optimization each,
so that what they take more than the first is what it buys; "on" rows have one approximation, or one thing remembered from the edit
before. The first row is measured once more in the middle of the run: a difference no larger than that row's says nothing.
A row whose velocity, hidden states, latents or pixels are not diffusers' reports no speed; what reuse of the reference leaves out
does not show there, as nothing has changed from one step to the next at the same noise level. Memory counts the pipeline's own
weights, which lie on the card all the time. The weights that make the modulation table lie there too; where they are read from
the host, as a model that is opened from files has it, making the table anew takes longer than told here.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import diffusers
import torch
from PIL import Image, ImageChops
from torch import Tensor

from benchmarks import systems
from benchmarks.machine import describe_machine
from benchmarks.peers import (
    BOUNDS,
    STAGES,
    Figures,
    Job,
    make_eager,
    make_job,
    median_ms,
    read_arguments,
    relative_error,
    say,
)
from benchmarks.reading import LARGEST_ERROR
from benchmarks.reference import mended_positions
from benchmarks.switch_rows import Before, DrawMany, Group, Switch, fast_of, make_groups
from benchmarks.systems import forget
from benchmarks.true_size import SIZES, make_pipeline
from millicent.edits import EditRequest
from millicent.engine import drawing
from millicent.engine import pipeline as stages_of
from millicent.engine.editor import Editor
from millicent.engine.loading import Model
from millicent.errors import InputError

STEP_REPEATS = 8
STAGE_REPEATS = 3
WARMUPS = 2  # the first edit of a shape compiles and allocates, the second is recorded
GIB = 1024**3
# of the table; differences are told of these and of the stages
COLUMNS = {
    "step_ms": "step ms",
    "edit_ms": "edit ms",
    "in_a_row_ms": "ms in a row",
    "peak_gib": "peak GiB",
    "reserved_gib": "reserved GiB",
}
WIDTH = 18
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Truth:
    """What diffusers makes of the job. velocity: of its step. latents: the reference's, packed. pixels: decoded from those."""

    velocity: Tensor
    text: Tensor
    latents: Tensor
    pixels: Tensor


@torch.no_grad()
def make_truth(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job) -> Truth:
    velocity = make_eager(pipeline, job).step()
    with mended_positions(pipeline):  # of the picture as an edit sizes it: a tiny one's side is no multiple of 32
        text = pipeline.encode_prompt(prompt=job.prompt, image=[small_picture(job)])[0]
    latents = job.img[:, job.target_tokens :]
    mean, deviation = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    raw = drawing.unpack(latents, *job.img_shapes[1]) * deviation + mean
    truth = Truth(velocity, text, latents, pipeline.vae.decode(raw[:, :, None]).sample[:, :, 0].clamp(-1, 1))
    assert all(bool(getattr(truth, field.name).isfinite().all()) for field in dataclasses.fields(truth))
    return truth


def small_picture(job: Job) -> Image.Image:
    """What the text encoder sees."""
    size = stages_of.size_for_area(job.size.encoder_px**2, job.picture.height, job.picture.width)
    return stages_of.resize(job.picture, *size)


def make_step(model: Model, job: Job, before: Before) -> Callable[[], Tensor]:
    """systems.make_step, with `before` run, and counted, at the beginning of each."""
    drawn = systems.make_step(model, job)

    @torch.inference_mode()
    def step() -> Tensor:
        before(model)
        return drawn()

    return step


def errors_of(step: Callable[[], Tensor], switch: Switch, model: Model, job: Job, truth: Truth) -> dict[str, float]:
    """How far each part is from diffusers', relative, in the mean square."""
    prepared = stages_of.prepare(make_request(job), model)
    for _ in range(2):  # the second is what comes from a recording, or from memory
        switch.before_edit(model)
        text = stages_of.read(job.prompt, prepared, model)
        latents = drawing.pack(stages_of.encode_picture(prepared.references[0], model))
        pixels = model.vae.decode(drawing.unpack(truth.latents, *job.img_shapes[1]))
    found = Truth(step(), text, latents, pixels)
    names = [field.name for field in dataclasses.fields(Truth)]
    return {name: relative_error(getattr(found, name), getattr(truth, name)) for name in names}


def make_request(job: Job) -> EditRequest:
    return EditRequest(images=(job.picture,), prompt=job.prompt, steps=job.steps, schedule="lightning", seed=job.seed)


@torch.inference_mode()
def measure(switch: Switch, model: Model, job: Job, truth: Truth, images: int) -> Figures:
    """The figures of a switch that is turned; no speeds where a part is further from diffusers than its bound."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    step = make_step(model, job, switch.before_step)
    errors = errors_of(step, switch, model, job, truth)
    # the velocity's are measured for each format; the others tell what is right from what is not
    bounds = dict.fromkeys(errors, LARGEST_ERROR) | {"velocity": BOUNDS[fast_of(model).plan.format]}
    figures: Figures = {"errors": {name: round(error, 5) for name, error in errors.items()}}
    if beyond := [name for name, error in errors.items() if not error <= bounds[name]]:  # so that NaN is beyond too
        return {**figures, "refused": f"its {' and '.join(beyond)} beyond the bound"}
    if switch.times_step:
        figures["step_ms"] = round(median_ms(step, model.device, STEP_REPEATS), 2)
    editor = Editor(switch.name, model)
    if switch.times_edit:
        figures |= time_edits(switch, editor, model, job, images)
    if switch.draw_many is not None:
        figures |= time_many(switch.draw_many, editor, model, job, images)
    return {**figures, **memory(model.device)}


def memory(device: torch.device) -> Figures:
    """GiB: the most that tensors took, and the most that was kept from others, the memory of graphs among it."""
    if device.type != "cuda":
        return {}
    taken, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"peak_gib": round(taken / GIB, 2), "reserved_gib": round(reserved / GIB, 2)}


def time_edits(switch: Switch, editor: Editor, model: Model, job: Job, images: int) -> Figures:
    """Medians: ms of an edit, and of its stages one by one."""
    request, edits_ms = make_request(job), []
    for number in range(WARMUPS + images):
        began = now_s(model)
        switch.before_edit(model)
        editor.edit(request)
        if number >= WARMUPS:
            edits_ms.append(1e3 * (now_s(model) - began))
    stages = [time_stages(switch.before_edit, model, job) for _ in range(min(STAGE_REPEATS, images))]
    return {
        "edit_ms": round(statistics.median(edits_ms), 2),
        "stages_ms": {stage: round(statistics.median(s[stage] for s in stages), 2) for stage in STAGES},
    }


def time_stages(before: Before, model: Model, job: Job) -> dict[str, float]:
    """ms of each of an edit's stages, the card idle between them; a modulation table belongs to what is prepared."""
    request, times_ms = make_request(job), {}

    def timed(stage: str, work: Callable[[], Made]) -> Made:
        began = now_s(model)
        made = work()
        times_ms[stage] = 1e3 * (now_s(model) - began)
        return made

    def prepare() -> tuple[stages_of.Prepared, stages_of.Course]:
        before(model)
        prepared = stages_of.prepare(request, model)
        course = stages_of.settle(request, model, prepared.height, prepared.width)
        stages_of.check_sigmas(course, model)
        return prepared, course

    prepared, course = timed("prepare", prepare)
    timed("text", lambda: stages_of.read(job.prompt, prepared, model))
    timed("vae_encode", lambda: [stages_of.encode_picture(one, model) for one in prepared.references])
    told = stages_of.encode(prepared, model, job.prompt, None)
    latents = timed("denoise", lambda: drawing.draw(told, model, course.sigmas, course.seeds, course.true_cfg))
    sent = timed("vae_decode", lambda: stages_of.send(latents.tensor, model))
    timed("to_pil", lambda: stages_of.receive(sent, request))
    return times_ms


def time_many(draw_many: DrawMany, editor: Editor, model: Model, job: Job, images: int) -> Figures:
    """No two pictures alike, so that nothing is remembered."""
    pictures: list[Image.Image] = [ImageChops.offset(job.picture, number, 0) for number in range(1, images + 1)]
    requests = [dataclasses.replace(make_request(job), images=(picture,)) for picture in pictures]
    draw_many(editor, requests[:WARMUPS])
    forget(model)
    began = now_s(model)
    draw_many(editor, requests)
    seconds = now_s(model) - began
    return {"in_a_row_ms": round(1e3 * seconds / images, 2), "images_per_s": round(images / seconds, 3)}


def now_s(model: Model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def with_differences(row: Figures, baseline: Figures) -> Figures:
    """The row, and how much more than the baseline it takes of all that both have: ms, and GiB of the card."""
    more: Figures = {name: round(row[name] - baseline[name], 2) for name in COLUMNS if name in row and name in baseline}
    if "stages_ms" in row and "stages_ms" in baseline:
        more["stages_ms"] = {stage: round(row["stages_ms"][stage] - baseline["stages_ms"][stage], 2) for stage in STAGES}
    return {**row, "more_than_baseline": more}


def measure_groups(groups: Sequence[Group], job: Job, truth: Truth, images: int) -> Iterator[tuple[Switch, Figures]]:
    """Each row as it is measured. One that breaks is a row that says so, and so is each of a group that cannot be opened."""
    baseline: Figures = {}
    for group in groups:
        rows = measure_group(group, job, truth, images)
        for switch, row in rows:
            if switch.state == "baseline":
                baseline = row
            yield switch, row if switch.state == "baseline" or _has_no_speed(row) else with_differences(row, baseline)


def measure_group(group: Group, job: Job, truth: Truth, images: int) -> Iterator[tuple[Switch, Figures]]:
    opened: list[Model] = []
    for switch in group.switches:
        say(f"{told(switch)} ...")
        try:
            if not opened:
                opened.append(group.open())
            figures = measure_turned(switch, opened[0], job, truth, images)
        except Exception as error:  # one row, out of memory perhaps, must not lose the others
            traceback.print_exc()
            figures = {"failed": f"{type(error).__name__}: {error}"[:300]}
        release()
        yield switch, figures
    opened.clear()
    release()


def measure_turned(switch: Switch, model: Model, job: Job, truth: Truth, images: int) -> Figures:
    with switch.turn(model) as turned:
        return measure(switch, turned, job, truth, images)


def release() -> None:
    """What nobody holds any more, graphs and their memory among it, is the card's again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _has_no_speed(row: Figures) -> bool:
    return "failed" in row or "refused" in row


def told(switch: Switch) -> str:
    return f"{switch.state}: {switch.name}" if switch.state in ("off", "on") else switch.name


def choose(groups: Sequence[Group], only: str | None) -> list[Group]:
    """The baseline, and those named in `only`, a list with commas; all without it. Raises InputError for a stranger."""
    if only is None:
        return list(groups)
    known = [switch.name for group in groups for switch in group.switches]
    names = only.split(",")
    if strangers := [name for name in names if name not in known]:
        raise InputError(f"There is no switch {', '.join(strangers)} here.", f"Choose among {', '.join(known)}.")
    chosen = [Group(group.open, tuple(s for s in group.switches if s.state == "baseline" or s.name in names)) for group in groups]
    return [group for group in chosen if group.switches]


def show(rows: Sequence[tuple[Switch, Figures]]) -> None:
    """A table: what each row takes, and in brackets how much more than the first."""
    print(f"\n{'':34}{'velocity':>9}" + "".join(f"{title:>{WIDTH}}" for title in COLUMNS.values()))
    for switch, row in rows:
        if _has_no_speed(row):
            print(f"{told(switch):34} no speed: {row.get('refused') or row.get('failed')}")
            continue
        cells = [_cell(row, name) for name in COLUMNS]
        print(f"{told(switch):34}{row['errors']['velocity']:9.4f}{''.join(cells)}")
    print(f"\n{'ms of a stage':34}" + "".join(f"{stage:>{WIDTH}}" for stage in STAGES))
    for switch, row in rows:
        if "stages_ms" in row:
            more = row.get("more_than_baseline", {}).get("stages_ms", {})
            cells = [_cell({stage: row["stages_ms"][stage], "more_than_baseline": more}, stage) for stage in STAGES]
            print(f"{told(switch):34}{''.join(cells)}")


def _cell(row: Figures, name: str) -> str:
    if name not in row:
        return f"{'-':>{WIDTH}}"
    more = row.get("more_than_baseline", {}).get(name)
    return f"{f'{row[name]:.1f}' + ('' if more is None else f' ({more:+.1f})'):>{WIDTH}}"


def main() -> None:
    args, device = read_arguments(__doc__, "switches", images=4)
    size = SIZES[args.size]
    pipeline = make_pipeline(size, device)
    job = make_job(pipeline, size, args.steps)
    groups = choose(make_groups(pipeline, size), args.only)
    truth = make_truth(pipeline, job)
    say(f"weights made, {size.name} size; job made: {job.img.shape[1]} picture tokens, {job.txt.shape[1]} of text")
    common = {"benchmark": "switches", "size": args.size, "steps": args.steps, "images": args.images}
    machine, rows = describe_machine(device), []
    for switch, row in measure_groups(groups, job, truth, args.images):
        rows.append((switch, row))
        line = json.dumps({**common, "switch": switch.name, "state": switch.state, **row, **machine})
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
    show(rows)


if __name__ == "__main__":
    main()
