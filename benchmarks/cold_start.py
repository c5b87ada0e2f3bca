"""Seconds from a process's start to its first picture, step by step. `python -m benchmarks.cold_start --folder FOLDER`.

The folder holds a converted FP8 model of random weights at true size, 21 GB, which is written there unless it is there already. It
is read once before, so that the page cache has it. Then processes open it and draw a 1024x1024 edit twice each, as `millicent edit`
opens it: the first one with no compiled kernels and no hashes of files, the others with what it has kept of both. --save appends a
line for each to the results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.converted_folder import make_folder
from benchmarks.machine import ROOT, describe_machine
from benchmarks.true_size import SIZES, Size

RESULTS = ROOT / "benchmarks" / "results" / "cold_start.jsonl"
MAX_FIRST_PICTURE_S = 15.0
_READ_BYTES = 16 << 20
# up to the second edit, which records graphs; together they are the time to the first picture, its hash included
STEPS = ("start", "import torch", "import millicent", "CUDA", "open", "table", "first edit", "hash", "second edit")
CHILD = """
import dataclasses, json, sys, time
started, folder, kept, side_px = float(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
seconds, last = {}, started

def step(name):
    global last
    now = time.time()
    seconds[name] = now - last
    last = now

step("start")
import torch
step("import torch")
from pathlib import Path
from PIL import Image
from millicent import Editor, EditRequest
from millicent.engine import failures, loading, pipeline, watch
from millicent.engine.sampler import lightning_sigmas
step("import millicent")
device = loading.choose_device("auto")
if device.type == "cuda":
    from millicent.kernels.compiled import keep_compiled
    keep_compiled(Path(kept) / "kernels", device)
    torch.zeros(1, device=device)
step("CUDA")
editor = Editor.open(folder, digests=Path(kept) / "digests")
step("open")
# it would be made within the first edit
fast = editor._model.fast
if fast is not None:
    fast.modulation.mods(lightning_sigmas(editor.card.steps))
if device.type == "cuda":
    torch.cuda.synchronize(device)
step("table")
# of every level, so that nothing of it is flat
image = Image.linear_gradient("L").resize((side_px, side_px)).convert("RGB")
result = editor.edit(EditRequest(images=(image,), prompt="make the shirt navy blue", seed=7))
step("first edit")
# what of it was a wait for the weights' hash
seconds["hash"] = max(0.0, seconds["first edit"] - result.timings.total_s)
seconds["first edit"] -= seconds["hash"]
again = editor.edit(EditRequest(images=(image,), prompt="make the shirt navy blue", seed=7))
step("second edit")
colors = len(result.image.getcolors(1 << 24) or ())
same = result.image.tobytes() == again.image.tobytes()
parts = {f"open: {name}": value for name, value in editor.loading_s.items()}
parts |= {f"first edit: {name}": value for name, value in dataclasses.asdict(result.timings).items()}
print(json.dumps({"seconds": seconds, "parts": parts, "colors": colors, "same": same}))
"""


def run_process(folder: Path, kept: Path, side_px: int) -> dict[str, float]:
    """Seconds of each step of one process; first picture: from its start until the picture was there, with its hash."""
    command = [sys.executable, "-c", CHILD]
    ran = subprocess.run(
        [*command, repr(time.time()), str(folder), str(kept), str(side_px)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    told = json.loads(ran.stdout.splitlines()[-1])
    # a speed is told of a picture alone
    assert told["colors"] > 1, "the picture is of one color"
    assert told["same"], "the same request drew another picture"
    first = sum(told["seconds"][name] for name in STEPS[:-1])
    found = {**{name: told["seconds"][name] for name in STEPS}, "first picture": first, **told["parts"]}
    return {name: round(seconds, 3) for name, seconds in found.items()}


def read_once(folder: Path) -> tuple[int, float]:
    """Bytes of all its files, and the seconds that reading them took."""
    started, count = time.perf_counter(), 0
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while piece := file.read(_READ_BYTES):
                    count += len(piece)
    return count, time.perf_counter() - started


def measure(size: Size, folder: Path, kept: Path, runs: int) -> list[dict[str, object]]:
    """A row for each process; the first finds nothing kept."""
    rows: list[dict[str, object]] = []
    for number in range(runs):
        seconds = run_process(folder, kept, size.picture_px)
        rows.append({"benchmark": "cold_start", "size": size.name, "compiled": number > 0, **seconds})
        print(f"process {number + 1}: first picture after {seconds['first picture']:.1f} s", flush=True)
    return rows


def show(rows: list[dict[str, object]]) -> None:
    names = [name for name in rows[0] if name not in ("benchmark", "size", "compiled")]
    width = max(map(len, names))
    print(f"\n{'seconds':{width}}" + "".join(f"{'compiled' if row['compiled'] else 'compiling':>12}" for row in rows))
    for name in names:
        print(f"{name:{width}}" + "".join(f"{row[name]:12.2f}" for row in rows))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is kept from one run to the next")
    parser.add_argument("--size", choices=SIZES, default="true")
    parser.add_argument("--runs", type=int, default=3, help="processes, the one that compiles included")
    parser.add_argument("--save", action="store_true", help=f"append to {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    size, device = SIZES[args.size], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    make_folder(size, args.folder)
    print(f"the folder is there after {time.perf_counter() - started:.1f} s")
    count, read_s = read_once(args.folder)
    print(f"{count / 1e9:.2f} GB, read once in {read_s:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as kept:
        rows = measure(size, args.folder.absolute(), Path(kept), args.runs)
    show(rows)
    rows = [{**row, "folder_bytes": count, **describe_machine(device)} for row in rows]
    if args.save:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(json.dumps(rows[-1]))
    if size.name == "true" and rows[-1]["first picture"] > MAX_FIRST_PICTURE_S:  # type: ignore[operator]
        sys.exit(f"too slow: {MAX_FIRST_PICTURE_S:.0f} s are allowed to the first picture")


if __name__ == "__main__":
    main()
