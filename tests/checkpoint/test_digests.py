"""Hashes of files that are kept: believed for as long as a file is as it was, and never of one that could have changed unseen."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from millicent.checkpoint import digests
from millicent.checkpoint.digests import file_sha256

LATER_NS = 10_000_000_000


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as large, and as left alone for long."""
    now = time.time_ns
    monkeypatch.setattr(digests, "_LEAST_BYTES", 0)
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + LATER_NS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    return path


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "data" / "digests"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read, right = list[int](), digests._hash

    def hash_counted(file: BinaryIO, size_bytes: int) -> str:
        read.append(size_bytes)
        return right(file, size_bytes)

    monkeypatch.setattr(digests, "_hash", hash_counted)
    return read


@pytest.mark.parametrize("size_bytes", [0, 1, (1 << 16) + 1, (16 << 20) + 5])
def test_the_hash_is_the_contents(tmp_path: Path, size_bytes: int) -> None:
    content = os.urandom(size_bytes)
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == sha256(content)


def test_a_file_that_stays_is_read_once(file: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_reads(monkeypatch)
    monkeypatch.chdir(file.parent)
    found = {file_sha256(path, kept) for path in (file, file, Path(file.name))}
    assert found == {sha256(b"one")}
    assert read == [3]
    (record,) = kept.iterdir()
    assert json.loads(record.read_text())["path"] == str(file.resolve())


def test_without_a_folder_nothing_is_kept(file: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_reads(monkeypatch)
    assert file_sha256(file) == file_sha256(file) == sha256(b"one")
    assert len(read) == 2
    monkeypatch.setattr(digests, "_LEAST_BYTES", 4)
    assert file_sha256(file, kept) == sha256(b"one")
    assert not kept.exists(), "a small file is not worth it"


def test_a_change_that_leaves_size_and_mtime_is_seen(file: Path, kept: Path) -> None:
    file_sha256(file, kept)
    before = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_sha256(file, kept) == sha256(b"two")
    other = file.with_name("other")
    other.write_bytes(b"six")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert file_sha256(file, kept) == sha256(b"six")


def test_a_file_that_was_just_written_is_not_kept(file: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests.time, "time_ns", lambda: file.stat().st_mtime_ns + 1000)
    assert file_sha256(file, kept) == sha256(b"one")
    assert not kept.exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(file: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = digests._hash

    def hash_and_change(opened: BinaryIO, size_bytes: int) -> str:
        digest = right(opened, size_bytes)
        file.write_bytes(b"two")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(digests, "_hash", hash_and_change)
        file_sha256(file, kept)
    assert not kept.exists()
    assert file_sha256(file, kept) == sha256(b"two")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null", "abcd", "no hex"])
def test_a_damaged_record_is_made_again(file: Path, kept: Path, damage: bytes | str) -> None:
    file_sha256(file, kept)
    (record,) = kept.iterdir()
    told = json.loads(record.read_text())
    record.write_bytes(damage if isinstance(damage, bytes) else json.dumps({**told, "sha256": damage}).encode())
    assert file_sha256(file, kept) == sha256(b"one")
    assert json.loads(record.read_text()) == told


def test_a_folder_that_cannot_be_written_is_told_of(file: Path, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.parent.write_text("a file, where a folder is wanted")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert file_sha256(file, kept) == sha256(b"one")
    assert caplog.text.count("cannot be kept") == 1
    assert [path.name for path in file.parent.iterdir() if path not in (file, kept.parent)] == []


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, kept: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "missing", kept)
