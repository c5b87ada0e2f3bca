"""What is to be edited, row by row: a CSV, JSON Lines or Parquet file, a folder of pictures, or a Shopify product export.

Rows stream: no file is ever held whole, and what is kept of each row is 12 to 36 bytes, by which a second one with the same id is
known. A row that cannot be used comes as a BadRow that names its line; the others go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from millicent.catalog import cloud
from millicent.catalog.delimited import Record, read_delimited
from millicent.catalog.folder import make_rows, read_folder
from millicent.catalog.json_lines import as_texts, read_json_lines
from millicent.catalog.names import SeenNames
from millicent.catalog.parquet import read_parquet
from millicent.catalog.rows import CLOUD_SCHEMES, BadRow, Chosen, Columns, Row, choose, make_row, scheme_of
from millicent.catalog.shopify import read_products, recognize_header
from millicent.catalog.text_lines import TextLines
from millicent.errors import InputError, InputNotFoundError

__all__ = ["BadRow", "Columns", "Row", "read_manifest"]

DELIMITED = (".csv", ".tsv", ".txt")
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
_ADVICE = {
    ".xlsx": "In the spreadsheet, save it as CSV UTF-8.",
    ".xls": "In the spreadsheet, save it as CSV UTF-8.",
    ".ods": "In the spreadsheet, save it as CSV, in UTF-8.",
    ".json": "Write one object a line, and call it .jsonl.",
    ".gz": "Unpack it first.",
    ".zip": "Unpack it first.",
}
_NO_TEXT = re.compile("[\ud800-\udfff\0]")


def read_manifest(path: str, columns: Columns | None = None) -> Iterator[Row | BadRow]:
    """Rows in the file's order, as they are asked for.

    path: a local file or folder, or one at s3:// or gs://; what it is, its ending says. columns: None for the usual names.
    Of rows with the same id the first one counts, the others are BadRows; so are ids that differ only in case or in Unicode's
    composition, as their pictures would overwrite each other on many systems.
    Raises InputNotFoundError, and InputError for what is no manifest and for a header that cannot be used: the first at once, the
    others when the first row is asked for. MissingExtraError where a package is missing.
    """
    asked = columns or Columns()
    is_remote = scheme_of(path) in CLOUD_SCHEMES
    if scheme_of(path) and not is_remote:
        raise InputError(f"The manifest {path} is at an address.", "Download it, or give a path, s3:// or gs://.")
    if not is_remote and not Path(path).exists():
        raise InputNotFoundError(f"There is no file or folder {path}.", "Check the path.")
    ending = PurePosixPath(path).suffix.lower()
    is_folder = (path.endswith("/") or not ending) if is_remote else Path(path).is_dir()
    if is_folder and asked.mask is not None:
        raise InputError(f"{path} is a folder, which has no column {asked.mask!r}.", "Write a CSV with the masks' names.")
    if is_folder:
        return _refuse_seconds(make_rows(cloud.list_names(path), path) if is_remote else read_folder(path))
    if ending not in (*DELIMITED, *JSON_LINES, *PARQUET):
        raise InputError(
            f"The manifest {path} has the ending {ending!r}; {', '.join((*DELIMITED, *JSON_LINES, *PARQUET))} are read.",
            _ADVICE.get(ending, "Give one of those."),
        )
    return _refuse_seconds(_read_file(path, ending, asked))


def _read_file(path: str, ending: str, columns: Columns) -> Iterator[Row | BadRow]:
    with closing(_open(path)) as file:
        base = path.rpartition("/")[0] if scheme_of(path) else str(Path(path).parent)
        if ending in PARQUET:
            yield from _make_rows(read_parquet(file, path), columns, base)
            return
        lines = TextLines(file, path, columns.encoding)
        if ending in JSON_LINES:
            yield from _make_rows(read_json_lines(lines), columns, base)
        else:
            names, records = read_delimited(lines)
            is_named = any(name is not None for name in (columns.id, columns.picture, columns.mask))
            shopify = None if is_named else recognize_header(names)
            if shopify is not None:
                yield from read_products(records, shopify)
            else:
                yield from _make_text_rows(records, choose(names, columns), base)


def _open(path: str) -> BinaryIO:
    if scheme_of(path):
        return cloud.open_file(path)
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise InputNotFoundError(f"{path} cannot be read: {error.strerror}.", "Give a file that can be read.") from error


def _make_text_rows(records: Iterable[Record | BadRow], chosen: Chosen, base: str) -> Iterator[Row | BadRow]:
    for record in records:
        yield record if isinstance(record, BadRow) else make_row(*record, chosen, base)


def _make_rows(records: Iterable[tuple[int, dict[str, Any]] | BadRow], columns: Columns, base: str) -> Iterator[Row | BadRow]:
    for record in records:
        yield record if isinstance(record, BadRow) else _make_typed_row(*record, columns, base)


def _make_typed_row(line: int, values: dict[str, Any], columns: Columns, base: str) -> Row | BadRow:
    """A row of JSON or Parquet values, each line with columns of its own. The picture may be a list: the first, and references."""
    try:
        chosen = choose(tuple(values), columns)
    except InputError as error:
        return BadRow(line, f"{error.message} {error.fix}")
    texts, pictures = as_texts(values), values[chosen.picture]
    more: tuple[str, ...] = ()
    if isinstance(pictures, list) and pictures:
        texts[chosen.picture], *rest = (place if isinstance(place, str) else "" for place in pictures)
        more = tuple(rest)
    elif not isinstance(pictures, str) and pictures:
        return BadRow(line, f"The column {chosen.picture!r} holds {type(pictures).__name__}; a path or address is wanted.")
    if flawed := next((name for name, text in texts.items() if _NO_TEXT.search(text)), None):
        return BadRow(line, f"The column {flawed!r} holds half of a surrogate pair or a NUL, which no text does.")
    return make_row(line, texts, chosen, base, more)


def _refuse_seconds(rows: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
    seen = SeenNames()
    for row in rows:
        before = seen.add(row.id, row.line) if isinstance(row, Row) else None
        if before is None:
            yield row
        else:
            assert isinstance(row, Row)
            yield BadRow(
                row.line,
                f"The id {row.id!r} was on line {before} already. Give each row one of its own, or say which column has one.",
            )
