"""A run of a catalog, with an editor that draws in no time."""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from fake_editor import WEIGHTS, FakeEditor, FakeStream, FakeWaves, accept, make_recipe, make_rows
from PIL import Image

from millicent.catalog import finish, leftovers, pictures, run_outcomes, run_requests, stopping, storage
from millicent.catalog.attempts import Candidate
from millicent.catalog.events import Event, Summary
from millicent.catalog.finish import Sources
from millicent.catalog.ledger import Ledger
from millicent.catalog.manifest import BadRow, Row
from millicent.catalog.pictures import asked_digest
from millicent.catalog.recipes import Recipe, expand_all
from millicent.catalog.run import run_catalog
from millicent.edits import EditRequest
from millicent.errors import InputError, MachineError, OutputError
from millicent.images import read_metadata
from millicent.quality.limits import Limits
from millicent.quality.sanity import Verdict, judge

Stage = Callable[..., Summary]
EDITORS = (FakeEditor, FakeStream, FakeWaves)


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def start(tmp_path: Path, events: list[Event]) -> Stage:
    """A run on the same ledger and output folder each time."""

    def started(editor: FakeEditor, rows: Sequence[Row | BadRow], recipe: Recipe | None = None, **more: Any) -> Summary:
        more = {"check": accept, "backoff_base_s": 0.01, "on_event": events.append, **more}
        with Ledger.open(str(tmp_path / "ledger.sqlite")) as ledger:
            return run_catalog(editor, rows, recipe or make_recipe(), ledger, str(tmp_path / "out"), weights_sha256=WEIGHTS, **more)

    return started


def rows_of(tmp_path: Path, count: int, pictures: int | None = None) -> list[Row]:
    return make_rows(tmp_path / "in", count, pictures=pictures)


def outputs(tmp_path: Path) -> set[str]:
    out = tmp_path / "out"
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def images(tmp_path: Path) -> dict[str, Any]:
    with Ledger.open(str(tmp_path / "ledger.sqlite"), write=False) as ledger:
        return {image.output: image for image in ledger.images()}


@pytest.mark.parametrize("kind", EDITORS)
def test_every_image_is_drawn_once_and_a_second_run_draws_none(kind: type[FakeEditor], tmp_path: Path, start: Stage) -> None:
    editor, rows = kind(), rows_of(tmp_path, 20)
    summary = start(editor, rows, make_recipe(variants=3), price=Decimal("0.36"))
    assert (summary.done, summary.already, summary.failed, summary.stopped) == (60, 0, 0, "")
    assert outputs(tmp_path) == {f"p{row}/v{variant}.png" for row in range(20) for variant in range(3)}
    assert set(editor.drawn.values()) == {1}
    again = start(kind(draw=refuse), rows, make_recipe(variants=3))
    assert (again.done, again.already) == (0, 60)


def refuse(request: EditRequest) -> None:
    raise AssertionError("nothing is to be drawn")


def test_ledger_holds_the_hash_of_the_file_and_the_file_its_recipe(tmp_path: Path, start: Stage) -> None:
    start(FakeEditor(), rows_of(tmp_path, 2))
    for name, image in images(tmp_path).items():
        data = (tmp_path / "out" / name).read_bytes()
        assert image.sha256 == hashlib.sha256(data).hexdigest()
        metadata = read_metadata(data)
        assert metadata is not None
        assert (metadata["key"], metadata["seed"]) == (image.key, image.seed)
        assert metadata["prompt"] == image.prompt


def test_the_bill_is_the_clock_times_the_price(tmp_path: Path, start: Stage) -> None:
    ticks = itertools.count(step=0.01)
    summary = start(FakeEditor(), rows_of(tmp_path, 5), price=Decimal("3.6"), cards=2, loading_s=10.0, clock=lambda: next(ticks))
    assert summary.bill is not None
    # $3.6 an hour and two cards: $0.002 a second
    assert summary.usd == pytest.approx(Decimal("0.002") * Decimal(str(summary.elapsed_s + 10)), abs=Decimal("0.001"))
    assert summary.bill.usd_of("loading") == Decimal("0.02")
    assert (summary.bill.images, summary.bill.accepted) == (5, 5)
    paid = [image.usd for image in images(tmp_path).values()]
    assert float(summary.bill.usd_of("busy")) == pytest.approx(float(sum(paid)), abs=1e-7)
    assert summary.bill.usd_of("busy") > 0
    assert summary.bill.usd_of("idle") > 0


