"""Pictures in and out: opened safely, upright and in sRGB; written whole or not at all, with what repeats them.

Pillow reads and writes; this module decides what is accepted. JPEG, PNG and WebP.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import struct
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from millicent.errors import (
    ImageTooLargeError,
    InputError,
    InputNotFoundError,
    NotAnImageError,
    OutputError,
    TruncatedImageError,
)

Fit = Literal["fit", "pad", "crop"]

MAX_PIXELS = 80_000_000  # a decoded RGB picture of this size takes 240 MB
READ_FORMATS = ("JPEG", "PNG", "WEBP")  # JPEG brings MPO along: what some phones write, with a second picture behind
WRITE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
QUALITY = 95
WHITE = (255, 255, 255)
FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")
IMAGE_DESCRIPTION, SOFTWARE = 0x010E, 0x0131  # EXIF tags
STRIP_GAP = 32  # one part in this many of a strip's height


def open_image(source: Path | str | bytes, *, name: str = "The input", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file, or its bytes with a name for messages -> an upright picture in sRGB, RGB or RGBA.

    The size is checked in the header, before anything is decoded. Raises InputNotFoundError, NotAnImageError,
    TruncatedImageError, ImageTooLargeError; InputError for a color profile that cannot be read.
    """
    data, name = (source, name) if isinstance(source, bytes) else (read_file(Path(source)), str(source))
    with _open_header(data, name, max_pixels) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
            raise TruncatedImageError(
                f"{name} is a {image.format} whose end is missing or damaged ({error}).", "Fetch or export it again."
            ) from error
    return _to_srgb(upright, name)


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises InputNotFoundError."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputNotFoundError(f"There is no file {path}.", "Check the path.") from error
    except OSError as error:
        raise InputNotFoundError(f"{path} cannot be read: {error.strerror}.", "Give a file that can be read.") from error


def _open_header(data: bytes, name: str, max_pixels: int) -> Image.Image:
    too_large = f"only pictures up to {max_pixels / 1e6:g} million pixels are opened"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=READ_FORMATS)
    except UnidentifiedImageError as error:
        if data.startswith(FIRST_BYTES):
            raise TruncatedImageError(f"{name} begins as a picture, but its header is damaged.", "Fetch it again.") from error
        raise NotAnImageError(f"{name} is not a JPEG, PNG or WebP picture.", "Give one of those.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"{name} says that it is huge; {too_large}.", "Make it smaller first.") from error
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        raise TruncatedImageError(f"{name} has a damaged header ({error}).", "Fetch or export it again.") from error
    if image.width * image.height > max_pixels:
        found = f"{image.width}x{image.height} pixels"
        raise ImageTooLargeError(f"{name} has {found}; {too_large}.", "Make it smaller first.")
    return image


def _to_srgb(image: Image.Image, name: str) -> Image.Image:
    """RGB or RGBA in sRGB, 8 bits a channel. A picture without a profile is taken as sRGB, as browsers do."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16-bit gray
        image = image.point(lambda level: level / 256).convert("L")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    color = image.convert("RGB") if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa", "1") else image
    color = _convert_profile(color, profile, name) if profile else color.convert("RGB")
    if alpha is not None:
        color.putalpha(alpha)
    color.info.clear()
    return color


def _convert_profile(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == "RGB" and image.mode != "RGB":
            image = image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise InputError(
            f"The color profile inside {name} cannot be read ({error}).", "Export the picture again, in sRGB."
        ) from error
    assert converted is not None, "only an in-place conversion returns nothing"
    return converted


def flatten(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*WHITE, 255)), rgba).convert("RGB")


def fit_to(image: Image.Image, width: int, height: int, fit: Fit) -> Image.Image:
    """A picture of exactly width x height: stretched, padded with white (alpha: with nothing), or its overhang cut."""
    size, lanczos = (width, height), Image.Resampling.LANCZOS
    if image.size == size:
        return image
    if fit == "pad":
        return ImageOps.pad(image, size, lanczos, 0 if image.mode == "L" else WHITE)
    if fit == "crop":
        return ImageOps.fit(image, size, lanczos)
    return image.resize(size, lanczos)


def before_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """The two side by side at the height of the second, on white."""
    before, after = flatten(before), flatten(after)
    before = before.resize((max(1, round(before.width * after.height / before.height)), after.height), Image.Resampling.LANCZOS)
    gap = max(1, after.height // STRIP_GAP)
    strip = Image.new("RGB", (before.width + gap + after.width, after.height), WHITE)
    strip.paste(before, (0, 0))
    strip.paste(after, (before.width + gap, 0))
    return strip


def format_for(path: Path) -> str:
    """Pillow's name of the format that a path's ending asks for. Raises OutputError."""
    if path.suffix.lower() not in WRITE_FORMATS:
        raise OutputError(f"{path} has the ending {path.suffix!r}.", f"Use {', '.join(WRITE_FORMATS)}.")
    return WRITE_FORMATS[path.suffix.lower()]


def check_writable(path: Path) -> None:
    """Raises OutputError where `save_image` could not write; leaves everything as it is."""
    format_for(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", "Give the name of a file in it.")
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist.", f"Make it first: mkdir -p {path.parent}")
    written = _beside(path)
    try:  # access() answers by permission bits alone, which says nothing of a read-only or full disk
        written.open("xb").close()
    except OSError as error:
        raise _unwritable(path, error) from error
    written.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def encode_image(image: Image.Image, file_format: str, metadata: Mapping[str, Any] | None = None) -> bytes:
    """A picture as PNG, JPEG or WEBP bytes; `metadata` goes into EXIF as JSON, where `read_metadata` finds it."""
    if image.mode == "RGBA" and file_format == "JPEG":
        raise OutputError("A JPEG cannot hold transparency.", "Write PNG or WebP, or flatten on white.")
    exif = Image.Exif()
    if metadata is not None:
        exif[SOFTWARE] = "millicent"
        exif[IMAGE_DESCRIPTION] = json.dumps(metadata)
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if file_format == "PNG" else {"quality": QUALITY}
    if file_format == "JPEG":
        options["subsampling"] = 0  # colors are what was asked for: keep them as sharp as the outlines
    try:
        image.save(buffer, file_format, exif=exif, **options)
    except (OSError, ValueError) as error:
        raise OutputError(f"The picture cannot be written as {file_format}: {error}.", "Write PNG.") from error
    return buffer.getvalue()


def save_image(image: Image.Image, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write beside the path, then rename: whatever fails, an older file stays as it was. Raises OutputError."""
    data, written = encode_image(image, format_for(path), metadata), _beside(path)
    try:
        with written.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            written.unlink()


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror}.", "Choose another place, or make room there.")


def read_metadata(source: Path | str | bytes) -> dict[str, Any] | None:
    """What `save_image` wrote beside the pixels; None in a picture that millicent did not write."""
    data, name = (source, "The input") if isinstance(source, bytes) else (read_file(Path(source)), str(source))
    with _open_header(data, name, MAX_PIXELS) as image:
        exif = image.getexif()
    if exif.get(SOFTWARE) != "millicent":
        return None
    metadata = json.loads(exif[IMAGE_DESCRIPTION])
    assert isinstance(metadata, dict)
    return metadata
