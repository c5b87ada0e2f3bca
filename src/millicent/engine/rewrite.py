"""A model folder beside its new transformer: the other parts copied, the card written, the whole put in its place at once."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from millicent.checkpoint.folder import PARTS, read_json
from millicent.checkpoint.write import partial_paths, sync_folder
from millicent.errors import OutputError
from millicent.facts.models import ModelCard

_INDEX = "model_index.json"
_CARD = "card.toml"
_CONFIG = Path("transformer") / "config.json"
_PAPERS = ("LICENSE*", "NOTICE*")


def working_folder(target: Path) -> Path:
    """Where a folder lies until it is whole; an earlier run's is gone on with."""
    work = target.with_name(f"{target.name}.partial")
    (work / "transformer").mkdir(parents=True, exist_ok=True)
    return work


def check_replaceable(target: Path, inputs: Sequence[Path]) -> None:
    """Raises OutputError for a target that holds an input or lies in one, or that is there and is no model folder."""
    for path in inputs:
        if path.resolve().is_relative_to(target.resolve()) or target.resolve().is_relative_to(path.resolve()):
            raise OutputError(f"{target} and the input {path} lie in one another.", "Choose another folder.")
    if target.exists() and not (target / _INDEX).is_file():
        raise OutputError(f"{target} is no model folder, so nothing of it is replaced.", "Choose another name.")


def copy_parts(folder: Path, work: Path, card: ModelCard, transformer_file: Path) -> None:
    """Everything of a model folder but its transformer's weights; what an earlier run has copied is left.

    card: written where the folder has one. transformer_file: where the new transformer goes, with its traces of an earlier run.
    Raises OutputError where there is no room.
    """
    copied = {path.relative_to(folder): path for path in _files(folder)}
    written = {_CONFIG, *([Path(_CARD)] if (folder / _CARD).is_file() else [])}
    kept = {transformer_file, *(path.relative_to(work) for path in partial_paths(work / transformer_file))}
    for stale in [path for path in work.rglob("*") if path.is_file() and path.relative_to(work) not in {*copied, *written, *kept}]:
        stale.unlink()
    missing = {name: path for name, path in copied.items() if not _is_copy(work / name, path)}
    needed, free = sum(path.stat().st_size for path in missing.values()), shutil.disk_usage(work).free
    if needed > free:
        raise OutputError(
            f"The other parts of {folder} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.", "Free some space."
        )
    for name, path in missing.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, work / name)  # with its time, which is set last: a copy that broke off has another
    config = read_json(folder / _CONFIG)
    config.pop("quantization_config", None)  # of the weights that are replaced
    (work / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if Path(_CARD) in written:
        (work / _CARD).write_text(to_toml(card), encoding="utf-8")


def _files(folder: Path) -> Iterator[Path]:
    yield folder / _INDEX
    for pattern in _PAPERS:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())
    for part in PARTS:
        if part != "transformer":
            yield from (path for path in sorted((folder / part).rglob("*")) if path.is_file())


def _is_copy(copy: Path, original: Path) -> bool:
    if not copy.is_file():
        return False
    found, wanted = copy.stat(), original.stat()
    return (found.st_size, found.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)


def to_toml(card: ModelCard) -> str:
    """A card as read_card reads it."""
    lines = []
    for field in fields(card):
        value = getattr(card, field.name)
        if field.default is not MISSING and value == field.default:
            continue
        # JSON's strings, numbers and lists of strings are TOML's
        lines.append(f"{field.name} = {value.isoformat() if isinstance(value, datetime.date) else json.dumps(value)}\n")
    return "".join(lines)


def publish_folder(work: Path, target: Path) -> None:
    """Give the whole folder its name; what had it is removed only when the new one is in its place."""
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    replaced = target.with_name(f"{target.name}.replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    work.rename(target)
    sync_folder(target.absolute().parent)
    shutil.rmtree(replaced, ignore_errors=True)
