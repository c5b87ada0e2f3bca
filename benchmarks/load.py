"""Seconds and memory to read a header, to recognize a file and to load it, at the true shapes. `python -m benchmarks.load`.

Files are synthetic: random weights at Qwen-Image's sizes, a few blocks of them, in several layouts. Each loaded file must hold
the numbers that were written, within its format's error; a speed is printed only then. Beside each load stands a plain read of
the same file, from the page cache too. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.machine import ROOT, describe_machine
from millicent.checkpoint.architecture import transformer_tensors
from millicent.checkpoint.header import read_header
from millicent.checkpoint.load import load_network
from millicent.checkpoint.recognize import recognize
from millicent.model.config import MMDiTConfig
from millicent.model.mmdit import MMDiT

RESULTS = ROOT / "benchmarks" / "results" / "load.jsonl"
TRUE_BLOCKS = 60
PAGE_BYTES = 4096
MAX_RECOGNIZE_S = 0.05
MIN_LOAD_SHARE = 0.7
CODES = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def true_config(blocks: int) -> dict[str, Any]:
    return {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": blocks, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip


def store_bf16(key: str, weight: Tensor) -> dict[str, Tensor]:
    return {key: weight.bfloat16()}


def store_rows(dtype: torch.dtype) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """8-bit codes with a scale for each row, blocks only, as LightX2V writes them."""

    def store(key: str, weight: Tensor) -> dict[str, Tensor]:
        if not (key.startswith("transformer_blocks.") and weight.ndim == 2):
            return store_bf16(key, weight)
        scale = weight.abs().amax(1, keepdim=True) / CODES[dtype]
        codes = weight / scale
        return {key: (codes.round() if dtype == torch.int8 else codes).to(dtype), f"{key}_scale": scale}

    return store


LAYOUTS = {"bf16": store_bf16, "fp8 rows": store_rows(torch.float8_e4m3fn), "int8 rows": store_rows(torch.int8)}
MAX_ERROR = {"bf16": 0.005, "fp8 rows": 0.04, "int8 rows": 0.02}


def draw(key: str, shape: tuple[int, ...]) -> Tensor:
    """The same numbers whenever they are asked for."""
    generator = torch.Generator().manual_seed(sum(key.encode()) + len(key))
    return torch.randn(shape, generator=generator) * (0.02 if len(shape) == 2 else 1.0)


def write(path: Path, layout: str, blocks: int) -> None:
    stored: dict[str, Tensor] = {}
    for key, shape in transformer_tensors(true_config(blocks)).items():
        stored |= LAYOUTS[layout](key, draw(key, shape))
    save_file(stored, path)


def write_empty(path: Path) -> None:
    """The whole model's header and none of its bytes: the file is a hole of 40.9 GB."""
    entries, end = {}, 0
    for key, shape in transformer_tensors(true_config(TRUE_BLOCKS)).items():
        size = 2 * torch.Size(shape).numel()
        entries[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def load(path: Path, blocks: int) -> MMDiT:
    recognized = recognize(path)
    with torch.device("meta"):
        mmdit = MMDiT(MMDiTConfig.from_dict(true_config(blocks)))
    load_network(mmdit, recognized.components["transformer"], recognized.source, torch.bfloat16, keep_codes=True)
    return mmdit


def check(mmdit: MMDiT, limit: float) -> float:
    """The largest relative error of three matrices. Raises SystemExit above `limit`."""
    worst = 0.0
    for layer in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mlp.net.2", "proj_out"):
        held = {key.removeprefix(f"{layer}."): tensor for key, tensor in mmdit.state_dict().items() if key.startswith(f"{layer}.")}
        weight = held["weight"].float() * held.get("weight_scale", torch.ones(()))
        truth = draw(f"{layer}.weight", tuple(weight.shape))
        worst = max(worst, float((weight - truth).norm() / truth.norm()))
    if worst > limit:
        raise SystemExit(f"{layer} was loaded with a relative error of {worst:.3f}, above {limit}: no speed is worth telling")
    return worst


def read_plainly(path: Path) -> None:
    """Every byte into memory of this process, which is what the least loader must do."""
    assert len(path.read_bytes()) == path.stat().st_size


def load_and_touch(path: Path, blocks: int) -> None:
    """Load, and read of every page that is only mapped: else a layout that needs no check would not be read at all."""
    for tensor in load(path, blocks).state_dict().values():
        tensor.flatten().view(torch.uint8)[::PAGE_BYTES].amax()


def median_s(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def peak_bytes(path: Path, blocks: int) -> int:
    """Peak memory of a process that loads the file and nothing else."""
    command = [sys.executable, "-m", "benchmarks.load", "--load", str(path), "--blocks", str(blocks)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(layout: str, folder: Path, blocks: int, repeats: int) -> dict[str, Any]:
    path = folder / f"{layout.replace(' ', '-')}.safetensors"
    write(path, layout, blocks)
    error = check(load(path, blocks), MAX_ERROR[layout])
    # in turns, so that a busy moment of the machine meets both
    pairs = [(median_s(lambda: read_plainly(path), 1), median_s(lambda: load_and_touch(path, blocks), 1)) for _ in range(repeats)]
    plain_s, load_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    row = {
        "layout": layout,
        "bytes": path.stat().st_size,
        "relative_error": round(error, 5),
        "plain_read_s": round(plain_s, 4),
        "load_s": round(load_s, 4),
        "share_of_plain_read": round(statistics.median(plain / load for plain, load in pairs), 3),
        "peak_bytes": peak_bytes(path, blocks),
    }
    path.unlink()
    return row


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['layout']:10} {row['bytes'] / 1e9:5.2f} GB  plain read {row['plain_read_s']:6.3f} s  load {row['load_s']:6.3f} s"
        f"  {100 * row['share_of_plain_read']:4.0f} %  peak {row['peak_bytes'] / 1e9:5.2f} GB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--keep", action="store_true", help=f"append the figures to {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--load", type=Path, help="only load this file and print the peak memory in bytes")
    args = parser.parse_args()
    if args.load:
        load(args.load, args.blocks)
        # not getrusage: that of a new process begins at its parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_empty(folder / "whole.safetensors")
        header_s = median_s(lambda: read_header(folder / "whole.safetensors"), args.repeats)
        recognize_s = median_s(lambda: recognize(folder / "whole.safetensors"), args.repeats)
        print(f"1933 tensors: header {1000 * header_s:.1f} ms, recognized {1000 * recognize_s:.1f} ms, header and all")
        rows = [measure(layout, folder, args.blocks, args.repeats) for layout in LAYOUTS]
    for row in rows:
        show(row)
    is_met = recognize_s < MAX_RECOGNIZE_S and all(row["share_of_plain_read"] >= MIN_LOAD_SHARE for row in rows)
    aims = f"recognized in {1000 * MAX_RECOGNIZE_S:.0f} ms, loads at {100 * MIN_LOAD_SHARE:.0f} % of a plain read"
    print(f"aims ({aims}): {'met' if is_met else 'MISSED'}")
    record = {
        **describe_machine(torch.device("cpu")),
        "header_s": header_s,
        "recognize_s": recognize_s,
        "loads": rows,
        "aims_met": is_met,
    }
    if args.keep:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
