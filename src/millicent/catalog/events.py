"""What a catalog run tells: one event at a time while it goes, and a summary at its end."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from millicent.cost import Bill

EventKind = Literal["started", "done", "linked", "rejected", "failed", "quarantined", "bad row", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to one image, to a row, or to the run.

    kind: "started", an attempt has begun; "done", the image is accepted and written; "linked", it is the same work as one that is
        done, and shares its file; "rejected" and "failed", an attempt was in vain: another follows, in this run or a later one, or
        "quarantined" does at once; "quarantined", nothing more is tried; "bad row", a line of the manifest that no image can be
        made of; "stopped", no more images are begun.
    elapsed_s: since the run began. row_line: of the manifest, 1 being its first; 0 for an event of the run.
    attempt: 1 or more; 0 where nothing was drawn. seconds, usd: what the attempt took and cost, told with its end and not again
        with "quarantined". why: as a user reads it. set_aside: where a rejected picture is kept, under the output root.
    """

    kind: EventKind
    elapsed_s: float
    row_line: int = 0
    row_id: str = ""
    variant: str = ""
    output: str = ""
    attempt: int = 0
    seed: int | None = None
    seconds: float = 0.0
    usd: Decimal | None = None
    why: str = ""
    set_aside: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run came to.

    done, linked, quarantined: images of this run. already: images that an earlier run finished; given_up: those that an earlier run
        quarantined. recovered: of `done`, those found written by a run that was killed before it could say so; they cost nothing.
    rejected, failed: attempts of this run. bad_rows: lines that no image can be made of. elsewhere: images that another run on the
        same ledger holds.
    waiting: images that were tried in vain, or wait for the same work, and are left to the next run, after a stop.
    elapsed_s: of this run, loading not included. usd: its price, idle time and loading too; None without a price.
    images_per_hour: done images of this run; None where there are none.
    bill: of the whole ledger, earlier runs too; None where no run has a price.
    stopped: why the run ended before the last row; "" where it did not.
    """

    done: int
    linked: int
    quarantined: int
    already: int
    given_up: int
    recovered: int
    rejected: int
    failed: int
    bad_rows: int
    elsewhere: int
    waiting: int
    elapsed_s: float
    usd: Decimal | None
    images_per_hour: float | None
    bill: Bill | None
    stopped: str