@pytest.mark.parametrize("kind", EDITORS)
def test_identical_work_is_done_once_and_linked(kind: type[FakeEditor], tmp_path: Path, start: Stage, events: list[Event]) -> None:
    rows = [replace(row, columns={"color": "red"}) for row in rows_of(tmp_path, 12, pictures=1)]
    editor = kind()
    summary = start(editor, rows, make_recipe(seed=7))
    assert (summary.done, summary.linked) == (1, 11)
    assert editor.drawn.total() == 1
    assert len({(tmp_path / "out" / name).read_bytes() for name in outputs(tmp_path)}) == 1
    assert len(outputs(tmp_path)) == 12
    assert {image.state for image in images(tmp_path).values() if image.output != "p0/v0.png"} == {"linked"}
    assert start(kind(draw=refuse), rows, make_recipe(seed=7)).already == 12


def test_a_link_is_made_of_an_earlier_run_and_drawn_where_that_picture_is_gone(tmp_path: Path, start: Stage) -> None:
    rows = [replace(row, columns={"color": "red"}) for row in rows_of(tmp_path, 3, pictures=1)]
    recipe = make_recipe(seed=7)
    start(FakeEditor(), rows[:1], recipe)
    assert start(FakeEditor(draw=refuse), rows[1:2], recipe).linked == 1
    (tmp_path / "out/p0/v0.png").unlink()
    assert start(FakeEditor(), rows[2:], recipe).done == 1
    assert start(FakeEditor(draw=refuse), rows, recipe).linked == 1
    assert outputs(tmp_path) == {"p0/v0.png", "p1/v0.png", "p2/v0.png"}


@pytest.mark.parametrize("kind", EDITORS)
def test_a_failure_is_retried_and_then_quarantined(
    kind: type[FakeEditor], tmp_path: Path, start: Stage, events: list[Event]
) -> None:
    def draw(request: EditRequest) -> None:
        if request.prompt.startswith("paint it red 3,"):
            raise MachineError("Out of memory.", "Draw smaller.")

    editor = kind(draw=draw)
    summary = start(editor, rows_of(tmp_path, 6), make_recipe(retries=2), price=Decimal(1))
    assert (summary.done, summary.failed, summary.quarantined) == (5, 3, 1)
    assert editor.drawn["paint it red 3, 0"] == 3
    image = images(tmp_path)["p3/v0.png"]
    assert (image.state, image.attempts, image.why) == ("quarantined", 3, "Out of memory. Draw smaller.")
    assert [event.kind for event in events if event.row_id == "p3" and event.kind != "started"] == [
        "failed",
        "failed",
        "failed",
        "quarantined",
    ]
    assert start(kind(draw=refuse), rows_of(tmp_path, 6)).given_up == 1
    again = start(kind(), rows_of(tmp_path, 6), retry_failed=True)
    assert (again.done, again.already) == (1, 5)
    assert images(tmp_path)["p3/v0.png"].attempts == 4


@pytest.mark.parametrize("kind", EDITORS)
def test_what_was_asked_wrongly_is_not_tried_again(kind: type[FakeEditor], tmp_path: Path, start: Stage) -> None:
    def draw(request: EditRequest) -> None:
        if "red 1," in request.prompt:
            raise InputError("The prompt is too long.", "Use fewer words.")

    editor = kind(draw=draw)
    summary = start(editor, rows_of(tmp_path, 3))
    assert (summary.done, summary.quarantined, summary.failed) == (2, 1, 1)
    assert editor.drawn["paint it red 1, 0"] == 1


@pytest.mark.parametrize("kind", EDITORS)
def test_a_bug_that_one_picture_brings_out_costs_only_that_picture(kind: type[FakeEditor], tmp_path: Path, start: Stage) -> None:
    def draw(request: EditRequest) -> None:
        if "red 4," in request.prompt:
            raise ZeroDivisionError("of a bug")

    summary = start(kind(draw=draw), rows_of(tmp_path, 10), make_recipe(retries=1))
    assert (summary.done, summary.quarantined) == (9, 1)
    assert images(tmp_path)["p4/v0.png"].why == "ZeroDivisionError: of a bug"


def reject_when(condition: Callable[[int], bool]) -> Any:
    """A check that rejects by how many pictures came before."""
    seen = itertools.count()

    def check(sources: Sequence[Image.Image], result: Image.Image, limits: Limits) -> Verdict:
        bad = condition(next(seen))
        return Verdict(not bad, ("It is blank.",) if bad else (), {})

    return check


