"""Seconds that pre-flight takes on this machine: first stage, trial, and the whole command. `python -m benchmarks.preflight`.

Each is timed in a process of its own, from its start to its end, as a user waits for it. Where there is no card the command tries
nothing, so the trial is run on the CPU and added. Exits with 1 above the limits. --save appends a line to the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.machine import ROOT, describe_machine
from millicent.hardware.judging import trial_command

RESULTS = ROOT / "benchmarks" / "results" / "preflight.jsonl"
MAX_FIRST_STAGE_S = 0.5
MAX_WHOLE_S = 5.0
FIRST_STAGE = """
import time
started = time.perf_counter()
from pathlib import Path
from millicent.engine.needs import needs_of
from millicent.hardware.preflight import check_machine
from millicent.hardware.probe import probe
machine = probe({"models": Path("models"), "temporary files": Path("/tmp")})
check_machine(machine, needs_of("qwen-image-edit-2511", None, machine))
print(time.perf_counter() - started)
"""
COMMAND = "import typer; from millicent.cli.preflight import preflight; app = typer.Typer(); app.command()(preflight); app()"


def time_first_stage() -> float:
    """Imports, probe and checks, without the start of Python."""
    ran = subprocess.run([sys.executable, "-c", FIRST_STAGE], capture_output=True, text=True, check=True)
    return float(ran.stdout)


def time_process(command: Sequence[str]) -> float:
    """A finding that is bad ends the command with 1 or 2, and is no failure here."""
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert ended.returncode in (0, 1, 2), ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    return seconds


def measure(runs: int) -> dict[str, float]:
    """Medians of so many runs, in seconds. The hub is not asked: its answer is waited for beside the trial, 2 s at most."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = (sys.executable, "-c", COMMAND, "--offline", "--json")
    rows = [(time_first_stage(), time_process(trial_command(device)), time_process(command)) for _ in range(runs)]
    first, trial, whole = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"first_stage_s": first, "trial_s": trial, "whole_s": whole if device == "cuda" else whole + trial}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="append a line to benchmarks/results/preflight.jsonl")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {name: round(seconds, 3) for name, seconds in measure(arguments.runs).items()}
    line = json.dumps(
        {"benchmark": "preflight", "device": device.type, "runs": arguments.runs, **found, **describe_machine(device)}
    )
    print(line)
    if arguments.save:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    if found["first_stage_s"] > MAX_FIRST_STAGE_S or found["whole_s"] > MAX_WHOLE_S:
        sys.exit(f"too slow: {MAX_FIRST_STAGE_S} s are allowed for the first stage, {MAX_WHOLE_S} s for the whole")


if __name__ == "__main__":
    main()
