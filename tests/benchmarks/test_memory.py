"""The benchmark of capped cards: what it draws, counts and compares, on a CPU without a cap."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from benchmarks.memory import compare, idle_of_graphs, make_requests, measure_phases, run_capped
from millicent import Editor, demo
from millicent.engine.settings import Settings


def test_a_run_draws_the_same_pictures_alone_and_in_a_row() -> None:
    row = run_capped(demo.folder(), None, side_px=64, images=4, link_gb_per_s=21.7)
    alone, in_a_row, other = row["pictures"][:2], row["pictures"][2:-1], row["pictures"][-1]
    assert in_a_row[2:] == alone  # the first two were drawn to warm up
    assert len({*in_a_row, other}) == 5
    assert row["waves"]["images"] == 4
    assert min(row[kind]["seconds"] for kind in ("alone", "waves")) > 0
    assert row["alone"]["link_gb"] == row["waves"]["link_gb"] == 0


def test_a_bit_that_differs_is_told() -> None:
    whole = {"pictures": ["a", "b"], "alone": {"seconds": 2.0}, "waves": {"seconds": 1.0}, "peak_gib": 11.0, "planned_gib": 10.0}
    capped = copy.deepcopy(whole) | {"alone": {"seconds": 3.0}}
    other = copy.deepcopy(whole) | {"pictures": ["a", "c"]}
    rows = {"none": whole, "24": capped, "16": other, "8": {"failed": "ended with 1"}}
    compare(rows)
    assert [row.get("same_pictures") for row in rows.values()] == [True, True, False, None]
    assert capped["alone"] == {"seconds": 3.0, "x_uncapped": 1.5}
    assert capped["peak_x_planned"] == pytest.approx(1.1)


def test_every_picture_is_another() -> None:
    pictures = [request.images[0] for request in make_requests(3, 32)]
    assert {picture.size for picture in pictures} == {(32, 32)}
    assert len({picture.tobytes() for picture in pictures}) == 3


def test_what_graphs_keep_for_themselves_is_counted() -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 100, "allocated_size": 40},
        {"segment_pool_id": (0, 1), "total_size": 20, "allocated_size": 5},
        {"segment_pool_id": (3, 0), "total_size": 8, "allocated_size": 0},
    ]
    assert idle_of_graphs(segments) == [15, 8]


def test_each_phase_is_watched_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with a card's counters that say how much more was given out each time they are asked."""
    allocated, told = itertools.count(10, 10), list[str]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: told.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: told.append("reset"))
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: next(allocated) << 30)
    editor = Editor.open("demo", device="cpu", settings=Settings(format="bf16"))
    (request,) = make_requests(1, 64)
    phases = ("VAE encode", "text", "denoise", "VAE decode")
    assert measure_phases(editor, request) == {"idle_gib": 10.0, "alive_gib": dict.fromkeys(phases, 10.0)}
    assert told == ["wait", "reset", "wait"] * 4
