"""Lines of a text file that somebody else's program wrote: whatever cannot be read is named with its line."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import BinaryIO

from millicent.errors import InputError

MAX_LINE_CHARS = 4_000_000
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class TextLines:
    """An iterator over lines with their ends, counted from 1, as an editor counts them.

    flaw: what the first unreadable line since it was last set to None holds; the reader that makes a record of lines sets it.
    """

    def __init__(self, file: BinaryIO, name: str, encoding: str | None) -> None:
        """file: at its start; to be closed by whoever opened it, while this is still held.

        Raises InputError for an encoding that Python does not know.
        """
        self.name, self.number = name, 0
        self.flaw: str | None = None
        start = file.read(4)
        file.seek(0)
        found = next((found for mark, found in _MARKS if start.startswith(mark)), None)
        self.encoding = found or _check_encoding(encoding or "utf-8")
        # UTF-8 keeps what it cannot read as half surrogates, so that it can be told; others put a U+FFFD
        is_utf8 = codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")
        self._broken = re.compile("[\ud800-\udfff]" if is_utf8 else "\ufffd")
        self._errors = "surrogateescape" if is_utf8 else "replace"
        # newline="": line ends within a quoted field belong to it
        self._stream = io.TextIOWrapper(file, self.encoding, self._errors, newline="")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_LINE_CHARS)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == MAX_LINE_CHARS and line[-1] not in "\r\n":
            raise InputError(
                f"Line {self.number} of {self.name} has more than {MAX_LINE_CHARS:,} characters.", "Is it the file that you mean?"
            )
        if "\0" in line:
            self.flaw = self.flaw or f"Line {self.number} holds a NUL character, which text does not; save the file as UTF-8."
        elif not line.isascii() and (broken := self._broken.search(line)):
            self.flaw = self.flaw or self._describe(broken)
        return line

    def _describe(self, broken: re.Match[str]) -> str:
        where = f"Line {self.number}, character {broken.start() + 1}"
        if self._errors == "replace":
            return f"{where} cannot be read as {self.encoding}."
        byte = ord(broken[0]) - 0xDC00
        guess = bytes([byte]).decode("cp1252", "replace")
        maybe = f" (in Windows-1252 it would be {guess!r})" if guess != "\ufffd" else ""
        return f"{where} is the byte 0x{byte:02x}, which is no UTF-8{maybe}; save the file as UTF-8, or say its encoding."


def _check_encoding(name: str) -> str:
    try:
        b"".decode(name)  # refuses also what is no encoding of text, such as hex
        codecs.lookup(name)
        "".encode(name)
    except LookupError as error:
        raise InputError(f"There is no text encoding {name!r}.", "Use a name as utf-8, cp1252 or latin-1.") from error
    return name
