"""What was measured: this engine's stages on the cards it has run on, and what others published of cards it has not."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from millicent.errors import InputError
from millicent.facts.formats import Format
from millicent.facts.rows import read_rows, require_known

MEASURED = Path(__file__).parent / "data" / "measured.toml"
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """What a card gives one product, attention or copy, in TFLOP/s and GB/s. card: as it reports itself. line: of `source`."""

    source: str
    line: int
    card: str
    bf16_gemm_8192x9216x3072_tflops: float
    fp8_gemm_8192x9216x3072_tflops: float
    bf16_gemm_8192x12288x3072_tflops: float
    fp8_gemm_8192x12288x3072_tflops: float
    bf16_gemm_8192x3072x12288_tflops: float
    fp8_gemm_8192x3072x12288_tflops: float
    cudnn_attention_tflops: float
    flash_attention_tflops: float
    copy_gb_per_s: float
    driver: str
    torch: str
    triton: str
    commit: str
    checked: datetime.date

    def product_tflops(self, number_format: Literal["bf16", "fp8"]) -> float:
        """The mean over the three shapes."""
        shapes = ("8192x9216x3072", "8192x12288x3072", "8192x3072x12288")
        return sum(float(getattr(self, f"{number_format}_gemm_{shape}_tflops")) for shape in shapes) / len(shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An edit, in milliseconds by stage. step_ms: with reuse of a later step. edit_ms: of one edit after another; images_per_s: of
    many whose stages overlap. The workload is at the top of data/measured.toml."""

    source: str
    line: int
    card: str
    system: str
    format: Format
    attention: Literal["exact", "int8"]
    reuse_reference: bool
    steps: int
    step_ms: float
    prepare_ms: float
    text_ms: float
    vae_encode_ms: float
    denoise_ms: float
    vae_decode_ms: float
    to_pil_ms: float
    edit_ms: float
    images_per_s: float
    peak_gib: float
    held_before_gib: float
    driver: str
    torch: str
    triton: str
    commit: str
    checked: datetime.date

    @property
    def added_bytes(self) -> int:
        """What the edit took beside what lay on the card before it."""
        return round((self.peak_gib - self.held_before_gib) * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A figure of someone else's, or of ours that is in no result file. gpu: the short name in facts/gpus.py.

    what: "step" has steps_per_s and the TFLOP of one; a product or an attention has tflops; the host link has gb_per_s.
    """

    what: Literal["step", "fp8 product", "int8 product", "int8 attention", "int8 attention, reuse", "host link"]
    gpu: str
    source: str
    checked: datetime.date
    steps_per_s: float | None = None
    linear_tflop: float | None = None
    attention_tflop: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    notes: str = ""
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    ceilings: tuple[Ceiling, ...]
    runs: tuple[Run, ...]
    published: tuple[Published, ...]

    def find_published(self, what: str, gpu: str) -> Published:
        return next(row for row in self.published if (row.what, row.gpu) == (what, gpu))


@cache
def read_measured(path: Path = MEASURED) -> Measured:
    """Raises InputError for a key that is unknown, missing or of the wrong type, and for what is in the file twice."""
    rows = read_rows(path, {"ceiling": Ceiling, "run": Run, "published": Published})
    measured = Measured(rows["ceiling"], rows["run"], rows["published"])
    lines: list[Ceiling | Run] = [*measured.ceilings, *measured.runs]
    _refuse_twice(path, [f"line {row.line} of {row.source}" for row in lines])
    _refuse_twice(path, [f"the {row.what} of {row.gpu}" for row in measured.published])
    for row in measured.published:
        require_known(f"{path}: {row.gpu}", row.unverified, Published)
    return measured


def _refuse_twice(path: Path, names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} has {twice[0]} twice.", "Correct the facts file.")
