"""Step 0: the text. `python -m recipes.demo.prompts --work build/demo` writes tokenizer/ and wordings.safetensors.

Every edit gets a number of tokenized wordings; in training they lie as one table on the device, and a wording is
picked by integer arithmetic.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from millicent.model.prompt import IMAGE_PAD, SYSTEM_PREFIX, edit_plus_prompt
from recipes.demo import tokenizer
from recipes.demo.encoder import PICTURE_TOKENS
from recipes.demo.scenes import Edit
from recipes.demo.wordings import held_out_wording, training_wording
from recipes.demo.world import CLASSES, COLOR_NAMES, LOGOS, OPS

TRAINING_WORDINGS = 40  # of each edit
HELD_OUT_WORDINGS = 6
EDITS = len(OPS) * len(CLASSES) * len(LOGOS) * len(COLOR_NAMES)
SEED = 7

Wording = Callable[[int, int, int, int, random.Random], str]


class PromptTable:
    """Ids of whole prompts: the shared prefix, one picture's tokens, the wording and the template's tail.

    prefix_tokens: how many the encoder's output loses again. picture_at: where the picture's tokens begin.
    """

    def __init__(self, work: Path, device: torch.device) -> None:
        bpe = read_tokenizer(work)
        self.special = {token: special_id(bpe, token) for token in tokenizer.SPECIAL_TOKENS}
        self.vocab_size = -(-bpe.get_vocab_size() // 64) * 64
        self.device = device
        self.prefix = torch.tensor(bpe.encode(SYSTEM_PREFIX, add_special_tokens=False).ids, device=device)
        self.prefix_tokens = len(self.prefix)
        whole = bpe.encode(edit_plus_prompt("x", 1), add_special_tokens=False).ids
        self.picture_at = whole.index(self.special[IMAGE_PAD])
        self.tables = {k: v.to(device) for k, v in load_file(work / "wordings.safetensors").items()}

    def training(self, edit: Edit, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One wording for each edit: ids (B, prefix + T) and the mask (B, T) of what is no padding."""
        return self.pick(edit, generator, "training")

    def held_out(self, edit: Edit, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.pick(edit, generator, "held_out")

    def pick(self, edit: Edit, generator: torch.Generator, split: str) -> tuple[Tensor, Tensor]:
        ids, lengths = self.tables[f"{split}.ids"], self.tables[f"{split}.lengths"]
        per_edit = len(ids) // EDITS
        cell = ((edit.op * len(CLASSES) + edit.cls) * len(LOGOS) + edit.aux) * len(COLOR_NAMES) + edit.color
        row = cell * per_edit + torch.randint(0, per_edit, cell.shape, device=self.device, generator=generator)
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[row, None]
        return torch.cat([self.prefix.expand(len(row), -1), ids[row].long()], 1), mask


def special_id(bpe: Tokenizer, token: str) -> int:
    found: int | None = bpe.token_to_id(token)
    assert found is not None, f"the vocabulary lacks {token}"
    return found


def read_tokenizer(work: Path) -> Tokenizer:
    bpe: Tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    return bpe


def wordings_in_order(wording: Wording, per_edit: int) -> list[str]:
    """`per_edit` wordings of every edit, edits in the order that `pick` counts them."""
    rng = random.Random(SEED)
    return [
        wording(op, color, aux, cls, rng)
        for op in range(len(OPS))
        for cls in range(len(CLASSES))
        for aux in range(len(LOGOS))
        for color in range(len(COLOR_NAMES))
        for _ in range(per_edit)
    ]


def tabulate(bpe: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """ids (rows, T) int16 of the prompts after the prefix, and lengths (rows,): how many of each row are no padding."""
    prefix_tokens = len(bpe.encode(SYSTEM_PREFIX, add_special_tokens=False).ids)
    pad, end = special_id(bpe, IMAGE_PAD), special_id(bpe, "<|endoftext|>")
    rows = []
    for encoded in bpe.encode_batch([edit_plus_prompt(text, 1) for text in texts], add_special_tokens=False):
        ids = encoded.ids
        at = ids.index(pad)
        rows.append(ids[prefix_tokens:at] + [pad] * PICTURE_TOKENS + ids[at + 1 :])
    lengths = np.array([len(row) for row in rows])
    table = np.full((len(rows), -(-lengths.max() // 8) * 8), end, dtype=np.int16)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table), torch.from_numpy(lengths)


def write(work: Path) -> None:
    """Train the tokenizer and write the tables."""
    tokenizer.train(work / "tokenizer")
    bpe = read_tokenizer(work)

    def held_out(op: int, color: int, aux: int, cls: int, rng: random.Random) -> str:
        return held_out_wording(op, color, aux, cls, rng.randrange(2**30))

    tables = {}
    for split, wording, per_edit in (
        ("training", training_wording, TRAINING_WORDINGS),
        ("held_out", held_out, HELD_OUT_WORDINGS),
    ):
        tables[f"{split}.ids"], tables[f"{split}.lengths"] = tabulate(bpe, wordings_in_order(wording, per_edit))
    save_file(tables, work / "wordings.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    args = parser.parse_args()
    write(args.work)


if __name__ == "__main__":
    main()
