"""`millicent preflight` as its user runs it, on saved machines and on this one."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from millicent.cli import preflight as command
from millicent.errors import InputError, InputNotFoundError, ModelNotFoundError, OutputError
from millicent.hardware.judging import start_trial
from millicent.hardware.machine import Machine, from_json

MACHINES = Path(__file__).parent.parent / "machines"
app = typer.Typer()
app.command()(command.preflight)


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def run_on(name: str, *args: str) -> tuple[int, str]:
    return run("--machine", str(MACHINES / f"{name}.json"), *args)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine, whatever it has, without its cards; its folders in a place of the test's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.mark.parametrize(("name", "code"), [("rtx-4090", 0), ("rtx-4090-riser", 1), ("rtx-5090-cu126", 2)])
def test_the_exit_code_tells_how_it_stands(name: str, code: int) -> None:
    assert run_on(name)[0] == code


def test_a_finding_is_shown_with_what_mends_it() -> None:
    text = " ".join(run_on("rtx-5090-cu126")[1].split())
    assert "no kernel image is available" in text
    assert '-> pip install "torch==' in text
    assert "will not run here" in text


def test_json_is_one_object() -> None:
    code, text = run_on("disk-20gb", "--json")
    found: dict[str, Any] = json.loads(text)
    assert code == found["exit_code"] == 2
    assert (found["model"], found["format"]) == ("qwen-image-edit-2511", "fp8")
    wrong = {finding["name"]: finding for finding in found["findings"] if finding["level"] == "error"}
    assert wrong.keys() == {"models disk"}
    assert wrong["models disk"].keys() == {"level", "name", "found", "wanted", "command"}
    assert found["needs"]["card_bytes"] == found["needs"]["weights_bytes"] + found["needs"]["working_bytes"]
    assert from_json(json.dumps(found["machine"])) == from_json((MACHINES / "disk-20gb.json").read_text())


def test_a_format_may_be_asked_for() -> None:
    assert run_on("rtx-3090", "--format", "fp8")[0] == 2
    assert json.loads(run_on("rtx-5090", "--format", "nvfp4", "--json")[1])["format"] == "nvfp4"
    with pytest.raises(InputError):
        run_on("rtx-3090", "--format", "fp7")
    with pytest.raises(ModelNotFoundError):
        run_on("rtx-3090", "--model", "qwen")


def test_a_report_goes_to_standard_output_or_a_file(tmp_path: Path) -> None:
    text = run_on("rtx-4090", "--report", "-")[1]
    assert text.startswith("## millicent preflight")
    run_on("rtx-4090", "--report", str(tmp_path / "report.md"))
    assert (tmp_path / "report.md").read_text() == text
    with pytest.raises(OutputError):
        run_on("rtx-4090", "--report", str(tmp_path / "no" / "report.md"))


def test_a_machine_that_is_not_there_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError):
        run("--machine", str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="lacks checked"):
        run("--machine", str(tmp_path / "bad.json"))


@pytest.mark.usefixtures("no_card")
def test_this_machine_without_a_card_fails_fast_and_offers_the_demo(tmp_path: Path) -> None:
    saved = tmp_path / "machine.json"
    code, text = run("--offline", "--save-machine", str(saved))
    assert code == 2
    assert "--model demo" in " ".join(text.split())
    assert "not asked: offline" in text
    machine = from_json(saved.read_text())
    assert machine.cards == ()
    assert {disk.path for disk in machine.disks} >= {
        str(tmp_path / "hf" / "hub"),
        str(command.default_folder("qwen-image-edit-2511")),
    }


@pytest.mark.usefixtures("no_card")
def test_what_is_fetched_already_is_not_wanted_again() -> None:
    def wanted() -> str:
        found = json.loads(run("--offline", "--json")[1])["findings"]
        return next(str(finding["wanted"]) for finding in found if finding["name"] == "models disk")

    before = wanted()
    folder = command.default_folder("qwen-image-edit-2511")
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(60 * 10**9)
    assert before.startswith("6")
    assert wanted() == "nothing: it is here"


def test_the_card_is_tried_where_there_are_torch_and_a_card() -> None:
    def read(name: str) -> Machine:
        return from_json((MACHINES / f"{name}.json").read_text())

    needs = command.needs_of("qwen-image-edit-2511", "fp8", read("rtx-4090"))

    def tried(name: str) -> list[str]:
        with start_trial(("false",)) as finish:
            return [finding.level for finding in command.try_card(read(name), needs, finish)]

    assert tried("rtx-4090") == ["error"]
    assert tried("no-gpu") == tried("bare-pod") == []
    assert tried("cpu-torch") == ["warning"]
