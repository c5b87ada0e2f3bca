"""CSV in all the ways that spreadsheets write it: commas, semicolons, tabs; quoted line ends; a byte order mark, `sep=;`."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence

from millicent.catalog.rows import BadRow
from millicent.catalog.text_lines import TextLines
from millicent.errors import InputError

DELIMITERS = ",;\t|"
Record = tuple[int, Mapping[str, str]]


def read_delimited(lines: TextLines) -> tuple[tuple[str, ...], Iterator[Record | BadRow]]:
    """The names of the columns, and then each row's line and values.

    Rows without any value are passed over, as spreadsheets leave them at the end. Raises InputError for a header that cannot be
    read, at once.
    """
    first, delimiter = _first_line(lines)
    reader = csv.reader(itertools.chain((first,), lines), delimiter=delimiter, strict=True)
    try:
        header = next(reader)
    except csv.Error as error:
        raise InputError(f"The header of {lines.name} cannot be read: {error}.", "Save it again as CSV UTF-8.") from error
    if lines.flaw is not None:
        raise InputError(f"The header of {lines.name} cannot be read. {lines.flaw}", "Save it as CSV UTF-8, or say its encoding.")
    names = _check_header(header, lines.name)
    return tuple(filter(None, names)), _records(reader, lines, names)


def _first_line(lines: TextLines) -> tuple[str, str]:
    """The header's first line, and the delimiter: the one that is most often in it, outside quotes."""
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise InputError(f"{lines.name} is empty.", "Give a file with a header and rows.")
    if first.lower().startswith("sep=") and len(first.strip("\r\n")) == 5:
        # Excel's own mark, which it does not show
        return next(lines, ""), first[4]
    outside = "".join(first.split('"')[::2])
    return first, max(DELIMITERS, key=outside.count)


def _check_header(header: Sequence[str], name: str) -> list[str]:
    names = [column.strip() for column in header]
    folded = [column.casefold() for column in names if column]
    if not folded:
        raise InputError(f"{name} begins with an empty header.", "Give the columns names in the first line.")
    twice = sorted({column for column in folded if folded.count(column) > 1})
    if twice:
        raise InputError(f"{name} has two columns named {', '.join(twice)}.", "Give each column a name of its own.")
    return names


def _records(reader: Iterator[list[str]], lines: TextLines, names: list[str]) -> Iterator[Record | BadRow]:
    width = len(names)
    has_unnamed = "" in names
    while True:
        line = lines.number + 1
        lines.flaw = None
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield BadRow(line, _describe(error, line, lines.number))
            continue
        if fields is None:
            return
        if lines.flaw is not None:
            yield BadRow(line, lines.flaw)
        elif not any(fields):
            continue
        elif len(fields) != width and (len(fields) < width or any(fields[width:])):
            yield BadRow(line, _describe_ragged(len(fields), width))
        else:
            values = dict(zip(names, fields, strict=False))
            if has_unnamed:
                del values[""]
            yield line, values


def _describe(error: csv.Error, first: int, last: int) -> str:
    span = f"lines {first} to {last} were taken for one row" if last > first else "it has text after a closing quote"
    if "limit" in str(error) or "unexpected end" in str(error):
        return f"A quote that opens here is not closed: {span}. Close it, or double each quote that is meant as one."
    return f"The quotes do not match ({error}; {span}). Double each quote within a quoted value."


def _describe_ragged(found: int, wanted: int) -> str:
    fix = "quote values that hold the delimiter" if found > wanted else "leave cells empty, but keep their delimiters"
    return f"The row has {found} values, the header {wanted}: {fix}."
