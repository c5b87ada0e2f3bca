"""The hash over a model's weights."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from millicent.checkpoint import fingerprint
from millicent.checkpoint.digests import file_sha256
from millicent.checkpoint.fingerprint import begin_weights_sha256, weights_sha256
from millicent.errors import CheckpointError


def write(root: Path, contents: dict[str, bytes]) -> list[Path]:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return [root / name for name in contents]


def test_the_hash_is_the_documented_one_in_any_order(tmp_path: Path) -> None:
    files = write(tmp_path, {"vae/b": b"two", "transformer/a": b"one", "lora": b""})
    lines = [
        f"{name} {hashlib.sha256(content).hexdigest()}\n"
        for name, content in (("lora", b""), ("transformer/a", b"one"), ("vae/b", b"two"))
    ]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert weights_sha256(tmp_path, files) == weights_sha256(tmp_path, reversed(files)) == expected


def test_content_and_name_both_count(tmp_path: Path) -> None:
    hashes = {
        weights_sha256(tmp_path, write(tmp_path, {"a": b"one"})),
        weights_sha256(tmp_path, write(tmp_path, {"a": b"onf"})),
        weights_sha256(tmp_path, write(tmp_path, {"b": b"one"})),
    }
    assert len(hashes) == 3


def test_loras_count_with_their_strength_and_not_with_their_place(tmp_path: Path) -> None:
    (model,) = write(tmp_path / "model", {"a": b"one"})
    here, there = write(tmp_path, {"here/x": b"lora", "there/y": b"lora"})
    plain = weights_sha256(model.parent, [model])
    strong = weights_sha256(model.parent, [model], [(here, 1.0)])
    assert strong == weights_sha256(model.parent, [model], [(there, 1.0)])
    assert len({plain, strong, weights_sha256(model.parent, [model], [(here, 0.5)])}) == 3


def test_a_file_in_two_places_counts_in_both(tmp_path: Path) -> None:
    (file,) = write(tmp_path, {"a": b"one"})
    digest = hashlib.sha256(b"one").hexdigest()
    lines = sorted([f"a {digest}\n", f"transformer: {digest}\n", f"lora:1.0 {digest}\n"])
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert weights_sha256(tmp_path, [file], [(file, 1.0)], [("transformer", file)]) == expected


def test_it_is_begun_without_waiting_and_waited_for_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, may_go_on = write(tmp_path, {str(number): bytes(number) for number in range(40)}), threading.Event()

    def hash_later(path: Path, kept: Path | None) -> str:
        assert may_go_on.wait(30)
        return file_sha256(path, kept)

    monkeypatch.setattr(fingerprint, "file_sha256", hash_later)
    wait = begin_weights_sha256(tmp_path, files)
    may_go_on.set()
    monkeypatch.undo()
    assert wait() == wait() == weights_sha256(tmp_path, files)


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_a_file_that_cannot_be_read_is_told_of_where_it_is_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    files = write(tmp_path, {"a": b"one", "b": b"two"})
    wait = begin_weights_sha256(tmp_path, [*files, tmp_path / name])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            wait()


def test_a_process_can_end_while_it_hashes(tmp_path: Path) -> None:
    fifo = tmp_path / "never-ends"
    os.mkfifo(fifo)
    code = f"""
from pathlib import Path
from millicent.checkpoint.fingerprint import begin_weights_sha256
begin_weights_sha256(Path({str(tmp_path)!r}), [Path({str(fifo)!r})])
print("opened")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert (ended.stdout, ended.stderr) == ("opened\n", "")
