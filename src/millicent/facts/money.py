"""Rows with money in them: dollars are written as text, so that no binary fraction ever stands between a page and a bill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from millicent.errors import InputError
from millicent.facts.rows import make_row, require_known

Row = TypeVar("Row")


def make_priced_row(kind: type[Row], values: Mapping[str, Any], where: str) -> Row:
    """A row whose fields named usd_... or ..._usd_... are Decimal, and text in the file.

    Raises InputError as `make_row` does, for money that is no text, no number, negative or endless, and where `unverified` names no
    field; `where` names the row in it.
    """
    money = {field.name for field in fields(kind) if "usd" in field.name.split("_")}  # type: ignore[arg-type]
    read = {key: read_usd(value, f"{where} has {key}") if key in money else value for key, value in values.items()}
    row = make_row(kind, read, where)
    require_known(where, values.get("unverified", ()), kind)
    return row


def read_usd(value: object, where: str) -> Decimal:
    """Dollars from text, as "0.34". Raises InputError."""
    fix = 'Write dollars as text, as "0.34".'
    if not isinstance(value, str):
        raise InputError(f"{where} = {value!r}, which is no text.", fix)
    try:
        usd = Decimal(value)
    except InvalidOperation:
        raise InputError(f"{where} = {value!r}, which is no number.", fix) from None
    if not usd.is_finite() or usd < 0:
        raise InputError(f"{where} = {value!r}; it must be zero or more.", fix)
    return usd
