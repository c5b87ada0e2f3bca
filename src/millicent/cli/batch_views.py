"""`millicent batch status|export|gallery`: what a ledger says, also while a run writes to it."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console

from millicent.catalog.bill import bill_of
from millicent.catalog.ledger import POSTGRES, Image, Ledger, Run, Spent, State
from millicent.catalog.storage import FetchLimits, read_bytes, read_output
from millicent.cli.cost import table_of_parts, write_value
from millicent.cli.live import show_time
from millicent.cost import Bill
from millicent.errors import InputNotFoundError, OutputError

if TYPE_CHECKING:
    from millicent.catalog.gallery import Shown

LEDGER = "ledger.sqlite"
MILLICENT_USD = Decimal("0.00001")
COLUMNS = (
    *("output", "row_line", "row_id", "variant", "state", "attempts", "seed", "seconds", "usd"),
    *("sha256", "linked_to", "set_aside", "why"),
)

Out = Annotated[str, typer.Argument(metavar="OUT", help="The output folder of a run.")]
StateName = Annotated[str | None, typer.Option("--state", metavar="<state>", help="Only images in it, as quarantined.")]
LedgerUrl = Annotated[str | None, typer.Option("--ledger", metavar="<file|url>", help="As given to the run.")]


def status(
    out: Out,
    ledger_url: LedgerUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Counts, throughput and the bill, of all runs on a ledger; also while one of them draws."""
    with read_ledger(out, ledger_url) as ledger:
        counts, runs, spent, bill = ledger.counts(), ledger.runs(), ledger.spent(), bill_of(ledger)
    if as_json:
        print(json.dumps(summarize(counts, runs, spent, bill), default=write_value))
    else:
        show(counts, runs, spent, bill)


def export(
    out: Out,
    to: Annotated[str, typer.Option("-o", "--to", metavar="<file>", help="A .csv or .jsonl; - for CSV on standard output.")] = "-",
    state: StateName = None,
    ledger_url: LedgerUrl = None,
) -> None:
    """Every image of a ledger with its state, attempts, seconds, dollars and the reason, in the manifest's order."""
    with read_ledger(out, ledger_url) as ledger:
        images = ledger.images(check_state(state))
        if to == "-":
            write_csv(images, sys.stdout)
            return
        path = Path(to)
        writers = {".csv": write_csv, ".jsonl": write_json_lines}
        if path.suffix.lower() not in writers:
            raise OutputError(f"{path} has the ending {path.suffix!r}.", f"Use {' or '.join(writers)}.")
        try:
            with path.open("w", encoding="utf-8", newline="") as file:
                count = writers[path.suffix.lower()](images, file)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror}.", "Choose another place, or make room there."
            ) from error
    print(f"{path}  {count:,} images")


def gallery(
    out: Out,
    to: Annotated[Path | None, typer.Option("-o", "--to", metavar="<file.html>", help="Default: gallery.html in OUT.")] = None,
    state: StateName = None,
    allow_hosts: Annotated[
        list[str] | None, typer.Option("--allow-host", metavar="<host>", help="That https pictures may come from. Repeatable.")
    ] = None,
    ledger_url: LedgerUrl = None,
) -> None:
    """Before and after of every image, as plain pages that open from the disk, with prompt, seed, dollars and verdict."""
    from millicent.catalog.gallery import write_gallery  # draws thumbnails

    if to is None and "://" in out:
        raise OutputError(f"{out} cannot hold the pages.", "Say where to write them: --to gallery.html")
    wanted, allowed = check_state(state), frozenset(allow_hosts or ())
    with read_ledger(out, ledger_url) as ledger:
        pages = write_gallery(
            (show_image(image) for image in ledger.images(wanted)),
            out,
            to or Path(out) / "gallery.html",
            read_before=lambda location: read_bytes(location, FetchLimits(), allowed),
            read_after=lambda name: read_output(out, name),
        )
    print(f"{pages[0]}  {len(pages)} page{'s' if len(pages) > 1 else ''}")


def show_image(image: Image) -> Shown:
    """A row of the ledger for the gallery; a rejected picture is shown too, where it was set aside."""
    from millicent.catalog.gallery import Shown

    accepted = image.state in ("done", "linked")
    return Shown(
        title=image.row_id,
        variant=image.variant,
        before=image.pictures[-1],
        after=image.output if accepted else image.set_aside,
        prompt=image.prompt,
        verdict=image.state,
        accepted=accepted,
        seed=image.seed,
        attempts=image.attempts,
        seconds=image.seconds,
        usd=image.usd,
        why=image.why,
    )


