"""Pictures in and out: what is accepted, how it is turned upright and into sRGB, and that writing never loses a file."""

import errno
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from millicent.errors import (
    ImageTooLargeError,
    InputError,
    InputNotFoundError,
    MillicentError,
    NotAnImageError,
    OutputError,
    TruncatedImageError,
)
from millicent.images import (
    before_after,
    check_writable,
    encode_image,
    fit_to,
    flatten,
    open_image,
    read_metadata,
    save_image,
)

PICTURE = draw_picture(40, 60)
ORIENTATION = 0x0112


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge: rows of zeros, of which only the first few are there."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(10_000)))


@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})])
def test_each_format_opens(file_format: str, options: dict[str, Any]) -> None:
    image = open_image(encode(PICTURE, file_format, **options))
    assert (image.mode, image.size) == ("RGB", (60, 40))
    assert np.abs(pixels(image) - pixels(PICTURE)).max() <= (40 if file_format == "JPEG" else 0)


def test_other_formats_are_refused() -> None:
    for file_format in ("GIF", "BMP", "TIFF"):
        with pytest.raises(NotAnImageError, match="not a JPEG, PNG or WebP"):
            open_image(encode(PICTURE, file_format))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_honored(orientation: int, file_format: str) -> None:
    """Independent of Pillow's own transposition: the corners say where the picture's top left went."""
    # where the first row and the first column lie, from the EXIF standard's table: (top or bottom or left or right)
    first_row, first_column = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    stored = Image.new("RGB", (64, 32), (128, 128, 128))
    stored.paste((255, 0, 0), (0, 0, 64, 4))  # row 0 red
    stored.paste((0, 0, 255), (0, 4, 4, 32))  # column 0 blue
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    opened = pixels(open_image(encode(stored, file_format, exif=exif)))
    sides = {"top": opened[1, 16:-16], "bottom": opened[-2, 16:-16], "left": opened[16:-16, 1], "right": opened[16:-16, -2]}
    if opened.shape[0] < 64:
        sides |= {"left": opened[8:-8, 1], "right": opened[8:-8, -2]}
    else:
        sides |= {"top": opened[1, 8:-8], "bottom": opened[-2, 8:-8]}
    red, blue = sides[first_row].mean(0), sides[first_column].mean(0)
    assert red[0] > 180 > 90 > red[2], (orientation, red)
    assert blue[2] > 180 > 90 > blue[0], (orientation, blue)


def test_an_srgb_profile_changes_nothing() -> None:
    srgb = ImageCms.createProfile("sRGB")
    tagged = open_image(encode(PICTURE, "PNG", icc_profile=ImageCms.ImageCmsProfile(srgb).tobytes()))
    assert np.abs(pixels(tagged) - pixels(PICTURE)).max() <= 1
    assert "icc_profile" not in tagged.info


