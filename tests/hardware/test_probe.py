"""This machine, read without torch."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from millicent.hardware import probe as probing
from millicent.hardware.probe import find_compiler, is_container, probe, read_disk, read_torch

PYPI = """from typing import Optional
__version__ = '2.13.0+cu130'
cuda: Optional[str] = '13.0'
hip: Optional[str] = None
"""
OLD = "__version__ = '2.4.1+cu121'\ncuda: str = '12.1'\n"


def test_this_machine_is_read(tmp_path: Path) -> None:
    machine = probe({"models": tmp_path / "not" / "yet" / "there"})
    assert machine.ram_bytes >= machine.ram_available_bytes > 0
    assert machine.cpu_count > 0
    assert machine.torch is not None
    assert machine.torch.startswith(version("torch"))
    (disk,) = machine.disks
    assert (disk.path, disk.purpose) == (str(tmp_path / "not" / "yet" / "there"), "models")
    assert disk.free_bytes > 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (PYPI, ("2.13.0+cu130", "13.0")),
        (OLD, ("2.4.1+cu121", "12.1")),
        ("__version__ = '2.13.0+cpu'\ncuda = None\n", ("2.13.0+cpu", None)),
    ],
)
def test_torch_is_read_from_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: tuple[str, str]
) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert read_torch() == found


def test_no_torch_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert read_torch() == (None, None)


def test_nothing_heavy_is_imported() -> None:
    """By the probe, the checks and the command together."""
    code = """
import sys
from pathlib import Path
import millicent.cli.preflight
from millicent.engine.needs import needs_of
from millicent.hardware.preflight import check_machine
from millicent.hardware.probe import probe
machine = probe({"models": Path("models")})
check_machine(machine, needs_of("qwen-image-edit-2511", None, machine))
print(sorted(sys.modules.keys() & {"torch", "numpy", "transformers", "safetensors"}))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_folders_on_one_file_system_say_so(tmp_path: Path) -> None:
    one, other = read_disk("models", tmp_path / "a"), read_disk("hub cache", tmp_path / "b" / "c")
    assert one.filesystem == other.filesystem is not None


def test_cc_is_the_compiler_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"clang": "/usr/bin/clang", "cc-13": "/opt/cc-13"}
    monkeypatch.setattr(probing.shutil, "which", here.get)
    assert (find_compiler(None), find_compiler("cc-13"), find_compiler("icc")) == ("clang", "cc-13", None)


@pytest.mark.parametrize(
    ("mark", "text"), [(".dockerenv", ""), ("run/.containerenv", ""), ("proc/1/cgroup", "0::/kubepods/besteffort/pod1\n")]
)
def test_a_container_is_told_by_its_marks(tmp_path: Path, mark: str, text: str) -> None:
    assert not is_container(tmp_path)
    path = tmp_path / mark
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert is_container(tmp_path)
