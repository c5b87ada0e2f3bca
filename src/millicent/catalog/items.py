"""One picture to draw: what a row and a variant of the recipe come to, and the key that says when two are the same work."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from millicent.edits import Schedule
from millicent.images import Fit

PictureFormat = Literal["png", "jpeg", "webp"]
ENDINGS: dict[str, PictureFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

_KEY_VERSION = "millicent-item-1"  # a change of what a key covers changes this, and with it every key
_SEED_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One picture to draw. `None` means, as in EditRequest: as the model's card says.

    row_line, row_id, variant: where it comes from. pictures: where its inputs lie: paths, s3://, gs:// or https://.
    mask: where one lies that the result is checked by.
    width, height: of the output in pixels, both or neither. seed: always set, so that the same item is the same picture.
    output: where the picture goes under the output folder, checked by names.check_name; its ending says its format.
    """

    row_line: int
    row_id: str
    variant: str
    pictures: tuple[str, ...]
    prompt: str
    seed: int
    output: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    fit: Fit = "fit"
    steps: int | None = None
    true_cfg: float | None = None
    schedule: Schedule | None = None
    mask: str | None = None

    @property
    def format(self) -> PictureFormat:
        return ENDINGS[self.output[self.output.rindex(".") :].lower()]

    def settings_json(self) -> str:
        """Canonical JSON of all that decides the output's bytes, besides the inputs' bytes and the weights."""
        settings = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": self.width,
            "height": self.height,
            "fit": self.fit,
            "steps": self.steps,
            "seed": self.seed,
            "true_cfg": self.true_cfg,
            "schedule": self.schedule,
            "format": self.format,
        }
        return json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def item_key(picture_sha256s: tuple[str, ...], item: Item, weights_sha256: str) -> str:
    """The SHA-256 in hex over the inputs' bytes, in their order, the settings and the weights: equal keys are equal pictures."""
    parts = [_KEY_VERSION, weights_sha256, list(picture_sha256s), item.settings_json()]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


def derive_seed(row_id: str, variant: str, redo: int = 0) -> int:
    """A seed of 32 bits that is the same in every run. redo: 0, then 1, 2 ... for each new try after a rejected picture."""
    text = json.dumps([row_id, variant] if redo == 0 else [row_id, variant, redo])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[: _SEED_BITS // 8], "big")
