"""`millicent pull` as its user runs it: what it shows, what it prints, and how it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import COMMIT, FakeHub, serve_hub
from safetensors.numpy import save

from millicent.cli.app import main
from millicent.engine.editor import Editor, find_model

REPO = "someone/some-lora"
LORA = save(
    {
        "transformer_blocks.0.attn.to_q.lora_down.weight": np.ones((4, 64), np.float32),
        "transformer_blocks.0.attn.to_q.lora_up.weight": np.ones((64, 4), np.float32),
    }
)


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with serve_hub() as hub:
        hub.add(REPO, {"lora.safetensors": LORA})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["millicent", "pull", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            main()
        assert isinstance(exited.value.code, int)
        return Ran(exited.value.code, *capfd.readouterr())

    return call


def test_the_license_is_shown_and_the_file_comes(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    ran = run(REPO, "--to", tmp_path / "loras")
    assert (ran.code, ran.err) == (0, "")
    size = re.escape(f"{len(LORA) / 1e6:.2f} MB")
    assert re.fullmatch(
        rf"{REPO} at c0ffee000000: 1 files, {size}\nlicense: apache-2.0, commercial use allowed\n"
        rf"{tmp_path}/loras  1 of 1 files fetched, {size}; all are whole\n",
        ran.out,
    )
    assert (tmp_path / "loras" / "lora.safetensors").read_bytes() == LORA


def test_json_is_one_object(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    expected = {
        "folder": str(tmp_path / "data" / "millicent" / "models" / "someone--some-lora"),
        "repo": REPO,
        "revision": "main",
        "commit": COMMIT,
        "license": "apache-2.0",
        "commercial_use": True,
        "license_accepted": False,
        "files": [
            {
                "path": "lora.safetensors",
                "size_bytes": len(LORA),
                "sha256": hashlib.sha256(LORA).hexdigest(),
                "fetched": True,
            }
        ],
        "fetched_bytes": len(LORA),
    }
    ran = run(REPO, "--revision", "main", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json == expected
    again = run(REPO, "--revision", "main", "--json").json
    expected["files"][0]["fetched"] = False  # type: ignore[index]
    assert again == expected | {"fetched_bytes": 0}


def test_quiet_says_nothing(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    assert run(REPO, "lora.safetensors", "-q", "--to", tmp_path / "x") == Ran(0, "", "")


def test_a_pulled_model_opens(run: Run, hub: FakeHub, tiny_folder: Path, tmp_path: Path) -> None:
    files = {str(path.relative_to(tiny_folder)): path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()}
    hub.add("Qwen/Qwen-Image-Edit-2511", files)
    ran = run("qwen-image-edit-2511")
    folder = tmp_path / "data" / "millicent" / "models" / "qwen-image-edit-2511"
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith(f"Use it with --model {folder}\n")
    assert find_model(folder)[2].name == "qwen-image-edit-2511"
    Editor.open(folder, device="cpu")


def test_a_card_says_how_its_file_is_used(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    name = "Qwen-Image-Edit-2511-Lightning-8steps-V1.0-bf16.safetensors"
    hub.add("lightx2v/Qwen-Image-Edit-2511-Lightning", {name: LORA})
    ran = run("qwen-image-edit-2511-lightning-8steps", "--to", tmp_path / "x")
    assert ran.out.endswith(f"Use it with --lora {tmp_path}/x/{name} on qwen-image-edit-2511, 8 steps\n")
    hub.add("lightx2v/Qwen-Image-Edit-2511-Lightning", {name: LORA}, license=None)
    ran = run("qwen-image-edit-2511-lightning-8steps", "--to", tmp_path / "x")
    assert "license: Apache-2.0 (our card says so, unverified; the repository names none), commercial use allowed\n" in ran.out


def test_a_connection_that_breaks_is_no_news(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after = [100]
    ran = run(REPO, "--to", tmp_path / "x")
    assert (ran.code, ran.err) == (0, "")


REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no card": (("qwen-image-edit-2611",), 31, "qwen-image-edit-2511"),
    "no repository": (("someone/else",), 31, "no repository someone/else"),
    "no revision": ((REPO, "--revision", "v2"), 31, "no such revision"),
    "no file": ((REPO, "x.gguf"), 10, "no file x.gguf"),
    "files of a card": (("qwen-image-edit-2511", "x.gguf"), 10, "says which files"),
    "no commercial use": (("someone/research",), 10, "--accept-license"),
    "wrong bytes": (("someone/wrong",), 30, "its hash is not"),
    "pickle": ((REPO, "pickle.bin"), 30, "pickle"),
    "unknown option": ((REPO, "--license"), 2, "--license"),
}


@pytest.mark.parametrize(("args", "code", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_one_line_and_an_exit_code(
    run: Run, hub: FakeHub, tmp_path: Path, args: tuple[str, ...], code: int, told: str
) -> None:
    hub.files[REPO]["pickle.bin"] = b"\x80\x04 and so on"
    hub.add("someone/research", {"x.safetensors": LORA}, license="cc-by-nc-4.0")
    hub.add("someone/wrong", {"wrong.safetensors": LORA})
    hub.contents["wrong.safetensors"] = LORA[:-1] + b"x"
    ran = run(*args, "--to", tmp_path / "x")
    assert ran.code == code
    assert told in ran.err
    if code != 2:  # usage errors are typer's, in a box
        assert re.fullmatch(r"error: [^\n]+\n", ran.err)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_accepted_license_is_told(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.add(REPO, {"x.safetensors": LORA}, license="cc-by-nc-4.0")
    ran = run(REPO, "--to", tmp_path / "x", "--accept-license")
    assert "license: cc-by-nc-4.0, no commercial use\n" in ran.out
    hub.add(REPO, {"x.safetensors": LORA}, license=None)
    ran = run(REPO, "--to", tmp_path / "y")
    assert "license: none is named, whether it allows commercial use is not known\n" in ran.out


def test_the_login_comes_from_the_environment(run: Run, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.wanted_token = "hf_secret"
    ran = run(REPO, "--to", tmp_path / "x")
    assert (ran.code, ran.err.count("\n")) == (30, 1)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ran = run(REPO, "--to", tmp_path / "x")
    assert ran.code == 0
    assert "hf_secret" not in ran.out + (tmp_path / "x" / "millicent-source.json").read_text()


def test_a_terminal_gets_a_bar_and_a_file_gets_none(hub: FakeHub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "millicent", "pull", REPO]
    ran = subprocess.run([*command, "--to", str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    master, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([*command, "--to", str(tmp_path / "y")], stdout=subprocess.PIPE, stderr=terminal, env=environment)
    out, _ = process.communicate(timeout=30)
    os.close(terminal)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert process.returncode == 0
    assert b"license" in out
    assert "lora.safetensors" in shown
