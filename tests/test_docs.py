"""The pages that describe the code say what the code does."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_cli_page_is_the_commands_own_help() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "write_cli.py"))
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page["make_page"](), "run: make docs"


def test_the_readmes_file_tree_names_every_file_and_no_other() -> None:
    """Each line of the tree is a path; a folder that is named without its files stands for all of them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("```text\n")[1].split("```")[0]
    named: set[str] = set()
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        found = re.match(r"( *)([\w./-]+)  ", line + "  ")
        assert found, line
        indent, name = len(found[1]), found[2]
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        path = "/".join([*(folder for _, folder in folders), name.rstrip("/")])
        assert (ROOT / path).exists(), path
        named.add(path)
        if name.endswith("/"):
            folders.append((indent, name.rstrip("/")))
    for package in ("src/millicent", "recipes", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            path = file.relative_to(ROOT).as_posix()
            if file.name not in ("__init__.py", "__main__.py"):
                assert path in named, f"the README's tree lacks {path}"


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("recipes/*/README.md")]
    assert len(pages) > 6
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
            link = target[0] or target[1]
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page}: {link}"
