"""Rows of a facts file into frozen dataclasses: every key known, every type right, every source there, or a refusal."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from millicent.errors import InputError

Row = TypeVar("Row")
_NAMES = {str: "text", int: "a whole number", float: "a float", bool: "true or false", datetime.date: "a date"}


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, by name. Raises InputError for a file that cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"The facts file {path} cannot be read: {error}.", f"Correct {path}.") from error


def read_rows(path: Path, kinds: Mapping[str, type[Any]]) -> dict[str, tuple[Any, ...]]:
    """The rows of each table of a facts file, as the dataclass that `kinds` names for it.

    Raises InputError for a table or key that is unknown or missing, and for a value of the wrong type.
    """
    tables = read_tables(path)
    if wrong := sorted(tables.keys() ^ kinds.keys()):
        told = "has the unknown table" if wrong[0] in tables else "lacks the table"
        raise InputError(f"The facts file {path} {told} {wrong[0]}.", f"Correct {path}.")
    for name, table in tables.items():
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            raise InputError(f"The facts file {path} has {name} as no list of tables.", f"Write each as [[{name}]] in {path}.")
    return {
        name: tuple(make_row(kinds[name], row, f"{path}: {name} {n}") for n, row in enumerate(tables[name], 1)) for name in kinds
    }


def make_row(kind: type[Row], values: Mapping[str, Any], where: str) -> Row:
    """A row of its dataclass. Lists become tuples, whole numbers floats where a float is wanted.

    Raises InputError for a key that is unknown, missing or of the wrong type, and for an empty text; `where` names the row in it.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    fix = "Correct the facts file."
    if unknown := sorted(values.keys() - known.keys()):
        raise InputError(f"{where} has the unknown key {', '.join(unknown)}.", fix)
    needed = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    if missing := sorted(needed - values.keys()):
        raise InputError(f"{where} lacks {', '.join(missing)}.", fix)
    made = {}
    for key, value in values.items():
        try:
            made[key] = _convert(value, hints[key])
        except TypeError as error:
            raise InputError(f"{where} has {key} = {value!r}; it must be {error}.", fix) from None
    return kind(**made)


def require_known(where: str, unverified: Sequence[str], kind: type[Any]) -> None:
    """Raises InputError where `unverified` names what is no field of the row's dataclass."""
    if unknown := sorted(set(unverified) - {field.name for field in fields(kind)}):
        raise InputError(f"{where} calls {', '.join(unknown)} unverified, which is no field.", "Correct the facts file.")


def _convert(value: Any, wanted: Any) -> Any:
    """The value as its annotation wants it. Raises TypeError with what it must be."""
    origin, choices = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):  # of "X | None" alone: TOML has no null, so a value that is there must be an X
        return _convert(value, next(choice for choice in choices if choice is not type(None)))
    if origin is Literal:
        if value not in choices:
            raise TypeError(f"one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        return _convert_list(value, choices)
    # bool is an int to isinstance, and a date with a time is a date
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise TypeError(_NAMES.get(wanted, f"of type {wanted.__name__}"))
    if isinstance(value, str) and not value.strip():
        raise TypeError("said")
    return value


def _convert_list(value: Any, choices: tuple[Any, ...]) -> tuple[Any, ...]:
    is_open = choices[-1] is Ellipsis
    if not isinstance(value, list) or not (is_open or len(value) == len(choices)):
        raise TypeError("a list" if is_open else f"a list of {len(choices)}")
    return tuple(_convert(entry, choices[0] if is_open else choices[n]) for n, entry in enumerate(value))