@pytest.mark.parametrize("kind", EDITORS)
def test_a_rejected_picture_is_drawn_with_another_seed_and_billed(
    kind: type[FakeEditor], tmp_path: Path, start: Stage, events: list[Event]
) -> None:
    summary = start(kind(), rows_of(tmp_path, 1), check=reject_when(lambda number: number < 2), price=Decimal(3600))
    assert (summary.done, summary.rejected, summary.quarantined) == (1, 2, 0)
    seeds = [event.seed for event in events if event.kind == "started"]
    assert len(set(seeds)) == 3
    assert summary.bill is not None
    assert (summary.bill.images, summary.bill.accepted) == (3, 1)
    assert summary.bill.usd_of("rejects") > 0
    assert outputs(tmp_path) == {"p0/v0.png", "_rejected/1/p0/v0.png", "_rejected/2/p0/v0.png"}


def test_rejects_end_in_quarantine_and_go_on_with_new_seeds_when_asked(tmp_path: Path, start: Stage, events: list[Event]) -> None:
    always = reject_when(lambda number: True)
    first = start(FakeEditor(), rows_of(tmp_path, 1), make_recipe(redo=1), check=always)
    assert (first.rejected, first.quarantined, first.done) == (2, 1, 0)
    image = images(tmp_path)["p0/v0.png"]
    assert (image.why, image.set_aside) == ("It is blank.", "_rejected/2/p0/v0.png")
    assert (tmp_path / "out" / image.set_aside).is_file()
    # each attempt is told, the last one too, before the image is given up; its price is told once
    assert [event.kind for event in events if event.kind != "started"] == ["rejected", "rejected", "quarantined"]
    assert [event.set_aside for event in events[-2:]] == [image.set_aside] * 2
    assert [event.seconds > 0 for event in events[-2:]] == [True, False]
    second = start(FakeEditor(), rows_of(tmp_path, 1), make_recipe(redo=1), check=always, retry_failed=True)
    assert (second.rejected, second.quarantined) == (2, 1)
    seeds = [event.seed for event in events if event.kind == "started"]
    assert len(set(seeds)) == 4
    assert "p0/v0.png" not in outputs(tmp_path)


def test_check_is_told_how_the_input_came_to_an_exact_size(tmp_path: Path, start: Stage) -> None:
    seen: list[str] = []

    def check(sources: Sources, result: Image.Image, limits: Limits) -> Verdict:
        seen.append(sources.fit)
        assert isinstance(sources[-1], Image.Image)
        return Verdict(True, (), {})

    recipe = make_recipe(variants=3)
    plain, padded, cropped = recipe.variants
    variants = (
        replace(plain, fit="pad"),
        replace(padded, size=(32, 16), fit="pad"),
        replace(cropped, size=(32, 16), fit="crop"),
    )
    start(FakeEditor(), rows_of(tmp_path, 1), replace(recipe, variants=variants), check=check)
    assert sorted(seen) == ["crop", "fit", "pad"], "without a size the result follows the input, whatever its fit"


@pytest.mark.parametrize("kind", EDITORS)
def test_same_work_as_one_that_is_given_up_is_given_up_too(kind: type[FakeEditor], tmp_path: Path, start: Stage) -> None:
    def draw(request: EditRequest) -> None:
        raise MachineError("Out of memory.", "Draw smaller.")

    rows = [replace(row, columns={"color": "red"}) for row in rows_of(tmp_path, 3, pictures=1)]
    editor = kind(draw=draw)
    assert start(editor, rows, make_recipe(seed=7, retries=1)).quarantined == 3
    assert editor.drawn.total() == 2


def test_budget_is_never_exceeded(tmp_path: Path, start: Stage, events: list[Event]) -> None:
    now = 0.0

    def draw(request: EditRequest) -> None:
        nonlocal now
        now += 10.0

    rows = rows_of(tmp_path, 30)
    editor = FakeStream(draw=draw)
    # 10 s at $3.6 an hour: a cent an image
    summary = start(editor, rows, price=Decimal("3.6"), budget_usd=Decimal("0.085"), expected_s=10.0, clock=lambda: now)
    assert (summary.done, summary.usd) == (8, Decimal("0.08"))
    assert "budget of $0.085" in summary.stopped
    assert [event.kind for event in events].count("stopped") == 1
    # the budget is of the ledger: what is spent stays spent
    assert start(FakeEditor(draw=refuse), rows, price=Decimal("3.6"), budget_usd=Decimal("0.085"), expected_s=10.0).done == 0
    more = start(FakeEditor(draw=draw), rows, price=Decimal("3.6"), budget_usd=Decimal("0.125"), expected_s=10.0, clock=lambda: now)
    assert (more.done, more.already) == (4, 8)


