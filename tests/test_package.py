"""The public face: what `import millicent` offers, and what it does not load."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import millicent

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_every_exported_name_is_what_its_home_calls_it() -> None:
    assert set(millicent.__all__) == {*millicent._HOME_OF, "__version__"}
    for name, home in millicent._HOME_OF.items():
        assert getattr(millicent, name) is getattr(sys.modules[home], name)
    assert set(dir(millicent)) == set(millicent.__all__)


def test_every_error_is_exported() -> None:
    from millicent import errors

    kinds = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert kinds == set(millicent._HOMES["millicent.errors"])


def test_importing_loads_nothing_heavy() -> None:
    loaded = run("import sys, millicent; print([m for m in ('torch', 'numpy', 'PIL', 'typer') if m in sys.modules])")
    assert loaded == "[]"


def test_the_command_line_and_the_nouns_load_no_torch() -> None:
    code = """
import sys, millicent.cli.app, millicent.engine.editor, millicent.facts.models
import millicent.checkpoint.header, millicent.checkpoint.architecture
from millicent import Editor, EditRequest, open_image
print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"""
    assert run(code) == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(millicent, "Editr")


def test_the_version_is_the_installed_one_and_the_changelogs() -> None:
    from importlib.metadata import version

    assert version("millicent") == millicent.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changelog.split("\n## ")[1].startswith(f"{millicent.__version__} ")


def test_every_dependency_is_pinned_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = {re.split(r"[>\[]", requirement)[0].strip().lower().replace("_", "-") for requirement in wanted}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert names <= {name.lower().replace("_", "-") for name in pins}