@contextmanager
def read_ledger(out: str, ledger_url: str | None) -> Iterator[Ledger]:
    """The ledger of a run, to read. Raises InputNotFoundError, and as Ledger.open."""
    url = ledger_url or str(Path(out) / LEDGER)
    if not url.startswith(POSTGRES) and not Path(url).is_file():
        raise InputNotFoundError(f"There is no ledger {url}.", "Give the folder that `millicent batch` wrote to, and its --ledger.")
    with Ledger.open(url, write=False) as ledger:
        yield ledger


def check_state(state: str | None) -> State | None:
    states: tuple[State, ...] = ("planned", "running", "done", "linked", "rejected", "failed", "quarantined")
    found = next((each for each in states if each == state), None)
    if state is not None and found is None:
        raise typer.BadParameter(f"{state} is no state; use one of {', '.join(states)}.", param_hint="--state")
    return found


def to_row(image: Image) -> dict[str, Any]:
    return {name: getattr(image, name) for name in COLUMNS} | {"prompt": image.prompt, "pictures": list(image.pictures)}


def write_csv(images: Iterator[Image], file: TextIO) -> int:
    """With a header; pictures as one field with spaces between. A spreadsheet must not take a text for a formula."""
    writer = csv.writer(file)
    writer.writerow([*COLUMNS, "prompt", "pictures"])
    count = 0
    for image in images:
        row = to_row(image) | {"pictures": " ".join(image.pictures)}
        writer.writerow([guard(value) for value in row.values()])
        count += 1
    return count


def guard(value: object) -> object:
    """With an apostrophe before a text that a spreadsheet would calculate."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def write_json_lines(images: Iterator[Image], file: TextIO) -> int:
    count = 0
    for image in images:
        file.write(json.dumps(to_row(image), default=write_value) + "\n")
        count += 1
    return count


def drawn_per_hour(runs: list[Run], spent: list[Spent]) -> float | None:
    """Accepted images an hour of one card, over the time that runs drew, loading left out; None before the first one."""
    hours = sum(run.elapsed_s * run.cards for run in runs) / 3600
    accepted = sum(each.attempts for each in spent if each.state == "done")
    return accepted / hours if hours and accepted else None


def summarize(counts: dict[State, int], runs: list[Run], spent: list[Spent], bill: Bill | None) -> dict[str, Any]:
    """What --json prints; dollars are text."""
    attempts = {
        outcome: sum(each.attempts for each in spent if each.state == outcome) for outcome in sorted({s.state for s in spent})
    }
    return {
        "images": counts,
        "attempts": attempts,
        "images_per_card_hour": drawn_per_hour(runs, spent),
        "runs": [asdict(run) for run in runs],
        "bill": None if bill is None else summarize_bill(bill),
    }


def summarize_bill(bill: Bill) -> dict[str, Any]:
    return {
        "total_usd": bill.total_usd,
        "usd_per_accepted_image": bill.usd_per_accepted_image,
        "images": bill.images,
        "accepted": bill.accepted,
        "gpu_hours": bill.gpu_hours,
        "parts": [asdict(part) for part in bill.parts],
        "assumptions": bill.assumptions,
    }


def show(counts: dict[State, int], runs: list[Run], spent: list[Spent], bill: Bill | None) -> None:
    total = sum(counts.values())
    print(f"{total:,} images: " + ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items())))
    rate = drawn_per_hour(runs, spent)
    if rate is not None:
        print(f"{rate:,.0f} accepted images an hour of a card, over {show_time(sum(run.elapsed_s for run in runs))} of drawing")
    for run in runs:
        print(f"run {run.started_at} on {run.host}, {show_time(run.elapsed_s)}: {describe_end(run)}")
    if bill is None:
        print("no bill: no run was given a price")
    else:
        show_bill(bill)


def describe_end(run: Run) -> str:
    if run.ended_at is None:
        return "goes on, or was killed a moment ago"
    return run.stopped or "came to its end"


def show_bill(bill: Bill) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    console.print(table_of_parts(bill))
    each = bill.usd_per_accepted_image
    if each is not None:
        print(f"per accepted image  ${each:.6f}  {each / MILLICENT_USD:,.1f} millicents *")
    print(bill.asterisk)
