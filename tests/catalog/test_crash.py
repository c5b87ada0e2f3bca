"""A catalog run that is killed at random moments loses nothing, writes nothing by halves, and pays for nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest


def run_and_kill(folder: Path, kills: int, images: int, editor: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("crash_run.py")), str(folder), str(kills), str(images), editor]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize(("editor", "kills", "images"), [("fake", 100, 300), ("demo", 3, 6)])
def test_killed_at_random_moments(tmp_path: Path, editor: str, kills: int, images: int) -> None:
    found = run_and_kill(tmp_path, kills, images, editor)
    assert found["killed"] == kills
    # what was being written when a run was killed is gone too
    assert not list(tmp_path.glob("*/out/**/.*"))
    for job in found["jobs"]:
        # every image once, in the output folder and in the ledger
        assert job["files"] == images
        assert job["states"] == {"done": images}
        # nothing was drawn that stood there finished, and nothing without its attempt on the disk first
        assert job["drawn_again"] == job["drawn_without_claim"] == 0
        # each image was paid for once; every other attempt was under way when its run was killed
        assert job["attempts"]["done"] == images
        assert job["attempts"]["done"] + job["attempts"]["lost"] == job["attempts_in_all"]
        assert job["seconds_of_attempts"] <= job["seconds_of_runs"] + 1e-6
        assert Decimal(job["paid_usd"]) <= Decimal(job["billed_usd"])
