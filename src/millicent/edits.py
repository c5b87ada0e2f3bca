"""The nouns of the library: what is asked for, what comes back, and the one method between them.

The catalog and the server need nothing more than an object with `.edit(request)`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image

from millicent.errors import EmptyPromptError, InputError, ScheduleError, SizeError
from millicent.images import Fit

Schedule = Literal["base", "lightning"]
Stage = Literal["prepare", "encode", "denoise", "decode"]

MAX_SEED = 2**63 - 1  # torch.Generator takes a signed 64-bit seed
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRequest:
    """One edit. `None` means: as the model's card says.

    images: one to as many references as the model takes; the output follows the last one's shape.
    schedule: "base" or "lightning" (the schedule that a distillation LoRA was trained with).
    sigmas: noise levels in place of a schedule, falling, in (0, 1], without the final 0; used exactly as given.
    true_cfg: guidance strength; above 1 it needs a negative prompt and doubles the cost.
    height, width: the exact output size in pixels, both or neither.
    fit: how an exact size is met. "fit" draws in the asked shape; "pad" and "crop" draw in the input's shape, then pad
        with white or cut the overhang.
    variants: pictures to draw; variant k uses seed + k, so that each can be drawn again alone.
    """

    images: tuple[Image.Image, ...]
    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    schedule: Schedule | None = None
    sigmas: tuple[float, ...] | None = None
    seed: int | None = None
    true_cfg: float | None = None
    height: int | None = None
    width: int | None = None
    fit: Fit = "fit"
    variants: int = 1

    def __post_init__(self) -> None:
        """Refuse what no model could draw. Raises InputError and its kinds."""
        if not self.images:
            raise InputError("No picture was given.", "Give at least one picture to edit.")
        if not self.prompt.strip():
            raise EmptyPromptError("The prompt is empty.", 'Say what to change, as in "make the shirt navy blue".')
        for text in (self.prompt, self.negative_prompt or ""):
            if _HALF_PAIR.search(text):  # as of an argument that was no UTF-8
                raise InputError(f"The prompt {text!r} holds half of a surrogate pair, which no text does.", "Give it in UTF-8.")
        _check_size(self.height, self.width)
        if self.fit not in ("fit", "pad", "crop"):
            raise SizeError(f"fit is {self.fit!r}.", "Use fit, pad or crop.")
        _check_schedule(self.steps, self.sigmas, self.schedule)
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED - self.variants:
            raise InputError(f"The seed is {self.seed}.", f"Use a whole number from 0 to {MAX_SEED - self.variants}.")
        if not 1 <= self.variants <= 64:
            raise InputError(f"{self.variants} variants were asked for.", "Ask for 1 to 64.")
        if self.true_cfg is not None and not (math.isfinite(self.true_cfg) and 1 <= self.true_cfg <= 20):
            raise InputError(f"true_cfg is {self.true_cfg}.", "Use a number from 1 (off) to 20.")


def _check_size(height: int | None, width: int | None) -> None:
    if (height is None) != (width is None):
        raise SizeError("Only one of height and width was given.", "Give both, or neither.")
    if height is None or width is None:
        return
    if not (16 <= height <= 16384 and 16 <= width <= 16384):
        raise SizeError(f"The output size is {width}x{height} pixels.", "Use 16 to 16384 pixels a side.")
    if max(height, width) > 16 * min(height, width):
        raise SizeError(f"The output size is {width}x{height} pixels.", "Keep the longer side within 16 times the shorter.")


def _check_schedule(steps: int | None, sigmas: tuple[float, ...] | None, schedule: str | None) -> None:
    if schedule not in (None, "base", "lightning"):
        raise ScheduleError(f"The schedule is {schedule!r}.", "Use base or lightning.")
    if steps is not None and not 1 <= steps <= 1000:
        raise ScheduleError(f"{steps} steps were asked for.", "Use 1 to 1000.")
    if sigmas is None:
        return
    if schedule is not None:
        raise ScheduleError("Both sigmas and a schedule were given.", "Give one of them.")
    if steps is not None and steps != len(sigmas):
        raise ScheduleError(f"{steps} steps and {len(sigmas)} sigmas were given.", "Leave out steps: it follows from sigmas.")
    falling = all(a > b for a, b in itertools.pairwise(sigmas))
    if not sigmas or not all(math.isfinite(s) and 0 < s <= 1 for s in sigmas) or not falling:
        shown = ", ".join(f"{s:g}" for s in sigmas)
        raise ScheduleError(
            f"The sigmas are [{shown}].", "Give finite numbers in (0, 1], each below the one before, without the final 0."
        )


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock seconds of each stage of one edit; on a GPU from one event of its stream to the next.

    In a run of many (Editor.edit_many) nothing waits between stages: `prepare_s` is the preparing thread's, the others are from
    one event of the GPU's stream to the next, and as the stages of neighbors overlap, `total_s` is more than an edit adds to the
    run. What it adds is EditResult.elapsed_s.
    """

    prepare_s: float
    encode_s: float
    denoise_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        return self.prepare_s + self.encode_s + self.denoise_s + self.decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class EditResult:
    """The pictures of one request, with all that it takes to draw them again.

    sigmas: the noise levels used, the final 0 included. seeds: one for each picture.
    weights_sha256: over every weight file that went in, LoRAs included (checkpoint/fingerprint.py).
    elapsed_s: in a run of many, the seconds from the end of the edit before (of the first: from the run's start) to this one's
        end, so that they add up to the run's; None for an edit alone, which takes timings.total_s.
    """

    images: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    sigmas: tuple[float, ...]
    schedule: str
    true_cfg: float
    model: str
    weights_sha256: str
    timings: Timings
    elapsed_s: float | None = None

    @property
    def image(self) -> Image.Image:
        return self.images[0]

    @property
    def seed(self) -> int:
        return self.seeds[0]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


@dataclass(frozen=True, slots=True)
class Progress:
    """Where an edit is: `step` of `steps` within `stage`. Sent before each step and once at each stage's end."""

    stage: Stage
    step: int
    steps: int


OnProgress = Callable[[Progress], None]


class SupportsEdit(Protocol):
    """What the catalog and the server ask of an editor."""

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> EditResult: ...