def test_deadline_is_kept_and_a_clock_that_jumps_back_does_not_move_it(
    tmp_path: Path, start: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    wall = datetime.now(tz=UTC)

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return wall - timedelta(hours=1) if now > 120 else wall

    def draw(request: EditRequest) -> None:
        nonlocal now
        now += 10.0

    monkeypatch.setattr(stopping, "datetime", Jumping)
    deadline = wall + timedelta(seconds=55)
    summary = start(FakeStream(draw=draw), rows_of(tmp_path, 20), deadline=deadline, expected_s=10.0, clock=lambda: now)
    assert summary.done == 5
    assert "would not be done by" in summary.stopped
    assert all(image.seconds >= 0 for image in images(tmp_path).values())


@pytest.mark.parametrize("kind", EDITORS)
def test_stop_gives_back_what_is_not_drawn(kind: type[FakeEditor], tmp_path: Path, start: Stage, events: list[Event]) -> None:
    stop = threading.Event()

    def draw(request: EditRequest) -> None:
        if "red 3," in request.prompt:
            stop.set()

    summary = start(kind(draw=draw), rows_of(tmp_path, 50), stop=stop, price=Decimal(36))
    assert summary.stopped == "It was asked to stop."
    assert (summary.done, summary.failed, summary.quarantined) == (4, 0, 0)
    assert outputs(tmp_path) == {f"p{number}/v0.png" for number in range(4)}
    begun = {event.output for event in events if event.kind == "started"}
    assert summary.waiting == len(begun) - 4
    assert kind is FakeEditor or len(begun) > 4
    for name in begun - outputs(tmp_path):
        image = images(tmp_path)[name]
        assert (image.state, image.attempts, image.seconds, image.usd) == ("planned", 0, 0.0, None)
    assert spent(tmp_path) == {"done": 4}
    assert start(kind(), rows_of(tmp_path, 50), price=Decimal(36)).done == 46
    assert spent(tmp_path) == {"done": 50}
    assert {image.attempts for image in images(tmp_path).values()} == {1}


def spent(tmp_path: Path) -> dict[str, int]:
    """Attempts by what they came to, of all runs."""
    with Ledger.open(str(tmp_path / "ledger.sqlite"), write=False) as ledger:
        return dict(sum((Counter({each.state: each.attempts}) for each in ledger.spent()), Counter[str]()))


def test_who_waits_for_work_that_is_given_back_is_drawn_by_the_next_run(tmp_path: Path, start: Stage) -> None:
    stop = threading.Event()
    rows = [replace(row, columns={"color": "red"}) for row in rows_of(tmp_path, 3, pictures=1)]

    class Stopped(FakeWaves):
        def edit_many(self, requests: Any, ahead: int = 1, cancelled: threading.Event | None = None) -> Iterator[Any]:
            list(requests)
            stop.set()
            yield from ()

    summary = start(Stopped(), rows, make_recipe(seed=7), stop=stop)
    assert (summary.done, summary.linked, summary.waiting) == (0, 0, 3)
    summary = start(FakeWaves(), rows, make_recipe(seed=7))
    assert (summary.done, summary.linked) == (1, 2)


def test_a_kill_in_the_midst_of_a_wave_leaves_all_of_it_to_the_next_run(tmp_path: Path, start: Stage) -> None:
    class Killed(BaseException):
        """As sudden as a kill, for a test."""

    def draw(request: EditRequest) -> None:
        if "red 13," in request.prompt:
            raise Killed

    rows = rows_of(tmp_path, 30)
    with pytest.raises(Killed):
        start(FakeWaves(draw=draw), rows)
    # two waves were claimed; of the second three were drawn
    attempts = spent(tmp_path)
    assert attempts["done"] + attempts["lost"] == 20
    assert attempts["lost"] >= 7
    summary = start(FakeWaves(), rows)
    assert summary.done + summary.already == 30
    assert len(outputs(tmp_path)) == 30
    assert {image.state for image in images(tmp_path).values()} == {"done"}


@pytest.mark.parametrize(("expected_s", "fits"), [(None, 35), (None, 5), (10.0, 5), (1.0, 35)])
@pytest.mark.parametrize("kind", EDITORS)
def test_a_wave_does_not_overrun_the_budget(
    kind: type[FakeEditor], tmp_path: Path, start: Stage, events: list[Event], expected_s: float | None, fits: int
) -> None:
    now = 0.0

    def draw(request: EditRequest) -> None:
        nonlocal now
        now += 10.0

    # 10 s at $3.6 an hour: a cent an image. A guess that is too low costs a wave at most, and none costs nothing
    summary = start(
        kind(draw=draw),
        rows_of(tmp_path, 60),
        price=Decimal("3.6"),
        budget_usd=(fits + Decimal("0.5")) / 100,
        expected_s=expected_s,
        clock=lambda: now,
    )
    assert (summary.done, summary.usd) == (fits, Decimal(fits) / 100)
    assert "would exceed the budget" in summary.stopped
    assert [event.kind for event in events].count("stopped") == 1
    assert spent(tmp_path) == {"done": fits}


def test_a_first_image_that_takes_long_does_not_end_a_run_that_has_money(tmp_path: Path, start: Stage) -> None:
    now, seconds = 0.0, itertools.chain([100.0], itertools.repeat(1.0))

    def draw(request: EditRequest) -> None:
        nonlocal now
        now += next(seconds)

    summary = start(FakeWaves(draw=draw), rows_of(tmp_path, 60), price=Decimal("3.6"), budget_usd=Decimal("0.4"), clock=lambda: now)
    assert (summary.done, summary.stopped) == (60, "")


def test_the_guess_of_an_image_has_a_whole_wave_in_it(tmp_path: Path, start: Stage) -> None:
    """The first of a wave takes the reading of all of it: were only the last ones looked at, the money would be overrun."""
    now = 0.0

    class Waves(FakeWaves):
        wave = 40

        def edit_many(self, requests: Any, ahead: int = 1, cancelled: threading.Event | None = None) -> Iterator[Any]:
            source = iter(requests)
            while wave := list(itertools.islice(source, self.wave)):
                advance(10.0 * len(wave))
                for request in wave:
                    advance(1.0)
                    yield self._outcome(request)

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    # 11 s an image: 100 are 1100 s, $1.1
    summary = start(
        Waves(), rows_of(tmp_path, 150), price=Decimal("3.6"), budget_usd=Decimal("1.1"), expected_s=11.0, clock=lambda: now
    )
    assert summary.usd is not None
    assert summary.usd <= Decimal("1.1")
    assert summary.done >= 90


def test_where_nothing_can_be_written_the_rest_of_a_wave_is_not_drawn(
    tmp_path: Path, start: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "WRITE_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(run_outcomes, "FINISH_WAITING", 0)
    write, full = storage.write_output, threading.Event()

    def no_room(root: str, name: str, data: bytes) -> None:
        if full.is_set():
            raise OutputError(f"{name} cannot be written: No space left on device.", "Make room there.")
        write(root, name, data)

    monkeypatch.setattr(storage, "write_output", no_room)
    editor = FakeWaves(draw=lambda request: full.set() if "red 3," in request.prompt else None)
    with pytest.raises(OutputError, match="No space left"):
        start(editor, rows_of(tmp_path, 20))
    assert editor.drawn.total() == 4
    assert spent(tmp_path) == {"done": 3, "failed": 1}
    assert {image.state for image in images(tmp_path).values()} == {"done", "failed", "planned"}


def test_bad_rows_are_told_and_do_not_stop_the_run(tmp_path: Path, start: Stage, events: list[Event]) -> None:
    first, second, third = rows_of(tmp_path, 3)
    missing = replace(second, columns={})
    summary = start(FakeEditor(), [first, BadRow(9, "It has no picture."), missing, third])
    assert (summary.done, summary.bad_rows) == (2, 2)
    told = {event.row_line: event.why for event in events if event.kind == "bad row"}
    assert told[9] == "It has no picture."
    assert "color" in told[missing.line]


def test_duplicate_skus_never_overwrite_each_other(tmp_path: Path, start: Stage, events: list[Event]) -> None:
    rows = rows_of(tmp_path, 2)
    twice = [rows[0], replace(rows[1], id="P0")]  # the same file where case does not count
    summary = start(FakeEditor(), twice)
    assert (summary.done, summary.bad_rows) == (1, 1)
    assert f"line {rows[0].line}" in next(event.why for event in events if event.kind == "bad row")


def test_a_missing_input_is_quarantined_at_once_and_costs_nothing(tmp_path: Path, start: Stage) -> None:
    rows = rows_of(tmp_path, 3)
    Path(rows[1].picture).unlink()
    editor = FakeEditor()
    summary = start(editor, rows, price=Decimal(1))
    assert (summary.done, summary.quarantined) == (2, 1)
    image = images(tmp_path)["p1/v0.png"]
    assert (image.attempts, image.usd, image.seconds) == (0, None, 0.0)
    assert "There is no file" in image.why
    rows_of(tmp_path, 3)  # it is there again
    assert start(FakeEditor(), rows).done == 1


def test_an_input_that_vanishes_after_it_was_hashed_is_drawn_from_what_was_hashed(tmp_path: Path, start: Stage) -> None:
    rows = rows_of(tmp_path, 2)

    def draw(request: EditRequest) -> None:
        Path(rows[0].picture).unlink(missing_ok=True)

    assert start(FakeEditor(draw=draw), rows).done == 2


def test_an_input_that_vanishes_before_a_retry_is_told(tmp_path: Path, start: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "KEPT", 0)
    rows = rows_of(tmp_path, 1)

    def draw(request: EditRequest) -> None:
        Path(rows[0].picture).unlink()
        raise MachineError("Out of memory.", "Draw smaller.")

    summary = start(FakeEditor(draw=draw), rows)
    assert (summary.failed, summary.quarantined) == (1, 1)
    assert "There is no file" in images(tmp_path)["p0/v0.png"].why


def test_a_changed_input_or_prompt_is_drawn_again_and_a_touched_one_is_not(tmp_path: Path, start: Stage) -> None:
    rows = rows_of(tmp_path, 3)
    start(FakeEditor(), rows)
    os.utime(rows[0].picture, (1, 1))
    Image.new("RGB", (16, 16), "white").save(rows[1].picture)
    changed = [*rows[:2], replace(rows[2], columns={"color": "blue"})]
    again = start(FakeEditor(), changed)
    assert (again.done, again.already) == (2, 1)
    assert start(FakeEditor(draw=refuse), changed).already == 3


def test_a_finished_picture_that_is_gone_is_drawn_again(tmp_path: Path, start: Stage) -> None:
    rows = rows_of(tmp_path, 3)
    start(FakeEditor(), rows)
    (tmp_path / "out/p1/v0.png").unlink()
    again = start(FakeEditor(), rows)
    assert (again.done, again.already, again.recovered) == (1, 2, 0)


def test_a_finished_picture_is_recognized_without_its_ledger(tmp_path: Path, start: Stage) -> None:
    rows = rows_of(tmp_path, 3)
    start(FakeEditor(), rows)
    for path in tmp_path.glob("ledger.sqlite*"):
        path.unlink()
    (tmp_path / "out/p1/v0.png").write_bytes(b"no picture of ours")
    again = start(FakeEditor(), rows)
    assert (again.done, again.recovered) == (3, 2)


def test_a_full_disk_ends_the_run_and_loses_one_picture_at_most(
    tmp_path: Path, start: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "WRITE_PAUSES_S", (0.0, 0.0))
    write, full = storage.write_output, threading.Event()

    def draw(request: EditRequest) -> None:
        if "red 3," in request.prompt:
            full.set()

    def no_room(root: str, name: str, data: bytes) -> None:
        if full.is_set():
            raise OutputError(f"{name} cannot be written: No space left on device.", "Make room there.")
        write(root, name, data)

    monkeypatch.setattr(storage, "write_output", no_room)
    monkeypatch.setattr(run_outcomes, "FINISH_WAITING", 0)
    monkeypatch.setattr(run_requests, "FINISH_WAITING", 0)
    with pytest.raises(OutputError, match="No space left"):
        start(FakeEditor(draw=draw), rows_of(tmp_path, 20))
    assert images(tmp_path)["p3/v0.png"].state == "failed"
    full.clear()
    monkeypatch.setattr(storage, "write_output", write)
    summary = start(FakeEditor(), rows_of(tmp_path, 20))
    assert summary.done + summary.already == 20
    assert len(outputs(tmp_path)) == 20


def test_one_name_that_cannot_be_written_is_that_image_s_trouble(
    tmp_path: Path, start: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "WRITE_PAUSES_S", (0.0, 0.0))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/p1").write_text("a file where a folder should be")
    summary = start(FakeEditor(), rows_of(tmp_path, 3))
    assert (summary.done, summary.quarantined) == (2, 1)


def test_an_output_folder_that_cannot_be_written_is_told_before_anything_is_drawn(tmp_path: Path, start: Stage) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="cannot be written"):
        start(FakeEditor(draw=refuse), rows_of(tmp_path, 3))


def test_a_check_that_breaks_quarantines_its_image_alone(tmp_path: Path, start: Stage) -> None:
    def check(sources: Sequence[Image.Image], result: Image.Image, limits: Limits) -> Verdict:
        raise ValueError("of a bug")

    summary = start(FakeEditor(), rows_of(tmp_path, 2), check=check)
    assert (summary.done, summary.quarantined) == (0, 2)


def test_a_second_run_on_one_ledger_is_refused_and_says_who_holds_it(tmp_path: Path, start: Stage) -> None:
    def draw(request: EditRequest) -> None:
        with pytest.raises(InputError, match=f"process {os.getpid()} on "):
            Ledger.open(str(tmp_path / "ledger.sqlite"))

    assert start(FakeEditor(draw=draw), rows_of(tmp_path, 1)).done == 1


def test_a_picture_that_was_written_and_not_marked_is_recognized_and_not_paid_again(
    tmp_path: Path, start: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """As sudden as a kill, for a test."""

    def die(*args: object) -> None:
        raise Killed

    rows = rows_of(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "end", die)
        with pytest.raises(Killed):
            start(FakeEditor(), rows, price=Decimal(1))
    assert outputs(tmp_path) == {"p0/v0.png"}
    assert images(tmp_path)["p0/v0.png"].state == "planned"
    summary = start(FakeEditor(draw=refuse), rows, price=Decimal(1))
    assert (summary.done, summary.recovered) == (1, 1)
    assert summary.bill is not None
    assert (summary.bill.accepted, summary.bill.usd_of("spot losses")) == (1, 0)


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path: Path, start: Stage) -> None:
    class Killed(BaseException):
        """As sudden as a kill, for a test."""

    def draw(request: EditRequest) -> None:
        if "red 1," in request.prompt:
            raise Killed

    rows, out = rows_of(tmp_path, 3), tmp_path / "out"
    with pytest.raises(Killed):
        start(FakeEditor(draw=draw), rows)

    def leave(name: str) -> Path:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half a picture")
        return path

    for name in ("p1/v0.png", "_rejected/1/p1/v0.png", finish.PROBE):
        leave(str(storage.name_beside(out / name).relative_to(out)))
    others = [
        leave(".v0.png.0123abcd"),  # of an output in the root, which is none of ours
        leave("p2/.v0.png.0123abcd"),  # of an image that no killed run was at
        leave("p1/.v1.png.0123abcd"),
        leave("p1/.v0.png.0123ABCD"),
        leave("p1/.v0.png.0123abcde"),
        leave("p1/.v0.png.backup01"),
        leave("p1/v0.png.0123abcd"),
    ]
    young = leave("p1/.v0.png.fedcba98")
    os.utime(young, (time.time() + 60, time.time() + 60))
    (out / "p1/.v0.png.00000001").mkdir()
    (out / "p1/.v0.png.00000002").symlink_to(others[0])
    start(FakeEditor(), rows)
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.name not in ("v0.png", "p0", "p1", "p2")}
    kept = {str(path.relative_to(out)) for path in (*others, young)}
    assert left == kept | {"p1/.v0.png.00000001", "p1/.v0.png.00000002", "_rejected", "_rejected/1"}
    assert {"p0/v0.png", "p1/v0.png", "p2/v0.png"} <= outputs(tmp_path)


