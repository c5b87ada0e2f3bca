"""Rows of a manifest: what each reader makes, and which of a file's columns hold what a row needs."""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from millicent.errors import InputError

ID_NAMES = ("id", "sku", "product_id", "product id", "item_id", "item id", "variant sku", "handle", "gtin", "ean", "article")
PICTURE_NAMES = (
    *("picture", "image", "photo", "picture_url", "image_url", "image url", "image_link", "image link", "image src"),
    *("image_path", "picture_path", "file_name", "filename", "file", "path", "url"),
)
MASK_NAMES = ("mask", "mask_url", "mask_path")
CLOUD_SCHEMES = ("s3", "gs")
READ_SCHEMES = (*CLOUD_SCHEMES, "https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Row:
    """One product picture to edit.

    line: where it begins in the file, from 1; in a Parquet file or a folder, its number.
    id: unlike all others of the manifest, also where neither case nor Unicode's composition counts.
    picture, more_pictures: where they lie: a path, s3://, gs:// or https://. What the manifest gives as a relative path begins at
        the manifest's own folder. more_pictures: further references for the same edit.
    columns: every value of the row, as text. mask: where a picture lies that is not black where the edit may change the last of the
        others; the result is checked by it, and not drawn by it.
    """

    line: int
    id: str
    picture: str
    more_pictures: tuple[str, ...]
    columns: Mapping[str, str]
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is left out. why: what was found and what is wanted, without the line."""

    line: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns mean what, by name; case does not count. None: the first of the usual names that is there.

    id: without any, a row's id is its picture's name without folder and ending.
    more: further references for the same edit; None for those named as the picture's with a 2, 3 ... behind: image_2, "Image 3".
    mask: where the edit may change the picture.
    encoding: of a CSV or JSON Lines file; None for UTF-8, or what its byte order mark says.
    """

    id: str | None = None
    picture: str | None = None
    more: tuple[str, ...] | None = None
    mask: str | None = None
    encoding: str | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """The file's own names of the columns. id: None where the picture's name is to serve. mask: None where there is none."""

    id: str | None
    picture: str
    more: tuple[str, ...]
    mask: str | None


@functools.lru_cache(maxsize=64)
def choose(names: tuple[str, ...], columns: Columns) -> Chosen:
    """Find the columns among a file's names. Raises InputError where one that is needed or asked for is not there."""
    by_fold = {name.casefold(): name for name in names}
    picture = _find(by_fold, columns.picture, PICTURE_NAMES, "picture")
    if picture is None:
        raise InputError(
            f"No column holds the picture; there are {', '.join(names)}.",
            f"Say which one does, or name it {', '.join(PICTURE_NAMES[:3])}.",
        )
    if columns.more is not None:
        more = tuple(_named(by_fold, name, "further picture") for name in columns.more)
    else:
        numbered = re.compile(re.escape(picture.casefold()) + r"[ _-]?[2-9]")
        more = tuple(name for fold, name in sorted(by_fold.items()) if numbered.fullmatch(fold))
    mask = _find(by_fold, columns.mask, MASK_NAMES, "mask")
    return Chosen(_find(by_fold, columns.id, ID_NAMES, "id"), picture, more, mask)


def _find(by_fold: Mapping[str, str], asked: str | None, usual: tuple[str, ...], what: str) -> str | None:
    if asked is not None:
        return _named(by_fold, asked, what)
    return next((by_fold[name] for name in usual if name in by_fold), None)


def _named(by_fold: Mapping[str, str], asked: str, what: str) -> str:
    if asked.casefold() not in by_fold:
        raise InputError(
            f"There is no column {asked!r} for the {what}; there are {', '.join(by_fold.values())}.", "Check the name."
        )
    return by_fold[asked.casefold()]


def make_row(line: int, columns: Mapping[str, str], chosen: Chosen, base: str, more: tuple[str, ...] = ()) -> Row | BadRow:
    """A row of a record. base: the manifest's folder. more: references beside those in the chosen columns."""
    location = columns[chosen.picture].strip()
    if not location:
        return BadRow(line, f"The column {chosen.picture!r} is empty; a picture's path or address is wanted.")
    row_id = columns[chosen.id].strip() if chosen.id is not None else stem(location)
    if not row_id:
        return BadRow(line, f"The column {chosen.id!r} is empty; an id is wanted.")
    more = (*(value for name in chosen.more if (value := columns.get(name, "").strip())), *more)
    mask = columns.get(chosen.mask, "").strip() if chosen.mask is not None else ""
    for place in (location, *more, *((mask,) if mask else ())):
        scheme = scheme_of(place)
        if scheme not in ("", *READ_SCHEMES):
            return BadRow(
                line, f"The picture {hide_query(place)!r} has the scheme {scheme}; a path, s3://, gs:// or https:// is wanted."
            )
    pictures = tuple(resolve(place, base) for place in more)
    return Row(line, row_id, resolve(location, base), pictures, columns, resolve(mask, base) if mask else None)


def scheme_of(location: str) -> str:
    """In lower case; "" for a path."""
    found = _SCHEME.match(location)
    return found[1].lower() if found else ""


def hide_query(location: str) -> str:
    """An address as it may be shown and logged: what follows the question mark may hold a signature, what precedes @ a password."""
    if not scheme_of(location) or scheme_of(location) in CLOUD_SCHEMES:
        return location
    shown, question, _ = location.partition("?")
    scheme, _, rest = shown.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if at:
        rest = "...@" + rest[len(user) + 1 :]
    return f"{scheme}://{rest}" + ("?..." if question else "")


def stem(location: str) -> str:
    """The name of a picture without folder and ending."""
    path = location.split("?", 1)[0].split("#", 1)[0] if scheme_of(location) else location
    return PurePath(posixpath.basename(path) if scheme_of(location) else path).stem


def resolve(location: str, base: str) -> str:
    """A relative path as seen from `base`, a folder or s3:// or gs:// prefix; anything else as it is."""
    if scheme_of(location) or Path(location).is_absolute():
        return location
    return f"{base.rstrip('/')}/{location}" if scheme_of(base) else str(Path(base) / location)
