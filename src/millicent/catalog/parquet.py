"""Parquet files, read some rows at a time. The one home of pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from millicent.catalog.rows import BadRow
from millicent.errors import InputError, MissingExtraError

_BATCH_ROWS = 1024


def read_parquet(file: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any]] | BadRow]:
    """Each row's number, from 1, and values. Raises MissingExtraError, InputError for a file that is damaged or none."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "The package pyarrow is not installed, and Parquet files need it.", 'Run: pip install "millicent[parquet]"'
        ) from error
    number = 0
    try:
        # without pre-buffering and dictionaries read ahead, memory is a batch's and not a file's
        for batch in ParquetFile(file, pre_buffer=False).iter_batches(_BATCH_ROWS, use_threads=False):
            for values in batch.to_pylist():
                number += 1
                yield number, values
    except (ArrowException, OSError) as error:
        raise InputError(f"{name} cannot be read as Parquet after row {number}: {error}.", "Write the file again.") from error
