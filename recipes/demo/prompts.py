"""Step 0: the text. `python -m recipes.demo.prompts --work build/demo` writes tokenizer/ and wordings.safetensors.

Every edit gets a number of tokenized wordings; in training they lie end to end on the device, and a wording is picked,
made noisy and put into the template by integer arithmetic.
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
from recipes.demo.noise import ROOM, Noise, pack_left
from recipes.demo.scenes import Edit
from recipes.demo.wordings import choosing_wording, held_out_wording, training_wording
from recipes.demo.world import CLASSES, COLOR_NAMES, LOGOS, OPS

TRAINING_WORDINGS = 100  # of each edit
HELD_OUT_WORDINGS = 6
CHOOSING_WORDINGS = 4
LONGEST_WORDING = 72  # characters; a longer one is drawn again, since all prompts are as wide as the longest
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
        head, tail = template(bpe)
        self.head, self.tail = torch.tensor(head, device=device), torch.tensor(tail, device=device)
        self.prefix_tokens = len(bpe.encode(SYSTEM_PREFIX, add_special_tokens=False).ids)
        self.picture_at = head.index(self.special[IMAGE_PAD])
        self.noise = Noise.of(bpe, device)
        self.tables = {k: v.to(device) for k, v in load_file(work / "wordings.safetensors").items()}
        self.longest = {k.split(".")[0]: int(v.diff().max()) for k, v in self.tables.items() if k.endswith(".starts")}

    def training(self, edit: Edit, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One wording for each edit, often noisy: ids (B, prefix + T) and the mask (B, T) of what is no padding."""
        return self.prompts(*self.noise(*self.pick(edit, generator, "training"), generator), self.longest["training"] + ROOM)

    def held_out(self, edit: Edit, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.of("held_out", edit, generator)

    def of(self, split: str, edit: Edit, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One wording for each edit, of any split, as it is."""
        return self.prompts(*self.pick(edit, generator, split), self.longest[split])

    def training_ids(self) -> Tensor:
        """Every id (n,) that `training` may show in a wording, with repetitions."""
        return torch.cat([self.tables["training.ids"].long(), self.noise.strange])

    def unmet(self, wordings: Tensor) -> Tensor:
        """Which ids (vocabulary,) are neither in the template nor among those of `wordings` (n,)."""
        return torch.bincount(torch.cat([self.head, self.tail, wordings]), minlength=self.vocab_size) == 0

    def pick(self, edit: Edit, generator: torch.Generator, split: str) -> tuple[Tensor, Tensor]:
        """One wording's ids for each edit, (B, longest), and which of them are its own."""
        ids, starts = self.tables[f"{split}.ids"], self.tables[f"{split}.starts"].long()
        per_edit = (len(starts) - 1) // EDITS
        cell = ((edit.op * len(CLASSES) + edit.cls) * len(LOGOS) + edit.aux) * len(COLOR_NAMES) + edit.color
        row = cell * per_edit + torch.randint(0, per_edit, cell.shape, device=self.device, generator=generator)
        at = starts[row, None] + torch.arange(self.longest[split], device=self.device)
        return ids[at.clamp(max=len(ids) - 1)].long(), at < starts[row + 1, None]

    def prompts(self, ids: Tensor, kept: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The kept ids (B, T), of which a row has at most `longest`, as whole prompts."""
        ids = torch.cat([ids, self.tail.expand(len(ids), -1)], 1)
        kept = torch.cat([kept, torch.ones_like(self.tail, dtype=torch.bool).expand(len(ids), -1)], 1)
        width = -(-(len(self.head) - self.prefix_tokens + longest + len(self.tail)) // 8) * 8  # eights are fast on a GPU
        width -= len(self.head) - self.prefix_tokens
        packed, lengths = pack_left(ids, kept, width, self.special["<|endoftext|>"])
        whole = torch.cat([self.head.expand(len(ids), -1), packed], 1)
        after = torch.arange(whole.shape[1] - self.prefix_tokens, device=self.device)
        return whole, after < lengths[:, None] + len(self.head) - self.prefix_tokens


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


def template(bpe: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before a wording, with the prefix and one picture's tokens, and those after it."""
    before, after = edit_plus_prompt("\0", 1).split("\0")
    head, tail = (bpe.encode(part, add_special_tokens=False).ids for part in (before, after))
    at = head.index(special_id(bpe, IMAGE_PAD))
    return [*head[:at], *[head[at]] * PICTURE_TOKENS, *head[at + 1 :]], tail


def tabulate(bpe: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The texts' ids end to end (n,) int16, and where each begins, and the last one ends, (texts + 1,) int32."""
    rows = [encoded.ids for encoded in bpe.encode_batch(texts, add_special_tokens=False)]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return torch.from_numpy(np.concatenate(rows).astype(np.int16)), torch.from_numpy(starts)


def write(work: Path) -> None:
    """Train the tokenizer and write the tables."""
    tokenizer.train(work / "tokenizer")
    bpe = read_tokenizer(work)

    def training(op: int, color: int, aux: int, cls: int, rng: random.Random) -> str:
        while len(text := training_wording(op, color, aux, cls, rng)) > LONGEST_WORDING:
            pass
        return text

    def held_out(op: int, color: int, aux: int, cls: int, rng: random.Random) -> str:
        return held_out_wording(op, color, aux, cls, rng.randrange(2**30))

    def choosing(op: int, color: int, aux: int, cls: int, rng: random.Random) -> str:
        return choosing_wording(op, color, aux, cls, rng.randrange(2**30))

    tables = {}
    for split, wording, per_edit in (
        ("training", training, TRAINING_WORDINGS),
        ("held_out", held_out, HELD_OUT_WORDINGS),
        ("choosing", choosing, CHOOSING_WORDINGS),
    ):
        tables[f"{split}.ids"], tables[f"{split}.starts"] = tabulate(bpe, wordings_in_order(wording, per_edit))
    save_file(tables, work / "wordings.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    args = parser.parse_args()
    write(args.work)


if __name__ == "__main__":
    main()
