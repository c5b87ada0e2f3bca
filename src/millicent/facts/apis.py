"""What paid image APIs ask for a picture, with their batch prices and how long each model will live, from data/apis.toml."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Literal

from millicent.errors import InputError
from millicent.facts.money import make_priced_row
from millicent.facts.rows import read_tables

APIS = Path(__file__).parent / "data" / "apis.toml"

Status = Literal["live", "deprecated", "shut down"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiPrice:
    """One picture from a paid API.

    provider: who is paid, a reseller too. label: which size or quality, in the provider's words ("1K", "low", "first megapixel").
    usd_per_image, batch_usd_per_image: at once, and in the provider's batch, which may take a day; None where it has none or none
    is known. extra: what an edit pays on top, as for the picture that it sends.
    status: as of `checked`. shutdown: the day that the provider named. contested: another source names another day, or none, and
    the switch-off was not seen; note says which.
    checked: the day somebody read the source. seen: the day the source itself speaks of, where that is an earlier one.
    """

    provider: str
    model: str
    label: str
    usd_per_image: Decimal
    status: Status
    source: str
    checked: datetime.date
    batch_usd_per_image: Decimal | None = None
    extra: str | None = None
    shutdown: datetime.date | None = None
    contested: bool = False
    seen: datetime.date | None = None
    note: str = ""
    unverified: tuple[str, ...] = ()


@cache
def read_apis(path: Path = APIS) -> tuple[ApiPrice, ...]:
    """Every price in the file, in its order. Raises InputError for a wrong row, and for two of one provider, model and label."""
    tables = read_tables(path)
    rows = tables.get("api")
    if tables.keys() != {"api"} or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} must hold [[api]] tables and nothing else.", f"Correct {path}.")
    prices = tuple(make_priced_row(ApiPrice, row, f"{path}: api {n}") for n, row in enumerate(rows, 1))
    names: set[tuple[str, str, str]] = set()
    for price in prices:
        _check(price, path)
        name = (price.provider, price.model, price.label)
        if name in names:
            raise InputError(f"{path} has {' '.join(name)} twice.", "Keep the newer one.")
        names.add(name)
    return prices


def status_on(price: ApiPrice, today: datetime.date) -> Status:
    """The status on a day: what was to be shut down counts as shut down from that day on, unless that is contested."""
    if price.shutdown is not None and not price.contested and today >= price.shutdown:
        return "shut down"
    return price.status


def current_apis(today: datetime.date) -> tuple[ApiPrice, ...]:
    """What can still be bought on a day, contested ones too; the cheapest first."""
    live = (price for price in read_apis() if status_on(price, today) != "shut down")
    return tuple(sorted(live, key=lambda price: (price.usd_per_image, price.provider, price.model, price.label)))


def _check(price: ApiPrice, path: Path) -> None:
    named = f"{path}: {price.provider} {price.model} {price.label}"
    if price.usd_per_image <= 0 or price.batch_usd_per_image == 0:
        raise InputError(f"{named} costs nothing.", "Give a price above zero.")
    if price.batch_usd_per_image is not None and price.batch_usd_per_image > price.usd_per_image:
        raise InputError(f"{named} costs more in batch than at once.", "Correct the prices.")
    if price.contested and not price.note:
        raise InputError(f"{named} is contested, and no note says how.", "Say in note which source says what.")
