"""`millicent cost`: the bill and what stands beside it, as text and as JSON; and `millicent cost refresh`."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from millicent.cli.cost import cost
from millicent.engine import workload
from millicent.engine.machine_plan import plan_machine
from millicent.engine.settings import Settings
from millicent.errors import InputError, MillicentError
from millicent.facts.gpus import find_gpu
from millicent.hardware.machine import machine_of

JOB = ("--images", "50000", "--variants", "3", "--gpu", "rtx 4090", "--seconds", "5", "--on", "2026-11-25")
CATALOG = """\
instance_name,location,price,cpu,memory,gpu_count,gpu_name,gpu_memory,spot,disk_size,gpu_vendor,flags,cpu_arch,provider_data
NVIDIA GeForce RTX 4090,EU-RO-1,0.55,8,62.0,1,RTX4090,24.0,False,,nvidia,,x86,{}
NVIDIA H100 MIG,EU-RO-1,0.55,8,62.0,1,H100,20.0,False,,nvidia,,x86,{}
"""


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def run(*arguments: str) -> Result:
    app = typer.Typer()

    @app.callback()
    def main() -> None:
        """So that cost is a command of its own."""

    app.add_typer(cost, name="cost")
    return CliRunner().invoke(app, ["cost", *arguments])


def ask(*arguments: str) -> dict[str, Any]:
    result = run(*JOB, "--json", *arguments)
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_the_parts_of_the_answer_sum_to_its_total() -> None:
    answer = ask()
    assert sum(Decimal(part["usd"]) for part in answer["parts"]) == Decimal(answer["total_usd"])
    assert answer["gpu"] == "RTX 4090"
    assert (answer["price"]["provider"], answer["price"]["kind"], answer["price"]["usd_per_hour"]) == (
        "RunPod",
        "on-demand",
        "0.69",
    )
    assert answer["images"] == "156250"
    assert Decimal(answer["parts"][0]["usd"]) == round(Decimal(150_000 * 5) / 3600 * Decimal("0.69"), 9)


def test_the_cheaper_price_is_taken_when_asked_for() -> None:
    cheap = ask("--kind", "community", "--provider", "runpod")
    assert cheap["price"]["usd_per_hour"] == "0.34"
    assert {other["usd_per_hour"] for other in cheap["other_prices"]} >= {"0.69", "1.116"}
    assert Decimal(cheap["total_usd"]) < Decimal(ask()["total_usd"])


def test_a_price_of_ones_own() -> None:
    own = ask("--price", "0.30", "--storage-gb", "0")
    assert own["price"]["source"] == "given with --price"
    assert "storage is not counted" in " ".join(own["warnings"])
    with pytest.raises(InputError, match="no price of storage"):
        raise_from(run(*JOB, "--price", "0.30", "--storage-gb", "60"))
    stored = ask("--price", "0.30", "--storage-gb", "60", "--storage-price", "0.1")
    assert {part["name"]: Decimal(part["usd"]) for part in stored["parts"]}["storage"] == 6


def test_apis_stand_beside_it_with_status_and_break_even() -> None:
    found = {(api["model"], api["label"]): api for api in ask()["apis"]}
    lite = found["gemini-3.1-flash-lite-image", "1K"]
    assert (lite["usd_per_image"], lite["batch_usd_per_image"], lite["status"]) == ("0.0336", "0.0168", "live")
    assert Decimal(lite["job_usd"]) == Decimal("0.0336") * 156250
    assert 20 < Decimal(lite["break_even_images_per_hour"]) < 21
    assert isinstance(lite["break_even_images_per_month"], int)
    assert not any(model == "gpt-image-1" for model, _ in found)


def test_a_stale_price_is_shown_with_a_warning() -> None:
    assert not any("rental price was last seen" in warning for warning in ask()["warnings"])
    later = json.loads(run(*JOB[:-1], "2027-02-01", "--json").stdout)
    assert any(warning.startswith("the rental price was last seen on 2026-11-22") for warning in later["warnings"])
    assert any("API prices last seen more than 60 days" in warning for warning in later["warnings"])


def test_a_contested_end_is_told() -> None:
    assert any("gemini-2.5-flash-image" in warning and "2027-03-15" in warning for warning in ask()["warnings"])


def test_the_text_says_what_the_json_says() -> None:
    text = run(*JOB).stdout
    answer = ask()
    for part in answer["parts"]:
        assert part["name"] in text
    assert f"{Decimal(answer['total_usd']):,.2f}" in text
    assert f"{Decimal(answer['usd_per_accepted_image']) * 100_000:,.1f} millicents" in text
    for told in (*answer["assumptions"], *answer["warnings"]):
        assert told in text
    assert "gemini-3.1-flash-lite-image" in text


def test_seconds_that_are_not_given_are_the_planners() -> None:
    result = run("--images", "1000", "--gpu", "H100 SXM", "--on", "2026-11-25", "--busy", "1", "--reject", "0", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    day = datetime.date(2026, 11, 25)
    asked, card = workload.ask(), find_gpu("H100 SXM")
    planned = plan_machine(asked.model, machine_of(card), Settings(), asked.work, on=day, gpu=card, compares=False)
    assert planned.seconds is not None
    busy = next(part for part in answer["parts"] if part["name"] == "busy")
    assert float(busy["hours"]) * 3600 == pytest.approx(1000 * planned.seconds, rel=1e-4)
    assert any("calibrated within" in line for line in answer["assumptions"])


def test_where_the_weights_lie_is_among_the_assumptions() -> None:
    answer = json.loads(run("--images", "1000", "--gpu", "RTX 3090", "--price", "0.2", "--json").stdout)
    assert any("with weights in turn in waves of" in line for line in answer["assumptions"])
    answer = json.loads(run("--images", "1000", "--gpu", "RTX 4090", "--price", "0.2", "--json").stdout)
    assert not any("with weights" in line for line in answer["assumptions"])


def test_rejects_can_be_left_out() -> None:
    assert ask("--leave-rejects", "--reject", "0.1")["accepted"] == "135000.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "5", "--gpu", "RTX 5090 D", "--price", "1"), "--seconds"),  # a card whose rates nobody publishes
        (("--images", "5", "--seconds", "5"), "--gpu"),
        (("--gpu", "RTX 4090", "--seconds", "5"), "--images"),
        ((*JOB, "--busy", "lots"), "no number"),
        ((*JOB, "--busy", "nan"), "no number"),
        ((*JOB[:-1], "yesterday"), "no date"),
    ],
)
def test_a_usage_error_says_what_to_give(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def raise_from(result: Result) -> None:
    assert isinstance(result.exception, MillicentError), result.output
    raise result.exception


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--provider", "AWS"), "No AWS price of the RTX 4090"),
        (("--kind", "stolen"), "stolen"),
        (("--busy", "1.2"), "busy_share"),
        (("--gpu", "RTX 9999"), "RTX 9999"),
        (("--on", "2020-01-01"), "2020-01-01"),
    ],
)
def test_what_cannot_be_answered_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        raise_from(run(*JOB, *arguments))


# gpuhunt leaves a local catalog's file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_refresh_writes_a_dated_file_that_the_next_forecast_uses(
    tmp_path: Path, data_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runpod.csv").write_text(CATALOG)
    monkeypatch.setenv("GPUHUNT_CATALOG_DIR", str(tmp_path))
    result = run("refresh", "--provider", "runpod", "--provider", "gcp")
    assert result.exit_code == 0, result.output
    (path,) = (data_home / "millicent" / "prices").glob("*.toml")
    assert f"{path}  1 price of 1 card\n" in result.output
    assert "or several cards': RunPod H100 20 GB (1 offer)" in result.output
    assert "nothing from Google Cloud" in result.output
    today = json.loads(run(*JOB[:-2], "--json").stdout)
    assert (today["price"]["usd_per_hour"], today["price"]["unverified"]) == ("0.55", [])

    told = json.loads(run("refresh", "--provider", "runpod", "--json").stdout)
    assert Path(told["path"]) != path
    assert told["unmapped"] == {"RunPod H100 20 GB": 1}
    assert len(list(path.parent.iterdir())) == 2


def test_a_forecast_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "gpuhunt", "transformers")
    code = f"import sys, millicent.cli.cost; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_old_prices_beside_the_bill_are_told() -> None:
    # the spot price of March, and two of the summer
    assert "3 other prices of the card last seen more than 60 days before 2026-11-25" in ask()["warnings"]
    assert any(warning.startswith("the rental price was last seen on 2026-03-01") for warning in ask("--kind", "spot")["warnings"])
