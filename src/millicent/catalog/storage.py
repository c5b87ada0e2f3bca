"""Bytes in and out, wherever they lie: local paths, s3:// and gs://, and, to read only, https:// from hosts that are allowed.

What is wrong with a location for good is an InputError or one of its kinds. What may pass, such as a network that is down or a
server that is busy, is a MachineError: trying again may help.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from millicent.catalog import cloud
from millicent.catalog.names import check_name
from millicent.catalog.rows import CLOUD_SCHEMES, hide_query, scheme_of
from millicent.catalog.web import INTERNET, FetchLimits, Network, fetch
from millicent.errors import InputError, InputNotFoundError, MachineError, OutputError

__all__ = ["FetchLimits", "exists", "name_beside", "output_location", "read_bytes", "read_output", "write_output"]

BESIDE_HEX = 8  # random digits at the end of a name beside


def read_bytes(location: str, limits: FetchLimits, allowed_hosts: frozenset[str], network: Network = INTERNET) -> bytes:
    """All bytes at a location, up to limits.max_bytes.

    allowed_hosts: hosts that https addresses may name, exactly, as "cdn.example.com" or "cdn.example.com:8443".
    network: the internet, but in tests.
    Raises InputNotFoundError, InputError; MachineError for what may pass; MissingExtraError.
    """
    scheme = scheme_of(location)
    if scheme in CLOUD_SCHEMES:
        return cloud.read_object(location, limits.max_bytes)
    if scheme == "https":
        return fetch(location, limits, allowed_hosts, network)
    if scheme:
        raise InputError(
            f"The picture {hide_query(location)} has the scheme {scheme}.",
            "Give a path, or an address with s3://, gs:// or https://.",
        )
    return _read_file(Path(location), limits.max_bytes)


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        # a pipe or device would keep us waiting: opened without, and told apart
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(number, "rb") as file:
            found = os.fstat(number)
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{path} is no file.", "Give a picture's file.")
            if found.st_size > max_bytes:
                raise InputError(f"{path} has more than {max_bytes:,} bytes, which is the limit.", "Make it smaller first.")
            # reading reserves what it is asked for: a byte more than there should be, to see whether the file grows
            data = file.read(found.st_size + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputNotFoundError(f"There is no file {path}.", "Check the path.") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputNotFoundError(f"{path} cannot be read: {why}.", "Give a file that can be read.") from error
    if len(data) > found.st_size:
        raise MachineError(f"{path} is being written.", "Try again once it is whole.")
    return data


def output_location(root: str, name: str) -> str:
    """Where an output lies. name: relative, with slashes. Raises OutputError for one that leads elsewhere."""
    if scheme_of(root) not in ("", *CLOUD_SCHEMES):
        raise OutputError(f"The output folder {hide_query(root)} is at an address.", "Give a path, s3:// or gs://.")
    return f"{root.rstrip('/')}/{check_name(name)}" if scheme_of(root) else str(Path(root) / check_name(name))


def write_output(root: str, name: str, data: bytes) -> None:
    """Write an output whole or not at all; on return it is on the disk, or in the store. Folders are made as needed.

    Raises OutputError; MachineError for what may pass in a store.
    """
    location = output_location(root, name)
    if scheme_of(root):
        cloud.write_object(location, data)
        return
    path = Path(location)
    try:
        _make_folder(path.parent)
        _write_file(path, data)
    except OSError as error:
        fix = "Make room there, then run the same command again." if error.errno == errno.ENOSPC else "Choose another place."
        raise OutputError(f"{path} cannot be written: {error.strerror}.", fix) from error


def _make_folder(folder: Path) -> None:
    """A new folder is on the disk only when the one that holds it is."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _write_file(path: Path, data: bytes) -> None:
    """Beside, then renamed: an older file stays until the new one is whole."""
    beside = name_beside(path)
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()
    _sync_folder(path.parent)


def name_beside(path: Path) -> Path:
    """A new name for what becomes `path` once it is whole; leftovers.py knows it again."""
    return path.with_name(f".{path.name}.{secrets.token_hex(BESIDE_HEX // 2)}")


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def exists(root: str, name: str) -> bool:
    """Whether an output is there, whole."""
    location = output_location(root, name)
    return cloud.object_exists(location) if scheme_of(root) else Path(location).is_file()


def read_output(root: str, name: str) -> bytes:
    """An output's bytes. Raises InputNotFoundError where there is none."""
    location = output_location(root, name)
    if scheme_of(root):
        return cloud.read_object(location, 1 << 40)
    try:
        return Path(location).read_bytes()
    except OSError as error:
        raise InputNotFoundError(f"{location} cannot be read: {error.strerror}.", "Check the output folder.") from error
