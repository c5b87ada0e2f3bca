"""`millicent plan`: what is printed, as text, JSON and a picture; and what is refused."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from millicent.cli import plan as command
from millicent.cli.bars import Bar, draw_bars
from millicent.cli.plan_view import ARTICLE
from millicent.errors import InputError, MachineError, SizeError
from millicent.facts.gpus import AmbiguousGpuError, UnknownGpuError, read_gpus

MACHINES = Path(__file__).parent.parent / "machines"
SVG = "{http://www.w3.org/2000/svg}"

app = typer.Typer()
app.command()(command.plan)


@pytest.fixture(autouse=True)
def _no_prices_of_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(kind: type[Exception], *arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, kind), result.output
    return str(result.exception)


def planned(*arguments: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return made


def test_a_plan_says_what_stays_how_long_it_takes_and_what_it_costs() -> None:
    shown = run("--gpu", "rtx4090")
    assert shown.startswith("RTX 4090: Qwen-Image-Edit-2511, 1024x1024, 1 reference, 4 steps")
    for part in ("transformer", "text encoder", "table of embeddings", "modulation table", "VAE", "activations", "caches", "peak"):
        assert f"\n {part} " in shown, part
    for told in ("denoise", "modelled", "s an image in a row", "RunPod", "community", "0.34", "int8", "chosen"):
        assert told in shown, told
    assert "FlashAttention" in shown


def test_the_json_is_one_object_with_the_same() -> None:
    made = planned("--gpu", "RTX 4090", "--attention", "int8")
    assert (made["card"], made["format"], made["attention"]) == ("RTX 4090", "fp8", "int8")
    assert made["peak_bytes"] == max(made["phase_peak_bytes"].values()) <= made["free_bytes"]
    on_card = sum(part["card_bytes"] for part in made["parts"])
    assert made["peak_bytes"] == on_card
    stages = made["stages"]
    row = sum(stages[stage]["seconds"] for stage in ("text", "VAE encode", "denoise", "VAE decode"))
    assert made["seconds_per_image"] == pytest.approx(row, abs=1e-3)
    assert made["images_per_hour"] == pytest.approx(3600 / made["seconds_per_image"])
    assert {each["kind"] for each in stages.values()} == {"modelled"}
    cheapest = made["prices"][0]
    assert float(cheapest["usd_per_image"]) == pytest.approx(
        float(cheapest["usd_per_hour"]) * made["seconds_per_image"] / 3600, abs=1e-7
    )
    assert all(price["source"] for price in made["prices"])


def test_a_machine_from_a_file() -> None:
    assert planned("--machine", str(MACHINES / "h200.json"))["stages"]["denoise"]["kind"] == "measured"
    shown = run("--machine", str(MACHINES / "rtx-4070-ti.json"))
    assert "streamed" in shown
    assert "pinned on the host" in shown
    assert "in waves of" in shown
    assert "No rental price of RTX 4070 Ti" in shown
    assert "waves of 10 share an exchange of 0.65 s" in shown
    assert "what is streamed comes while the card computes" in shown
    made = planned("--machine", str(MACHINES / "rtx-4070-ti.json"))
    assert (made["wave_images"], made["records_graphs"], made["recorded"]) == (10, False, ["text"])
    assert made["phase_peak_bytes"]["denoise"] > made["arena_bytes"] > 0
    assert made["resident_blocks"] < 60
    assert made["abreast"] == 2


def test_what_is_recorded_is_told_and_what_it_keeps() -> None:
    whole = planned("--gpu", "H100 SXM")
    assert (whole["records_graphs"], whole["recorded"]) == (True, ["text", "VAE encode", "denoise", "VAE decode"])
    assert "in VAE decode, beside what graphs of all phases keep" in run("--gpu", "H100 SXM")
    machine = str(MACHINES / "rtx-4090.json")
    partly = planned("--machine", machine)
    assert (partly["records_graphs"], partly["recorded"]) == (False, ["text", "denoise"])
    shown = run("--machine", machine)
    assert "in VAE decode, beside what graphs of text and denoise keep" in shown
    assert "graphs are recorded of text and denoise alone" in shown
    none = run("--gpu", "RTX 4090", "--memory", "23.5")
    assert "graphs are not recorded" in none
    assert "in VAE decode; " in none


def test_less_memory_of_the_card_is_planned_for() -> None:
    whole, half = planned("--gpu", "RTX 4090"), planned("--gpu", "RTX 4090", "--memory", "16")
    assert whole["exchanged_bytes"] == whole["streamed_step_bytes"] == 0
    assert half["exchanged_bytes"] > 0
    assert half["peak_bytes"] <= half["free_bytes"] == 16 * 10**9
    least = planned("--gpu", "RTX 4090", "--memory", "8.5")
    assert least["streamed_step_bytes"] > half["streamed_step_bytes"]
    assert least["resident_blocks"] < half["resident_blocks"]
    # more than is free is no limit
    assert planned("--gpu", "RTX 4090", "--memory", "80") == whole
    assert "they lie on the card in turn" in run("--gpu", "RTX 4090", "--memory", "16")


def test_a_card_without_times_is_shown_without_them() -> None:
    shown = run("--machine", str(MACHINES / "rtx-4090-laptop.json"))
    assert "is not in our table of cards" in shown
    assert "an image in a row" not in shown


def test_this_machine_is_probed_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "probe", lambda *_: command.read_machine(MACHINES / "l40s.json"))
    assert planned()["card"] == "L40S"
    monkeypatch.setattr(command, "probe", lambda *_: command.read_machine(MACHINES / "no-gpu.json"))
    assert "--gpu" in refused(MachineError)


def test_what_is_asked_for_is_what_is_planned() -> None:
    made = planned("--gpu", "H100 SXM", "--size", "512x768", "--refs", "2", "--steps", "8", "--format", "bf16", "--reuse-reference")
    assert made["work"]["width"] == 512
    assert made["work"]["height"] == 768
    assert made["work"]["target_tokens"] == 32 * 48
    assert made["work"]["reference_tokens"] == 8192
    assert (made["work"]["steps"], made["format"], made["reuse_reference"]) == (8, "bf16", True)
    assert planned("--gpu", "H100 SXM", "--model", "demo")["work"]["width"] == 256


def test_all_cards_are_ranked_by_dollars() -> None:
    made = planned("--all")
    priced = [float(card["usd_per_image"][0]) for card in made["cards"] if card["usd_per_image"]]
    assert priced == sorted(priced)
    assert len(made["cards"]) + len(made["refused"]) == len(read_gpus())
    shown = run("--all")
    assert set(ARTICLE) <= {card["card"] for card in made["cards"]}
    marked = [line for line in shown.splitlines() if line.strip().startswith("*") or "article" in line]
    assert len(marked) == 1 + len(ARTICLE)
    assert "cards have no rental price" in shown
    assert "Cards on which nothing runs: T4" in shown


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'safetensors', 'PIL'}"
    code = f"import sys, millicent.cli.plan; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# pictures


def test_the_ranking_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "cards.svg"
    run("--all", "--plot", str(path))
    texts = [node.text or "" for node in ET.parse(path).getroot().iter(f"{SVG}text")]
    assert texts[0] == "Millicents an image"
    assert {f"{card}" for card in ARTICLE} <= {text.rpartition(",")[0] for text in texts}


def test_a_plan_is_drawn_by_its_stages(tmp_path: Path) -> None:
    path = tmp_path / "plan.SVG"
    run("--gpu", "L40S", "--plot", str(path))
    texts = [node.text for node in ET.parse(path).getroot().iter(f"{SVG}text")]
    assert {"prepare", "text", "VAE encode", "denoise", "VAE decode", "output"} <= set(texts)


def test_bars_are_as_long_as_their_values() -> None:
    root = ET.fromstring(draw_bars("a <b>", "c & d", [Bar("one", 1, 2, "1 to 2"), Bar("two", 4, 4, "4", marked=True)]))
    widths = [float(node.attrib["width"]) for node in root.iter(f"{SVG}rect")][1:]
    assert widths == pytest.approx([w * widths[3] / 4 for w in (2, 1, 4, 4)], rel=0.01)
    assert next(root.iter(f"{SVG}text")).text == "a <b>"


# refusals


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        (InputError, ["--plot", "x.png", "--all"], "charts are SVG"),
        (InputError, ["--all", "--gpu", "RTX 4090"], "--gpu and --all were given"),
        (InputError, ["--gpu", "RTX 4090", "--machine", "m.json"], "--gpu and --machine were given"),
        (AmbiguousGpuError, ["--gpu", "RTX 6000"], "several cards"),
        (UnknownGpuError, ["--gpu", "RTX 9090"], "no card named"),
        (InputError, ["--machine", "nowhere.json"], "no file"),
        (SizeError, ["--gpu", "L4", "--size", "1024"], "as 1024x768"),
        (InputError, ["--gpu", "L4", "--format", "fp7"], "format is 'fp7'"),
        (InputError, ["--gpu", "L4", "--attention", "sage"], "attention is 'sage'"),
        (InputError, ["--gpu", "L4", "--memory", "0"], "memory_gb is 0.0"),
        (InputError, ["--gpu", "L4", "--memory", "nan"], "memory_gb is nan"),
        (MachineError, ["--gpu", "L4", "--memory", "2"], "even with all weights streamed"),
        (MachineError, ["--gpu", "RTX 3090", "--format", "fp8"], "do not run fp8"),
        (MachineError, ["--gpu", "T4"], "none of our formats"),
        (InputError, ["--machine", str(MACHINES / "rtx-4090-laptop.json"), "--plot", "x.svg"], "no times"),
    ],
)
def test_what_cannot_be_planned_is_refused(kind: type[Exception], arguments: list[str], told: str) -> None:
    assert told in refused(kind, *arguments)
