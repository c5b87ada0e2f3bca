"""What attempts cost: those that ended, and those that a killed run had under way."""

from __future__ import annotations

from decimal import Decimal

from millicent.catalog.ledger_database import Database, utc_now
from millicent.catalog.ledger_rows import AttemptState

HOUR_S = Decimal(3600)

_NANO = Decimal("1e-9")


def bury(database: Database) -> None:
    """End the runs whose lease is over, in the caller's transaction: what they had under way is lost, and paid for."""
    dead = database.execute(
        f"SELECT id, elapsed_s, busy_until_s, cards, usd_per_hour FROM runs WHERE ended_at IS NULL AND lease_until < {database.now}"
    )
    for run_id, elapsed_s, busy_until_s, cards, usd_per_hour in dead:
        lost = database.execute("SELECT output, number FROM attempts WHERE run_id = ? AND state = 'running'", (run_id,))
        share_s = max(0.0, elapsed_s - busy_until_s) / max(1, len(lost))
        usd = None if usd_per_hour is None else price_of(share_s, Decimal(usd_per_hour) * cards / HOUR_S)
        for output, number in lost:
            why = "The run was killed while this was under way."
            pay(database, output, number, "lost", share_s, usd, why)
            database.execute(
                "UPDATE images SET state = 'planned', why = ? WHERE output = ? AND run_id = ? AND state = 'running'",
                (why, output, run_id),
            )
        stopped = "The run was killed."
        database.execute("UPDATE runs SET ended_at = ?, stopped = ? WHERE id = ?", (utc_now(), stopped, run_id))


def pay(database: Database, output: str, number: int, state: AttemptState, seconds: float, usd: Decimal | None, why: str) -> None:
    """Close an attempt; its image costs what all its attempts do."""
    database.execute(
        "UPDATE attempts SET state = ?, seconds = ?, usd = ?, why = ? WHERE output = ? AND number = ?",
        (state, seconds, as_text(usd), why, output, number),
    )
    paid = database.execute("SELECT seconds, usd FROM attempts WHERE output = ?", (output,))
    priced = [Decimal(each) for _, each in paid if each is not None]
    database.execute(
        "UPDATE images SET seconds = ?, usd = ? WHERE output = ?",
        (sum(each for each, _ in paid), as_text(sum(priced, Decimal(0))) if priced else None, output),
    )


def price_of(seconds: float, usd_per_second: Decimal) -> Decimal:
    """To a billionth of a dollar."""
    return (Decimal(str(seconds)) * usd_per_second).quantize(_NANO)


def as_text(usd: Decimal | None) -> str | None:
    """As a ledger holds dollars, without an exponent."""
    return None if usd is None else f"{usd:f}"
