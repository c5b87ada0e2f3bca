"""Items: what decides a picture is in its key, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.catalog.items import Item, derive_seed, item_key
from millicent.catalog.names import MAX_PART_BYTES, SeenNames, as_part, as_path, check_name, fold
from millicent.edits import MAX_SEED
from millicent.errors import OutputError

ITEM = Item(
    row_line=2,
    row_id="A1",
    variant="navy",
    pictures=("a1.png",),
    prompt="make it navy",
    seed=7,
    output="A1/navy.png",
    width=512,
    height=768,
)
SHA = "a" * 64
WEIGHTS = "f" * 64


def test_settings_are_canonical_json() -> None:
    settings = json.loads(ITEM.settings_json())
    assert settings == {
        "prompt": "make it navy",
        "negative_prompt": None,
        "width": 512,
        "height": 768,
        "fit": "fit",
        "steps": None,
        "seed": 7,
        "true_cfg": None,
        "schedule": None,
        "format": "png",
    }
    assert ITEM.settings_json() == json.dumps(settings, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "make it navy "},
        {"negative_prompt": ""},
        {"width": 513},
        {"height": 769},
        {"fit": "pad"},
        {"steps": 4},
        {"seed": 8},
        {"true_cfg": 1.0},
        {"schedule": "lightning"},
        {"output": "A1/navy.jpg"},
    ],
)
def test_what_decides_the_picture_changes_the_key(change: dict[str, Any]) -> None:
    assert item_key((SHA,), dataclasses.replace(ITEM, **change), WEIGHTS) != item_key((SHA,), ITEM, WEIGHTS)


@pytest.mark.parametrize(
    "change", [{"row_line": 9}, {"row_id": "B2"}, {"variant": "blue"}, {"pictures": ("other/place.png",)}, {"output": "B2/x.PNG"}]
)
def test_what_does_not_decide_it_does_not(change: dict[str, Any]) -> None:
    assert item_key((SHA,), dataclasses.replace(ITEM, **change), WEIGHTS) == item_key((SHA,), ITEM, WEIGHTS)


def test_pictures_and_weights_and_their_order_are_in_the_key() -> None:
    other = "b" * 64
    keys = {
        item_key(shas, ITEM, weights)
        for shas, weights in [
            ((SHA,), WEIGHTS),
            ((other,), WEIGHTS),
            ((SHA,), other),
            ((SHA, other), WEIGHTS),
            ((other, SHA), WEIGHTS),
        ]
    }
    assert len(keys) == 5
    assert all(len(key) == 64 for key in keys)


def test_the_key_of_a_given_item_never_changes() -> None:
    # a ledger of last season knows its work by these
    assert item_key((SHA,), ITEM, WEIGHTS) == "2b53c96e3e5f7fa7bcd2543359c02f3bddbdc18502b05e9102cacaa5b5e7f2dd"


def test_seeds_are_stable_and_differ_by_id_variant_and_redo() -> None:
    assert derive_seed("A1", "navy") == derive_seed("A1", "navy", 0)
    seeds = {
        derive_seed(*words) for words in [("A1", "navy"), ("A1", "blue"), ("A2", "navy"), ("A1", "navy", 1), ("A1", "navy", 2)]
    }
    assert len(seeds) == 5
    # neither do the words run into each other
    assert derive_seed("A", "1navy") != derive_seed("A1", "navy")
    assert all(0 <= seed < MAX_SEED for seed in seeds)
    assert derive_seed("A1", "navy") == 2118070286


@pytest.mark.parametrize(
    "name",
    [
        "../a.png", "a/../../b.png", "/etc/passwd.png", "a//b.png", "a/", "", ".", "..", "a/./b.png", "a\\..\\b.png", "C:/a.png",
        "c:a.png", "a\0.png", "a\n.png", "a\x7f.png", "a\x85.png", "a\ud800.png", ".hidden.png", "x/.git/y.png", "a /b.png",
        "a./b.png", " a.png", "con.png", "a/NUL", "Aux.tar.png", "com1.png", "LPT9/x.png", "COM¹.png", "x" * 241 + ".png",
        "é" * 121, "/".join(["abcdefghi"] * 101),
    ],
)  # fmt: skip
def test_names_that_lead_elsewhere_or_are_no_files_are_refused(name: str) -> None:
    with pytest.raises(OutputError):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["a.png", "A1/navy.png", "=1+1.png", "-a.png", "@x+y.png", "schön/größe.png", "x" * 240, "console.png"]
)
def test_other_names_are_taken(name: str) -> None:
    assert check_name(name) == name


def test_unicode_is_composed() -> None:
    assert check_name("scho\u0308n.png") == "sch\u00f6n.png"


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("shirt", "shirt"),
        ("AB/12", "AB%2F12"),
        ("..\\..", "%2E.%5C.%2E"),
        ('10" x 12"', "10%22 x 12%22"),
        ("50%", "50%25"),
        (".5mm", "%2E5mm"),
        ("St. Martin Inc.", "St. Martin Inc%2E"),
        ("=1+1", "=1+1"),
        ("a\u202eb", "a%E2%80%AEb"),
        ("e\u0301", "\u00e9"),
    ],
)
def test_values_are_one_part_of_a_path(value: str, part: str) -> None:
    assert as_part(value) == part
    assert check_name(part) == part


def test_slashes_of_an_id_make_folders_but_lead_nowhere_else() -> None:
    assert as_path("shoes/red 12") == "shoes/red 12"
    for value in ("../x", "/x", "a/../../x", "a//b"):
        with pytest.raises(OutputError):
            check_name(f"{as_path(value)}/navy.png")


@given(st.text(min_size=1), st.text(min_size=1))
def test_no_value_leaves_the_folder_and_no_two_share_a_part(one: str, other: str) -> None:
    for value in (one, other):
        try:
            name = check_name(f"out/{as_part(value)}.png")
        except OutputError:
            continue
        assert name.count("/") == 1
        assert name.startswith("out/")
    if as_part(one) == as_part(other):
        assert as_part(fold(one)) == as_part(fold(other))


@given(st.lists(st.text(max_size=6), max_size=200))
def test_seen_names_are_told_apart_by_what_a_file_system_sees(names: list[str]) -> None:
    seen, lines = SeenNames(), dict[str, int]()
    for line, name in enumerate(names, start=1):
        assert seen.add(name, line) == lines.get(fold(name))
        lines.setdefault(fold(name), line)


def test_seen_names_grow() -> None:
    seen = SeenNames()
    assert not any(seen.add(f"name {number}", number) for number in range(1, 20_000))
    assert all(seen.add(f"NAME {number}", 0) == number for number in range(1, 20_000))


@pytest.mark.parametrize(("one", "other"), [("A", "a"), ("\u00e9", "e\u0301"), ("STRASSE", "stra\u00dfe"), ("\u212b", "\u00e5")])
def test_names_that_only_some_systems_tell_apart(one: str, other: str) -> None:
    assert fold(one) == fold(other)
    assert MAX_PART_BYTES < 255
