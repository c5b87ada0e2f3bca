"""The ledger's rows, as they are handed about: what is asked for, what is known, and what every image and run came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

State = Literal["planned", "running", "done", "linked", "rejected", "failed", "quarantined"]
AttemptState = Literal["running", "done", "rejected", "failed", "lost"]

STAGES = ("prepare_s", "encode_s", "denoise_s", "decode_s", "check_s", "write_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One image to make. pictures: locations. asked: see migrations.py. key: None where the pictures cannot be read."""

    output: str
    row_line: int
    row_id: str
    variant: str
    pictures: tuple[str, ...]
    prompt: str
    asked: str
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the ledger says of an image. lost: attempts at it that were under way when their run was killed."""

    state: State
    asked: str
    key: str | None
    failures: int
    rejects: int
    rejects_forgiven: int
    lost: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What came of asking for an image.

    "mine": draw it; attempt is its number. "link": `original` is the same work, and done. "done": another run has finished it.
    "held": another run is drawing it, or the same work.
    """

    kind: Literal["mine", "link", "done", "held"]
    attempt: int = 0
    original: str = ""
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The end of an attempt. state: of the image from now on. seconds: of the run, that this attempt is billed.

    set_aside: where a rejected picture is kept, under the output root.
    stages: seconds of each stage that was reached, by the names in STAGES. elapsed_s: of the run, when the attempt came out.
    """

    state: State
    attempt_state: AttemptState
    seconds: float
    elapsed_s: float
    stages: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    sha256: str | None = None
    set_aside: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A row of the ledger, for status, export and gallery. usd: of all attempts; None where no run that drew it had a price.

    set_aside: where the picture that was rejected last is kept, under the output root; None for an image that has none.
    """

    output: str
    row_line: int
    row_id: str
    variant: str
    pictures: tuple[str, ...]
    prompt: str
    key: str | None
    state: State
    attempts: int
    seed: int | None
    seconds: float
    usd: Decimal | None
    linked_to: str | None
    sha256: str | None
    set_aside: str | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A row of the ledger: one process that drew. started_at, ended_at: UTC, ISO 8601; ended_at is None while it runs."""

    id: str
    host: str
    pid: int
    started_at: str
    loading_s: float
    elapsed_s: float
    cards: int
    usd_per_hour: Decimal | None
    ended_at: str | None
    stopped: str


@dataclass(frozen=True, slots=True)
class Spent:
    """Attempts of one run and of one outcome: how many, and their seconds."""

    run_id: str
    state: AttemptState
    attempts: int
    seconds: float
