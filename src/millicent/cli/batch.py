"""`millicent batch MANIFEST -o OUT`, and `millicent batch status|export|gallery`."""

from __future__ import annotations

import datetime
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from millicent.catalog.cluster import Cluster
from millicent.catalog.events import Summary
from millicent.catalog.ledger import Ledger
from millicent.catalog.manifest import Columns, Row, read_manifest
from millicent.catalog.recipes import Recipe, read_recipe
from millicent.cli.batch_forecast import dry_run
from millicent.cli.batch_views import LEDGER, export, gallery, show_bill, status, summarize_bill
from millicent.cli.cost import choose_prices, write_value
from millicent.cli.edit import parse_lora, tell
from millicent.cli.live import Tally, show_time, stopping, watch
from millicent.cli.plan import MemoryLimit
from millicent.cli.pull import digests_folder, kernels_folder
from millicent.engine.editor import Editor
from millicent.engine.settings import Attention, Format, Settings
from millicent.errors import InputError, OutputError
from millicent.facts.gpus import find_gpu

EXIT_INCOMPLETE, EXIT_STOPPED = 1, 3


class ManifestFirst(TyperGroup):
    """`millicent batch MANIFEST` is `millicent batch run MANIFEST`. A manifest that is called as a command is written ./status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


batch = typer.Typer(
    cls=ManifestFirst,
    help="Edit a whole catalog: resumable, each identical picture once, with a running bill. `millicent batch run --help` has the"
    " options of `millicent batch MANIFEST -o OUT --recipe RECIPE`.",
    no_args_is_help=True,
    subcommand_metavar="MANIFEST | COMMAND ...",
)
batch.command()(status)
batch.command()(export)
batch.command()(gallery)


def read_usd(text: str) -> Decimal:
    """ "20usd", "$20" or "20" -> dollars."""
    bare = re.sub(r"(?i)^\$|\s*usd$", "", str(text).strip())
    try:
        usd = Decimal(bare)
    except InvalidOperation:
        usd = Decimal("NaN")
    if not (usd.is_finite() and usd > 0):
        raise typer.BadParameter(f"{text} is no sum of dollars; write it as 20usd.")
    return usd


def read_deadline(text: str) -> datetime.datetime:
    """ "6h", "90m", or a date and time, by this machine's clock where it names no zone -> when no more images are begun."""
    now = datetime.datetime.now().astimezone()
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hm])", str(text)):
        return now + datetime.timedelta(**{{"h": "hours", "m": "minutes"}[found[2]]: float(found[1])})
    try:
        deadline = datetime.datetime.fromisoformat(str(text)).astimezone()
    except ValueError as error:
        raise typer.BadParameter(f"{text} is no time; write it as 6h, 90m or 2026-11-30T08:00.") from error
    if deadline <= now:
        raise typer.BadParameter(f"{text} is over.")
    return deadline


