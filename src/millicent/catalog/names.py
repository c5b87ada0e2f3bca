"""Names of outputs: made of a row's values, and the same file on every system or refused.

A value cannot leave the output folder: it is written so that it stays one part of a path, and the whole name is checked once
more before anything is written under it.
"""

from __future__ import annotations

import re
import unicodedata
from array import array

from millicent.errors import OutputError

MAX_PART_BYTES = 240  # 255 is what file systems take; what is written beside adds a few
MAX_NAME_BYTES = 1000
# what Windows or a URL would take for something else; the percent sign, so that no two values come out the same
_SPECIAL = re.compile(r'[\\:*?"<>|%/]')
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")  # Unicode's categories Cc and Cs
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


def as_path(value: str) -> str:
    """An id as it stands in a file name: its slashes make folders, each part is as `as_part` makes it."""
    return "/".join(map(as_part, value.split("/")))


def as_part(value: str) -> str:
    """A value as it stands in a file name: what is special there, and what cannot be seen, as %XX of its UTF-8 bytes.

    So is a dot at either end: there it hides a file, or is dropped by Windows. Unicode comes out composed (NFC).
    """
    value = unicodedata.normalize("NFC", value)
    if value in ("", ".", ".."):
        return value  # no file's name however it is written: check_name refuses it
    if not value.isascii() or _SPECIAL.search(value):
        value = "".join(_escape(char) if _is_special(char) else char for char in value)
    if value[0] == ".":
        value = "%2E" + value[1:]
    return value[:-1] + "%2E" if value[-1] == "." else value


def _is_special(char: str) -> bool:
    return _SPECIAL.match(char) is not None or unicodedata.category(char) in ("Cf", "Zl", "Zp")


def _escape(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode())


def check_name(name: str) -> str:
    """A relative path with "/" between its parts, in NFC. Raises OutputError for what leads elsewhere or is no file's name."""
    name = unicodedata.normalize("NFC", name)
    for part in name.split("/"):
        if why := _fault(part):
            raise OutputError(f"The output name {name!r} {why}.", "Change the recipe's output pattern, or the value in it.")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise OutputError(
            f"The output name {name[:60]!r}... has {len(name.encode())} bytes; {MAX_NAME_BYTES} are taken.",
            "Use a shorter pattern or shorter values.",
        )
    return name


def _fault(part: str) -> str | None:
    """What is wrong with one part of a path, to follow "The output name ..."; None for nothing."""
    if part in ("", ".", ".."):
        return f"has {part!r} between slashes, which is no file's name"
    if _CONTROL.search(part):
        return "has a control character or half of a surrogate pair"
    if "\\" in part or ":" in part:
        return "has a backslash or a colon, which other systems read as a path"
    if part[0] == "." or part[-1] in ". ":
        return f"has the part {part!r}, which begins with a dot or ends with a dot or a space"
    if part[0] == " ":
        return f"has the part {part!r}, which begins with a space"
    if _DEVICES.fullmatch(part):
        return f"has the part {part!r}, which names a device on Windows"
    if len(part.encode()) > MAX_PART_BYTES:
        return f"has a part of {len(part.encode())} bytes, where {MAX_PART_BYTES} are taken"
    return None


def fold(name: str) -> str:
    """What a file system that minds neither case nor composition makes of a name."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


class SeenNames:
    """Which names came before, folded, and on which line: 12 bytes a name and some room, so that 100,000 rows take a few MB.

    Names are told apart by 64 bits of their hash; among a million names the odds that two are taken for one are 1 in 40 million.
    """

    def __init__(self) -> None:
        self._count = 0
        self._hashes = array("Q", bytes(8 * 1024))
        self._lines = array("I", bytes(4 * 1024))

    def add(self, name: str, line: int) -> int | None:
        """The line that a name came on before; None for a new one, which is noted."""
        value = hash(fold(name)) & 0xFFFF_FFFF_FFFF_FFFF or 1  # 0 is an empty place
        place = self._find(value)
        if self._hashes[place]:
            return self._lines[place]
        self._hashes[place], self._lines[place] = value, line
        self._count += 1
        if self._count * 3 > len(self._hashes) * 2:
            self._grow()
        return None

    def _find(self, value: int) -> int:
        hashes, mask = self._hashes, len(self._hashes) - 1
        place = value & mask
        while hashes[place] not in (0, value):
            place = place + 1 & mask
        return place

    def _grow(self) -> None:
        old_hashes, old_lines = self._hashes, self._lines
        size = len(old_hashes) * 2
        self._hashes, self._lines = array("Q", bytes(8 * size)), array("I", bytes(4 * size))
        for value, line in zip(old_hashes, old_lines, strict=True):
            if value:
                place = self._find(value)
                self._hashes[place], self._lines[place] = value, line
