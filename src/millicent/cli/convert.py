"""`millicent convert SRC -o DST --format FORMAT`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from millicent.cli.edit import parse_lora
from millicent.errors import MissingExtraError

if TYPE_CHECKING:
    from millicent.checkpoint.convert import Report

_WORST = 10


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model folder, demo, or a transformer's file in any layout.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="<path>", help="A new folder for a folder, else a .safetensors.")],
    number_format: Annotated[
        Literal["fp8", "int8", "bf16"], typer.Option("--format", help="For the blocks' matrices; all else is bf16.")
    ],
    loras: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="<file[:strength]>", help="A LoRA to fuse in before quantizing. Repeatable."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of the Lightning schedule that the modulation table is for. Default: the LoRA's.")
    ] = None,
    keep_modulation: Annotated[
        bool, typer.Option("--keep-modulation", help="Keep the weights that the table makes superfluous, a third of all.")
    ] = False,
    distilled: Annotated[
        int | None, typer.Option(help="Steps that SRC is distilled for where only its name says so; 0 for none.")
    ] = None,
    zero_cond_t: Annotated[
        bool | None,
        typer.Option("--zero-cond-t/--no-zero-cond-t", help="Whether a lone file is 2511's kind, where it does not say."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no summary.")] = False,
) -> None:
    """Write a model's transformer in another format, with LoRAs fused in and a modulation table.

    The matrices of the blocks become FP8 or INT8 codes with one scale for each row. What depends on the timestep alone becomes
    a table for the few steps of a Lightning schedule, and its weights are left out. Killed and run again, it goes on where it was.
    """
    try:
        from millicent.engine.convert import ConvertRequest
        from millicent.engine.convert import convert as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("millicent"):
            raise
        raise MissingExtraError(
            f"The package {error.name} is not installed, and converting needs it.", 'Run: pip install "millicent[engine]"'
        ) from error
    request = ConvertRequest(
        format=number_format,
        loras=tuple(parse_lora(lora) for lora in loras or ()),
        steps=steps,
        keep_modulation=keep_modulation,
        distilled_steps=distilled,
        zero_cond_t=zero_cond_t,
        overwrite=overwrite,
    )
    begin = time.perf_counter()
    with progress_bar(shown=not quiet and sys.stderr.isatty()) as on_unit:
        report = run(source, out, request, on_unit)
    if as_json:
        print(json.dumps(summarize(report, time.perf_counter() - begin)))
    elif not quiet:
        show(report, time.perf_counter() - begin)


def summarize(report: Report, seconds: float) -> dict[str, Any]:
    """What --json prints."""
    return {**dataclasses.asdict(report), "target": str(report.target), "seconds": seconds}


def show(report: Report, seconds: float) -> None:
    if report.started_anew:
        print("What an interrupted run had left was of another source or other options, and was made anew.")
    elif report.resumed_units:
        print(f"Gone on with an interrupted run: {report.resumed_units} of {report.units} parts were done.")
    before, after = report.bytes_before / 1e9, report.bytes_after / 1e9
    print(f"{report.target}  {before:.2f} -> {after:.2f} GB in {seconds:.0f} s")
    counts = ", ".join(f"{count} {stored_as}" for stored_as, count in report.counts.items() if count)
    print(f"parameters: {counts}; modulation table: {f'{report.table_tensors} tensors' if report.table_tensors else 'none'}")
    copied = sum(layer.is_copied for layer in report.layers)
    fused = sum(layer.is_fused for layer in report.layers)
    print(f"matrices: {len(report.layers)}, {copied} with the source's own codes, {fused} changed by LoRAs")
    table = Table("layer", "format", "relative error", title="The largest errors", title_justify="left", box=None)
    for layer in sorted(report.layers, key=lambda layer: -layer.error)[:_WORST]:
        table.add_row(layer.name, layer.format, f"{layer.error:.2e}")
    Console().print(table)


@contextmanager
def progress_bar(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A line on standard error with the parts that are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("convert", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
