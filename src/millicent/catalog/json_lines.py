"""JSON Lines: one object a line; and a row's values as text, whatever JSON or Parquet had them as."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from millicent.catalog.rows import BadRow
from millicent.catalog.text_lines import TextLines


def read_json_lines(lines: TextLines) -> Iterator[tuple[int, dict[str, Any]] | BadRow]:
    """Each line's number and object. Blank lines are passed over."""
    for line in lines:
        if not line.strip():
            continue
        if lines.flaw is not None:
            yield BadRow(lines.number, lines.flaw)
            lines.flaw = None
        else:
            yield _parse(line, lines.number)


def _parse(line: str, number: int) -> tuple[int, dict[str, Any]] | BadRow:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = " This looks like one JSON value over many lines; one object a line is wanted." if number == 1 else ""
        return BadRow(number, f"The line is no JSON ({error}).{hint}")
    if not isinstance(found, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(found), "a number or truth value")
        return BadRow(number, f'The line is {kind}; an object is wanted, as {{"id": "A1", "picture": "a1.jpg"}}.')
    return number, found


def as_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Every value as text: nothing as "", lists joined by ", ", objects as JSON."""
    return {name: value if isinstance(value, str) else as_text(value) for name, value in values.items()}


def as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(as_text, value))
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict) else str(value)
