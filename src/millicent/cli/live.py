"""What a catalog run shows while it goes: on a terminal, as JSON lines, as a Prometheus textfile; and how it is stopped."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from millicent.catalog.events import Event
from millicent.errors import MissingExtraError, OutputError

LINE_S = 30.0  # between lines where there is no terminal
TEXTFILE_S = 10.0  # between writings of the textfile
_MICRO = Decimal("1e-6")

Tell = Callable[[Event], None]


@dataclass(slots=True)
class Tally:
    """The state of a run so far, from its events.

    total: images of the manifest; 0 where it was not counted. before: of those, what earlier runs have finished or given up.
    usd_per_hour: of all cards together; None without a price. started_s: time.monotonic() when the rented time began to count.
    """

    total: int = 0
    before: int = 0
    usd_per_hour: Decimal | None = None
    started_s: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)
    first_s: float | None = None

    def add(self, event: Event) -> None:
        self.counts[event.kind] += 1
        if self.first_s is None and event.kind == "started":
            self.first_s = time.monotonic()

    def figures(self) -> Figures:
        """As of now."""
        now, counts = time.monotonic(), self.counts
        accepted = counts["done"] + counts["linked"]
        handled = accepted + counts["quarantined"]
        drawing_s = 0.0 if self.first_s is None else now - self.first_s
        left = max(0, self.total - self.before - handled)
        usd = None
        if self.usd_per_hour is not None:
            usd = (self.usd_per_hour * Decimal(repr(now - self.started_s)) / 3600).quantize(_MICRO)
        return Figures(
            total=self.total,
            before=self.before,
            handled=handled,
            accepted=accepted,
            linked=counts["linked"],
            rejected=counts["rejected"],
            failed=counts["failed"],
            quarantined=counts["quarantined"],
            bad_rows=counts["bad row"],
            elapsed_s=round(now - self.started_s, 3),
            images_per_hour=round(accepted / drawing_s * 3600, 1) if accepted and drawing_s else None,
            usd=usd,
            usd_per_accepted_image=(usd / accepted).quantize(_MICRO) if usd is not None and accepted else None,
            left_s=round(left * drawing_s / handled) if handled and self.total else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A run at one moment. Attempts in vain: rejected, failed. handled: accepted and quarantined, of this run.

    elapsed_s, usd: with loading. images_per_hour, left_s: at the rate since the first image was begun; None before one is handled.
    """

    total: int
    before: int
    handled: int
    accepted: int
    linked: int
    rejected: int
    failed: int
    quarantined: int
    bad_rows: int
    elapsed_s: float
    images_per_hour: float | None
    usd: Decimal | None
    usd_per_accepted_image: Decimal | None
    left_s: int | None

    def __str__(self) -> str:
        """One line for a person."""
        parts = [f"{self.accepted:,} accepted", f"{self.rejected:,} rejected"]
        parts += [f"{count:,} {name}" for name, count in (("failed", self.failed), ("quarantined", self.quarantined)) if count]
        if self.bad_rows:
            parts.append(f"{self.bad_rows:,} bad {'row' if self.bad_rows == 1 else 'rows'}")
        if self.images_per_hour is not None:
            parts.append(f"{self.images_per_hour:,.0f} an hour")
        if self.usd is not None:
            parts.append(f"${self.usd:,.4f}")
        if self.usd_per_accepted_image is not None:
            parts.append(f"${self.usd_per_accepted_image:.6f} an accepted image")
        if self.left_s is not None:
            parts.append(f"{show_time(self.left_s)} left")
        return ", ".join(parts)


