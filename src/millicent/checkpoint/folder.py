"""A model as diffusers lays it out: a folder with model_index.json and one folder for each part.

Here a folder is only looked at: which files make it, and whether all are there. What the files hold is for header.py and load.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millicent.checkpoint.header import read_header
from millicent.errors import CheckpointError, IncompleteModelError, WeightsMismatchError

# what Edit and Edit-Plus folders name in model_index.json; other pipelines are other models
PIPELINES = {"QwenImageEditPipeline": "edit", "QwenImageEditPlusPipeline": "edit-plus"}
# what each part may be; where there are two names, either reads the same files
PARTS = {
    "transformer": ("QwenImageTransformer2DModel",),
    "vae": ("AutoencoderKLQwenImage",),
    "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
    "processor": ("Qwen2VLProcessor", "Qwen2_5_VLProcessor"),
}
FETCH_AGAIN = "Fetch the whole model again."
_SHOWN_KEYS = 5


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """pipeline: "edit" or "edit-plus". Every part's folder is there; what is in it has not been read yet."""

    path: Path
    pipeline: str


def open_folder(path: Path) -> ModelFolder:
    """Check that `path` is a diffusers-layout folder of a model that we run.

    Raises IncompleteModelError for a missing part, CheckpointError for another kind of model.
    """
    index = read_json(path / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise CheckpointError(
            f"{path} is a {name} model; this version runs {' and '.join(PIPELINES)}.",
            "Use a Qwen-Image-Edit, -2509 or -2511 folder.",
        )
    for part, wanted in PARTS.items():
        # [library, class]
        entry = index.get(part)
        found = entry[-1] if isinstance(entry, list) and entry else entry
        if found not in wanted:
            raise CheckpointError(
                f"{path / 'model_index.json'} names {found} as the {part}; this version reads {wanted[0]}.",
                "Use a Qwen-Image-Edit, -2509 or -2511 folder.",
            )
        if not (path / part).is_dir():
            raise IncompleteModelError(f"The folder {path / part} is missing.", FETCH_AGAIN)
    return ModelFolder(path, PIPELINES[name])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises IncompleteModelError where there is no file, CheckpointError for a broken one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IncompleteModelError(f"{path} is missing.", FETCH_AGAIN) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", FETCH_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.", FETCH_AGAIN)
    return value


def find_weight_files(part: Path) -> list[Path]:
    """The safetensors files of one part: the single file, or the shards that its index names.

    part: a folder such as transformer/. Raises IncompleteModelError for none or a missing shard, CheckpointError where
    several sets of weights lie side by side.
    """
    stems = ("diffusion_pytorch_model", "model")
    indexes = sorted(path for stem in stems for path in part.glob(f"{stem}*.safetensors.index.json"))
    files = sorted(path for stem in stems for path in part.glob(f"{stem}*.safetensors"))
    if not indexes and not files:
        raise IncompleteModelError(f"{part} holds no {stems[0]}*.safetensors or {stems[1]}*.safetensors.", FETCH_AGAIN)
    if not indexes:
        if "-of-" in files[0].name:
            raise IncompleteModelError(f"{part} holds shards such as {files[0].name}, but no index.", FETCH_AGAIN)
        if len(files) > 1:
            raise _several(part, files)
        return files
    loose = [path for path in files if "-of-" not in path.name]
    if len(indexes) > 1 or loose:
        raise _several(part, [*indexes, *loose])
    return _shards(indexes[0])


def _several(part: Path, paths: Sequence[Path]) -> CheckpointError:
    names = ", ".join(path.name for path in paths)
    return CheckpointError(f"{part} holds several sets of weights: {names}.", "Keep one of them.")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.", FETCH_AGAIN)
    names = {str(name) for name in weight_map.values()}
    for name in sorted(names):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names the shard {name!r} outside its folder.", FETCH_AGAIN)
        if not (index.parent / name).is_file():
            raise IncompleteModelError(f"The shard {index.parent / name} is missing.", FETCH_AGAIN)
    shards = [index.parent / name for name in sorted(names)]
    held = {key: shard.name for shard in shards for key in read_header(shard).tensors}
    if held != weight_map:
        differing = sorted(held.keys() ^ weight_map.keys()) or sorted(k for k in held if held[k] != weight_map[k])
        raise WeightsMismatchError(f"{index} and its shards differ in {show_some(differing)}.", FETCH_AGAIN)
    return shards


def show_some(keys: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    shown = ", ".join(keys[:_SHOWN_KEYS])
    return shown if len(keys) <= _SHOWN_KEYS else f"{shown}, and {len(keys) - _SHOWN_KEYS} more"
