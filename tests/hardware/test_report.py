"""The report for a bug: whole, pasteable, and without what names its user."""

from pathlib import Path

import pytest

from millicent.engine.needs import needs_of
from millicent.hardware.findings import Finding
from millicent.hardware.machine import from_json
from millicent.hardware.preflight import check_machine
from millicent.hardware.report import write_report

MACHINES = Path(__file__).parent.parent / "machines"


def report(name: str, *more: Finding) -> str:
    machine = from_json((MACHINES / f"{name}.json").read_text())
    needs = needs_of("qwen-image-edit-2511", None, machine)
    return write_report(machine, needs, (*check_machine(machine, needs), *more), "1.2.3")


def test_it_says_what_the_machine_is_and_what_was_found() -> None:
    text = report("container-4gb")
    for said in ("millicent: 1.2.3, qwen-image-edit-2511 in fp8", "torch 2.13.0+cu130", "580.95.05 (CUDA 13.0)", "| error | ram |"):
        assert said in text
    assert "GPU-0000" not in text


def test_every_row_of_the_table_has_its_columns() -> None:
    finding = Finding(level="error", name="a|b", found="two\nlines", wanted="", command="x | y")
    rows = [line for line in report("two-cards", finding).splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows)
    assert "two lines" in rows[-1]


def test_the_home_folder_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    finding = Finding(level="error", name="disk", found="/home/jane/.cache is full, /home/janet is not")
    text = report("rtx-4090", finding)
    assert "~/.cache is full, /home/janet is not" in text