@batch.command("run")
def run(
    manifest: Annotated[
        str,
        typer.Argument(
            help="A CSV, JSON Lines or Parquet file, a Shopify product export, or a folder of pictures; or s3://, gs://."
        ),
    ],
    out: Annotated[str, typer.Option("-o", "--out", help="The folder for the pictures; or s3://BUCKET/PREFIX, gs://.")],
    recipe_file: Annotated[str, typer.Option("--recipe", metavar="<file.toml>", help="What to draw of each row.")],
    ledger_url: Annotated[
        str | None,
        typer.Option("--ledger", metavar="<file|url>", help=f"Default: {LEDGER} in OUT. postgresql:// for several writers."),
    ] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Count, show the first prompts, and foretell time and money.")] = False,
    budget: Annotated[
        Decimal | None,
        typer.Option(parser=read_usd, metavar="<20usd>", help="Begin no image that would cost more than this in all."),
    ] = None,
    deadline: Annotated[
        datetime.datetime | None,
        typer.Option(parser=read_deadline, metavar="<6h|time>", help="Begin no image that would end later."),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what earlier runs gave up.")] = False,
    price: Annotated[
        Decimal | None,
        typer.Option(parser=read_usd, metavar="<usd>", help="Dollars an hour of one card. Default: known for --gpu."),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help='The card, as "RTX 4090": for its price, and for --dry-run its speed.')] = None,
    allow_hosts: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="<host>", help="A host that https pictures may come from. Repeatable. Default: none."),
    ] = None,
    id_column: Annotated[str | None, typer.Option("--id-column", help="Default: id, sku and the like.")] = None,
    picture_column: Annotated[str | None, typer.Option("--picture-column", help="Default: picture, image and the like.")] = None,
    mask_column: Annotated[
        str | None, typer.Option("--mask-column", help="Where a picture may change: checked, not drawn by. Default: mask.")
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Of a CSV or JSON Lines file. Default: UTF-8.")] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="<address>", help="Draw on a Ray cluster: auto, HOST:PORT, or local to start one."),
    ] = None,
    ray_actors: Annotated[int | None, typer.Option("--ray-actors", help="How many workers. Default: one for each GPU.")] = None,
    textfile: Annotated[
        Path | None, typer.Option(metavar="<file.prom>", help="Keep the figures there too, for Prometheus's textfile collector.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON lines, the summary last.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no summary.")] = False,
    model: Annotated[str, typer.Option(help="demo, demo-base, or a diffusers-layout folder.")] = "demo",
    transformer: Annotated[Path | None, typer.Option(help="A transformer in place of the model's.")] = None,
    text_encoder: Annotated[Path | None, typer.Option(help="A text encoder in place of the model's.")] = None,
    vae: Annotated[Path | None, typer.Option(help="A VAE in place of the model's.")] = None,
    distilled: Annotated[int | None, typer.Option(help="How many steps the transformer is distilled for; 0 for none.")] = None,
    loras: Annotated[
        list[str] | None, typer.Option("--lora", metavar="<file[:strength]>", help="A LoRA to add. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    number_format: Annotated[Format | None, typer.Option("--format", help="Default: the card's fastest.")] = None,
    attention: Annotated[Attention, typer.Option(help="Exact, or with 8-bit products: an approximation.")] = "exact",
    reuse_reference: Annotated[bool, typer.Option("--reuse-reference", help="Faster, an approximation.")] = False,
    memory_gb: MemoryLimit = None,
) -> None:
    """Edit a whole catalog.

    Killed anywhere, the same command goes on: nothing is lost, and nothing paid twice. Ctrl-C begins no more images and gives back
    those that are not drawn yet, a second one stops at once. The exit code is 0 where every image is there, 1 with bad rows or
    quarantined images, 3 after a stop.
    """
    started_s = time.monotonic()
    recipe = read_recipe(recipe_file)
    columns = Columns(id=id_column, picture=picture_column, mask=mask_column, encoding=encoding)
    usd_per_hour = price_of(price, gpu)
    if budget is not None and usd_per_hour is None:
        raise InputError("A budget was given, and no price of the card is known.", "Give --price, or the card with --gpu.")
    if ray_actors is not None and ray is None:
        raise InputError("--ray-actors was given without --ray.", "Give the cluster too, as --ray auto.")
    settings = Settings(format=number_format, attention=attention, reuse_reference=reuse_reference, memory_gb=memory_gb)
    open_editor = partial(
        Editor.open,
        absolute(model),
        transformer=transformer and transformer.resolve(),
        text_encoder=text_encoder and text_encoder.resolve(),
        vae=vae and vae.resolve(),
        loras=[(path.resolve(), strength) for path, strength in map(parse_lora, loras or ())],
        distilled_steps=distilled,
        device=device,
        settings=settings,
        kernels=kernels_folder(),
        digests=digests_folder(),
    )
    allowed = frozenset(allow_hosts or ())
    if dry:
        dry_run(
            manifest, columns, recipe, model, gpu, usd_per_hour, open_editor, allowed, settings, ray_actors or 1, as_json=as_json
        )
        return
    total = count_rows(manifest, columns) * len(recipe.variants)  # a manifest that cannot be read is told before weights are loaded
    with Ledger.open(ledger_url or default_ledger(out)) as ledger, opened(open_editor, ray, ray_actors) as editor:
        if not quiet:
            tell_of(editor)
        cards = getattr(editor, "cards", 1)
        tally = Tally(
            total=total,
            before=count_before(ledger, retry_failed),
            usd_per_hour=None if usd_per_hour is None else usd_per_hour * cards,
            started_s=started_s,
        )
        stop = threading.Event()
        with stopping(stop), watch(tally, as_json=as_json, quiet=quiet, textfile=textfile) as on_event:
            summary = draw(
                editor,
                read_manifest(manifest, columns),
                recipe,
                ledger,
                out,
                cards=cards,
                loading_s=time.monotonic() - started_s,
                price=usd_per_hour,
                budget_usd=budget,
                deadline=deadline,
                retry_failed=retry_failed,
                on_event=on_event,
                stop=stop,
                allowed_hosts=allowed,
            )
    if as_json:
        bill = None if summary.bill is None else summarize_bill(summary.bill)
        print(json.dumps({"event": "summary", **asdict(summary), "bill": bill}, default=write_value))
    elif not quiet:
        show(summary, out)
    raise typer.Exit(exit_code(summary))


def draw(editor: Any, rows: Iterator[Any], recipe: Recipe, ledger: Ledger, out: str, **options: Any) -> Summary:
    """The run itself, with what needs numpy imported only now."""
    from millicent.catalog.run import run_catalog
    from millicent.quality.sanity import judge

    def check(sources: Any, result: Any, limits: Any) -> Any:
        # the result follows the last reference's shape, so that is what it is held against
        return judge(sources[-1], result, limits, sources.mask, fit=sources.fit)

    return run_catalog(editor, rows, recipe, ledger, out, weights_sha256=editor.weights_sha256, check=check, **options)


@contextmanager
def opened(open_editor: Callable[[], Editor], ray: str | None, ray_actors: int | None) -> Iterator[Editor | Cluster]:
    if ray is None:
        yield open_editor()
        return
    with Cluster.open(ray, open_editor, ray_actors) as cluster:
        yield cluster


def tell_of(editor: Editor | Cluster) -> None:
    if not isinstance(editor, Cluster):
        tell(editor)
        wave = getattr(editor, "wave", 1)
        if wave > 1:
            print(f"in waves of {wave}: up to so many images are read before the first of them is drawn", file=sys.stderr)
        return
    for warning in editor.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{editor.cards} worker{'' if editor.cards == 1 else 's'} on Ray", file=sys.stderr)


def absolute(model: str) -> str:
    """A folder's name, so that workers elsewhere on this machine find it; other names as they are."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def price_of(price: Decimal | None, gpu: str | None) -> Decimal | None:
    """Dollars an hour of one card: as given, else the cheapest on demand of the named card, else None."""
    if price is not None or gpu is None:
        return price
    return choose_prices(find_gpu(gpu), datetime.date.today(), None, None, None)[0].usd_per_hour


def default_ledger(out: str) -> str:
    """In the output folder, which is made. Raises OutputError where OUT is no local folder."""
    if "://" in out:
        raise OutputError(f"{out} cannot hold the ledger.", "Say where to keep it: --ledger FILE, or postgresql://.")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {out} cannot be made: {error.strerror}.", "Choose another place.") from error
    return str(Path(out) / LEDGER)


def count_rows(manifest: str, columns: Columns) -> int:
    return sum(isinstance(row, Row) for row in read_manifest(manifest, columns))


def count_before(ledger: Ledger, retry_failed: bool) -> int:
    """Images that this run finds finished, or given up."""
    counts = ledger.counts()
    return counts.get("done", 0) + counts.get("linked", 0) + (0 if retry_failed else counts.get("quarantined", 0))


def exit_code(summary: Summary) -> int:
    if summary.stopped:
        return EXIT_STOPPED
    return EXIT_INCOMPLETE if summary.bad_rows or summary.quarantined or summary.given_up else 0


def show(summary: Summary, out: str) -> None:
    names = (
        "done",
        "linked",
        "already",
        "recovered",
        "rejected",
        "failed",
        "quarantined",
        "given_up",
        "bad_rows",
        "elsewhere",
        "waiting",
    )
    told = [f"{getattr(summary, name):,} {name.replace('_', ' ')}" for name in names if getattr(summary, name)]
    print(f"{out}  {', '.join(told) or 'nothing to draw'}")
    if summary.images_per_hour is not None:
        print(f"{summary.images_per_hour:,.0f} images an hour, over {show_time(summary.elapsed_s)}")
    if summary.stopped:
        print(f"stopped: {summary.stopped} The same command goes on from here.")
    if summary.bill is not None:
        show_bill(summary.bill)
