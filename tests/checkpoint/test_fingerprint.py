"""The hash over a model's weights."""

import hashlib
from pathlib import Path

from millicent.checkpoint.fingerprint import weights_sha256


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
