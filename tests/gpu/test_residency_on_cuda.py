"""Weights that do not all stay on a card: the pictures to the bit, a host that never waits, processes that share."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from capped_demo import (
    CUDA,
    SETTINGS,
    SHARES,
    ask,
    digest,
    draw,
    draw_in_waves,
    layers_of,
    load,
    pictures_of,
    residency_of,
    wanted,
)
from refuse_waiting import refuse_waiting

pytest.importorskip("triton")

from millicent.engine import fitting
from millicent.engine.editor import Editor
from millicent.engine.host_memory import allocate
from millicent.engine.layer_stack import Link, Stack

pytestmark = pytest.mark.gpu

# some 300 microseconds: ten times what a copy of a layer takes, or its work
LATE_CYCLES = 500_000


# the demo's text encoder is so small that hardly a placement streams it by itself
STREAMED_READING = [(0.3, {"resident_encoder_layers": number}) for number in (0, 1)]


@pytest.mark.parametrize(("share", "changes"), [*((share, {}) for share in SHARES), *STREAMED_READING])
@pytest.mark.parametrize("kind", SETTINGS)
def test_draws_the_same_pictures_wherever_weights_lie(kind: str, share: float, changes: dict[str, int]) -> None:
    model = load(kind, share, 256 * 256, None, **changes)
    assert residency_of(model).in_turn
    assert draw(model) == wanted(kind)
    for wave, cancelled in ((1, None), (3, threading.Event())):
        assert draw_in_waves(model, wave, cancelled) == wanted(kind)
    assert draw(model) == wanted(kind)


@pytest.mark.parametrize("late", ["copies", "layers"])
def test_nothing_is_read_before_it_comes_nor_written_over_before_it_is_read(monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    model = load("own", 0.3, resident_encoder_layers=0)
    send, arrive = Link.send, Stack.arrive

    def send_late(self: Link, *rest: Any) -> None:
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(LATE_CYCLES)
        send(self, *rest)

    def run_late(self: Stack, number: int) -> None:
        arrive(self, number)
        torch.cuda._sleep(LATE_CYCLES)

    monkeypatch.setattr(Link, "send", send_late if late == "copies" else send)
    monkeypatch.setattr(Stack, "arrive", run_late if late == "layers" else arrive)
    assert draw_in_waves(model, 3) == wanted("own")
    assert draw(model) == wanted("own")


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_the_host_waits_for_no_copy(share: float) -> None:
    model = load("own", share)
    for _ in range(2):  # what comes a second time is recorded, and that waits
        draw_in_waves(model, 3)
    before = residency_of(model).copied_bytes
    with refuse_waiting():
        found = draw_in_waves(model, 3)
    assert found == wanted("own")
    assert residency_of(model).copied_bytes > before


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [1, 3])
def test_copies_what_the_placement_says(share: float, count: int) -> None:
    """A wave exchanges once, reads for each of its edits, and draws as many together as the placement has it."""
    model = load("own", share)
    residency, placement = residency_of(model), residency_of(model).placement
    Editor("demo", model).edit(ask(0))
    residency.wave, before = count, residency.copied_bytes
    outcomes = list(Editor("demo", model).edit_many(ask(number, 3 + number) for number in range(count)))
    copied = residency.copied_bytes - before
    assert all(pictures_of(one) for one in outcomes)
    work = fitting.usual_work(model.card)
    drawn = -(-count // placement.abreast) * work.steps * placement.streamed_step_bytes
    told = placement.exchanged_bytes + count * placement.reading_bytes(work) + drawn
    # what a ring has of the next pass when the other network comes is lost
    assert told <= copied <= told + 2 * max(layer.size_bytes for layer in layers_of(model))


def test_what_lies_beside_the_arena_is_in_pages() -> None:
    """So that a card which is full to the brim loses little between pieces."""
    load("own", 0.3)
    torch.cuda.empty_cache()
    piece = torch.empty(100 << 20, dtype=torch.uint8, device=CUDA)
    (found,) = (
        segment
        for segment in torch.cuda.memory_snapshot()
        if segment["address"] <= piece.data_ptr() < segment["address"] + segment["total_size"]
    )
    assert found["is_expandable"] == (torch.cuda.device_count() == 1)


def test_slabs_are_page_locked_until_they_are_closed_or_the_model_goes() -> None:
    layers, model = layers_of(load("own", 0.3)), load("own", 0.3)
    gc.collect()
    assert not any(layer.host.is_pinned() for layer in layers)
    assert all(layer.host.is_pinned() for layer in layers_of(model))
    residency_of(model).close()
    assert not any(layer.host.is_pinned() for layer in layers_of(model))
    again = allocate(sum(layer.size_bytes for layer in layers), None, CUDA)
    assert again.tensor.is_pinned()
    again.close()


OTHER_PROCESS = """
from capped_demo import digest, draw, load, residency_of
model = load("own", 0.3, shared_as="demo")
assert residency_of(model).is_filled
print(digest(draw(model)))
"""


def test_two_processes_share_their_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = wanted("own")  # compiles the kernels, which the other process then finds
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = load("own", 0.3, shared_as="demo")
    assert not residency_of(model).is_filled
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", OTHER_PROCESS]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == digest(expected)
    assert draw(model) == expected
