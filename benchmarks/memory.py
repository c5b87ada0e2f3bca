"""The same edits on one card with less and less memory: seconds, bytes over the link, peak against plan, and the same pictures.

    python -m benchmarks.memory --folder FOLDER

FOLDER is what benchmarks.cold_start writes: the 20B model's shapes with random weights, converted to FP8. Each cap has a process of
its own, whose memory PyTorch limits, and whose copies to the card are held up until they are as slow as those of an RTX 4090 that
were measured (21.7 GB/s). "alone" is one edit after another of pictures not seen before; "waves" is edit_many; one more edit has
another shape, for the peak of memory. Exits with 1 where a picture differs from the one without a cap, in any bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.machine import ROOT, describe_machine
from millicent.edits import EditRequest, EditResult
from millicent.engine import drawing, pipeline
from millicent.engine.editor import Editor
from millicent.engine.settings import Settings
from millicent.engine.weighing import CONTEXT_BYTES

T = TypeVar("T")
RESULTS = ROOT / "benchmarks" / "results" / "memory.jsonl"
GIB = 1 << 30
# of a card's memory, what a program finds free: 22.5 GiB of an RTX 4090's 24
USABLE = 22.5 / 24
# of an RTX 4090: LightX2V streamed the transformer's 40.9 GB of BF16 in each step of 1.88 s (its blogs/EN/DisaggBlogPost.md)
LINK_GB_PER_S = 21.7
SLOWER_AT_MOST = {24: 1.03, 16: 1.10, 12: 1.35}
PROMPT = "put the shirt on a sand backdrop, with soft light from the left"


def make_requests(count: int, side_px: int) -> Iterator[EditRequest]:
    """Each of another picture, and so read, encoded and drawn anew."""
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        small = (torch.rand(8, 8, 3, generator=generator) * 255).to(torch.uint8).numpy()
        picture = Image.fromarray(small).resize((side_px, side_px), Image.Resampling.BICUBIC)
        yield EditRequest(images=(picture,), prompt=PROMPT, seed=number)


def slow_down(device: torch.device, gb_per_s: float) -> Any:
    """What holds a copy stream up after a copy of so many bytes, until it was no faster than that."""
    own_gb_per_s, cycles_per_s = measure_link(device), measure_clock(device)
    seconds_per_byte = max(0.0, 1 / gb_per_s - 1 / own_gb_per_s) / 1e9
    return lambda size_bytes: torch.cuda._sleep(int(size_bytes * seconds_per_byte * cycles_per_s))


def measure_link(device: torch.device) -> float:
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    card = host.to(device)
    return 1e-9 * host.numel() / min(_seconds(lambda: card.copy_(host, non_blocking=True)) for _ in range(5))


def measure_clock(device: torch.device) -> float:
    """Cycles of a second, as a sleep on the card counts them."""
    cycles = 20_000_000
    return cycles / min(_seconds(lambda: torch.cuda._sleep(cycles)) for _ in range(3))


def _seconds(work: Any) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def run_capped(folder: Path, cap_gib: float | None, side_px: int, images: int, link_gb_per_s: float) -> dict[str, Any]:
    """One cap, in a process that has done nothing else."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logging.basicConfig()  # to standard error
    logging.getLogger("millicent").setLevel(logging.DEBUG)  # what memory ran out for
    settings = Settings() if cap_gib is None else Settings(memory_gb=cap_gib * USABLE * GIB / 1e9)
    delay = slow_down(device, link_gb_per_s) if device.type == "cuda" else None
    began = time.perf_counter()
    editor = Editor.open(folder, device=device.type, settings=settings)
    loaded_s = time.perf_counter() - began
    residency = editor._model.residency
    if residency is not None:
        residency.link.delay = delay
    requests = list(make_requests(images, side_px))
    for request in requests[:2]:
        editor.edit(request)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    alone = measure_alone(editor, requests[2:6])
    waves = measure_waves(editor, requests)
    # of a shape that nothing is recorded of: it runs beside all that graphs keep, which is what a plan leaves room for
    wide = requests[0].images[0].resize((side_px * 5 // 4, side_px))
    other = name_pictures(editor.edit(dataclasses.replace(requests[0], images=(wide,))))
    placement = None if residency is None else residency.placement
    return {
        "loaded_s": round(loaded_s, 1),
        "loading_s": {name: round(seconds, 2) for name, seconds in editor.loading_s.items()},
        "alone": alone,
        "waves": waves,
        "pictures": [*alone.pop("pictures"), *waves.pop("pictures"), other],
        **({} if device.type != "cuda" else measure_memory(device)),
        **({} if device.type != "cuda" else measure_phases(editor, requests[0])),
        **({} if placement is None else tell_placement(placement, editor._model.wave)),
    }


def measure_alone(editor: Editor, requests: Sequence[EditRequest]) -> dict[str, Any]:
    copied, seconds, pictures = copied_bytes(editor), [], []
    for request in requests:
        began = time.perf_counter()
        result = editor.edit(request)
        seconds.append(time.perf_counter() - began)
        pictures.append(name_pictures(result))
    link = (copied_bytes(editor) - copied) / len(requests)
    return {"seconds": round(statistics.median(seconds), 4), "link_gb": round(link / 1e9, 3), "pictures": pictures}


def measure_waves(editor: Editor, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """From the first request to the last picture, both exchanges included."""
    copied, pictures = copied_bytes(editor), []
    began = time.perf_counter()
    for outcome in editor.edit_many(requests):
        if not isinstance(outcome, EditResult):
            raise outcome
        pictures.append(name_pictures(outcome))
    seconds = (time.perf_counter() - began) / len(requests)
    link = (copied_bytes(editor) - copied) / len(requests)
    return {"seconds": round(seconds, 4), "link_gb": round(link / 1e9, 3), "images": len(requests), "pictures": pictures}


def copied_bytes(editor: Editor) -> int:
    residency = editor._model.residency
    return 0 if residency is None else residency.copied_bytes


def name_pictures(result: EditResult) -> str:
    return hashlib.sha256(b"".join(image.tobytes() for image in result.images)).hexdigest()[:16]


def measure_memory(device: torch.device) -> dict[str, Any]:
    """Of this process at its fullest since its warm-up: what PyTorch had of the card, with CUDA's own beside it.

    given_out_gib: of that in tensors, or in what graphs keep for their own passes; the rest is lost between pieces, or idle.
    """
    free, total = torch.cuda.mem_get_info(device)
    own = total - free - torch.cuda.memory_reserved(device)
    pools = idle_of_graphs(torch.cuda.memory_snapshot())
    return {
        "peak_gib": round((torch.cuda.max_memory_reserved(device) + own) / GIB, 3),
        "given_out_gib": round((torch.cuda.max_memory_allocated(device) + sum(pools) + own) / GIB, 3),
        "graphs_gib": [round(size / GIB, 3) for size in pools],
        "context_gib": round(own / GIB, 3),
    }


@torch.inference_mode()
def measure_phases(editor: Editor, request: EditRequest) -> dict[str, Any]:
    """What a plan's phases have alive, each by itself: beside what lay there before it. idle_gib: that, with nothing remembered."""
    model, alive_gib = editor._model, dict[str, float]()
    assert model.latents is not None
    model.latents.clear()
    assert model.reader is not None
    for kept in (model.reader.pictures, model.reader.openings, model.reader.embeddings):
        kept.clear()

    def watch(name: str, work: Callable[[], T]) -> T:
        torch.cuda.synchronize(model.device)
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        made = work()
        torch.cuda.synchronize(model.device)
        alive_gib[name] = round((torch.cuda.max_memory_allocated(model.device) - before) / GIB, 3)
        return made

    idle_gib = round(torch.cuda.memory_allocated(model.device) / GIB, 3)
    prepared = pipeline.prepare(request, model)
    course = pipeline.settle(request, model, prepared.height, prepared.width)
    watch("VAE encode", lambda: [pipeline.encode_picture(reference, model) for reference in prepared.references])
    watch("text", lambda: pipeline.read(request.prompt, prepared, model))
    told = pipeline.encode(prepared, model, request.prompt, None)
    latents = watch("denoise", lambda: drawing.draw(told, model, course.sigmas, course.seeds, course.true_cfg))
    watch("VAE decode", lambda: pipeline.send(latents.tensor, model))
    return {"idle_gib": idle_gib, "alive_gib": alive_gib}


def idle_of_graphs(segments: Sequence[Mapping[str, Any]]) -> list[int]:
    """Bytes of each pool of graphs' that hold no tensor, in the order in which they were made: see speed_up_model."""
    idle: dict[tuple[int, ...], int] = {}
    for segment in segments:
        pool = tuple(segment["segment_pool_id"])
        if pool != (0, 0):
            idle[pool] = idle.get(pool, 0) + int(segment["total_size"]) - int(segment["allocated_size"])
    return [idle[pool] for pool in sorted(idle)]


def tell_placement(placement: Any, wave: int) -> dict[str, Any]:
    return {
        "planned_gib": round(placement.peak_bytes / GIB, 3),
        "planned_context_gib": round(CONTEXT_BYTES / GIB, 3),
        "peaks": {name: round(size / GIB, 3) for name, size in placement.peaks},
        "wave": wave,
        "in_turn": placement.in_turn,
        "abreast": placement.abreast,
        "recorded": list(placement.recorded),
        "arena_gib": round(placement.arena_bytes / GIB, 3),
        "resident_blocks": placement.resident_blocks,
        "resident_encoder_layers": placement.resident_encoder_layers,
        "exchanged_gb": round(placement.exchanged_bytes / 1e9, 3),
        "streamed_step_gb": round(placement.streamed_step_bytes / 1e9, 3),
    }


def run_child(arguments: argparse.Namespace, cap: str) -> dict[str, Any]:
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.memory", "--folder", str(arguments.folder), "--child", cap]
    command += ["--side", str(arguments.side), "--images", str(arguments.images), "--link", str(arguments.link)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        return {"failed": f"ended with {ran.returncode}"}
    row: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    told = {key: value for key, value in row.items() if key != "pictures"}
    print(f"{cap}: {time.perf_counter() - began:.0f} s in all, {json.dumps(told)}", flush=True)
    return row


def compare(rows: dict[str, dict[str, Any]]) -> None:
    """Add to each row how it stands to the one without a cap."""
    whole = rows.get("none", {})
    for row in rows.values():
        if "failed" in row or "pictures" not in whole:
            continue
        row["same_pictures"] = row["pictures"] == whole["pictures"]
        for kind in ("alone", "waves"):
            row[kind]["x_uncapped"] = round(row[kind]["seconds"] / whole[kind]["seconds"], 3)
        if "planned_gib" in row:
            row["peak_x_planned"] = round(row["peak_gib"] / row["planned_gib"], 3)


def show(rows: dict[str, dict[str, Any]]) -> None:
    names = ("cap", "alone s", "x", "GB", "waves s", "x", "GB", "peak/plan GiB", "blocks", "abreast", "encoder", "same", "load s")
    table = Table(*names)
    for cap, row in rows.items():
        if "failed" in row:
            table.add_row(cap, row["failed"])
            continue
        kinds = [str(row[kind].get(key, "")) for kind in ("alone", "waves") for key in ("seconds", "x_uncapped", "link_gb")]
        table.add_row(
            cap,
            *kinds,
            f"{row.get('peak_gib')}/{row.get('planned_gib')}",
            str(row.get("resident_blocks")),
            str(row.get("abreast")),
            str(row.get("resident_encoder_layers")),
            str(row.get("same_pictures")),
            str(row["loaded_s"]),
        )
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a converted model")
    parser.add_argument("--caps", default="none,24,16,12,8", help="GiB of the cards that are imitated; none for the whole card")
    parser.add_argument("--images", type=int, default=40, help="in waves")
    parser.add_argument("--link", type=float, default=LINK_GB_PER_S, help="GB/s, for all caps")
    parser.add_argument("--side", type=int, default=1024, help="of the pictures, in pixels")
    parser.add_argument("--save", action="store_true", help=f"append a line to {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        cap = None if arguments.child == "none" else float(arguments.child)
        row = run_capped(arguments.folder, cap, arguments.side, arguments.images, arguments.link)
        print(json.dumps(row))
        return
    rows = {cap: run_child(arguments, cap) for cap in arguments.caps.split(",")}
    compare(rows)
    show(rows)
    if arguments.save:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kept = {cap: {key: value for key, value in row.items() if key != "pictures"} for cap, row in rows.items()}
        line = {"side_px": arguments.side, "link_gb_per_s": arguments.link, "rows": kept, **describe_machine(device)}
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    sys.exit(any(row.get("same_pictures") is False or "failed" in row for row in rows.values()))


if __name__ == "__main__":
    main()
