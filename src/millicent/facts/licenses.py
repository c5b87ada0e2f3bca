"""Which licenses allow a model to be used for money, as far as their names tell."""

from __future__ import annotations

import tomllib
from pathlib import Path

LICENSES = Path(__file__).parent / "data" / "licenses.toml"


def allows_commercial_use(license_name: str | None) -> bool | None:
    """True or False for the names in data/licenses.toml, None for one that it does not know. No legal advice."""
    if license_name is None:
        return None
    known = tomllib.loads(LICENSES.read_text(encoding="utf-8"))
    name = "-".join(license_name.lower().replace("_", "-").split())
    if any(mark in name for mark in known["noncommercial_marks"]):
        return False
    return True if name in known["commercial"] else None
