"""`millicent inspect FILE|FOLDER|URL`."""

from __future__ import annotations

import json
import os
from typing import Annotated
from urllib.parse import urlsplit

import typer

from millicent.checkpoint.hub import PUBLIC_HUB
from millicent.checkpoint.inspection import Inspection, inspect_checkpoint


def inspect(
    where: Annotated[str, typer.Argument(help="A safetensors or GGUF file, a folder of them, a model folder, or an http(s) URL.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Tell what a checkpoint is and whether it loads, from its headers alone.

    A file behind a URL is read by ranges, 2 MB of it at most. HF_TOKEN goes to the hub (HF_ENDPOINT) and nowhere else.
    The exit code is 30 where something would be refused.
    """
    inspections = inspect_checkpoint(where, token_for(where))
    if as_json:
        found = [inspection.as_dict() for inspection in inspections]
        print(json.dumps(found[0] if len(found) == 1 else {"name": where, "parts": found}, indent=2))
    else:
        print("\n\n".join(show(inspection) for inspection in inspections))
    if any(inspection.refused for inspection in inspections):
        raise typer.Exit(30)


def token_for(where: str) -> str | None:
    """The hub's token, for an address at the hub alone: any other server could keep it."""
    hub, asked = urlsplit(os.environ.get("HF_ENDPOINT") or PUBLIC_HUB), urlsplit(where)
    is_hub = (asked.scheme, asked.netloc) == (hub.scheme, hub.netloc)
    return os.environ.get("HF_TOKEN") or None if is_hub else None


def show(inspection: Inspection) -> str:
    lines = [inspection.name]
    for name, value in inspection.as_dict().items():
        if name == "name" or value in (None, "", [], {}):
            continue
        lines.append(f"  {name.removesuffix('_bytes').replace('_', ' '):16} {show_value(name, value)}")
    return "\n".join(lines)


def show_value(name: str, value: object) -> str:
    if name == "size_bytes" and isinstance(value, int):
        return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"
    if isinstance(value, dict):
        return ", ".join(
            f"{count} {key}" if isinstance(count, int) else f"{key}: {show_value('', count)}" for key, count in value.items()
        )
    if isinstance(value, list):
        return ("\n" + " " * 19).join(str(each) for each in value)
    return str(value)