def gamma_one_profile() -> bytes:
    """sRGB's primaries with a linear tone curve, by rewriting the three curve tags of Littlecms's sRGB profile."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = struct.unpack(">I", profile[128:132])[0]
    for i in range(tags):
        name, offset, _size = struct.unpack(">4sII", profile[132 + 12 * i : 144 + 12 * i])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 12] = b"curv" + bytes(4) + struct.pack(">I", 0)  # no entries: the identity
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_linear_profile_brightens_as_the_srgb_curve_says(mode: str) -> None:
    linear = np.linspace(0.05, 1, 16)
    levels = (linear * 255).round().astype(np.uint8)
    picture = Image.fromarray(np.repeat(levels[None, :, None], 3, 2).repeat(8, 0)).convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    opened = open_image(encode(picture, "PNG", icc_profile=gamma_one_profile()))
    expected = 255 * np.where(levels / 255 <= 0.0031308, levels / 255 * 12.92, 1.055 * (levels / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(pixels(opened)[0, :, 0] - expected).max() <= 1.5
    assert opened.mode == mode
    if mode == "RGBA":
        assert np.array_equal(pixels(opened)[..., 3], pixels(picture)[..., 3])


def test_a_broken_profile_is_refused_rather_than_guessed() -> None:
    with pytest.raises(InputError, match="color profile inside The input cannot be read"):
        open_image(encode(PICTURE, "PNG", icc_profile=b"no profile at all"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb_or_rgba(mode: str) -> None:
    source = Image.fromarray((pixels(PICTURE.convert("L")) * 257).astype(np.uint16)) if mode == "I;16" else PICTURE.convert(mode)
    opened = open_image(encode(source, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 100} if mode == "CMYK" else {})))
    assert opened.mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")
    expected = source.convert("RGB") if mode != "I;16" else PICTURE.convert("L").convert("RGB")
    assert np.abs(pixels(opened.convert("RGB")) - pixels(expected)).max() <= (12 if mode == "CMYK" else 1)


def test_flatten_puts_what_is_transparent_on_white() -> None:
    image = PICTURE.convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert (pixels(flatten(image)) == 255).all()
    image.putalpha(Image.new("L", image.size, 255))
    assert np.array_equal(pixels(flatten(image)), pixels(PICTURE))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"There is no file .*nowhere\.png"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(InputNotFoundError, match="cannot be read"):
        open_image(tmp_path)


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 60_000), (12_000, 8_000), (9_000, 9_000)])
def test_a_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageTooLargeError, match="up to 80 million pixels"):
        open_image(png_bomb(*size))


def test_the_cap_is_exact() -> None:
    data = encode(PICTURE, "PNG")
    assert open_image(data, max_pixels=2400).size == (60, 40)
    with pytest.raises(ImageTooLargeError, match="60x40 pixels"):
        open_image(data, max_pixels=2399)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_every_cut_of_a_file_is_named_and_never_crashes(file_format: str) -> None:
    data = encode(draw_picture(64, 64), file_format)
    kinds = set()
    for length in [*range(0, 64, 3), *range(64, len(data) - 2, max(1, len(data) // 40))]:
        with pytest.raises((NotAnImageError, TruncatedImageError)) as caught:
            open_image(data[:length], name="cut")
        kinds.add(type(caught.value))
        assert "cut" in caught.value.message
    assert kinds == {NotAnImageError, TruncatedImageError}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=16))
def test_damaged_bytes_give_a_picture_or_one_of_our_errors(file_format: str, at: int, noise: bytes) -> None:
    data = bytearray(encode(PICTURE, file_format))
    at %= len(data)
    data[at : at + len(noise)] = noise
    try:
        opened = open_image(bytes(data))
    except MillicentError:
        return
    assert opened.mode in ("RGB", "RGBA")


def test_fit_to_and_before_after() -> None:
    assert fit_to(PICTURE, 60, 40, "pad") is PICTURE
    padded = pixels(fit_to(PICTURE, 60, 80, "pad"))
    assert (padded[:20] == 255).all()
    assert np.array_equal(padded[20:60], pixels(PICTURE))
    assert np.array_equal(pixels(fit_to(PICTURE, 40, 40, "crop")), pixels(PICTURE)[:, 10:50])
    assert (pixels(fit_to(PICTURE.getchannel(0), 60, 80, "pad"))[:20] == 0).all()
    strip = before_after(ImageOps.scale(PICTURE, 2), PICTURE)
    assert strip.size == (60 + 1 + 60, 40)
    assert np.array_equal(pixels(strip)[:, 61:], pixels(PICTURE))
    assert (pixels(strip)[:, 60] == 255).all()


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_what_is_saved_comes_back_with_its_metadata(tmp_path: Path, ending: str) -> None:
    metadata = {"prompt": 'make it "navy", señor 藍', "seed": 2**63 - 2, "sigmas": [1.0, 0.1 + 0.2, 0.0]}
    path = tmp_path / f"out{ending}"
    save_image(PICTURE, path, metadata)
    assert read_metadata(path) == metadata
    difference = np.abs(pixels(open_image(path)) - pixels(PICTURE))
    assert difference.max() <= (0 if ending.lower() == ".png" else 40)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_a_foreign_picture_has_no_metadata_of_ours() -> None:
    assert read_metadata(encode(PICTURE, "PNG")) is None
    exif = Image.Exif()
    exif[0x0131], exif[0x010E] = "a camera", "{}"
    assert read_metadata(encode(PICTURE, "JPEG", exif=exif)) is None


def test_transparency_in_a_jpeg_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="JPEG cannot hold transparency"):
        encode_image(PICTURE.convert("RGBA"), "JPEG")
    path = tmp_path / "out.jpg"
    path.write_bytes(b"older")
    with pytest.raises(OutputError):
        save_image(PICTURE.convert("RGBA"), path)
    assert path.read_bytes() == b"older"


def test_what_cannot_be_written_is_told_beforehand(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for path, found in [
        (tmp_path / "out.gif", "'.gif'"),
        (tmp_path / "out", "''"),
        (tmp_path / "nowhere" / "out.png", "does not exist"),
        (tmp_path / "folder.png", "is a folder"),
        (Path("/proc/out.png"), "cannot be written"),
    ]:
        with pytest.raises(OutputError, match=found):
            check_writable(path)
    check_writable(tmp_path / "out.png")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_older_file_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"older")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OutputError, match="No space left on device"):
        save_image(PICTURE, path)
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
