"""`millicent pull MODEL|REPO`."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from millicent.checkpoint.fetch import Fetched, FetchProgress, Listing, OnFetch, fetch, list_model
from millicent.checkpoint.hub import PUBLIC_HUB, Hub
from millicent.facts.models import Card, LoraCard, ModelCard, TransformerCard


def pull(
    model: Annotated[
        str, typer.Argument(help="A card's name, as qwen-image-edit-2511, or a repository on the hub, as owner/name.")
    ],
    files: Annotated[
        list[str] | None, typer.Argument(help="Of a repository: paths or patterns. Default: a whole model, or its one weight file.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit. Default: the main branch.")] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="<folder>", help="Default: millicent/models/NAME in your data folder, ~/.local/share.")
    ] = None,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Accept a license that allows no commercial use.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no summary.")] = False,
) -> None:
    """Fetch a model, a LoRA or a ready-made file, and check every byte.

    License, free disk and the header of each weight file are looked at before the download starts. Run again, it goes on where it
    was broken off, and checks what is there. HF_TOKEN and HF_ENDPOINT are read from the environment.
    """
    # it would tell of each connection that it takes up again
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    hub = Hub((os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/"), os.environ.get("HF_TOKEN") or None)
    listing = list_model(model, files or (), revision, hub)
    is_told = not quiet and not as_json
    if is_told:
        show_listing(listing)
    folder = to or default_folder(listing.name)
    with progress_bar(shown=is_told and sys.stderr.isatty()) as on_progress:
        fetched = fetch(listing, folder, hub, accept_license, on_progress)
    if as_json:
        print(json.dumps(summarize(listing, fetched, accept_license)))
    elif is_told:
        show(listing, fetched)


def default_folder(name: str) -> Path:
    """Where a user's programs keep their data, by the XDG rules: a model is neither a cache to be emptied nor a project's own."""
    return _data_folder() / "models" / name


def kernels_folder() -> Path | None:
    """Where compiled kernels are kept: beside the models, on the disk that a rented machine keeps. None where Triton was told."""
    return None if os.environ.get("TRITON_CACHE_DIR") else _data_folder() / "kernels"


def digests_folder() -> Path:
    """Where hashes of weight files are kept, beside the models."""
    return _data_folder() / "digests"


def _data_folder() -> Path:
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share") / "millicent"


def show_listing(listing: Listing) -> None:
    """What would come, and under which license: said before anything does."""
    use = {True: "commercial use allowed", False: "no commercial use", None: "whether it allows commercial use is not known"}
    size = show_size(listing.size_bytes)
    is_doubtful = listing.repository.license is None and listing.card is not None and "license" in listing.card.unverified
    doubt = " (our card says so, unverified; the repository names none)" if is_doubtful else ""
    print(f"{listing.repository.name} at {listing.repository.commit[:12]}: {len(listing.files)} files, {size}")
    print(f"license: {listing.license or 'none is named'}{doubt}, {use[listing.commercial]}", flush=True)


def show(listing: Listing, fetched: Fetched) -> None:
    size = show_size(fetched.fetched_bytes)
    print(f"{fetched.folder}  {len(fetched.fetched)} of {len(listing.files)} files fetched, {size}; all are whole")
    if hint := show_use(listing.card, fetched):
        print(hint)


def show_use(card: Card | None, fetched: Fetched) -> str | None:
    """How to edit with what came."""
    match card:
        case ModelCard():
            return f"Use it with --model {fetched.folder}"
        case LoraCard():
            return f"Use it with --lora {fetched.folder / card.files[0]} on {card.base}, {card.steps} steps"
        case TransformerCard():
            distilled = f" --distilled {card.steps}" if card.steps else ""
            return f"Use it with --transformer {fetched.folder / card.files[0]}{distilled} on {card.base}"
    return None


def show_size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"


def summarize(listing: Listing, fetched: Fetched, accepted: bool) -> dict[str, Any]:
    """What --json prints."""
    came = set(fetched.fetched)
    return {
        "folder": str(fetched.folder),
        "repo": listing.repository.name,
        "revision": listing.revision,
        "commit": listing.repository.commit,
        "license": listing.license,
        "commercial_use": listing.commercial,
        "license_accepted": accepted,
        "files": [
            {"path": file.path, "size_bytes": file.size_bytes, "sha256": fetched.sha256[file.path], "fetched": file.path in came}
            for file in listing.files
        ],
        "fetched_bytes": fetched.fetched_bytes,
    }


@contextmanager
def progress_bar(shown: bool) -> Iterator[OnFetch]:
    """A line on standard error with the stage, the file, and the bytes of all files."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=None)

        def on_progress(progress: FetchProgress) -> None:
            name = progress.file.rpartition("/")[2]
            bar.update(
                task, description=f"{progress.stage:7} {name}", completed=progress.done_bytes, total=progress.total_bytes or None
            )

        yield on_progress
