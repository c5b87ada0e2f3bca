"""Where compiled kernels are kept."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from millicent.errors import OutputError
from millicent.kernels import compiled

triton = pytest.importorskip("triton")
CARD = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A/B 200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")  # which the knob sets too; put back afterwards
    yield
    triton.knobs.cache.dir = triton.knobs.env


def test_the_folder_is_named_by_all_that_code_depends_on() -> None:
    asked = ("NVIDIA H200", (9, 0), "2.11.0+cu130", "3.6.0")
    name = compiled.folder_name(*asked)
    assert name.startswith("NVIDIA-H200-sm90-torch2.11.0+cu130-triton3.6.0-")
    others = [("NVIDIA L4", *asked[1:]), (asked[0], (8, 9), *asked[2:]), (*asked[:2], "2.12.0", "3.6.0"), (*asked[:3], "3.7.1")]
    assert len({name, *(compiled.folder_name(*each) for each in others)}) == 5


def test_other_code_has_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for code in ("one", "two"):
        (tmp_path / "kernel.py").write_text(code)
        monkeypatch.setattr(compiled, "_KERNELS", tmp_path)
        names.append(compiled.folder_name("card", (9, 0), "2", "3"))
    assert names[0] != names[1]


def test_triton_keeps_its_files_there(tmp_path: Path) -> None:
    folder = compiled.keep_compiled(tmp_path / "kernels", CARD)
    assert folder.parent == tmp_path / "kernels"
    manager = triton.runtime.cache.get_cache_manager("00" * 32)
    assert Path(manager.put(b"code", "kernel.cubin")).is_relative_to(folder)
    # and so do the processes that it starts
    told = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.knobs.cache.dir)"], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == str(folder)


def test_a_folder_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="Compiled kernels cannot be kept in") as caught:
        compiled.keep_compiled(tmp_path / "file", CARD)
    assert "TRITON_CACHE_DIR" in caught.value.fix
    assert triton.knobs.cache.dir == "/elsewhere"
