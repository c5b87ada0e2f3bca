"""`millicent gpus`: the table, one card's page, and names that are no card."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from millicent.cli.gpus import gpus
from millicent.errors import InputError, MillicentError
from millicent.facts.formats import FORMAT_NAMES
from millicent.facts.gpus import AmbiguousGpuError, UnknownGpuError, read_gpus

app = typer.Typer()
app.command()(gpus)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_has_a_line_for_every_card_and_says_what_its_marks_mean() -> None:
    lines = run().splitlines()
    for gpu in read_gpus():
        (line,) = [line for line in lines if line.startswith(f" {gpu.name}  ")]
        assert f"{gpu.capability[0]}.{gpu.capability[1]}" in line
        assert len(line.split()) == len(gpu.name.split()) + len(gpu.architecture.split()) + 7, line
    (line,) = [line for line in lines if line.startswith(" RTX 4090  ")]
    assert line.split() == ["RTX", "4090", "Ada", "8.9", "~24564", "1008", "165.2", "330.3", "660.6", "-"]
    (line,) = [line for line in lines if line.startswith(" GB10  ")]
    assert line.split()[-4:] == ["?", "?", "?", "~500"]
    assert any("~ derived" in line for line in lines)


def test_a_page_tells_what_runs_what_saves_memory_and_what_is_not_there() -> None:
    page = run("RTX", "4090")
    runs, rest = page.split("They do not run")
    absent, rest = rest.split("These save memory")
    memory, ours = rest.split("\nmillicent\n")
    for name, rate in [("fp8-rowwise", "330.3 TFLOP/s"), ("int8", "660.6 TOP/s"), ("bf16", "165.2 TFLOP/s")]:
        (line,) = [line for line in runs.splitlines() if line.split()[:1] == [name]]
        assert rate in line
    assert "2.0x BF16" in runs
    assert "4.0x BF16" in runs
    assert "on the box are with FP16 sums" in " ".join(runs.split())
    assert "not to be taken for  RTX 4090 D" in runs
    assert "nvfp4" in absent
    assert "int8-weight" in memory
    assert "fp8 storage" in memory
    assert "--format bf16, fp8, int8, int8-weight" in ours
    assert 'pip install "torch==' in ours
    assert "driver 580 or later" in ours


@pytest.mark.parametrize("gpu", [pytest.param(gpu, id=gpu.name) for gpu in read_gpus()])
def test_every_card_has_a_page_and_an_object(gpu: object) -> None:
    name = getattr(gpu, "name", "")
    assert run(name).startswith(f"{name}: ")
    page = json.loads(run(name, "--json"))
    assert page["name"] == name
    assert [row["format"] for row in page["formats"]] == list(FORMAT_NAMES)
    assert page["torch"]["command"].startswith("pip install")
    assert page["checked"]


def test_json_holds_the_whole_table() -> None:
    table = json.loads(run("--json"))["gpus"]
    assert [row["name"] for row in table] == [gpu.name for gpu in read_gpus()]
    assert all(row["source"] and row["checked"] for row in table)


def test_what_ampere_and_turing_are_told() -> None:
    assert "--format bf16, int8, int8-weight" in run("3090")
    assert "no FP8" in run("3090").split("They do not run")[1]
    assert "does not run: it computes in BF16" in run("T4")
    assert "less than its BF16" in run("B300").split("They do not run")[1]


def test_a_laptops_card_has_formats_and_no_rates() -> None:
    page = run("NVIDIA GeForce RTX 4090 Laptop GPU")
    assert "has no rates" in " ".join(page.split())
    assert "TFLOP/s" not in page
    assert "fp8-rowwise" in page
    as_json = json.loads(run("RTX 4090 Laptop GPU", "--json"))
    assert (as_json["kind"], as_json["capability"]) == ("laptop", [8, 9])
    assert all(row["rate"] is None for row in as_json["formats"])


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("RTX 6000", AmbiguousGpuError, "Quadro RTX 6000"),
        ("MI300X", UnknownGpuError, "AMD's"),
        ("toaster", UnknownGpuError, "no card named"),
    ],
)
def test_a_name_that_is_no_one_card_is_an_error(name: str, kind: type[MillicentError], told: str) -> None:
    with pytest.raises(kind, match=told) as error:
        run(name)
    assert error.value.exit_code == 19
    assert isinstance(error.value, InputError)


def test_it_answers_without_anything_heavy() -> None:
    heavy = "{'torch', 'numpy', 'safetensors', 'transformers'}"
    told = f"import sys; from millicent.cli.gpus import gpus; gpus(['L4']); print(sorted(set(sys.modules) & {heavy}))"
    ran = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
