"""Reads deploy/ with SkyPilot's and dstack's own parsers and prints what they made of it, as JSON. Run by their interpreter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import sky
import yaml
from dstack._internal.core.models.configurations import parse_apply_configuration
from sky.utils import common_utils, schemas
from sky.volumes.volume import Volume


def read_sky_volume(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    common_utils.validate_schema(config, schemas.get_volume_schema(), "Invalid volume: ")
    return dict(Volume.from_yaml_config(config).to_yaml_config())


def read_dstack(path: Path) -> dict[str, Any]:
    return dict(json.loads(parse_apply_configuration(yaml.safe_load(path.read_text())).model_dump_json()))


def main(folder: Path) -> None:
    made: dict[str, dict[str, Any]] = {
        "skypilot.yaml": sky.Task.from_yaml(str(folder / "skypilot.yaml")).to_yaml_config(),
        "skypilot-volume.yaml": read_sky_volume(folder / "skypilot-volume.yaml"),
    }
    made |= {path.name: read_dstack(path) for path in sorted(folder.glob("*.dstack.yml"))}
    print(json.dumps(made, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
