"""A folder as `millicent convert --to fp8` writes it, of random weights at the 20B model's true shapes: 21 GB in half a minute.

Converting random BF16 weights would write and read 41 GB more. Names, shapes and dtypes are those of the converter; the codes and
numbers are pieces of one random piece, which is all that reading them depends on. The pictures are of noise, and finite. The text
encoder, which the converter copies as it is, is in FP8 here too, with a scale a row.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.true_size import Size, _text_encoder_config, make_card, make_vae
from millicent import demo
from millicent.checkpoint.architecture import text_encoder_tensors, transformer_tensors
from millicent.checkpoint.convert import is_quantized
from millicent.checkpoint.converted import TABLE_PREFIX, ConvertedMetadata, without_modulation
from millicent.checkpoint.write import Entry, ResumableFile, outline
from millicent.engine.convert import TRANSFORMER_FILE
from millicent.engine.modulation import LightningTable
from millicent.engine.rewrite import to_toml
from millicent.model.config import MMDiTConfig
from millicent.model.modulation import TIMESTEPS

Entries = dict[str, Entry]

STEPS = 4
_MADE = "made.json"
_SCALE = "_scale"
_CODE_DEVIATION = 100.0  # of a row's codes, whose largest is 448
_POOL_VALUES = 1 << 24
_TORCH_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def make_folder(size: Size, folder: Path) -> None:
    """Write it, unless it is there already and whole. Raises FileExistsError for one of another size."""
    told = {"size": size.name, "version": 1}
    if (folder / _MADE).is_file():
        if json.loads((folder / _MADE).read_text()) != told:
            raise FileExistsError(f"{folder} holds another model. Name another folder, or remove it.")
        return
    for part in ("tokenizer", "processor", "scheduler"):
        shutil.copytree(demo.folder() / part, folder / part, dirs_exist_ok=True)
    shutil.copy(demo.folder() / "model_index.json", folder)
    (folder / "card.toml").write_text(to_toml(make_card(size)), encoding="utf-8")
    config = transformer_config(size)
    _write_config(folder / "transformer", config)
    table = LightningTable(MMDiTConfig.from_dict(config), "lightning", STEPS)
    pool = _Pool()
    # an edit looks its noise levels up in the table
    timesteps = table.make(TIMESTEPS, lambda name: torch.empty(0))
    _write(folder / TRANSFORMER_FILE, transformer_entries(config, table), _metadata().to_header(), pool, timesteps)
    encoder = _text_encoder_config(size).to_dict()
    _write_config(folder / "text_encoder", encoder)
    _write(folder / "text_encoder" / "model.safetensors", text_encoder_entries(encoder), {"format": "pt"}, pool, {})
    make_vae(size, torch.device("cpu")).save_pretrained(folder / "vae")
    (folder / _MADE).write_text(json.dumps(told), encoding="utf-8")


def transformer_config(size: Size) -> dict[str, Any]:
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": size.layers,
        "attention_head_dim": size.head_dim,
        "num_attention_heads": size.heads,
        "joint_attention_dim": size.text_hidden,
        "axes_dims_rope": list(size.axes_dims_rope),
        "zero_cond_t": True,
    }


def transformer_entries(config: Mapping[str, Any], table: LightningTable) -> Entries:
    """As the converter's outline has them, without the weights that the table makes superfluous."""
    entries: Entries = {}
    for name, shape in without_modulation(transformer_tensors(config)).items():
        entries |= _codes_of(name, shape) if is_quantized(name, shape) else {name: Entry("BF16", shape)}
    return entries | {key: entry for of_module in table.entries.values() for key, entry in of_module.items()}


def text_encoder_entries(config: Mapping[str, Any]) -> Entries:
    """The linears of its layers as codes; embeddings and norms in BF16. Without the LM head, which no edit reads."""
    entries: Entries = {}
    for name, shape in text_encoder_tensors(config).items():
        is_linear = len(shape) == 2 and "embed_tokens" not in name
        entries |= _codes_of(name, shape) if is_linear else {name: Entry("BF16", shape)}
    return entries


def _codes_of(name: str, shape: tuple[int, ...]) -> Entries:
    return {name: Entry("F8_E4M3", shape), name + _SCALE: Entry("F32", (shape[0], 1))}


def _metadata() -> ConvertedMetadata:
    return ConvertedMetadata(
        format="fp8",
        distilled_steps=STEPS,
        schedule="lightning",
        steps=STEPS,
        modulation_table=True,
        modulation_weights=False,
        zero_cond_t=True,
        source="random weights",
    )


def _write_config(part: Path, config: Mapping[str, Any]) -> None:
    part.mkdir(parents=True, exist_ok=True)
    (part / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _write(path: Path, entries: Entries, metadata: Mapping[str, str], pool: _Pool, known: Mapping[str, Tensor]) -> None:
    """known: tensors that are no random ones."""
    with ResumableFile(path, outline(entries, metadata), {}) as file:
        for name, entry in entries.items():
            if name in known:
                tensor = known[name]
            elif entry.dtype == "F8_E4M3":
                tensor = pool.codes(entry.shape)
            elif name.endswith(_SCALE):
                columns = entries[name.removesuffix(_SCALE)].shape[1]
                tensor = torch.full(entry.shape, 1 / (_CODE_DEVIATION * math.sqrt(columns)))
            else:
                tensor = pool.numbers(name, entry)
            file.write(name, tensor)
        file.publish()


class _Pool:
    """Random numbers, and the codes that are made of them, which every tensor is cut from."""

    def __init__(self) -> None:
        self._numbers = torch.randn(_POOL_VALUES, generator=torch.Generator().manual_seed(1))
        self._codes = self._numbers.mul(_CODE_DEVIATION).clamp(-448, 448).to(torch.float8_e4m3fn)
        self._offset = 0

    def codes(self, shape: tuple[int, ...]) -> Tensor:
        # as bytes, since not every operation has FP8
        return self._cut(self._codes.view(torch.uint8), shape).view(torch.float8_e4m3fn)

    def numbers(self, name: str, entry: Entry) -> Tensor:
        """Matrices keep the signal's size, norms are near 1, biases and a table's vectors small."""
        drawn = self._cut(self._numbers, entry.shape)
        if name.startswith(TABLE_PREFIX):
            drawn = 0.2 * drawn
        elif len(entry.shape) > 1:
            drawn = drawn if "embed_tokens" in name else drawn / math.sqrt(drawn[0].numel())
        else:
            drawn = 1 + 0.1 * drawn if name.endswith("weight") else 0.02 * drawn
        return drawn.to(_TORCH_DTYPES[entry.dtype])

    def _cut(self, pool: Tensor, shape: tuple[int, ...]) -> Tensor:
        """From where the last one ended, and from the beginning again where the pool does."""
        count, begin = math.prod(shape), self._offset
        self._offset = (begin + count) % len(pool)
        end = begin + count
        pieces = [pool[begin:end], *[pool] * (end // len(pool) - 1), *([pool[: end % len(pool)]] if end > len(pool) else [])]
        return torch.cat(pieces).reshape(shape)
