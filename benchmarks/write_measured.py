"""Draw facts/data/measured.toml anew from results/peers.jsonl: `python -m benchmarks.write_measured`, after a run at true size.

Of each of our systems, and of the card's ceilings, the last line counts. What others published stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from millicent.facts.measured import MEASURED

ROOT = Path(__file__).parents[1]
SOURCE = "benchmarks/results/peers.jsonl"
PUBLISHED = "[[published]]"


def write_rows(lines: Iterable[str]) -> str:
    """The tables [[ceiling]] and [[run]] of result lines, as TOML."""
    last: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        is_ours = row["system"] == "card" or row["system"].startswith("millicent")
        if row["size"] == "true" and is_ours and not {"failed", "refused"} & row.keys():
            last[row["system"]] = number, row
    return "\n".join(write_row(number, row) for number, row in sorted(last.values(), key=lambda found: found[0]))


def write_row(number: int, row: Mapping[str, Any]) -> str:
    is_card = row["system"] == "card"
    values: dict[str, Any] = {"source": SOURCE, "line": number, "card": row["card"]}
    values |= _ceilings(row) if is_card else _run(row)
    values |= {
        "driver": row["driver"],
        "torch": row["versions"]["torch"],
        "triton": row["versions"]["triton"],
        "commit": row["commit"],
    }
    # JSON writes such values as TOML does
    told = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join([f"[[{'ceiling' if is_card else 'run'}]]", *told, f"checked = {row['date']}", ""])


def _ceilings(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.endswith("tflops") or key == "copy_gb_per_s"}


def _run(row: Mapping[str, Any]) -> dict[str, Any]:
    system = row["system"]
    return {
        "system": system,
        "format": row["format"],
        "attention": "int8" if "8-bit attention" in system else "exact",
        "reuse_reference": "reuse" in system,
        "steps": row["steps"],
        "step_ms": row["step_ms"],
        **{f"{stage}_ms": ms for stage, ms in row["stages_ms"].items()},
        **{key: row[key] for key in ("edit_ms", "images_per_s", "peak_gib", "held_before_gib")},
    }


def renew(text: str, lines: Iterable[str]) -> str:
    """The facts file with its measured rows drawn anew. text: as it is."""
    head, _, tables = text.partition("\n[[")
    published = tables[tables.index(f"\n{PUBLISHED}\n") :]
    return f"{head}\n{write_rows(lines)}{published}"


def main() -> None:
    lines = (ROOT / SOURCE).read_text(encoding="utf-8").splitlines()
    MEASURED.write_text(renew(MEASURED.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main()
