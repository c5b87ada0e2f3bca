"""What a ledger's runs have cost, loading, idle time and all, as the bill that forecasts come as too."""

from __future__ import annotations

import datetime
from collections import defaultdict
from decimal import Decimal

from millicent.catalog.ledger import AttemptState, Ledger, Run
from millicent.cost import Bill, GpuPart, Part
from millicent.facts.prices import RentalPrice

PARTS: dict[AttemptState, GpuPart] = {"done": "busy", "rejected": "rejects", "failed": "retries", "lost": "spot losses"}

_HOUR_S = Decimal(3600)
_NANO = Decimal("1e-9")
_MICRO = Decimal("1e-6")


def bill_of(ledger: Ledger) -> Bill | None:
    """All runs of a ledger together, each at its own price; None where none had one.

    A run is billed from the start of its loading to its end; of a killed one, to its last sign of life. Runs without a price are
    left out, and so are their images.
    """
    runs = {run.id: run for run in ledger.runs() if run.usd_per_hour is not None}
    if not runs:
        return None
    seconds: dict[str, dict[GpuPart, Decimal]] = {run.id: defaultdict(Decimal) for run in runs.values()}
    images = accepted = 0
    for spent in ledger.spent():
        if spent.run_id in runs:
            seconds[spent.run_id][PARTS[spent.state]] += _seconds(spent.seconds)
            images += spent.attempts if spent.state in ("done", "rejected") else 0
            accepted += spent.attempts if spent.state == "done" else 0
    hours: dict[GpuPart, Decimal] = defaultdict(Decimal)
    usd: dict[GpuPart, Decimal] = defaultdict(Decimal)
    for run in runs.values():
        parts = seconds[run.id]
        parts["idle"] = max(Decimal(0), _seconds(run.elapsed_s) - sum(parts.values(), Decimal(0)))
        parts["loading"] = _seconds(run.loading_s)
        for name, part_s in parts.items():
            hours[name] += part_s * run.cards / _HOUR_S
            usd[name] += part_s * run.cards / _HOUR_S * (run.usd_per_hour or 0)
    last = list(runs.values())[-1]
    return Bill(
        parts=tuple(Part(name, hours[name], usd[name].quantize(_NANO)) for name in hours),
        images=Decimal(images),
        accepted=Decimal(accepted),
        price=_price(last),
        cards=last.cards,
        assumptions=_assume(list(runs.values())),
    )


def _seconds(seconds: float) -> Decimal:
    return Decimal(str(seconds)).quantize(_MICRO)


def _price(run: Run) -> RentalPrice:
    assert run.usd_per_hour is not None
    day = datetime.datetime.fromisoformat(run.started_at).date()
    return RentalPrice(
        provider="your price",
        gpu="",
        kind="on-demand",
        usd_per_hour=run.usd_per_hour,
        since=day,
        source="as given to the run",
        checked=day,
    )


def _assume(runs: list[Run]) -> tuple[str, ...]:
    prices = sorted({run.usd_per_hour for run in runs if run.usd_per_hour is not None})
    told = " and ".join(f"${price}" for price in prices)
    return (
        f"measured over {len(runs)} run{'s' if len(runs) > 1 else ''} at {told} for an hour of a card",
        "a run that was killed is billed to its last sign of life, at most some seconds before its end",
        "time rented before and after the runs, storage, traffic, people and taxes are not counted",
        "a linked image costs nothing, and is not counted as an image",
    )
