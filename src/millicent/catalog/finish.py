"""A drawn picture on its way out: checked, written whole under its name, or set aside."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

import millicent
from millicent.catalog import storage
from millicent.catalog.attempts import Read, is_remote
from millicent.catalog.items import Item
from millicent.edits import EditResult
from millicent.errors import InputNotFoundError, MachineError, OutputError
from millicent.images import Fit, encode_image
from millicent.quality.limits import Limits
from millicent.quality.sanity import Verdict


class Sources(tuple[Image.Image, ...]):
    """The pictures that a result was drawn from.

    fit: how the last one came to the result's size, as EditRequest.fit. mask: of the last one; what is not black may change.
    """

    fit: Fit = "fit"
    mask: Image.Image | None = None

    @classmethod
    def of(cls, item: Item, images: Iterable[Image.Image], mask: Image.Image | None = None) -> Self:
        made = cls(images)
        made.mask = mask
        made.fit = item.fit if item.height is not None else "fit"
        return made


Check = Callable[[Sources, Image.Image, Limits], Verdict]

REJECTED = "_rejected"  # the folder, in the output root, of pictures that were not accepted, by attempt
PROBE = "_probe.txt"
PROBE_TRIES = 5
WRITE_PAUSES_S = (0.5, 2.0)  # before a write is tried again: what was drawn is paid for


@dataclass(frozen=True, slots=True)
class Finished:
    """sha256: of the file. place: its name under the output root; for a rejected picture not the one that it should have had."""

    verdict: Verdict
    sha256: str
    place: str
    check_s: float
    write_s: float


def finish(item: Item, read: Read, result: EditResult, attempt: int, out: str, limits: Limits, check: Check) -> Finished:
    """Check a picture and write it. Raises OutputError or MachineError where it cannot be written, after some tries."""
    begin = time.perf_counter()
    verdict = check(Sources.of(item, read.images, read.mask), result.image, limits)
    checked = time.perf_counter()
    data = encode_image(result.image, item.format.upper(), describe(item, read, result))
    place = item.output if verdict.accepted else set_aside_name(item.output, attempt)
    _write(out, place, data)
    return Finished(verdict, hashlib.sha256(data).hexdigest(), place, checked - begin, time.perf_counter() - checked)


def set_aside_name(output: str, attempt: int) -> str:
    """Where a picture that was not accepted is kept, under the output root."""
    return f"{REJECTED}/{attempt}/{output}"


def describe(item: Item, read: Read, result: EditResult) -> dict[str, Any]:
    """What it takes to draw a picture again, and the key by which a later run knows it; the same wherever it was drawn."""
    return {
        "millicent": millicent.__version__,
        "key": read.key,
        "model": result.model,
        "weights_sha256": result.weights_sha256,
        "prompt": item.prompt,
        "negative_prompt": item.negative_prompt,
        "seed": result.seed,
        "steps": result.steps,
        "schedule": result.schedule,
        "sigmas": list(result.sigmas),
        "true_cfg": result.true_cfg,
        "width": result.image.width,
        "height": result.image.height,
        "fit": item.fit if item.height is not None else None,
        "inputs_sha256": list(read.sha256s),
    }


def _write(out: str, name: str, data: bytes) -> None:
    for pause_s in WRITE_PAUSES_S:
        try:
            storage.write_output(out, name, data)
            return
        except (OutputError, MachineError):
            time.sleep(pause_s)
    storage.write_output(out, name, data)


def check_root(out: str, size_bytes: int = 1) -> None:
    """Raises OutputError or MachineError where nothing of that size can be written under the root; leaves no local file."""
    for tries_left in reversed(range(PROBE_TRIES)):
        try:
            storage.write_output(out, PROBE, b"\n" * size_bytes)
            break
        except OutputError as error:
            # a run that begins at the same moment takes it for what a killed one has left, and sweeps it (leftovers.py)
            if not (tries_left and isinstance(error.__cause__, FileNotFoundError)):
                raise
    if not is_remote(out):
        (Path(out) / PROBE).unlink(missing_ok=True)


def link_output(out: str, original: str, name: str) -> None:
    """The same file under another name: a hard link, or a copy where there are none.

    Raises InputNotFoundError where the original is gone, OutputError.
    """
    if not storage.exists(out, original):
        raise InputNotFoundError(f"The output {original} is gone.", "It is drawn again.")
    if not is_remote(out) and _hard_link(Path(out) / original, Path(out) / name):
        return
    storage.write_output(out, name, storage.read_output(out, original))


def _hard_link(original: Path, target: Path) -> bool:
    """Whether the file system could. A name that is there already is replaced at once, by the link whole."""
    beside = storage.name_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.hardlink_to(original)
            return True
        beside.hardlink_to(original)
        beside.replace(target)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            beside.unlink()  # rename leaves it where both names are one file already
    return True
