"""A run that is killed again and again: `python crash_run.py FOLDER KILLS IMAGES EDITOR`, where EDITOR is fake or demo.

Each life of the run is a fork of this process, so that it begins at once, and is killed at a random moment by SIGKILL. A job
that ends before the last kill is followed by another one. Prints what was found as one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from fake_editor import WEIGHTS, FakeEditor, FakeStream, FakeWaves, accept, make_recipe, make_rows
from PIL import Image

from millicent import Editor
from millicent.catalog.bill import bill_of
from millicent.catalog.ledger import Ledger
from millicent.catalog.run import run_catalog
from millicent.edits import EditRequest
from millicent.images import read_metadata

DRAW_S = 0.004
SEED = 20


class Job:
    """One catalog in a folder of its own."""

    def __init__(self, folder: Path, count: int, demo: Editor | None) -> None:
        self.folder, self.demo = folder, demo
        self.out, self.log = folder / "out", folder / "drawn.txt"
        self.rows = make_rows(folder / "in", count, pictures=count)
        small = {"size": (32, 32), "steps": 1} if demo is not None else {}
        recipe = make_recipe()
        self.recipe = replace(recipe, variants=tuple(replace(variant, **small) for variant in recipe.variants))

    def live(self) -> None:
        """One life of the run."""
        editor, weights = self.open_editor()
        with Ledger.open(str(self.folder / "ledger.sqlite")) as ledger:
            run_catalog(
                editor, self.rows, self.recipe, ledger, str(self.out), weights_sha256=weights, check=accept, price=Decimal(36)
            )

    def open_editor(self) -> tuple[Any, str]:
        if self.demo is not None:
            return self.demo, self.demo.weights_sha256
        kind = random.choice((FakeEditor, FakeStream, FakeWaves))
        return kind(draw=self.note_drawing), WEIGHTS

    def note_drawing(self, request: EditRequest) -> None:
        """A line for each drawing, as a witness beside the ledger; what stands in the output folder must not be drawn."""
        number = request.prompt.removeprefix("paint it red ").partition(",")[0]
        with self.log.open("a") as log:
            log.write(f"p{number}/v0.png {'again' if (self.out / f'p{number}/v0.png').exists() else 'new'}\n")
        time.sleep(random.uniform(0, 2 * DRAW_S))

    def look(self) -> None:
        """Whatever has a final name is whole."""
        for path in self.out.rglob("*.png"):
            if not path.name.startswith("."):
                Image.open(path).load()

    def judge(self) -> dict[str, Any]:
        """The whole job, after its end."""
        with Ledger.open(str(self.folder / "ledger.sqlite"), write=False) as ledger:
            images, runs, spent, bill = list(ledger.images()), ledger.runs(), ledger.spent(), bill_of(ledger)
        assert bill is not None
        files = {str(path.relative_to(self.out)) for path in self.out.rglob("*") if path.is_file() and path.name[0] != "."}
        for image in images:
            data = (self.out / image.output).read_bytes()
            assert hashlib.sha256(data).hexdigest() == image.sha256, image
            metadata = read_metadata(data)
            assert metadata is not None
            assert metadata["key"] == image.key, image
        drawn = Counter(self.log.read_text().splitlines()) if self.log.exists() else Counter[str]()
        attempts = Counter({image.output: image.attempts for image in images})
        return {
            "files": len(files),
            "states": dict(Counter(image.state for image in images)),
            "drawn_again": sum(count for line, count in drawn.items() if line.endswith("again")),
            "drawn_without_claim": sum((Counter({line.split()[0]: n for line, n in drawn.items()}) - attempts).values()),
            "attempts": dict(Counter({state: sum(s.attempts for s in spent if s.state == state) for state in ("done", "lost")})),
            "attempts_in_all": attempts.total(),
            "paid_usd": str(sum((image.usd or Decimal(0) for image in images), Decimal(0))),
            "billed_usd": str(bill.total_usd),
            "seconds_of_attempts": sum(each.seconds for each in spent),
            "seconds_of_runs": sum(run.elapsed_s for run in runs),
            "runs": len(runs),
        }


def live_and_die(job: Job, kill_after_s: float | None) -> bool:
    """Whether it was killed, and did not end by itself."""
    pid = os.fork()
    if pid == 0:
        random.seed()
        try:
            job.live()
            os._exit(0)
        except BaseException as error:  # a fork must not go on as its parent
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "a run has failed"
    return False


def open_demo() -> Editor:
    """Opened once for all forks; with one thread, as torch's others would be missing in them."""
    import torch

    torch.set_num_threads(1)
    return Editor.open("demo", device="cpu")


def main() -> None:
    folder, kills, count, kind = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    moments = random.Random(SEED)
    longest_s = {"fake": 0.25, "demo": 0.6}[kind]
    demo = open_demo() if kind == "demo" else None
    found: list[dict[str, Any]] = []
    killed = 0
    while killed < kills:
        job = Job(folder / str(len(found)), count, demo)
        while killed < kills and live_and_die(job, moments.uniform(0, longest_s)):
            killed += 1
            job.look()
        live_and_die(job, None)
        found.append(job.judge())
    print(json.dumps({"killed": killed, "jobs": found}))


if __name__ == "__main__":
    main()
