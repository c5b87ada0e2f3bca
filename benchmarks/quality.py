"""What each number format and approximation does to the demo model's edits. `python -m benchmarks.quality`.

The edits of recipes.demo.evaluate, of shapes, scenes and wordings that training never saw, in 4 Lightning steps from fixed seeds,
drawn with every setting of the engine and scored twice: by how far the picture is from the one that the same engine draws in
BF16, and by the task, for a changed pixel is not yet a worse edit. Three rows give the scale: BF16 again, the same edits from
other seeds, and the pictures left as they were. A setting that does not run here is a row that says why. The table comes last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.machine import ROOT, describe_machine
from millicent import demo
from millicent.edits import EditRequest
from millicent.engine.editor import Editor
from millicent.engine.loading import choose_device
from millicent.engine.settings import Settings
from millicent.errors import MillicentError
from millicent.model.tokenizer import read_tokenizer
from recipes.demo.evaluate import BATCH, edit_numbers, to_image, to_pixels
from recipes.demo.metrics import ciede2000, measure, psnr, ssim
from recipes.demo.scenes import Scenes
from recipes.demo.validate import SEED
from recipes.demo.wordings import held_out_wording

RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
MODEL = "demo"
STEPS = 4
OTHER_SEEDS = 100_000  # further than the number of scenes
IS_BETTER_HIGH = {"psnr_db": True, "ssim": True, "ciede2000": False}

Row = dict[str, object]
Figures = Mapping[str, Tensor]  # one for each scene


@dataclass(frozen=True, slots=True)
class Configuration:
    name: str
    settings: Settings
    dtype: str = "bf16"
    seed_shift: int = 0


BASELINE = Configuration("bf16", Settings(format="bf16"))
CONFIGURATIONS = (
    BASELINE,  # drawn again: what is not the same is this machine's own noise
    Configuration("bf16+other-seeds", Settings(format="bf16"), seed_shift=OTHER_SEEDS),
    Configuration("plain-bf16", Settings(plain=True)),
    Configuration("plain-fp32", Settings(plain=True), "fp32"),
    Configuration("fp8", Settings(format="fp8")),
    Configuration("int8", Settings(format="int8")),
    Configuration("int8-weight", Settings(format="int8-weight")),
    Configuration("nvfp4", Settings(format="nvfp4")),
    Configuration("fp8+bf16-down", Settings(format="fp8", bf16_down=True)),
    Configuration("int8+bf16-down", Settings(format="int8", bf16_down=True)),
    Configuration("fp8+bf16-edges", Settings(format="fp8", bf16_edge_blocks=1)),
    Configuration("int8+bf16-edges", Settings(format="int8", bf16_edge_blocks=1)),
    Configuration("nvfp4+bf16-down+bf16-edges", Settings(format="nvfp4", bf16_down=True, bf16_edge_blocks=1)),
    Configuration("int8-attention", Settings(format="bf16", attention="int8")),
    Configuration("reuse", Settings(format="bf16", reuse_reference=True)),
    Configuration("fp8+reuse", Settings(format="fp8", reuse_reference=True)),
    Configuration("fp8+int8-attention+reuse", Settings(format="fp8", attention="int8", reuse_reference=True)),
)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Scenes to edit. sources, targets: (N, 3, H, W) in [0, 1]; masks: (N, H, W), true where the edit changes the source."""

    sources: Tensor
    targets: Tensor
    masks: Tensor
    requests: tuple[EditRequest, ...]


def held_out(count: int, device: torch.device) -> HeldOut:
    """The first `count` scenes of recipes.demo.evaluate, with its wordings and seeds; ordered by how long the prompt is."""
    scenes, generator = Scenes(torch.device("cpu")), torch.Generator().manual_seed(SEED)
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    masks: list[Tensor] = []
    requests: list[EditRequest] = []
    while len(requests) < count:
        source, target, mask, edit = scenes.pairs(BATCH, generator, held_out=True)
        for i in range(min(BATCH, count - len(requests))):
            number = len(requests)
            prompt = held_out_wording(*edit_numbers(edit, i), number)
            image = to_image(source[i])
            requests.append(EditRequest(images=(image,), prompt=prompt, steps=STEPS, schedule="lightning", seed=number))
            # as the editor sees it: 8 bits
            sources.append(to_pixels(image))
            targets.append(target[i])
            masks.append(mask[i])
    tokenizer = read_tokenizer(demo.folder() / "tokenizer")
    lengths = [len(tokenizer.encode(request.prompt)) for request in requests]
    # a card captures a graph for each length, and keeps few
    order = sorted(range(count), key=lengths.__getitem__)

    def stack(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensors[i] for i in order]).to(device)

    return HeldOut(stack(sources), stack(targets), stack(masks), tuple(requests[i] for i in order))


def draw(configuration: Configuration, requests: Sequence[EditRequest], device: torch.device) -> Tensor:
    """The edited pictures (N, 3, H, W) in [0, 1], of 8 bits. Raises MachineError for a setting that the device does not run."""
    editor = Editor.open(MODEL, device=str(device), dtype=configuration.dtype, settings=configuration.settings)
    images = []
    for request in requests:
        assert request.seed is not None
        seeded = dataclasses.replace(request, seed=request.seed + configuration.seed_shift)
        images.append(editor.edit(seeded).image)
    return torch.stack([to_pixels(image) for image in images]).to(device)


