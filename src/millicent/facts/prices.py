"""What it costs to rent a card, to keep files and to send them out: dated, with sources, from data/prices/<provider>.toml.

A price is appended with its date and never overwritten. Files that a user's `millicent cost refresh` wrote are read after the
package's, and end the prices before them.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache, lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

from millicent.errors import InputError
from millicent.facts.money import make_priced_row
from millicent.facts.rows import read_tables

PRICES = Path(__file__).parent / "data" / "prices"
STALE_AFTER_DAYS = 60

RentalKind = Literal["on-demand", "community", "spot", "serverless", "reserved"]
StorageKind = Literal["container disk", "volume", "stopped volume", "network volume", "block storage"]


class Dated(Protocol):
    """Anything that was read on one day, and maybe speaks of an earlier one."""

    @property
    def checked(self) -> datetime.date: ...
    @property
    def seen(self) -> datetime.date | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RentalPrice:
    """One card for an hour. gpu: the short name in facts/gpus.py.

    usd_per_hour: per card; the lowest, where the source gives a range, which then goes up to highest_usd_per_hour.
    since, until: the first and last day it held, as far as anybody saw; no until where it was not seen to change.
    checked: the day somebody read the source. seen: the day the source itself speaks of, where that is an earlier one.
    unverified: the fields that no source settles; note says why.
    """

    provider: str
    gpu: str
    kind: RentalKind
    usd_per_hour: Decimal
    since: datetime.date
    source: str
    checked: datetime.date
    until: datetime.date | None = None
    highest_usd_per_hour: Decimal | None = None
    seen: datetime.date | None = None
    note: str = ""
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoragePrice:
    """A GB (10^9 bytes) kept for a month. above_gb: the price holds for what lies above so many GB."""

    provider: str
    kind: StorageKind
    usd_per_gb_month: Decimal
    source: str
    checked: datetime.date
    above_gb: int = 0
    seen: datetime.date | None = None
    note: str = ""
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressPrice:
    """A GB (10^9 bytes) sent out of a provider's network."""

    provider: str
    usd_per_gb: Decimal
    source: str
    checked: datetime.date
    seen: datetime.date | None = None
    note: str = ""
    unverified: tuple[str, ...] = ()


_TABLES: dict[str, type[Any]] = {"rental": RentalPrice, "storage": StoragePrice, "egress": EgressPrice}


def read_prices(folder: Path | None = None) -> tuple[RentalPrice, ...]:
    """Every rental price, by provider, card, kind and date; with those in a user's folder, if it is there.

    In that folder a newer price ends an older one of the same provider, card and kind, the package's too; of two from the same day
    the later file's counts. Raises InputError for a wrong row, and for dates that overlap within one file or within the package.
    """
    if folder is None or not folder.is_dir():
        return _read_packaged()
    # a ranking of every card asks for each card's prices
    return _merge(tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.glob("*.toml"))))


def prices_of(gpu: str, on: datetime.date, folder: Path | None = None) -> tuple[RentalPrice, ...]:
    """The prices of a card (its short name) that held on a day, the cheapest first; none is an answer too."""
    held = [price for price in read_prices(folder) if price.gpu == gpu and price.since <= on <= (price.until or on)]
    return tuple(sorted(held, key=lambda price: (price.usd_per_hour, price.provider, price.kind)))


def is_stale(price: Dated, today: datetime.date) -> bool:
    """Whether nobody has seen the price hold in the last STALE_AFTER_DAYS days."""
    return (today - (price.seen or price.checked)).days > STALE_AFTER_DAYS


@cache
def read_storage() -> tuple[StoragePrice, ...]:
    """Every storage price. Raises InputError."""
    return tuple(price for path in _packaged_files() for price in _read_file(path, "storage"))


@cache
def read_egress() -> tuple[EgressPrice, ...]:
    """Every price of traffic out. Raises InputError."""
    return tuple(price for path in _packaged_files() for price in _read_file(path, "egress"))


