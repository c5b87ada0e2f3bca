"""Cards: what an edit, or who fetches its files, needs to know of a model that its own files do not say.

The cards of what is published lie in data/models; a model's folder may carry its own as card.toml, which then wins.
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
CardSchedule = Literal["base", "lightning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What every card says.

    repo, revision, files: where it is published: owner/name, a branch or commit, paths within; no paths for a whole model.
    size_bytes: of all its files, as its publisher shows it; often rounded, so the hub is asked before anything is fetched.
    source, checked: where these facts stand, and the day somebody last looked. unverified: the fields that no source settles.
    """

    name: str
    title: str
    license: str
    source: str
    checked: datetime.date
    repo: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()
    size_bytes: int | None = None
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard(Card):
    """A whole model, and how it was trained to be used.

    pipeline: "edit" takes one picture, "edit-plus" any number.
    vae_area_px, encoder_area_px: pixels of each picture as the VAE and the text encoder see it, and of the output.
    steps, schedule, true_cfg, negative_prompt: the defaults of an edit.
    max_prompt_tokens: the longest prompt in tokens, without the template and the pictures.
    lora: a file in the model's folder that is fused into the transformer when it opens.
    """

    pipeline: Pipeline
    vae_area_px: int
    encoder_area_px: int
    steps: int
    schedule: CardSchedule
    true_cfg: float
    negative_prompt: str
    max_prompt_tokens: int
    lora: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraCard(Card):
    """One LoRA file. base: the card of the model it was trained on; it fits its neighbours' shapes, but not their weights.

    steps, schedule, true_cfg: what an edit with it must use.
    """

    repo: str
    files: tuple[str, ...]
    base: str
    steps: int
    schedule: CardSchedule
    true_cfg: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerCard(Card):
    """A transformer in one ready-made file; the other parts come from `base`.

    layout: what its publisher says of the numbers in it; the header decides. steps: where a Lightning LoRA is fused in;
    else the base's, as with true_cfg.
    """

    repo: str
    files: tuple[str, ...]
    base: str
    layout: str
    schedule: CardSchedule
    steps: int | None = None
    true_cfg: float | None = None


KINDS: dict[str, type[Card]] = {"model": ModelCard, "lora": LoraCard, "transformer": TransformerCard}
_CHOICES = {"pipeline": ("edit", "edit-plus"), "schedule": ("base", "lightning")}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "vae_area_px": int,
    "encoder_area_px": int,
    "steps": int,
    "max_prompt_tokens": int,
    "size_bytes": int,
    "true_cfg": (int, float),
    "checked": datetime.date,
    "files": list,
    "unverified": list,
}


def read_card(path: Path) -> ModelCard:
    """Read a model's card. Raises CheckpointError for a key that is unknown, missing or of the wrong type."""
    card = read_any_card(path)
    if not isinstance(card, ModelCard):
        raise CheckpointError(f"{path} is a {_kind(card)}'s card; a whole model's is wanted here.", f"Correct {path}.")
    return card


def read_any_card(path: Path) -> Card:
    """Read a card of any kind, which its key `kind` tells; without it, a model's. Raises as `read_card`."""
    fix = f"Correct {path}."
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(f"The model card {path} cannot be read: {error}.", fix) from error
    kind = values.pop("kind", "model")
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"The model card says kind = {kind!r}; it can be {', '.join(KINDS)}.", fix)
    _check_keys(KINDS[kind], values, fix)
    for key, value in values.items():
        _check_value(key, value, fix)
    if unknown := sorted(set(values.get("unverified", ())) - values.keys()):
        raise CheckpointError(f"The model card calls {', '.join(unknown)} unverified, but does not say it.", fix)
    values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    if "true_cfg" in values:
        values["true_cfg"] = float(values["true_cfg"])
    card = KINDS[kind](**values)
    _check_whole(card, fix)
    return card


def _check_keys(kind: type[Card], values: Mapping[str, Any], fix: str) -> None:
    known = {field.name: field.default is MISSING for field in fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        raise CheckpointError(f"The model card has the unknown key {', '.join(unknown)}.", fix)
    if missing := sorted(key for key, needed in known.items() if needed and key not in values):
        raise CheckpointError(f"The model card lacks {', '.join(missing)}.", fix)


def _check_value(key: str, value: object, fix: str) -> None:
    wanted = _TYPES.get(key, str)
    # bool is an int to isinstance, and a date with a time is a date
    if not isinstance(value, wanted) or isinstance(value, (bool, datetime.datetime)):
        raise CheckpointError(f"The model card says {key} = {value!r}, which has the wrong type.", fix)
    if isinstance(value, list) and not (value and all(isinstance(entry, str) and entry for entry in value)):
        raise CheckpointError(f"The model card says {key} = {value!r}; it must be a list of names.", fix)
    if key in _CHOICES and value not in _CHOICES[key]:
        raise CheckpointError(f"The model card says {key} = {value!r}; it can be {' or '.join(_CHOICES[key])}.", fix)
    if isinstance(value, (int, float)) and not 1 <= value < (1e12 if key == "size_bytes" else 1e9):
        raise CheckpointError(f"The model card says {key} = {value!r}; it must be at least 1.", fix)
    if key == "repo" and str(value).count("/") != 1:
        raise CheckpointError(f"The model card says repo = {value!r}; it must be owner/name.", fix)


def _check_whole(card: Card, fix: str) -> None:
    if isinstance(card, (LoraCard, TransformerCard)) and len(card.files) != 1:
        raise CheckpointError(f"The card of {card.name} names {len(card.files)} files; a {_kind(card)} is one.", fix)
    if isinstance(card, TransformerCard) and (card.schedule == "lightning") != (card.steps is not None):
        raise CheckpointError(f"The card of {card.name} says schedule = {card.schedule!r} and steps = {card.steps}.", fix)


def _kind(card: Card) -> str:
    return next(name for name, kind in KINDS.items() if type(card) is kind)


def list_cards(kind: type[Card] = Card) -> tuple[str, ...]:
    """The names of all published cards, or of those of one kind."""
    names = sorted(path.stem for path in CARD_FOLDER.glob("*.toml"))
    return tuple(name for name in names if kind is Card or isinstance(read_any_card(CARD_FOLDER / f"{name}.toml"), kind))


def find_card(name: str) -> ModelCard:
    """The card of a published whole model. Raises ModelNotFoundError."""
    names = list_cards(ModelCard)
    if name not in names:
        raise ModelNotFoundError(f"There is no model card named {name!r}.", f"Use one of {', '.join(names)}.")
    return read_card(CARD_FOLDER / f"{name}.toml")


def find_any_card(name: str) -> Card:
    """The card of anything published: a model, a LoRA, a transformer. Raises ModelNotFoundError."""
    if name not in list_cards():
        raise ModelNotFoundError(f"There is no card named {name!r}.", f"Use one of {', '.join(list_cards())}.")
    return read_any_card(CARD_FOLDER / f"{name}.toml")
