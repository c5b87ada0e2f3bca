"""deploy/: read by SkyPilot's and dstack's own parsers, and its script run with stand-ins for all that it calls."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from millicent.cli import app as cli
from millicent.cli.batch import batch
from millicent.facts.gpus import find_gpu

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
# their eighty dependencies have an environment of their own
PARSERS = Path(os.environ.get("MILLICENT_DEPLOY_PYTHON", ROOT / ".venv-deploy/bin/python"))


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    assert PARSERS.is_file(), (
        f"{PARSERS} is not there: pip install skypilot dstack into an environment, or set MILLICENT_DEPLOY_PYTHON"
    )
    env = {"HOME": str(tmp_path_factory.mktemp("home")), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    run = subprocess.run(
        [PARSERS, ROOT / "tests/deploy/parse_deploy.py", DEPLOY], capture_output=True, text=True, cwd=ROOT, env=env, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout.splitlines()[-1]))


def test_skypilot_rents_one_spot_card_that_we_know(parsed: dict[str, Any]) -> None:
    task = parsed["skypilot.yaml"]
    offers = task["resources"]["any_of"]
    assert len(offers) == 2
    for offer in offers:
        ((name, count),) = offer["accelerators"].items()
        assert (count, offer["use_spot"]) == (1, True)
        assert find_gpu(name).memory_mib >= 24_000
    assert task["run"] == "sh deploy/catalog.sh"


def test_the_volume_of_skypilot_is_the_one_that_its_task_mounts(parsed: dict[str, Any]) -> None:
    task, volume = parsed["skypilot.yaml"], parsed["skypilot-volume.yaml"]
    assert task["volumes"] == {task["envs"]["KEEP"]: volume["name"]}


def test_the_dstack_task_runs_on_the_fleet_with_the_volume(parsed: dict[str, Any]) -> None:
    fleet, task, volume = (parsed[f"{name}.dstack.yml"] for name in ("fleet", "task", "volume"))
    assert [fleet["type"], task["type"], volume["type"]] == ["fleet", "task", "volume"]
    assert [chosen["name"] for chosen in task["fleets"]] == [fleet["name"]]
    assert [mount["name"] for mount in task["volumes"]] == [volume["name"]]
    assert task["volumes"][0]["path"] == task["env"]["KEEP"]
    assert task["resources"]["gpu"]["name"] == fleet["resources"]["gpu"]["name"] == ["RTX4090", "L40S"]
    assert task["retry"]["on_events"] == ["no-capacity", "interruption"]
    assert task["commands"] == ["sh /job/catalog.sh"]


def test_what_dstack_carries_along_is_there(parsed: dict[str, Any]) -> None:
    for file in parsed["task.dstack.yml"]["files"]:
        assert (DEPLOY / file["local_path"]).exists(), file


@pytest.mark.parametrize("name", ["skypilot.yaml", "task.dstack.yml"])
def test_the_tasks_set_all_that_the_script_asks_for(parsed: dict[str, Any], name: str) -> None:
    told = parsed[name]
    env = told["envs"] if "envs" in told else told["env"]
    assert {"MANIFEST", "RECIPE", "KEEP", "PRICE_USD"} <= env.keys()
    for key in ("MANIFEST", "RECIPE"):
        assert (ROOT / env[key].removeprefix("/job/")).is_file(), env[key]


# the script


@pytest.fixture
def run_script(tmp_path: Path) -> Any:
    """Runs deploy/catalog.sh with stand-ins that write down how they are called; gives the exit code and the calls."""

    def run(preflight: int = 0, cards: int = 1, **env: str) -> tuple[int, list[str]]:
        tools, calls = tmp_path / "tools", tmp_path / "calls"
        tools.mkdir()
        bodies = {
            # makes the environment's folder, so that what comes first in PATH is there but empty
            "python3": "exit 0",
            "pip": "exit 0",
            "nvidia-smi": f"for n in $(seq {cards}); do echo GPU $n; done",
            "millicent": f'case $1 in preflight) exit {preflight};; pull) mkdir -p "$4" && : > "$4/w.safetensors";; esac',
        }
        for name, body in bodies.items():
            path = tools / name
            path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{calls}"\n{body}\n')
            path.chmod(0o755)
        told = {"MANIFEST": "m.csv", "RECIPE": "r.toml", "KEEP": str(tmp_path / "keep"), "PRICE_USD": "0.34"} | env
        done = subprocess.run(
            ["sh", DEPLOY / "catalog.sh"],
            env={"HOME": str(tmp_path), "PATH": f"{tools}:{os.environ['PATH']}", **told},
            capture_output=True,
            text=True,
            timeout=20,
        )
        return done.returncode, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_preflight_comes_before_torch_and_before_the_weights(run_script: Any, tmp_path: Path) -> None:
    code, calls = run_script(BUDGET="20usd")
    keep = tmp_path / "keep"
    lora = f"{keep}/models/qwen-image-edit-2511-lightning-4steps/w.safetensors"
    weights = f"--model {keep}/models/qwen-image-edit-2511"
    options = f"{weights} --price 0.34 --ledger {keep}/ledger.sqlite --lora {lora} --budget 20usd"
    assert code == 0
    assert [call for call in calls if not call.startswith(("python3", "nvidia-smi"))] == [
        "pip install --quiet millicent",
        "millicent preflight --model qwen-image-edit-2511",
        "pip install --quiet millicent[engine,cloud]",
        "millicent preflight --model qwen-image-edit-2511",
        f"millicent pull qwen-image-edit-2511 --to {keep}/models/qwen-image-edit-2511",
        f"millicent pull qwen-image-edit-2511-lightning-4steps --to {keep}/models/qwen-image-edit-2511-lightning-4steps",
        f"millicent batch m.csv --out {keep}/out --recipe r.toml {options}",
    ]


def test_a_card_that_will_not_do_costs_nothing_more(run_script: Any) -> None:
    code, calls = run_script(preflight=2)
    assert code != 0
    assert calls[-1] == "millicent preflight --model qwen-image-edit-2511"
    assert "pip install --quiet millicent[engine,cloud]" not in calls


def test_a_warning_does_not_stop_it(run_script: Any) -> None:
    code, calls = run_script(preflight=1)
    assert code == 0
    assert calls[-1].startswith("millicent batch")


def test_several_cards_are_used_through_ray(run_script: Any) -> None:
    _, calls = run_script(cards=4)
    assert "pip install --quiet millicent[engine,cloud,ray]" in calls
    assert "--ray local" in calls[-1]


def test_without_a_manifest_it_says_what_is_missing(run_script: Any) -> None:
    code, calls = run_script(MANIFEST="")
    assert (code != 0, calls) == (True, [])


def test_every_option_that_the_script_gives_is_one_of_the_command(run_script: Any) -> None:
    _, calls = run_script(cards=2, BUDGET="20usd")
    known = {
        "preflight": typer.main.get_command(cli.app),
        "pull": typer.main.get_command(cli.app),
        "batch": typer.main.get_command(batch),
    }
    for call in calls:
        tool, command, *words = call.split()
        if tool != "millicent":
            continue
        group = known[command]
        found = group.commands["run" if command == "batch" else command]  # type: ignore[attr-defined]
        options = {name for parameter in found.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, call
