"""What a path holds, as one header: a file, a URL, a folder of shards, or a folder with a file for each block.

The tensors of several files lie as if in one long file, so that nobody after this needs to know how many there are.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from millicent.checkpoint.folder import FETCH_AGAIN, find_weight_files, read_json
from millicent.checkpoint.header import Header, TensorInfo, read_header
from millicent.checkpoint.llama_cpp import check_pair
from millicent.checkpoint.source import Source, open_source
from millicent.errors import CheckpointError, IncompleteModelError

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_BLOCK_FILES = "block_*.safetensors"  # LightX2V's save_by_block
_BESIDE_BLOCKS = "non_block.safetensors"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """header: of all files together. source: reads it. config: the folder's config.json, {} where there is none."""

    header: Header
    source: JoinedSource
    config: Mapping[str, Any]


class JoinedSource:
    """Several files as one, the second beginning where the first ends."""

    def __init__(self, name: str, files: Sequence[Source]) -> None:
        self.name, self.files = name, tuple(files)
        self.begins = [0, *accumulate(file.size_bytes for file in files)]
        self.size_bytes = self.begins[-1]

    def locate(self, begin: int) -> tuple[Source, int]:
        """The file that holds a byte, and the byte's place in it."""
        number = min(bisect_right(self.begins, begin), len(self.files)) - 1
        return self.files[number], begin - self.begins[number]

    def read(self, begin: int, end: int) -> bytes:
        """As Source.read; a tensor lies in one file, but what lies near it may not."""
        pieces = []
        while begin < end:
            file, place = self.locate(begin)
            count = min(end - begin, file.size_bytes - place)
            if count <= 0:
                count = end - begin  # past the last file, which then says so
            pieces.append(file.read(place, place + count))
            begin += count
        return b"".join(pieces)


def open_weights(where: str | Path, token: str | None = None) -> WeightFiles:
    """Read the headers behind a path or URL; `token` is for a URL that wants a login.

    Raises IncompleteModelError for a shard alone, a missing shard and a folder without weights; CheckpointError for files that
    hold a tensor twice, and all that read_header refuses.
    """
    is_url = isinstance(where, str) and where.startswith(("http://", "https://"))
    if not is_url and Path(where).is_dir():
        folder = Path(where)
        return join(str(folder), [open_source(path) for path in _weight_files(folder)], _config(folder))
    source = open_source(where, token)
    if found := _SHARD.search(source.name):
        raise IncompleteModelError(
            f"{source.name} is shard {int(found[1])} of {int(found[2])}, not a whole model.",
            "Give the folder that holds all of them.",
        )
    return join(source.name, [source], {})


def _weight_files(folder: Path) -> list[Path]:
    blocks = sorted(folder.glob(_BLOCK_FILES), key=lambda path: (len(path.name), path.name))
    if not blocks:
        single = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
        if len(single) > 1 and all(path.suffix == ".gguf" for path in single):
            return single
        is_one = len(single) == 1 and not any(folder.glob("*.index.json")) and not _SHARD.search(single[0].name)
        return single if is_one else find_weight_files(folder)
    if not (folder / _BESIDE_BLOCKS).is_file():
        raise IncompleteModelError(f"{folder} holds {len(blocks)} block files, but no {_BESIDE_BLOCKS}.", FETCH_AGAIN)
    return [*blocks, folder / _BESIDE_BLOCKS]


def _config(folder: Path) -> Mapping[str, Any]:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    beside = folder / "hf_quant_config.json"  # ModelOpt's older place for it
    if "quantization_config" not in config and beside.is_file():
        producer = read_json(beside).get("producer")
        name = producer.get("name") if isinstance(producer, dict) else producer
        config = {**config, "quantization_config": {"quant_method": name}}
    return config


def join(name: str, files: Sequence[Source], config: Mapping[str, Any]) -> WeightFiles:
    source = JoinedSource(name, files)
    headers = [read_header(file) for file in files]
    if len(files) == 1:
        return WeightFiles(replace(headers[0], name=name), source, config)
    if headers[0].container == "gguf":
        check_pair(headers, name)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, Any] = {}
    for header, begin in zip(headers, source.begins, strict=False):
        if twice := sorted(tensors.keys() & header.tensors.keys()):
            raise CheckpointError(f"{name} holds {twice[0]} in more than one file.", FETCH_AGAIN)
        for key, info in header.tensors.items():
            tensors[key] = replace(info, begin=info.begin + begin, end=info.end + begin)
        metadata |= header.metadata
    whole = Header(name, headers[0].container, tensors, metadata, source.size_bytes, sum(h.header_bytes for h in headers))
    return WeightFiles(whole, source, config)