@cache
def _read_packaged() -> tuple[RentalPrice, ...]:
    prices = [price for path in _packaged_files() for price in _read_file(path, "rental")]
    _check_overlaps(prices, str(PRICES))
    return _in_order(prices)


@lru_cache(maxsize=1)
def _merge(files: tuple[tuple[Path, int, int], ...]) -> tuple[RentalPrice, ...]:
    """The package's prices and those of files, each given with when it was written and how long it is."""
    prices = _read_packaged()
    for path, _, _ in files:
        prices = _supersede(prices, _read_file(path, "rental"))
    return _in_order(prices)


def _packaged_files() -> list[Path]:
    return sorted(PRICES.glob("*.toml"))


def _read_file(path: Path, table: str) -> tuple[Any, ...]:
    """One table's rows of a price file, the whole of which is checked."""
    tables = read_tables(path)
    if unknown := sorted(tables.keys() - _TABLES.keys()):
        raise InputError(f"{path} has the unknown table {', '.join(unknown)}.", f"Use {', '.join(_TABLES)}.")
    rows: dict[str, list[Any]] = {name: [] for name in _TABLES}
    for name, entries in tables.items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{path} has {name} as no list of tables.", f"Write each as [[{name}]].")
        rows[name] = [make_priced_row(_TABLES[name], entry, f"{path}: {name} {n}") for n, entry in enumerate(entries, 1)]
    for price in rows["rental"]:
        _check_rental(price, str(path))
    _check_overlaps(rows["rental"], str(path))
    return tuple(rows[table])


def _check_rental(price: RentalPrice, where: str) -> None:
    named = f"{where}: {_key_text(price)} since {price.since}"
    if price.usd_per_hour <= 0:
        raise InputError(f"{named} costs nothing.", "Give a price above zero.")
    if price.highest_usd_per_hour is not None and price.highest_usd_per_hour <= price.usd_per_hour:
        raise InputError(f"{named} goes from {price.usd_per_hour} up to {price.highest_usd_per_hour}.", "Give the lower one first.")
    if price.until is not None and price.until < price.since:
        raise InputError(f"{named} ends on {price.until}, before it begins.", "Correct the dates.")


def _check_overlaps(prices: Iterable[RentalPrice], where: str) -> None:
    for earlier, later in pairwise(_in_order(prices)):
        if _key(earlier) == _key(later) and _overlap(earlier, later):
            told = earlier.until or "no end"
            raise InputError(
                f"{where}: {_key_text(earlier)} has a price from {earlier.since} to {told} and another from {later.since}.",
                f"End the first with until = {later.since - datetime.timedelta(days=1)}, or give its true dates.",
            )


def _supersede(prices: tuple[RentalPrice, ...], newer: tuple[RentalPrice, ...]) -> tuple[RentalPrice, ...]:
    """Newer prices beside older ones; an older one ends the day before a newer one of its key, or goes if that leaves no day."""
    kept: list[RentalPrice] = []
    by_key = {key: list(rows) for key, rows in groupby(_in_order(newer), key=_key)}
    for price in prices:
        starts = [each.since for each in by_key.get(_key(price), ()) if _overlap(each, price)]
        if not starts:
            kept.append(price)
        elif price.since < min(starts):
            kept.append(replace(price, until=min(starts) - datetime.timedelta(days=1)))
    return (*kept, *newer)


def _overlap(one: RentalPrice, other: RentalPrice) -> bool:
    return one.since <= (other.until or datetime.date.max) and other.since <= (one.until or datetime.date.max)


def _in_order(prices: Iterable[RentalPrice]) -> tuple[RentalPrice, ...]:
    return tuple(sorted(prices, key=lambda price: (*_key(price), price.since)))


def _key(price: RentalPrice) -> tuple[str, str, str]:
    return price.provider, price.gpu, price.kind


def _key_text(price: RentalPrice) -> str:
    return f"{price.provider} {price.gpu} {price.kind}"
