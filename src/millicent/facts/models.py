"""Model cards: what an edit needs to know of a model that its config.json files do not say.

The cards of the published models lie in data/models; a folder may carry its own as card.toml, which then wins.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from millicent.errors import CheckpointError, ModelNotFoundError

CARD_FOLDER = Path(__file__).parent / "data" / "models"

Pipeline = Literal["edit", "edit-plus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """How a model was trained to be used.

    pipeline: "edit" takes one picture, "edit-plus" any number.
    vae_area_px, encoder_area_px: pixels of each picture as the VAE and the text encoder see it, and of the output.
    steps, schedule, true_cfg, negative_prompt: the defaults of an edit.
    max_prompt_tokens: the longest prompt in tokens, without the template and the pictures.
    lora: a file in the model's folder that is fused into the transformer when it opens.
    source, checked: where these facts stand, and the day somebody last looked.
    """

    name: str
    title: str
    pipeline: Pipeline
    vae_area_px: int
    encoder_area_px: int
    steps: int
    schedule: Literal["base", "lightning"]
    true_cfg: float
    negative_prompt: str
    max_prompt_tokens: int
    license: str
    source: str
    checked: datetime.date
    lora: str | None = None


_CHOICES = {"pipeline": ("edit", "edit-plus"), "schedule": ("base", "lightning")}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "vae_area_px": int,
    "encoder_area_px": int,
    "steps": int,
    "max_prompt_tokens": int,
    "true_cfg": (int, float),
    "checked": datetime.date,
}


def read_card(path: Path) -> ModelCard:
    """Read one card. Raises CheckpointError for a key that is unknown, missing or of the wrong type."""
    fix = f"Correct {path}."
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(f"The model card {path} cannot be read: {error}.", fix) from error
    _check_keys(values, fix)
    for key, value in values.items():
        _check_value(key, value, fix)
    return ModelCard(**{**values, "true_cfg": float(values["true_cfg"])})


def _check_keys(values: Mapping[str, Any], fix: str) -> None:
    known = {field.name: field.default is MISSING for field in fields(ModelCard)}
    if unknown := sorted(values.keys() - known.keys()):
        raise CheckpointError(f"The model card has the unknown key {', '.join(unknown)}.", fix)
    if missing := sorted(key for key, needed in known.items() if needed and key not in values):
        raise CheckpointError(f"The model card lacks {', '.join(missing)}.", fix)


def _check_value(key: str, value: object, fix: str) -> None:
    wanted = _TYPES.get(key, str)
    # bool is an int to isinstance, and a date with a time is a date
    if not isinstance(value, wanted) or isinstance(value, (bool, datetime.datetime)):
        raise CheckpointError(f"The model card says {key} = {value!r}, which has the wrong type.", fix)
    if key in _CHOICES and value not in _CHOICES[key]:
        raise CheckpointError(f"The model card says {key} = {value!r}; it can be {' or '.join(_CHOICES[key])}.", fix)
    if isinstance(value, (int, float)) and not 1 <= value < 1e9:
        raise CheckpointError(f"The model card says {key} = {value!r}; it must be at least 1.", fix)


def list_cards() -> tuple[str, ...]:
    """The names that `find_card` knows."""
    return tuple(sorted(path.stem for path in CARD_FOLDER.glob("*.toml")))


def find_card(name: str) -> ModelCard:
    """The card of a published model. Raises ModelNotFoundError."""
    if name not in list_cards():
        raise ModelNotFoundError(f"There is no model card named {name!r}.", f"Use one of {', '.join(list_cards())}.")
    return read_card(CARD_FOLDER / f"{name}.toml")