def show_time(seconds: float) -> str:
    """ "2 h 05 min", "3 min 10 s", "12 s"."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


@contextmanager
def watch(tally: Tally, *, as_json: bool, quiet: bool, textfile: Path | None) -> Iterator[Tell]:
    """Something to tell events to, which shows them: JSON lines on standard output, a bar or lines on standard error.

    Raises OutputError where the textfile cannot be written, MissingExtraError without prometheus-client.
    """
    write = None if textfile is None else _open_textfile(tally, textfile)
    written_s = time.monotonic()
    with _show(tally, as_json, quiet) as show:

        def tell(event: Event) -> None:
            nonlocal written_s
            tally.add(event)
            show(event)
            if write is not None and time.monotonic() >= written_s + TEXTFILE_S:
                write()
                written_s = time.monotonic()

        try:
            yield tell
        finally:
            if write is not None:
                write()


@contextmanager
def _show(tally: Tally, as_json: bool, quiet: bool) -> Iterator[Tell]:
    if as_json:
        yield print_json
    elif quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _bar(tally) as tell:
            yield tell
    else:
        yield _lines(tally)


def print_json(event: Event) -> None:
    """One line that a machine reads: what is empty is left out; dollars are text."""
    told = {name: value for name, value in asdict(event).items() if value not in (None, "", 0) or name == "elapsed_s"}
    print(json.dumps({"event": told.pop("kind"), **told}, default=str), flush=True)


def _lines(tally: Tally) -> Tell:
    """For a log: what went wrong at once, and every now and then how far the run is."""
    shown_s = time.monotonic()

    def tell(event: Event) -> None:
        nonlocal shown_s
        if trouble := describe_trouble(event):
            print(trouble, file=sys.stderr, flush=True)
        if time.monotonic() >= shown_s + LINE_S:
            shown_s = time.monotonic()
            print(tally.figures(), file=sys.stderr, flush=True)

    return tell


@contextmanager
def _bar(tally: Tally) -> Iterator[Tell]:
    """A bar, and under it the figures; what went wrong stays above them."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with Bar(*columns, console=Console(stderr=True, highlight=False), transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("the first image is being drawn", total=tally.total or None, completed=tally.before)

        def tell(event: Event) -> None:
            if trouble := describe_trouble(event):
                bar.console.print(trouble, markup=False)
            figures = tally.figures()
            bar.update(task, completed=tally.before + figures.handled, description=str(figures) if figures.handled else None)

        yield tell


def describe_trouble(event: Event) -> str | None:
    """A line for a bad row, a quarantined image and the reason of a stop; None for what a person need not read."""
    if event.kind == "bad row":
        return f"line {event.row_line}: {event.why}"
    if event.kind == "quarantined":
        kept = f" (kept as {event.set_aside})" if event.set_aside else ""
        return f"quarantined {event.output or event.row_id} (line {event.row_line}): {event.why}{kept}"
    return f"stopping: {event.why}" if event.kind == "stopped" else None


def _open_textfile(tally: Tally, path: Path) -> Callable[[], None]:
    """Writes the figures where node_exporter's textfile collector finds them; whole or not at all."""
    try:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "prometheus-client is not installed, and --textfile needs it.", 'Run: pip install "millicent[server]"'
        ) from error
    if path.suffix != ".prom":
        raise OutputError(f"{path} would not be read by the textfile collector.", "Give a name that ends in .prom.")
    registry = CollectorRegistry()
    names = {
        "total": "Images that the manifest asks for",
        "accepted": "Images of this run that were accepted, linked ones too",
        "linked": "Images of this run that share another's file",
        "rejected": "Attempts of this run whose picture was rejected",
        "failed": "Attempts of this run that gave no picture",
        "quarantined": "Images of this run that were given up",
        "bad_rows": "Rows that no image can be made of",
        "elapsed_s": "Seconds since the run's process began",
        "usd": "Dollars of this run, idle time and loading too",
        "usd_per_accepted_image": "Dollars for each accepted image",
        "images_per_hour": "Accepted images an hour",
        "left_s": "Seconds that are left at this rate",
    }
    units = {"elapsed_s": "elapsed_seconds", "left_s": "left_seconds"}
    gauges = {name: Gauge(f"millicent_batch_{units.get(name, name)}", told, registry=registry) for name, told in names.items()}

    def write() -> None:
        figures = tally.figures()
        for name, gauge in gauges.items():
            value = getattr(figures, name)
            gauge.set(float("nan") if value is None else float(value))
        try:
            write_to_textfile(str(path), registry)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}.", "Choose another place.") from error

    write()
    return write


@contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C, or SIGTERM from a rented machine that is taken away: sets `stop`. A second one ends the process at once.

    The ledger is made for both: what a run gives back, and what is in flight when it is killed, is drawn by the next one.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            Console(stderr=True).show_cursor()
            os.write(2, b"stopped at once; the same command goes on from here\n")
            os._exit(128 + number)
        stop.set()
        os.write(2, b"\nstopping: what is not drawn is given back; once more stops at once\n")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
