"""Memory that runs out in the midst of an edit, and memory that lasts over many."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from capped_demo import WORDS, ask, keep_contents, load, pictures_of, residency_of

pytest.importorskip("triton")

from millicent.edits import EditRequest
from millicent.engine import drawing, pressure
from millicent.engine.editor import Editor
from millicent.engine.failures import recover
from millicent.errors import MachineError

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def whole_card_again() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


# a drawing of that size asks for memory that the one before has not left
LARGE_PX = 1024 * 1024
LARGE, SMALL = ask(5, 0, 3), ask(6, height=256, width=256)
OVERSIZED_BYTES = 4 << 30
# the layers' share of memory, and an arena far larger than they need, which is given back with the placement
STARTS = {"recorded": (None, 0), "on the card": (1.0, 0), "in turn": (0.9, OVERSIZED_BYTES)}


@pytest.fixture(params=STARTS)
def editor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Editor:
    # of the 5 MB that the demo's layers take
    monkeypatch.setattr(pressure, "_STEP_BYTES", 3 << 20)
    share, arena_bytes = STARTS[request.param]
    made = Editor("demo", load("own", share, LARGE_PX, None, **({"arena_bytes": arena_bytes} if arena_bytes else {})))
    assert pictures_of(made.edit(LARGE)) == wanted_large()[1]
    return made


@cache
def wanted_large() -> list[list[bytes]]:
    editor = Editor("demo", load("own", None, LARGE_PX))
    return [pictures_of(editor.edit(request)) for request in (SMALL, LARGE)]


def limit_draws(monkeypatch: pytest.MonkeyPatch, times: int, *, lifts: bool) -> None:
    """So many large drawings find less of the card's memory than is taken already. lifts: the limit, when each has ended."""
    right, left = drawing.draw, iter(range(times))

    def limited(told: Any, model: Any, sigmas: Any, seeds: tuple[int, ...], *rest: Any) -> Any:
        if seeds != (LARGE.seed,) or next(left, None) is None:
            return right(told, model, sigmas, seeds, *rest)
        torch.cuda.empty_cache()
        allowed_bytes = max(torch.cuda.memory_reserved() - (64 << 20), 1 << 20)
        torch.cuda.set_per_process_memory_fraction(allowed_bytes / torch.cuda.get_device_properties(0).total_memory)
        try:
            return right(told, model, sigmas, seeds, *rest)
        finally:
            if lifts:
                torch.cuda.set_per_process_memory_fraction(1.0)

    monkeypatch.setattr(drawing, "draw", limited)


@pytest.mark.parametrize("many", [False, True])
def test_draws_once_more_with_less(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, many: bool
) -> None:
    before, (small, large) = residency_of(editor._model).placement, wanted_large()
    # what an oversized arena gives back is all that the next try has; once more as it is comes before
    limit_lasts = before.arena_bytes == OVERSIZED_BYTES
    limit_draws(monkeypatch, 1 if limit_lasts else 2, lifts=not limit_lasts)
    outcomes = list(editor.edit_many([SMALL, LARGE, SMALL, LARGE])) if many else [editor.edit(LARGE)]
    assert [pictures_of(one) for one in outcomes] == ([small, large, small, large] if many else [large])
    assert caplog.text.count("the edit is drawn again") == 1
    assert residency_of(editor._model).placement.peak_bytes < before.peak_bytes
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert pictures_of(editor.edit(LARGE)) == large


@pytest.mark.parametrize("many", [False, True])
def test_tells_where_less_is_not_enough_and_goes_on(editor: Editor, monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    before, (small, large) = residency_of(editor._model).placement, wanted_large()
    with monkeypatch.context() as patch:
        limit_draws(patch, 99, lifts=True)
        if many:
            found = list(editor.edit_many([SMALL, LARGE, SMALL]))
            assert isinstance(found.pop(1), MachineError)
            assert [pictures_of(one) for one in found] == [small, small]
        else:
            with pytest.raises(MachineError, match="too small for this edit"):
                editor.edit(LARGE)
    assert residency_of(editor._model).placement == before
    for _ in range(3):
        assert pictures_of(editor.edit(LARGE)) == large


# a page of PyTorch's allocator, of 20 MiB; as many streams' workspaces of cuBLAS's, 8 MiB or more each, are far more
RUNS, FIRST_RUNS, GROWTH_OF_RUNS_BYTES = 40, 8, 24 << 20
EDITS, WARM, PERIOD, GROWTH_BYTES = 500, 60, 48, 2 << 20


def ask_mixed(number: int) -> EditRequest:
    """Each of 24 shapes twice in a row, so that it is recorded where passes are, and forgotten before it comes again."""
    shape = number // 2
    return ask(number, shape % 6, prompt=WORDS[shape // 6 % 4], steps=1 + shape % 2)


@pytest.mark.parametrize(("share", "many"), [(None, False), (0.3, False), (0.3, True)])
def test_memory_does_not_grow_over_edits_of_mixed_sizes(share: float | None, many: bool) -> None:
    model = load("own", share)
    residency_of(model).wave = 3
    keep_contents(model, 0)  # or most edits would read and encode nothing
    gc.collect()
    torch.cuda.empty_cache()
    editor, requests, seen = Editor("demo", model), map(ask_mixed, range(EDITS)), []
    for outcome in editor.edit_many(requests) if many else map(editor.edit, requests):
        assert pictures_of(outcome)
        reserved = torch.cuda.memory_reserved()
        seen.append((reserved, reserved - torch.cuda.memory_allocated()))
    # of each period, as MiB: what is reserved, and what of that is idle
    fullest = [
        tuple(max(each) >> 20 for each in zip(*seen[begin : begin + PERIOD], strict=True)) for begin in range(WARM, EDITS, PERIOD)
    ]
    for number in range(WARM + PERIOD, EDITS):  # against the same place in the first period
        then = seen[WARM + (number - WARM) % PERIOD]
        grown = [after - before for after, before in zip(seen[number], then, strict=True)]
        assert max(grown) <= GROWTH_BYTES, (number, grown, fullest)


@pytest.mark.parametrize("share", [None, 0.3])
def test_memory_does_not_grow_with_runs_of_many_edits(share: float | None) -> None:
    model = load("own", share)
    keep_contents(model, 0)
    editor, seen = Editor("demo", model), []
    for _ in range(RUNS):
        assert all(pictures_of(outcome) for outcome in editor.edit_many(map(ask_mixed, range(4))))
        seen.append(torch.cuda.memory_reserved())
    assert max(seen) <= max(seen[:FIRST_RUNS]) + GROWTH_OF_RUNS_BYTES, [size >> 20 for size in seen]


def test_recordings_that_are_dropped_and_made_again_take_no_more() -> None:
    model, seen = load("own", None), []
    for _ in range(10):
        for _ in range(3):  # as it is, recorded, replayed
            keep_contents(model, 0)
            assert pictures_of(Editor("demo", model).edit(ask(0)))
        recover(model, RuntimeError("of another edit"), torch.cuda.current_stream())
        seen.append(torch.cuda.memory_reserved())
    assert max(seen) <= seen[0] + GROWTH_OF_RUNS_BYTES, [size >> 20 for size in seen]
