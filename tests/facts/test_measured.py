"""What was measured: drawn from benchmarks/results and from nowhere else."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.write_measured import renew, write_rows
from millicent.errors import InputError
from millicent.facts.gpus import find_gpu
from millicent.facts.measured import MEASURED, Ceiling, Run, read_measured

ROOT = Path(__file__).parents[2]
ROWS = [*read_measured().ceilings, *read_measured().runs]
RENAMED = {"checked": "date"}


def line_of(row: Ceiling | Run) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((ROOT / row.source).read_text(encoding="utf-8").splitlines()[row.line - 1])
    stages = {f"{stage}_ms": ms for stage, ms in line.pop("stages_ms", {}).items()}
    return line | stages | line["versions"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"line {row.line}")
def test_a_row_is_the_line_that_it_names(row: Ceiling | Run) -> None:
    line = line_of(row)
    for key, value in asdict(row).items():
        if key in ("source", "line", "attention", "reuse_reference"):
            continue
        found = line[RENAMED.get(key, key)]
        assert str(found) == str(value) or found == value, key


@pytest.mark.parametrize("row", read_measured().runs, ids=lambda row: row.system)
def test_what_a_run_was_made_with_is_in_its_name(row: Run) -> None:
    system = line_of(row)["system"]
    assert (row.attention == "int8", row.reuse_reference) == ("8-bit attention" in system, "reuse" in system)


def test_the_rows_are_as_the_benchmark_writes_them() -> None:
    """python -m benchmarks.write_measured, after a run at true size."""
    text = MEASURED.read_text(encoding="utf-8")
    lines = (ROOT / "benchmarks/results/peers.jsonl").read_text(encoding="utf-8").splitlines()
    assert renew(text, lines[: max(row.line for row in ROWS)]) == text


def test_the_last_line_of_a_system_counts() -> None:
    lines = (ROOT / "benchmarks/results/peers.jsonl").read_text(encoding="utf-8").splitlines()
    text = write_rows([*lines, lines[3], lines[1]])
    assert f"line = {len(lines) + 1}\n" in text
    assert "line = 4\n" not in text
    assert "diffusers" not in text


def test_the_cards_are_in_the_table() -> None:
    for name in {row.card for row in ROWS} | {row.gpu for row in read_measured().published}:
        assert find_gpu(name)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (r"step_ms = (\S+)", r"stepms = \1", "unknown key stepms"),
        (r"line = \d+\n", "", "lacks line"),
        (r"line = (\d+)\n([^$]*?)line = \d+\n", r"line = \1\n\2line = \1\n", r"line \d+ of benchmarks/results/peers\.jsonl twice"),
        (r"step_ms = (\S+)", r'step_ms = "\1"', "must be a float"),
        ('gpu = "RTX 6000 Ada"', 'gpu = "RTX 4090"', "the step of RTX 4090 twice"),
        (r'unverified = \["gb_per_s"\]', 'unverified = ["speed"]', "speed unverified"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    text = MEASURED.read_text(encoding="utf-8")
    changed, count = re.subn(old, new, text, count=1)
    assert count == 1
    path = tmp_path / "measured.toml"
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(InputError, match=told):
        read_measured(path)
