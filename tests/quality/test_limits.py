"""A recipe's [checks] table: every threshold by its name, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest

from millicent.errors import InputError
from millicent.quality.limits import Limits, read_limits


def test_an_empty_table_is_the_defaults() -> None:
    assert read_limits({}) == Limits()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
def test_every_threshold_is_read_by_its_name(name: str) -> None:
    value = {bool: True, float: 0.125, str: "product"}[type(getattr(Limits(), name))]
    assert getattr(read_limits({name: value}), name) == value != getattr(Limits(), name)


def test_a_whole_number_will_do_for_a_threshold() -> None:
    assert read_limits({"min_change_de": 3}).min_change_de == 3


def test_an_unknown_name_is_told_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match="max_zom") as error:
        read_limits({"max_zom": 0.1})
    assert "max_zoom" in error.value.fix


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_zoom", "1%"),
        ("max_zoom", -0.1),
        ("max_zoom", math.nan),
        ("max_zoom", math.inf),
        ("max_zoom", True),
        ("max_zoom", None),
        ("allow_copy", 1),
        ("allow_copy", "yes"),
        ("keep", "backdrop"),
        ("keep", True),
        ("keep", ["background"]),
    ],
)
def test_a_value_that_means_nothing_is_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        read_limits({name: value})


def test_a_recipe_is_read_without_numpy() -> None:
    code = "import sys, millicent.quality.limits; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
