"""What a catalog run adds to the editor's own time, and how fast it goes on where it was: `python -m benchmarks.catalog`.

Three parts: the ledger alone (an image claimed and marked done), whole runs (with an editor that takes no time, here and on one
worker of a local Ray cluster, and with the demo model, beside the same edits without a catalog), and a resume over many rows that
are done. A run that leaves anything out is reported as such, with no figures, and the exit status is 1; so it is where the ledger
takes 2 ms an image or a resume 5 s. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.machine import ROOT, describe_machine
from millicent import Editor
from millicent.catalog.cluster import Cluster
from millicent.catalog.events import Summary
from millicent.catalog.ledger import Ended, Ledger, Work
from millicent.catalog.manifest import Row
from millicent.catalog.pictures import asked_digest
from millicent.catalog.recipes import Recipe, Variant, expand_all
from millicent.catalog.run import run_catalog
from millicent.edits import EditRequest, EditResult, OnProgress, SupportsEdit, Timings
from millicent.images import flatten, open_image
from millicent.quality.limits import Limits
from millicent.quality.sanity import Verdict

RESULTS = ROOT / "benchmarks" / "results" / "catalog.jsonl"
WEIGHTS = "0" * 64
MOST_LEDGER_MS = 2.0
MOST_RESUME_S = 5.0
SIZE = 1024


class NoEditor:
    """Hands the same picture out at once."""

    name = "none"
    weights_sha256 = WEIGHTS

    def __init__(self) -> None:
        self._picture = Image.effect_noise((SIZE, SIZE), 20).convert("RGB")

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> EditResult:
        return EditResult(
            images=(self._picture,),
            seeds=(request.seed or 0,),
            sigmas=(1.0, 0.0),
            schedule="lightning",
            true_cfg=1.0,
            model="none",
            weights_sha256=WEIGHTS,
            timings=Timings(0.0, 0.0, 0.0, 0.0),
        )


def accept(sources: Sequence[Image.Image], result: Image.Image, limits: Limits) -> Verdict:
    """The checks have a benchmark of their own."""
    return Verdict(True, (), {})


def make_rows(count: int, picture: Path) -> Iterator[Row]:
    return (Row(number + 2, f"p{number}", str(picture), (), {}) for number in range(count))


def make_recipe(size: int, ending: str) -> Recipe:
    variant = Variant(name="v", prompt="make it red", output="{id}" + ending, size=(size, size))
    return Recipe(variants=(variant,), checks=Limits())


def time_ledger(folder: Path, count: int) -> float:
    """Milliseconds of an image, claimed and marked done."""
    with Ledger.open(str(folder / "alone.sqlite")) as ledger:
        ledger.begin_run(loading_s=0.0, cards=1, usd_per_hour=None)
        begin = time.perf_counter()
        for number in range(count):
            work = Work(
                output=f"{number}.png",
                row_line=number,
                row_id=str(number),
                variant="v",
                pictures=("a.jpg",),
                prompt="make it red",
                asked=str(number),
                key=str(number),
            )
            claim = ledger.claim(work, number, float(number))
            ended = Ended(state="done", attempt_state="done", seconds=1.0, elapsed_s=float(number), sha256=WEIGHTS)
            ledger.end(work, claim.attempt, ended)
        return (time.perf_counter() - begin) / count * 1e3


def run_whole(folder: Path, editor: SupportsEdit, rows: Iterable[Row], recipe: Recipe, weights: str) -> Summary:
    with Ledger.open(str(folder / "ledger.sqlite")) as ledger:
        return run_catalog(editor, rows, recipe, ledger, str(folder / "out"), weights_sha256=weights, check=accept)


def time_run(folder: Path, editor: SupportsEdit, count: int, picture: Path, ending: str) -> float | None:
    """Milliseconds of an image, read, written and synced, with an editor that takes none; None where one is missing."""
    folder.mkdir()
    summary = run_whole(folder, editor, make_rows(count, picture), make_recipe(SIZE, ending), WEIGHTS)
    return summary.elapsed_s / count * 1e3 if summary.done == count else None


def time_ray(folder: Path, count: int, picture: Path) -> float | None:
    """As time_run, of JPEG, with the editor in a worker: a picture goes there and another comes back."""
    cluster = Cluster.open("local", NoEditor, actors=1)
    try:
        return time_run(folder, cluster, count, picture, ".jpg")
    finally:
        cluster.close()


def time_demo(folder: Path, count: int, picture: Path) -> tuple[float, float] | None:
    """Milliseconds of an image with the demo model: in a plain loop over edit_many that keeps nothing, and in a catalog run."""
    folder.mkdir()
    torch.set_num_threads(1)  # more would wait for each other, and for the threads that read and write
    editor, recipe = Editor.open("demo"), make_recipe(64, ".png")
    source = flatten(open_image(picture))
    requests = [EditRequest(images=(source,), prompt="make it red", seed=seed, width=64, height=64) for seed in range(count)]
    editor.edit(requests[0])
    begin = time.perf_counter()
    drawn = [outcome for outcome in editor.edit_many(requests) if isinstance(outcome, EditResult)]
    plain_ms = (time.perf_counter() - begin) / count * 1e3
    summary = run_whole(folder, editor, make_rows(count, picture), recipe, editor.weights_sha256)
    return (plain_ms, summary.elapsed_s / count * 1e3) if len(drawn) == summary.done == count else None


def time_resume(folder: Path, count: int, picture: Path) -> dict[str, Any] | None:
    """A ledger and an output folder in which everything is done, and a run over it. rss: by how much the peak grew in that run."""
    folder.mkdir()
    recipe, out = make_recipe(SIZE, ".png"), folder / "out"
    out.mkdir()
    with Ledger.open(str(folder / "ledger.sqlite")) as ledger:
        ledger.begin_run(loading_s=0.0, cards=1, usd_per_hour=None)
        begin = time.perf_counter()
        for item in expand_all(make_rows(count, picture), recipe):
            assert not hasattr(item, "why"), item
            (out / item.output).touch()
            work = Work(
                output=item.output,
                row_line=item.row_line,
                row_id=item.row_id,
                variant="v",
                pictures=(str(picture),),
                prompt="make it red",
                asked=asked_digest(item, WEIGHTS),
                key=item.output,
            )
            ledger.adopt(work, WEIGHTS)
        print(f"made {count:,} finished rows in {time.perf_counter() - begin:.1f} s")
        ledger.end_run(1.0, "")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    summary = run_whole(folder, NoEditor(), make_rows(count, picture), recipe, WEIGHTS)
    seconds = time.perf_counter() - begin
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if summary.already != count:
        return None
    return {
        "rows": count,
        "resume_s": round(seconds, 3),
        "rows_per_s": round(count / seconds),
        "rss_grown_mb": round(grown / 1024, 1),
        "ledger_mb": round((folder / "ledger.sqlite").stat().st_size / 1e6, 1),
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """The figures; None where a run left something out."""
    picture = folder / "picture.png"
    Image.effect_noise((SIZE, SIZE), 20).convert("RGB").resize((256, 256)).save(picture)
    resume = time_resume(folder / "resume", args.rows, picture)  # first, so that its memory is its own
    ledger_ms = time_ledger(folder, args.images)
    png_ms, jpeg_ms = (time_run(folder / ending[1:], NoEditor(), args.images, picture, ending) for ending in (".png", ".jpg"))
    ray_ms = time_ray(folder / "ray", args.images, picture)
    demo = time_demo(folder / "demo", args.demo_images, picture)
    if resume is None or png_ms is None or jpeg_ms is None or ray_ms is None or demo is None:
        return None
    return {
        "benchmark": "catalog",
        "ledger": "sqlite",
        "images": args.images,
        "output_px": f"{SIZE}x{SIZE}",
        "ledger_ms_per_image": round(ledger_ms, 3),
        "run_ms_per_image": {"png": round(png_ms, 2), "jpeg": round(jpeg_ms, 2), "jpeg on ray": round(ray_ms, 2)},
        "demo_ms_per_image": {"edit_many": round(demo[0], 2), "catalog": round(demo[1], 2)},
        "resume": resume,
        **describe_machine(torch.device("cpu")),
    }


def show(figures: dict[str, Any]) -> None:
    run, demo, resume = figures["run_ms_per_image"], figures["demo_ms_per_image"], figures["resume"]
    print(f"ledger alone: {figures['ledger_ms_per_image']} ms an image")
    print(
        f"whole run, {figures['output_px']}, no time to draw: {run['png']} ms an image as PNG, {run['jpeg']} as JPEG, "
        f"{run['jpeg on ray']} as JPEG on Ray"
    )
    print(f"demo model: {demo['edit_many']} ms an image without a catalog, {demo['catalog']} with")
    print(
        f"resume: {resume['rows']:,} finished rows in {resume['resume_s']} s, {resume['rows_per_s']:,} rows/s, "
        f"{resume['rss_grown_mb']} MB more memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--demo-images", type=int, default=20)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--save", action="store_true", help=f"append the figures to {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    if figures is None:
        sys.exit("A run has left images out: no figures.")
    show(figures)
    print(json.dumps(figures))
    if args.save:
        with RESULTS.open("a") as file:
            file.write(json.dumps(figures) + "\n")
    if figures["ledger_ms_per_image"] > MOST_LEDGER_MS or figures["resume"]["resume_s"] > MOST_RESUME_S:
        sys.exit(f"Too slow: the ledger may take {MOST_LEDGER_MS} ms an image, and a resume {MOST_RESUME_S} s.")


if __name__ == "__main__":
    main()
