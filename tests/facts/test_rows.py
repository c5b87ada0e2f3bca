"""What a facts file may not be."""

import datetime
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.errors import InputError
from millicent.facts.rows import make_row, read_rows, read_tables, require_known


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    name: str
    capability: tuple[int, int]
    rate: float
    kind: Literal["fast", "slow"]
    source: str
    checked: datetime.date
    lanes: int | None = None
    names: tuple[str, ...] = ()
    is_known: bool = False


GOOD: dict[str, Any] = {
    "name": "A",
    "capability": [8, 9],
    "rate": 2,
    "kind": "fast",
    "source": "a page",
    "checked": datetime.date(2026, 11, 22),
    "lanes": 16,
    "names": ["a", "b"],
    "is_known": True,
}


def test_a_row_has_the_types_of_its_dataclass() -> None:
    row = make_row(Fact, GOOD, "here")
    assert (row.capability, row.names, row.lanes, row.is_known) == ((8, 9), ("a", "b"), 16, True)
    assert type(row.rate) is float


@pytest.mark.parametrize("key", ["name", "capability", "rate", "kind", "source", "checked"])
def test_a_row_without_what_it_needs_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=f"here lacks {key}"):
        make_row(Fact, {name: value for name, value in GOOD.items() if name != key}, "here")


@given(st.text(string.ascii_lowercase + "_", min_size=1).filter(lambda key: key not in GOOD))
def test_an_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=f"here has the unknown key {key}"):
        make_row(Fact, {**GOOD, key: 1}, "here")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 1),
        ("name", "  "),
        ("source", ""),
        ("capability", [8]),
        ("capability", [8, 9, 1]),
        ("capability", ["8", "9"]),
        ("capability", "8.9"),
        ("rate", "2"),
        ("rate", True),
        ("kind", "middling"),
        ("kind", ["fast"]),
        ("checked", "2026-11-22"),
        ("checked", datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC)),
        ("lanes", 16.0),
        ("lanes", True),
        ("names", "a"),
        ("names", ["a", 1]),
        ("is_known", 1),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"here has {key} = "):
        make_row(Fact, {**GOOD, key: value}, "here")


def test_a_file_must_have_its_tables_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "facts.toml"
    with pytest.raises(InputError, match="cannot be read"):
        read_tables(file)
    for text, told in [
        ("fact = 1", "no list of tables"),
        ("[fact]\nname = 'A'", "no list of tables"),
        ("[[fact]]\nname = 'A'\n[[more]]\n", "unknown table more"),
        ("", "lacks the table fact"),
        ("[[fact]", "cannot be read"),
        ("[[fact]]\nname = 'A'", "fact 1 lacks capability"),
    ]:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=told):
            read_rows(file, {"fact": Fact})


def test_what_is_called_unverified_is_a_field() -> None:
    require_known("here", ("rate", "lanes"), Fact)
    with pytest.raises(InputError, match="here calls weight unverified"):
        require_known("here", ("rate", "weight"), Fact)
