"""A folder of pictures as a manifest: every JPEG, PNG and WebP in it and below, in the order of their names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from millicent.catalog.rows import BadRow, Row
from millicent.errors import InputNotFoundError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
# pictures that are not read: to pass over them in silence would lose products
OTHER_ENDINGS = (".tif", ".tiff", ".heic", ".heif", ".avif", ".gif", ".bmp", ".psd", ".jp2", ".jxl", ".svg", ".dng", ".cr2", ".nef")


def read_folder(path: str) -> Iterator[Row | BadRow]:
    """Hidden files and folders, and files that are no pictures, are passed over; links to folders are not followed."""
    return make_rows(_walk(path, ""), path)


def make_rows(names: Iterator[str], base: str) -> Iterator[Row | BadRow]:
    """Rows of pictures that lie under `base`, by their paths in it: the id is the path without its ending."""
    number = 0
    for name in names:
        place = PurePosixPath(name)
        ending = place.suffix.lower()
        if ending in ENDINGS:
            number += 1
            columns = {"file": name, "name": place.stem, "folder": "" if place.parent.name == "" else str(place.parent)}
            yield Row(number, str(place.with_suffix("")), f"{base.rstrip('/')}/{name}", (), columns)
        elif ending in OTHER_ENDINGS:
            number += 1
            yield BadRow(number, f"{name} is a {ending[1:].upper()} picture; JPEG, PNG or WebP is wanted.")


def _walk(root: str, within: str) -> Iterator[str]:
    folder = Path(root) / within
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise InputNotFoundError(f"The folder {folder} cannot be read: {error.strerror}.", "Check the path.") from error
    for entry in entries:
        name = f"{within}/{entry.name}" if within else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, name)
        elif entry.is_file():
            yield name
