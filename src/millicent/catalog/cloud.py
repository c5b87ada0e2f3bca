"""Objects at s3:// and gs://. The one home of fsspec, and of s3fs and gcsfs behind it.

Credentials, region and endpoint are found as Amazon's and Google's own tools find them. Nothing is cached: a run is not the only
one that writes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from millicent.catalog.rows import scheme_of
from millicent.errors import InputError, InputNotFoundError, MachineError, MillicentError, MissingExtraError, OutputError

CONNECT_S, READ_S = 10.0, 60.0
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"connect_timeout": CONNECT_S, "read_timeout": READ_S}},
    "gs": {"use_listings_cache": False, "requests_timeout": READ_S},
}


def read_object(location: str, max_bytes: int) -> bytes:
    """A whole object. Raises InputNotFoundError, InputError; MachineError for what may pass."""
    with _errors(location):
        system = _system(location)
        # asked first: clients fetch in parallel by ranges, and answer one beyond the end each in a way of its own
        size_bytes: int = system.info(location)["size"]
        if size_bytes > max_bytes:
            raise InputError(f"{location} has {size_bytes:,} bytes; {max_bytes:,} is the limit.", "Make it smaller first.")
        return cast("bytes", system.cat_file(location)) if size_bytes else b""


def write_object(location: str, data: bytes) -> None:
    """Put an object, whole or not at all. Raises OutputError where it is refused; MachineError for what may pass."""
    with _errors(location, writes=True):
        _system(location).pipe_file(location, data)


def object_exists(location: str) -> bool:
    with _errors(location):
        return bool(_system(location).exists(location))


def open_file(location: str) -> BinaryIO:
    """An object to be read piece by piece."""
    with _errors(location):
        return cast("BinaryIO", _system(location).open(location, "rb"))


def list_names(location: str) -> Iterator[str]:
    """The names of all objects under a prefix, without the prefix, sorted. Raises as `read_object`."""
    with _errors(location):
        system = _system(location)
        prefix = system._strip_protocol(location).rstrip("/") + "/"
        found: list[str] = system.find(prefix)
    if not found:
        raise InputNotFoundError(f"There is nothing under {location}.", "Check the bucket and the prefix.")
    yield from (name.removeprefix(prefix) for name in sorted(found))


def _system(location: str) -> Any:
    scheme = scheme_of(location)
    try:
        import fsspec

        return fsspec.filesystem(scheme, **_OPTIONS[scheme])
    except ImportError as error:
        raise MissingExtraError(
            f"A package that reads {scheme}:// is not installed ({error}).", 'Run: pip install "millicent[cloud]"'
        ) from error


@contextmanager
def _errors(location: str, *, writes: bool = False) -> Iterator[None]:
    """What a store's client raises, as one of ours. Every client raises kinds of its own, so all are caught."""
    refused = OutputError if writes else InputError
    try:
        yield
    except MillicentError:
        raise
    except FileNotFoundError as error:
        raise (OutputError if writes else InputNotFoundError)(
            f"There is no {location}.", "Check the bucket and the name."
        ) from error
    except PermissionError as error:
        raise refused(f"{location} may not be {'written' if writes else 'read'} ({error}).", "Check the credentials.") from error
    except Exception as error:
        if "credentials" in str(error).lower():
            raise refused(
                f"There are no credentials for {location} ({error}).", "Set them, as for the store's own tools."
            ) from error
        raise MachineError(f"{location} cannot be reached: {type(error).__name__}: {error}.", "Try again later.") from error
