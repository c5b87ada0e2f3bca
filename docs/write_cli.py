"""Write docs/cli.md from the commands' own help and the tree of errors. `make docs`; a test holds the page true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from millicent import errors

PAGE = Path(__file__).parent / "cli.md"
COMMANDS = (
    (),
    ("preflight",),
    ("gpus",),
    ("plan",),
    ("pull",),
    ("inspect",),
    ("convert",),
    ("edit",),
    ("batch",),
    ("batch", "run"),
    ("batch", "status"),
    ("batch", "export"),
    ("batch", "gallery"),
    ("cost",),
    ("cost", "refresh"),
)
PLAIN = {"COLUMNS": "110", "TERMINAL_WIDTH": "110", "NO_COLOR": "1", "TERM": "dumb"}


def read_help(command: tuple[str, ...]) -> str:
    """The help text, as a terminal of 110 columns shows it."""
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"} | PLAIN
    ran = subprocess.run(
        [sys.executable, "-m", "millicent", *command, "--help"], env=environment, capture_output=True, text=True, check=True
    )
    return "\n".join(line.rstrip() for line in ran.stdout.strip().splitlines())


def make_page() -> str:
    assert errors.__doc__
    tree = errors.__doc__.split("\n\n")[1]
    helps = [f"## millicent {' '.join(command)}".rstrip() + f"\n\n```text\n{read_help(command)}\n```\n" for command in COMMANDS]
    return "\n".join(
        [
            "# The command line",
            "",
            "Written by `make docs` from the commands themselves.",
            "",
            *helps,
            "## Exit codes",
            "",
            "Every error is one line on standard error that says what was found, what was wanted and what to do. Its kind is the",
            "exit code; 0 is success, 2 a usage error, 130 Ctrl-C. An output file that was there before stays as it was.",
            "",
            f"```text\n{tree}\n```\n",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