def compare(pictures: Tensor, wanted: Tensor) -> Figures:
    """How far two sets of pictures (N, 3, H, W) are apart, scene by scene; the same picture has 100 dB.

    psnr_db, ssim, and ciede2000, the mean over the pixels.
    """
    parts = [
        (psnr(a, b), ssim(a, b), ciede2000(a, b).mean((1, 2)))
        for a, b in zip(pictures.split(BATCH), wanted.split(BATCH), strict=True)
    ]
    columns = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return dict(zip(IS_BETTER_HIGH, columns, strict=True))


def task(pictures: Tensor, scenes: HeldOut) -> Figures:
    """The task's own score of each picture: its distance from the true edit, inside and outside of what the edit changes."""
    parts = [measure(*batch) for batch in zip(*(x.split(BATCH) for x in (pictures, scenes.targets, scenes.masks)), strict=True)]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def spread(values: Tensor, is_better_high: bool) -> dict[str, float]:
    """worst_decile: nine scenes of ten are better than it."""
    decile = torch.quantile(values.double(), 0.1 if is_better_high else 0.9)
    worst = values.min() if is_better_high else values.max()
    return {"mean": round(values.mean().item(), 4), "worst_decile": round(decile.item(), 4), "worst": round(worst.item(), 4)}


def is_done(edited: Figures, unedited: Figures) -> Tensor:
    """(N,): whether more than half of the difference between the source and the true edit is gone, where the edit is to be."""
    return edited["de_inside"] < 0.5 * unedited["de_inside"]


class Scores:
    """Scores pictures against those that the same engine draws in BF16."""

    def __init__(self, scenes: HeldOut, baseline: Tensor) -> None:
        self.scenes, self.baseline = scenes, baseline
        self.unedited = task(scenes.sources, scenes)
        self.baseline_done = is_done(task(baseline, scenes), self.unedited)

    def score(self, pictures: Tensor) -> Row:
        """edits_lost, edits_gained: scenes whose edit is done by the baseline alone, and by these pictures alone."""
        distances, scored = compare(pictures, self.baseline), task(pictures, self.scenes)
        done = is_done(scored, self.unedited)
        return {
            **{name: spread(values, IS_BETTER_HIGH[name]) for name, values in distances.items()},
            "identical": int((pictures == self.baseline).flatten(1).all(1).sum()),
            "task": {name: round(values.nanmean().item(), 4) for name, values in scored.items()},
            "edits_done": int(done.sum()),
            "edits_lost": int((self.baseline_done & ~done).sum()),
            "edits_gained": int((done & ~self.baseline_done).sum()),
        }


def measure_one(configuration: Configuration, scores: Scores, device: torch.device) -> Row:
    """A row's own part; "not_run" says why a setting does not run here, "failed" what went wrong."""
    row: Row = {"configuration": configuration.name, "dtype": configuration.dtype, "settings": asdict(configuration.settings)}
    try:
        return row | scores.score(draw(configuration, scores.scenes.requests, device))
    except MillicentError as error:
        return row | {"not_run": str(error)}
    except Exception as error:  # the others are still to be measured
        return row | {"failed": f"{type(error).__name__}: {error}"}


def measure_all(chosen: Sequence[Configuration], count: int, device: torch.device) -> Iterator[Row]:
    # a card's convolutions are TF32 otherwise, and the FP32 row would not be FP32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        scenes = held_out(count, device)
        scores = Scores(scenes, draw(BASELINE, scenes.requests, device))
        about = {"benchmark": "quality", "model": MODEL, "scenes": count, "steps": STEPS, "against": BASELINE.name}
        machine = describe_machine(device)
        yield about | {"configuration": "unedited"} | scores.score(scenes.sources) | machine
        for configuration in chosen:
            yield about | measure_one(configuration, scores, device) | machine


def cells(row: Row) -> list[str]:
    """A line of the table."""
    why = row.get("not_run", row.get("failed"))
    if why is not None:
        return [str(row["configuration"]), f"{'not run' if 'not_run' in row else 'FAILED'}: {why}"]
    distances = []
    for name, digits in zip(IS_BETTER_HIGH, (1, 3, 2), strict=True):
        figures = row[name]
        assert isinstance(figures, dict)
        distances += [f"{value:.{digits}f}" for value in figures.values()]
    scored = row["task"]
    assert isinstance(scored, dict)
    counts = [str(row[name]) for name in ("edits_done", "edits_lost", "edits_gained")]
    return [str(row["configuration"]), *distances, *counts, f"{scored['de_inside']:.2f}", f"{scored['de_outside']:.2f}"]


def show(rows: Sequence[Row]) -> None:
    first = rows[0]
    print(
        f"\n{first['card']}: {first['scenes']} held-out scenes in {first['steps']} steps, against the engine's {first['against']}"
    )
    print(f"{'':28}{'PSNR, dB':>22}{'SSIM':>22}{'CIEDE2000':>22}{'edits':>24}{'from the truth':>18}")
    titles = ["", *("mean", "decile", "worst") * 3, "done", "lost", "gained", "inside", "outside"]
    widths = [28, *[8, 7, 7] * 3, *[10, 7, 7], *[9, 9]]
    for line in (titles, *(cells(row) for row in rows)):
        if len(line) == 2:
            print(f"{line[0]:28}  {line[1]}")
        else:
            print(f"{line[0]:28}" + "".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--device", default="auto")
    names = [configuration.name for configuration in CONFIGURATIONS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of: {'; '.join(names)}")
    parser.add_argument("--save", action="store_true", help=f"append the JSON lines to {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    chosen = [configuration for configuration in CONFIGURATIONS if args.only is None or configuration.name in args.only]
    rows = []
    for row in measure_all(chosen, args.scenes, choose_device(args.device)):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.save and "failed" not in row:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    show(rows)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
