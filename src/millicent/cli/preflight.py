"""`millicent preflight`."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import millicent
from millicent.cli.pull import default_folder, kernels_folder
from millicent.engine.needs import needs_of
from millicent.errors import InputError, InputNotFoundError, OutputError
from millicent.hardware.findings import Finding, exit_code, ok, warning
from millicent.hardware.host_checks import HUB_CACHE, KERNELS, MODELS, TEMPORARY
from millicent.hardware.judging import LIMIT_S, Ended, judge, start_trial, trial_command
from millicent.hardware.machine import Machine, from_json, to_json
from millicent.hardware.needs import Needs
from millicent.hardware.network import start_asking
from millicent.hardware.preflight import check_machine
from millicent.hardware.probe import probe
from millicent.hardware.report import write_report

DEFAULT_MODEL = "qwen-image-edit-2511"
PUBLIC_HUB = "https://huggingface.co"
_COLORS = {"ok": "green", "warning": "yellow", "error": "bold red"}


def preflight(
    model: Annotated[str, typer.Option(help="A card's name.")] = DEFAULT_MODEL,
    format_name: Annotated[
        str | None, typer.Option("--format", help="bf16, fp8, int8, int8-weight or nvfp4. Default: the one that suits the card.")
    ] = None,
    machine_file: Annotated[
        Path | None, typer.Option("--machine", metavar="<file>", help="Judge a saved machine instead of this one.")
    ] = None,
    save_machine: Annotated[
        Path | None, typer.Option("--save-machine", metavar="<file>", help="Write what was found of this machine, as JSON.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="<file>", help="Write a report for a bug, as Markdown; - for standard output.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Will this card, driver, torch, disk and memory do? In five seconds, before anything is fetched, torch itself included.

    Every finding says what was found, what is wanted and what mends it. Where there are torch and a card, a few small things are
    tried on it. The exit code is 0, 1 with warnings, 2 where an edit will not work. HF_TOKEN and HF_ENDPOINT are read.
    """
    env = os.environ
    # its child imports torch meanwhile, which takes longest
    with start_trial(trial_command("cuda")) if machine_file is None else nullcontext() as finish:
        machine = (
            read_machine(machine_file) if machine_file else probe(folders(model), env.get("CUDA_VISIBLE_DEVICES"), env.get("CC"))
        )
        if save_machine is not None:
            write(save_machine, to_json(machine) + "\n")
        needs = needs_of(model, format_name, machine, present_bytes(default_folder(model)) if machine_file is None else 0)
        ask = start_hub(needs, offline) if machine_file is None else None
        findings = check_machine(machine, needs)
        if finish is not None:
            findings += try_card(machine, needs, finish)
    if ask is not None:
        findings += (ask(),)
    if report is not None:
        write_or_print(report, write_report(machine, needs, findings, millicent.__version__))
    if as_json:
        print(json.dumps(summarize(machine, needs, findings)))
    elif report is None or str(report) != "-":
        show(findings, needs)
    raise typer.Exit(exit_code(findings))


def folders(model: str) -> dict[str, Path]:
    """What a download and an edit fill, by purpose, as the environment sets them."""
    home = Path.home()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    return {
        MODELS: default_folder(model),
        HUB_CACHE: Path(os.environ.get("HF_HUB_CACHE") or hub / "hub"),
        TEMPORARY: Path(tempfile.gettempdir()),
        KERNELS: kernels_folder() or Path(os.environ["TRITON_CACHE_DIR"]),
    }


def present_bytes(folder: Path) -> int:
    """Of the model's files, what is here already, whole or in part."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def start_hub(needs: Needs, offline: bool) -> Callable[[], Finding]:
    """The hub is asked while everything else is looked at."""
    if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return lambda: ok("hub", "not asked: offline")
    return start_asking(os.environ.get("HF_ENDPOINT") or PUBLIC_HUB, needs.repo, os.environ.get("HF_TOKEN") or None)


def try_card(machine: Machine, needs: Needs, finish: Callable[[float], Ended]) -> tuple[Finding, ...]:
    """The second stage, where there is something to try."""
    if machine.card is None or machine.torch is None:
        return ()
    if machine.torch_cuda is None:
        return (warning("trial", "torch is a build without CUDA, so nothing was tried on the card", "a CUDA build of torch"),)
    return judge(finish(LIMIT_S), machine, needs)


def read_machine(path: Path) -> Machine:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputNotFoundError(f"There is no file {path}.", "Write one with --save-machine.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.", "Write one with --save-machine.") from error
    return from_json(text)


def write_or_print(path: Path, text: str) -> None:
    if str(path) == "-":
        print(text, end="")
    else:
        write(path, text)


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}.", "Choose another file.") from error


def summarize(machine: Machine, needs: Needs, findings: tuple[Finding, ...]) -> dict[str, Any]:
    """What --json prints."""
    return {
        "model": needs.model,
        "format": needs.format,
        "exit_code": exit_code(findings),
        "needs": {"card_bytes": needs.card_bytes, "disk_bytes": needs.disk_bytes, **dataclasses.asdict(needs)},
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "machine": dataclasses.asdict(machine),
    }


def show(findings: tuple[Finding, ...], needs: Needs) -> None:
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        color = _COLORS[finding.level]
        table.add_row(f"[{color}]{finding.level}[/]", escape(finding.name), describe(finding))
    console.print(table)
    console.print(escape(conclude(findings, needs)))


def describe(finding: Finding) -> str:
    lines = [escape(finding.found)]
    if finding.level != "ok":
        lines += [f"wanted: {escape(finding.wanted)}"] if finding.wanted else []
        lines += [f"[bold]-> {escape(finding.command)}[/]"] if finding.command else []
    return "\n".join(lines)


def conclude(findings: tuple[Finding, ...], needs: Needs) -> str:
    levels = [finding.level for finding in findings]
    told = {0: "will run here", 1: "will run here, with what the warnings say", 2: "will not run here"}[exit_code(findings)]
    counts = f"errors {levels.count('error')}, warnings {levels.count('warning')}, in order {levels.count('ok')}"
    return f"{needs.model} in {needs.format} {told}: {counts}."
