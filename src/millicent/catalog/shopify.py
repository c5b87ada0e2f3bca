"""Shopify's product export: one row for each of a product's variants and pictures, joined by the product's handle.

Every picture of a product becomes one row of ours: a catalog's photographs are what is to be edited. Its columns are the
product's (which Shopify writes on the first row alone), then those of the first variant that shows this picture, then its own.
Both of Shopify's headers are read: "Handle, Title, ... Image Src, Image Position, Variant Image" and, since 2025, "Title, URL
handle, ... Product image URL, Image position, Variant image URL".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from millicent.catalog.delimited import Record
from millicent.catalog.rows import BadRow, Row


@dataclass(frozen=True, slots=True)
class Header:
    """Shopify's names of what is needed here."""

    handle: str
    picture: str
    position: str
    variant_picture: str


HEADERS = (
    Header("Handle", "Image Src", "Image Position", "Variant Image"),
    Header("URL handle", "Product image URL", "Image position", "Variant image URL"),
)


def recognize_header(names: tuple[str, ...]) -> Header | None:
    """The columns as this file spells them; None where it is no product export."""
    by_fold = {name.casefold(): name for name in names}
    for header in HEADERS:
        if all(name.casefold() in by_fold for name in (header.handle, header.picture, "Title")):
            spelled = (header.handle, header.picture, header.position, header.variant_picture)
            return Header(*(by_fold.get(name.casefold(), name) for name in spelled))
    return None


def read_products(records: Iterable[Record | BadRow], header: Header) -> Iterator[Row | BadRow]:
    """A row for each picture; a product without any is a BadRow. No more than one product is held at a time."""

    def handle_of(record: Record | BadRow) -> str | None:
        return None if isinstance(record, BadRow) else record[1].get(header.handle, "").strip()

    for handle, group in itertools.groupby(records, handle_of):
        if handle is None:
            yield from (record for record in group if isinstance(record, BadRow))
            continue
        product = [record for record in group if not isinstance(record, BadRow)]
        if handle:
            yield from _read_product(handle, product, header)
        else:
            yield from (BadRow(line, f"The column {header.handle!r} is empty; Shopify's handle is wanted.") for line, _ in product)


def _read_product(handle: str, product: list[Record], header: Header) -> Iterator[Row | BadRow]:
    first_line, shared = product[0]
    pictures: dict[str, Record] = {}
    variants: dict[str, Mapping[str, str]] = {}
    for line, columns in product:
        if location := columns[header.picture].strip():
            pictures.setdefault(location, (line, columns))
        if shown := columns.get(header.variant_picture, "").strip():
            variants.setdefault(shown, columns)
            pictures.setdefault(shown, (line, columns))
    if not pictures:
        yield BadRow(first_line, f"The product {handle!r} has no picture: {header.picture!r} is empty in all its rows.")
    for number, (location, (line, columns)) in enumerate(pictures.items(), start=1):
        merged = {**shared, **_filled(variants.get(location, {})), **_filled(columns)}
        yield Row(line, handle if number == 1 else f"{handle}-{_position(columns, header, number)}", location, (), merged)


def _position(columns: Mapping[str, str], header: Header, number: int) -> str:
    """Shopify's own number of the picture, which stays when the file is exported in another order."""
    position = columns.get(header.position, "").strip()
    return position if position.isdecimal() and columns[header.picture].strip() else str(number)


def _filled(columns: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in columns.items() if value.strip()}
