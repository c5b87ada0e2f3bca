"""What a run shows while it goes: figures from events, lines for people and machines."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from decimal import Decimal

import pytest

from millicent.catalog.events import Event, EventKind
from millicent.cli.live import Figures, Tally, describe_trouble, print_json, show_time, stopping, watch


def event(kind: EventKind, **more: object) -> Event:
    return Event(kind=kind, elapsed_s=1.0, **more)  # type: ignore[arg-type]


def tally_of(*kinds: EventKind, total: int = 10, usd_per_hour: Decimal | None = Decimal(36)) -> Tally:
    """A run that began 100 s ago, and whose first image 50 s ago: $1 so far at $36 an hour."""
    now = time.monotonic()
    tally = Tally(total=total, usd_per_hour=usd_per_hour, started_s=now - 100)
    for kind in kinds:
        tally.add(event(kind))
    tally.first_s = now - 50
    return tally


def test_figures_follow_from_events() -> None:
    figures = tally_of("started", "done", "started", "rejected", "started", "done", "linked", "quarantined", "bad row").figures()
    assert (figures.accepted, figures.linked, figures.rejected, figures.quarantined, figures.bad_rows) == (3, 1, 1, 1, 1)
    assert figures.images_per_hour == pytest.approx(3 / 50 * 3600, rel=0.01)
    assert float(figures.usd or 0) == pytest.approx(1.0, rel=0.01)
    assert float(figures.usd_per_accepted_image or 0) == pytest.approx(1 / 3, rel=0.01)
    assert figures.left_s == pytest.approx(6 * 50 / 4, rel=0.02)


def test_what_earlier_runs_did_is_not_left() -> None:
    tally = tally_of("started", "done")
    tally.before = 7
    assert tally.figures().left_s == pytest.approx(2 * 50, rel=0.02)


def test_before_the_first_image_nothing_is_guessed() -> None:
    figures = Tally(total=10).figures()
    assert (figures.images_per_hour, figures.usd, figures.usd_per_accepted_image, figures.left_s) == (None, None, None, None)
    assert str(figures) == "0 accepted, 0 rejected"


def test_a_line_for_a_person_says_all() -> None:
    figures = Figures(
        total=10,
        before=0,
        handled=4,
        accepted=1234,
        linked=0,
        rejected=2,
        failed=1,
        quarantined=3,
        bad_rows=1,
        elapsed_s=1.0,
        images_per_hour=1500.4,
        usd=Decimal("1.5"),
        usd_per_accepted_image=Decimal("0.001216"),
        left_s=3700,
    )
    assert str(figures) == (
        "1,234 accepted, 2 rejected, 1 failed, 3 quarantined, 1 bad row, 1,500 an hour, $1.5000, $0.001216 an accepted image,"
        " 1 h 01 min left"
    )


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (190, "3 min 10 s"), (7500, "2 h 05 min")])
def test_times_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert show_time(seconds) == text


def test_json_leaves_out_what_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(event("done", output="P1/navy.png", usd=Decimal("0.000100")))
    assert json.loads(capsys.readouterr().out) == {"event": "done", "elapsed_s": 1.0, "output": "P1/navy.png", "usd": "0.000100"}


def test_trouble_is_told_and_the_rest_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe_trouble(event("done")) is None
    assert describe_trouble(event("stopped", why="enough")) == "stopping: enough"
    with watch(Tally(), as_json=False, quiet=False, textfile=None) as tell:
        tell(event("bad row", row_line=7, why="no picture"))
        tell(event("rejected", output="a.png", why="blank", set_aside="_rejected/1/a.png"))
        tell(event("quarantined", output="a.png", row_line=8, why="blank", set_aside="_rejected/1/a.png"))
        tell(event("done"))
    assert capsys.readouterr().err == "line 7: no picture\nquarantined a.png (line 8): blank (kept as _rejected/1/a.png)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_the_run_to_stop_and_says_what_becomes_of_the_rest(
    number: signal.Signals, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, stop, ended = signal.getsignal(number), threading.Event(), list[int]()
    monkeypatch.setattr(os, "_exit", ended.append)
    with stopping(stop):
        signal.raise_signal(number)
        assert stop.is_set()
        assert capfd.readouterr().err == "\nstopping: what is not drawn is given back; once more stops at once\n"
        assert not ended
        signal.raise_signal(number)
        assert ended[0] == 128 + number
        assert "stopped at once; the same command goes on from here" in capfd.readouterr().err
    assert signal.getsignal(number) == before


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with watch(Tally(), as_json=False, quiet=True, textfile=None) as tell:
        tell(event("quarantined", why="no"))
    assert capsys.readouterr() == ("", "")
