"""From a model's name and an edit's options to sizes: which networks run, on how many tokens, how often. No weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from millicent import demo
from millicent.checkpoint.folder import read_json
from millicent.errors import InputError, ModelNotFoundError
from millicent.facts.models import LoraCard, ModelCard, TransformerCard, find_any_card, list_cards, read_card
from millicent.model.config import MMDiTConfig, VAEConfig
from millicent.model.sizes import PATCH_PX, ModelSizes, QwenVLSizes, Workload

DEFAULT_MODEL = "qwen-image-edit-2511"
LIGHTNING_STEPS = (4, 8)  # what Lightning LoRAs are published for; with them guidance is off
_FIX = "Use one of `millicent pull`'s names, or a model folder."


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """told: what was assumed, a line each."""

    title: str
    model: ModelSizes
    work: Workload
    told: tuple[str, ...]


def ask(model: str = DEFAULT_MODEL, size: tuple[int, int] | None = None, references: int = 1, steps: int | None = None) -> Asked:
    """model: a card's name, a model folder with a card.toml, or demo. size: (width, height), the model's own by default.

    Steps that are not said are 4, with the Lightning LoRA, for a whole model; else as its card says.
    Raises ModelNotFoundError, CheckpointError for a folder that is another model, InputError for a size or count that cannot be.
    """
    card, sizes, own_steps = _find(model)
    if not 1 <= references <= 16:
        raise InputError(f"{references} references were asked for.", "Use 1 to 16.")
    if card.pipeline == "edit" and references > 1:
        raise InputError(
            f"{card.title} edits one picture, and {references} were asked for.", "Use a model of the 2509 or 2511 kind."
        )
    taken = (own_steps or LIGHTNING_STEPS[0]) if steps is None else steps
    if not 1 <= taken <= 200:
        raise InputError(f"{taken} steps were asked for.", "Use 1 to 200.")
    is_distilled = taken in LIGHTNING_STEPS or own_steps is not None
    guided = card.true_cfg > 1 and not is_distilled
    width, height = _drawn(size, card.vae_area_px)
    return Asked(
        title=card.title,
        model=sizes,
        work=Workload(
            width=width,
            height=height,
            references=references,
            steps=taken,
            reference_px=card.vae_area_px,
            encoder_px=card.encoder_area_px,
            guided=guided,
        ),
        told=tuple(_tell(card, taken, guided, is_distilled, size, (width, height))),
    )


def _find(name: str) -> tuple[ModelCard, ModelSizes, int | None]:
    """A model's card and sizes, and the steps of one that is distilled."""
    folder = demo.folder() if name == "demo" else Path(name)
    if (folder / "card.toml").is_file():
        card = read_card(folder / "card.toml")
        return card, read_sizes(folder), card.steps if card.lora else None
    if name not in list_cards():
        raise ModelNotFoundError(f"There is no model named {name!r}, and no folder {name} with a card.toml.", _FIX)
    found = find_any_card(name)
    steps = found.steps if isinstance(found, (LoraCard, TransformerCard)) else None
    base = find_any_card(found.base) if isinstance(found, (LoraCard, TransformerCard)) else found
    assert isinstance(base, ModelCard)
    return base, ModelSizes(transformer=MMDiTConfig(zero_cond_t="2511" in base.name)), steps


def read_sizes(folder: Path) -> ModelSizes:
    """Of a model folder's three networks, from their config.json. Raises CheckpointError."""
    return ModelSizes(
        transformer=MMDiTConfig.from_dict(read_json(folder / "transformer" / "config.json")),
        text_encoder=QwenVLSizes.from_dict(read_json(folder / "text_encoder" / "config.json")),
        vae=VAEConfig.from_dict(read_json(folder / "vae" / "config.json")),
    )


def _drawn(size: tuple[int, int] | None, area_px: int) -> tuple[int, int]:
    """What the model draws, as engine/pipeline.py has it: no more than its own area, in the asked shape."""
    side = round(math.sqrt(area_px))
    width, height = size or (side, side)
    if not (min(width, height) >= 16 and max(width, height) <= min(16384, 16 * min(width, height))):
        raise InputError(
            f"The size is {width}x{height} pixels.", "Use 16 to 16384 a side, the longer at most 16 times the shorter."
        )
    scale = math.sqrt(min(area_px, width * height) / (width * height))
    return tuple(max(PATCH_PX, round(each * scale / PATCH_PX) * PATCH_PX) for each in (width, height))  # type: ignore[return-value]


def _tell(
    card: ModelCard, steps: int, guided: bool, is_distilled: bool, size: tuple[int, int] | None, drawn: tuple[int, int]
) -> list[str]:
    told = []
    if guided:
        told.append(f"{steps} steps with guidance, two forwards each: {card.title} is not distilled for so few")
    elif is_distilled and card.lora is None:
        told.append(f"{steps} steps without guidance, as with a Lightning LoRA")
    if size is not None and size != drawn:
        told.append(f"drawn at {drawn[0]}x{drawn[1]} and then brought to {size[0]}x{size[1]}")
    return told