@pytest.mark.parametrize(("swept", "ends"), [(2, False), (5, True)])
def test_a_probe_that_another_run_sweeps_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swept: int, ends: bool
) -> None:
    """Both begin at the same moment, and one takes the other's for what a killed run has left."""
    right, times = Path.replace, itertools.count()

    def rename(self: Path, target: Path) -> Path:
        if next(times) < swept:
            assert leftovers.sweep(str(tmp_path), [finish.PROBE], time.time_ns() + 10**9) == 1
        return right(self, target)

    monkeypatch.setattr(Path, "replace", rename)
    if ends:
        with pytest.raises(OutputError, match="No such file"):
            finish.check_root(str(tmp_path))
    else:
        finish.check_root(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_kills_the_process_comes_last(tmp_path: Path, start: Stage, events: list[Event]) -> None:
    class Killed(BaseException):
        """As sudden as a kill, for a test."""

    def draw(request: EditRequest) -> None:
        if "red 1," in request.prompt:
            raise Killed

    rows = rows_of(tmp_path, 6)
    for _ in range(4):
        with pytest.raises(Killed):
            start(FakeEditor(draw=draw), rows)
    started = [event.row_id for event in events if event.kind == "started"]
    assert (started.count("p1"), started[-1]) == (4, "p1")
    assert set(started[:-1]) == {f"p{number}" for number in range(6)}
    start(FakeEditor(), rows)
    assert len(outputs(tmp_path)) == 6


def test_ten_thousand_finished_rows_are_passed_over_in_flat_memory(tmp_path: Path, start: Stage) -> None:
    def rows() -> Iterator[Row]:
        (first,) = rows_of(tmp_path, 1)
        return (replace(first, id=f"p{number}", line=number + 2) for number in range(10_000))

    recipe, out = make_recipe(), tmp_path / "out"
    with Ledger.open(str(tmp_path / "ledger.sqlite")) as ledger:
        ledger.begin_run(loading_s=0.0, cards=1, usd_per_hour=None)
        for item in expand_all(rows(), recipe):
            assert not isinstance(item, BadRow)
            candidate = Candidate(item, asked_digest(item, WEIGHTS), None, key=item.output)
            (out / item.output).parent.mkdir(parents=True)
            (out / item.output).touch()
            ledger.adopt(candidate.work, WEIGHTS)
    tracemalloc.start()
    try:
        assert start(FakeEditor(draw=refuse), rows(), recipe).already == 10_000
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # names that were seen take 16 bytes and room to grow; how long it takes is benchmarks.catalog's
    assert most_bytes < 4_000_000


def test_pictures_are_let_go_as_the_run_goes_on(tmp_path: Path, start: Stage) -> None:
    finished, alive = itertools.count(1), []

    def count(event: Event) -> None:
        if event.kind == "done" and next(finished) == 150:
            alive.append(sum(type(thing) is Image.Image for thing in gc.get_objects()))

    gc.collect()
    before = sum(type(thing) is Image.Image for thing in gc.get_objects())
    start(FakeStream(), rows_of(tmp_path, 200), on_event=count)
    # read ahead, kept, in flight and waiting for the disk: some of each, and none of those that are done
    assert alive[0] - before < 60


def mask_of(folder: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> str:
    """White where the edit may change the picture."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(folder / "mask.png")
    return str(folder / "mask.png")


class Repainter(FakeEditor):
    """Gives its picture back with the left half in another color."""

    def edit(self, request: EditRequest, on_progress: Any = None) -> Any:
        made, source = super().edit(request, on_progress), request.images[-1].copy()
        source.paste((200, 30, 30), (0, 0, source.width // 2, source.height))
        return replace(made, images=(source,))


def judged(sources: Sources, result: Image.Image, limits: Limits) -> Verdict:
    return judge(sources[-1], result, replace(limits, allow_shift=True), sources.mask, fit=sources.fit)


@pytest.mark.parametrize(("box", "done"), [((0, 0, 48, 64), 1), ((40, 0, 64, 64), 0), (None, 1)])
def test_what_changes_outside_of_a_mask_is_rejected(
    tmp_path: Path, start: Stage, box: tuple[int, int, int, int] | None, done: int
) -> None:
    (row,) = rows_of(tmp_path, 1)
    Image.effect_noise((64, 64), 90).convert("RGB").save(row.picture)
    masked = row if box is None else replace(row, mask=mask_of(tmp_path, (64, 64), box))
    summary = start(Repainter(), [masked], make_recipe(redo=0), check=judged)
    assert (summary.done, summary.quarantined) == (done, 1 - done)
    if not done:
        assert "drift" in images(tmp_path)["p0/v0.png"].why or "color" in images(tmp_path)["p0/v0.png"].why


def test_a_mask_of_another_size_is_refused_and_another_mask_is_another_image(tmp_path: Path, start: Stage) -> None:
    (row,) = rows_of(tmp_path, 1)
    masked = replace(row, mask=mask_of(tmp_path, (16, 20), (0, 0, 8, 8)))
    assert start(FakeEditor(draw=refuse), [masked]).quarantined == 1
    assert "has 16x20 pixels, and its picture 16x16" in images(tmp_path)["p0/v0.png"].why
    keys = []
    for box in ((0, 0, 8, 8), (0, 0, 9, 9)):
        mask_of(tmp_path, (16, 16), box)
        assert start(FakeEditor(), [masked], retry_failed=True).done == 1
        keys.append(images(tmp_path)["p0/v0.png"].key)
    assert start(FakeEditor(), [row]).done == 1
    assert len({*keys, images(tmp_path)["p0/v0.png"].key}) == 3


def test_a_mask_that_keeps_nothing_is_refused(tmp_path: Path, start: Stage) -> None:
    (row,) = rows_of(tmp_path, 1)
    shape = Image.new("RGBA", (16, 16))
    shape.paste((255, 255, 255, 255), (4, 4, 8, 8))
    shape.save(tmp_path / "mask.png")
    assert start(FakeEditor(draw=refuse), [replace(row, mask=str(tmp_path / "mask.png"))]).quarantined == 1
    assert "is black nowhere" in images(tmp_path)["p0/v0.png"].why


def test_a_mask_is_not_taken_for_a_further_reference(tmp_path: Path, start: Stage) -> None:
    (row,) = rows_of(tmp_path, 1)
    mask = mask_of(tmp_path, (16, 16), (0, 0, 8, 8))
    assert start(FakeEditor(), [replace(row, more_pictures=(mask,))]).done == 1
    again = start(FakeEditor(), [replace(row, mask=mask)])
    assert (again.done, again.already) == (1, 0)
