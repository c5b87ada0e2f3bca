"""The format table: every pair stated once, capability by capability, and in step with what the engine plans by."""

import datetime
import re
import tomllib
from pathlib import Path

import pytest

from millicent.engine.planner import TENSOR_CORES
from millicent.engine.settings import FORMATS
from millicent.errors import InputError
from millicent.facts.formats import (
    ENGINE_FORMATS,
    FORMAT_NAMES,
    FORMATS_FILE,
    list_capabilities,
    read_formats,
    read_memory_formats,
    support,
    tensor_core_capabilities,
)
from millicent.facts.gpus import read_gpus

TEXT = FORMATS_FILE.read_text(encoding="utf-8")


def test_every_format_is_stated_for_every_card() -> None:
    assert {gpu.capability for gpu in read_gpus()} <= set(list_capabilities())
    for name in FORMAT_NAMES:
        for capability in list_capabilities():
            row = support(name, capability)
            assert (row.format, row.capability) == (name, capability)
            assert row.source
            assert row.because
            assert row.checked >= datetime.date(2026, 11, 22)


def test_no_row_speaks_of_later_cards() -> None:
    rows = tomllib.loads(TEXT)["support"]
    assert all(isinstance(pair, list) and len(pair) == 2 for row in rows for pair in row["capabilities"])
    for row in rows:
        told = f"{row['because']} {row['runs']}"
        assert not re.search(r">=|\+|and (later|above|newer)", told), told


def test_what_the_engine_plans_by_is_what_the_table_says() -> None:
    assert set(ENGINE_FORMATS) == set(FORMATS) == set(TENSOR_CORES)
    for name, capabilities in TENSOR_CORES.items():
        assert tensor_core_capabilities(name) == capabilities, name


def test_a_higher_number_is_no_superset() -> None:
    runs = {name: {each for each in list_capabilities() if support(name, each).runs} for name in FORMAT_NAMES}
    assert (10, 0) in runs["int8"]
    assert (10, 3) not in runs["int8"]
    assert (12, 0) in runs["int8"]
    assert runs["fp8-blockwise"] == {(9, 0)}
    assert runs["mxfp8"] == runs["nvfp4"] == {(10, 0), (10, 3), (12, 0), (12, 1)}
    assert runs["fp8-tensorwise"] == runs["fp8-rowwise"] == runs["mxfp8"] | {(8, 9), (9, 0)}
    assert (7, 5) in runs["int8"] & runs["int4"]
    assert (7, 5) not in runs["bf16"]
    assert (7, 0) not in runs["int8"]
    assert (9, 0) not in runs["int4"]
    assert runs["fp16"] == set(list_capabilities())


def test_software_gates_are_told() -> None:
    rowwise = support("fp8-rowwise", (8, 9))
    assert (rowwise.min_torch, rowwise.min_cuda) == ("2.12", "12.1")
    assert "hang" in rowwise.because
    assert support("fp8-blockwise", (9, 0)).min_cuda == "12.9"
    assert support("bf16", (12, 0)).min_torch == "2.7"
    for name in FORMAT_NAMES:
        for capability in ((10, 0), (10, 3), (12, 0), (12, 1)):
            row = support(name, capability)
            compiled_alone = name == "fp8-rowwise" and capability in ((10, 3), (12, 1))
            assert not row.runs or row.min_cuda == ("12.9" if compiled_alone else "12.8"), (name, capability)


def test_what_saves_memory_only_is_told() -> None:
    assert [row.name for row in read_memory_formats()][:2] == ["int8-weight", "fp8 storage"]
    assert all(row.source and row.because for row in read_memory_formats())


def test_what_the_table_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="no format 'fp2'"):
        support("fp2", (8, 9))
    with pytest.raises(InputError, match=r"nothing of compute capability 13\.0.*It knows 7\.0, .*12\.1"):
        support("bf16", (13, 0))
    with pytest.raises(InputError, match="no format 'fp2'"):
        tensor_core_capabilities("fp2")


def damage(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (damage("runs = false", "runs = 0"), "support 1 has runs = 0"),
        (damage("runs = false", "run = false"), "unknown key run"),
        (damage('format = "bf16"', 'format = "bf61"'), "must be one of bf16, "),
        (re.sub(r"\nsource = .*", "", TEXT, count=1), "support 1 lacks source"),
        (damage("capabilities = [[7, 0], [7, 5]]", "capabilities = [[7, 0], [7, 0]]"), r"states bf16 on \(7, 0\) twice"),
        (damage("capabilities = [[7, 0], [7, 5]]", "capabilities = [[7, 0], [8, 0]]"), r"states bf16 on \(8, 0\) twice"),
        (damage("capabilities = [[7, 0], [7, 5]]", "capabilities = [[7, 0]]"), r"says nothing of bf16 on \(7, 5\)"),
        (damage("capabilities = [[7, 0], [7, 5]]", 'capabilities = ">= 7.0"'), "must be a list"),
        (damage('unverified = ["runs"]', 'unverified = ["rnus"]'), "calls rnus unverified"),
    ],
)
def test_a_wrong_table_is_refused(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "formats.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=told):
        read_formats(file)
