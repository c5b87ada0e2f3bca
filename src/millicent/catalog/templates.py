"""Text with a row's values in it: "put the {color} {title} on a sand backdrop". {{ and }} stand for braces.

Deliberately not str.format: its fields can reach into objects, and cannot name the column "Option1 Value: main".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from millicent.errors import InputError

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
SHOWN_COLUMNS = 12


@dataclass(frozen=True, slots=True)
class Template:
    """parts: text as it is, and between two of them the name of a column: one more text than names."""

    texts: tuple[str, ...]
    names: tuple[str, ...]


class FillError(Exception):
    """A row lacks a value. Its text says which, and what the row has; no MillicentError: it ends a row, not the run."""


@functools.lru_cache(maxsize=256)
def parse_template(text: str) -> Template:
    """Raises InputError for a brace that is neither doubled nor part of a name."""
    texts, names, at, current = [], [], 0, ""
    for found in _TOKEN.finditer(text):
        current += text[at : found.start()]
        at = found.end()
        token = found[0]
        if token in ("{{", "}}"):
            current += token[0]
        elif found[1] is not None and found[1].strip():
            texts.append(current)
            names.append(found[1].strip())
            current = ""
        else:
            raise InputError(
                f"The template {text!r} has a stray {token!r} at character {found.start() + 1}.",
                "Write {column}, and double a brace that is meant as one: {{ or }}.",
            )
    return Template((*texts, current + text[at:]), tuple(names))


def fill(template: Template, sources: Sequence[Mapping[str, str]], guard: Callable[[str, str], str] | None = None) -> str:
    """The text with each name's value in its place. guard: called with name and value, gives what is put there.

    A value is taken from the first source that has the name, as it is or else without regard to case. Raises FillError for a
    column that is not there or empty.
    """
    pieces = [template.texts[0]]
    for name, text in zip(template.names, template.texts[1:], strict=True):
        value = _find_value(sources, name)
        pieces.append(guard(name, value) if guard is not None else value)
        pieces.append(text)
    return "".join(pieces)


def _find_value(sources: Sequence[Mapping[str, str]], name: str) -> str:
    """A column's value without the space around it."""
    value = next((value for values in sources if (value := _look_up(values, name)) is not None), None)
    if value is None:
        names = [column for values in sources for column in values]
        shown = ", ".join(names[:SHOWN_COLUMNS]) + (", ..." if len(names) > SHOWN_COLUMNS else "")
        raise FillError(f"There is no column {name!r}; there are {shown}.")
    value = value.strip()
    if not value:
        raise FillError(f"The column {name!r} is empty, and the recipe wants it.")
    return value


def _look_up(values: Mapping[str, str], name: str) -> str | None:
    if name in values:
        return values[name]
    folded = name.casefold()
    return next((value for column, value in values.items() if column.casefold() == folded), None)
