"""`millicent convert` as its user runs it, on the demo."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from millicent.cli.app import main
from millicent.demo import folder as demo_folder

TRANSFORMER = Path("transformer") / "diffusion_pytorch_model.safetensors"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: its exit code, output and errors."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["millicent", "convert", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            main()
        assert isinstance(exited.value.code, int)
        captured = capfd.readouterr()
        return exited.value.code, captured.out, captured.err

    return call


def test_the_demo_becomes_a_folder_of_fp8(run: Run, tmp_path: Path) -> None:
    code, out, err = run("demo", "-o", tmp_path / "fp8", "--format", "fp8")
    assert (code, err) == (0, "")
    size = (tmp_path / "fp8" / TRANSFORMER).stat().st_size
    assert size < 0.4 * (demo_folder() / TRANSFORMER).stat().st_size  # half the bits, and a third of the weights left out
    assert "30 left out" in out
    assert "modulation table: 28 tensors" in out
    assert "72 changed by LoRAs" in out
    errors = [float(found) for found in re.findall(r"transformer_blocks\S+ +fp8 +(\S+)", out)]
    assert len(errors) == 10
    assert errors == sorted(errors, reverse=True)
    assert all(0.02 < error < 0.03 for error in errors)  # of 3 bits of mantissa
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8"]


def test_json_tells_of_every_layer(run: Run, tmp_path: Path) -> None:
    code, out, err = run("demo-base", "-o", tmp_path / "int8", "--format", "int8", "--keep-modulation", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["target"] == str(tmp_path / "int8")
    assert told["counts"] == {"bf16": 133, "int8": 72, "left out": 0}
    assert (told["table_tensors"], told["resumed_units"], told["started_anew"]) == (0, 0, False)
    assert told["bytes_after"] == (tmp_path / "int8" / TRANSFORMER).stat().st_size
    assert len(told["layers"]) == 90
    assert {layer["format"] for layer in told["layers"]} == {"int8", "bf16"}
    assert 0.001 < max(layer["error"] for layer in told["layers"]) < 0.02


def test_quiet_says_nothing(run: Run, tmp_path: Path) -> None:
    lora = demo_folder() / "lightning-4steps.safetensors"
    source = demo_folder() / TRANSFORMER
    out = tmp_path / "made.safetensors"
    assert run(source, "-o", out, "--format", "bf16", "--lora", f"{lora}:0.9", "--zero-cond-t", "-q") == (0, "", "")
    assert out.is_file()


def test_what_is_there_stays_unless_overwritten(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "made"
    assert run("demo", "-o", out, "--format", "bf16", "-q")[0] == 0
    before = (out / TRANSFORMER).read_bytes()
    code, _, err = run("demo", "-o", out, "--format", "fp8")
    assert (code, err) == (20, f"error: {out} is there already. Choose another name, or give --overwrite.\n")
    assert (out / TRANSFORMER).read_bytes() == before
    assert run("demo", "-o", out, "--format", "fp8", "--overwrite", "-q")[0] == 0
    assert len((out / TRANSFORMER).read_bytes()) < len(before)


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["demo-base", "--steps", "4"], 17, "no modulation table can hold it"),
        (["nothing"], 31, "There is no model 'nothing'"),
        (["demo", "--lora", "nowhere.safetensors"], 18, "There is no LoRA nowhere.safetensors"),
        (["demo", "--steps", "0"], 17, "0 steps"),
        (["demo", "--no-zero-cond-t"], 30, "zero_cond_t is True"),
    ],
)
def test_what_cannot_be_is_one_line(args: list[str], code: int, told: str, run: Run, tmp_path: Path) -> None:
    found, out, err = run(*args, "-o", tmp_path / "made", "--format", "fp8")
    assert (found, out) == (code, "")
    assert told in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_format_that_is_none_is_a_usage_error(run: Run, tmp_path: Path) -> None:
    assert run("demo", "-o", tmp_path / "made", "--format", "fp4")[0] == 2
