"""What a picture must keep to: the thresholds of the checks, as a recipe's [checks] table may set them.

What the defaults cost and catch is measured in tests/quality/test_detection.py. This module needs no numpy, so that a recipe can be
read without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from millicent.errors import InputError

Keep = Literal["nothing", "background", "product"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Thresholds, and the checks that a recipe may switch off. Raises InputError for a value that means nothing.

    Levels are of 255; "de" is CIEDE2000; shift is a share of the picture's longer side; zoom is a share of its size.

    min_contrast_levels: below this spread a picture is blank.
    max_noise_levels: above this grain, and above twice the source's, a picture is static.
    min_structure: a picture is static where coarse forms (four or fewer across) hold less than this share of what varies in it,
        its spectrum is flat (max_flatness), and its outlines agree with the source's (a correlation) neither to min_common in four
        tiles nor to min_likeness as a whole.
    min_change_de, min_change_median_de: a picture is a copy of its source unless its most changed place differs by the one, or
        half of it by the other. allow_copy: it may be.
    min_likeness: the correlation of both pictures' outlines from which on shift and zoom can be measured.
    max_shift, max_zoom: how far the picture may have moved or grown against its source. allow_shift: it may be anywhere.
    require_registration: a picture that has too little in common with its source to measure this is rejected, not passed.
    keep: what the edit leaves as it is. Its color must not drift; with a mask, nor may anything outside that.
    max_drift_median_de, max_drift_p95_de: by how much half, and 95 %, of what stays may drift.
    """

    min_contrast_levels: float = 2.5
    max_noise_levels: float = 15.0
    min_structure: float = 0.35
    max_flatness: float = 0.35
    min_common: float = 0.6
    allow_copy: bool = False
    min_change_de: float = 8.0
    min_change_median_de: float = 2.0
    allow_shift: bool = False
    min_likeness: float = 0.3
    max_shift: float = 0.005
    max_zoom: float = 0.01
    require_registration: bool = False
    keep: Keep = "nothing"
    max_drift_median_de: float = 2.0
    max_drift_p95_de: float = 6.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), type(field.default))


def read_limits(table: Mapping[str, object]) -> Limits:
    """A recipe's [checks] table -> Limits. Raises InputError for an unknown name or a value of the wrong kind."""
    names = [field.name for field in dataclasses.fields(Limits)]
    unknown = [name for name in table if name not in names]
    if unknown:
        raise InputError(f"[checks] has no setting named {', '.join(unknown)}.", f"Use: {', '.join(names)}.")
    return Limits(**table)  # type: ignore[arg-type]  # __post_init__ checks each


def _check(name: str, value: object, kind: type) -> None:
    if kind is bool and not isinstance(value, bool):
        raise InputError(f"[checks] {name} is {value!r}.", "Use true or false.")
    if kind is str and value not in get_args(Keep):
        raise InputError(f"[checks] {name} is {value!r}.", f"Use one of: {', '.join(get_args(Keep))}.")
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value >= 0):  # type: ignore[arg-type,operator]
            raise InputError(f"[checks] {name} is {value!r}.", "Use a number, 0 or more.")
