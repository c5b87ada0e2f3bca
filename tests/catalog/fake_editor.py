"""Editors that draw nothing worth seeing, in no time; and a small catalog for them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from millicent.catalog.manifest import Row
from millicent.catalog.recipes import Recipe, Variant
from millicent.edits import EditRequest, EditResult, OnProgress, Timings
from millicent.errors import MillicentError
from millicent.quality.limits import Limits
from millicent.quality.sanity import Verdict

WEIGHTS = "0" * 64
PROMPT = "paint it {color}"
Draw = Callable[[EditRequest], None]


def draw_well(request: EditRequest) -> None:
    """Nothing goes wrong."""


class FakeEditor:
    """Draws a plain color that follows from the request. draw: called first, to fail or to take time."""

    def __init__(self, draw: Draw = draw_well, seconds: float = 0.0) -> None:
        self._draw, self._seconds = draw, seconds
        self.drawn: Counter[str] = Counter()  # by prompt

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> EditResult:
        self.drawn[request.prompt] += 1
        self._draw(request)
        time.sleep(self._seconds)
        told = f"{request.prompt} {request.seed}".encode() + request.images[0].tobytes()
        color = tuple(hashlib.sha256(told).digest()[:3])
        assert request.seed is not None
        return EditResult(
            images=(Image.new("RGB", (16, 16), color),),
            seeds=(request.seed,),
            sigmas=(1.0, 0.0),
            schedule="lightning",
            true_cfg=1.0,
            model="fake",
            weights_sha256=WEIGHTS,
            timings=Timings(0.0, 0.0, self._seconds, 0.0),
        )


class FakeStream(FakeEditor):
    """The same with several in flight, as Editor.edit_many: a result comes once `ahead` + 2 more requests have been taken."""

    def edit_many(
        self, requests: Iterable[EditRequest], ahead: int = 1, cancelled: threading.Event | None = None
    ) -> Iterator[EditResult | MillicentError]:
        taken: list[EditRequest] = []
        for request in requests:
            taken.append(request)
            if len(taken) > ahead + 2:
                yield self._outcome(taken.pop(0))
            if cancelled is not None and cancelled.is_set():
                return
        while taken and not (cancelled is not None and cancelled.is_set()):
            yield self._outcome(taken.pop(0))

    def _outcome(self, request: EditRequest) -> EditResult | MillicentError:
        try:
            return self.edit(request)
        except MillicentError as error:
            return error


class FakeWaves(FakeStream):
    """The same in waves, as Editor.edit_many where weights are exchanged: all of a wave are taken before the first is drawn."""

    wave = 10

    def edit_many(
        self, requests: Iterable[EditRequest], ahead: int = 1, cancelled: threading.Event | None = None
    ) -> Iterator[EditResult | MillicentError]:
        source = iter(requests)
        while wave := list(islice(source, self.wave)):
            for request in wave:
                if cancelled is not None and cancelled.is_set():
                    return
                yield self._outcome(request)


def accept(sources: Sequence[Image.Image], result: Image.Image, limits: Limits) -> Verdict:
    return Verdict(True, (), {})


def make_picture(folder: Path, number: int) -> Path:
    path = folder / f"{number}.png"
    if not path.exists():
        Image.new("RGB", (16, 16), (number % 256, number // 256 % 256, 7)).save(path)
    return path


def make_rows(folder: Path, count: int, *, pictures: int | None = None) -> list[Row]:
    """Rows p0, p1 ... with a picture each, or with `pictures` pictures between them."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Row(number + 2, f"p{number}", str(make_picture(folder, number % (pictures or count))), (), {"color": f"red {number}"})
        for number in range(count)
    ]


def make_recipe(*, variants: int = 1, prompt: str = PROMPT, seed: int | None = None, redo: int = 2, retries: int = 3) -> Recipe:
    return Recipe(
        variants=tuple(
            Variant(name=f"v{number}", prompt=f"{prompt}, {number}", output="{id}/{variant}.png", seed=seed)
            for number in range(variants)
        ),
        checks=Limits(),
        redo_rejects=redo,
        retries=retries,
    )
