"""Words that do not matter, dropped and put in at random while training, so that the encoder learns what does.

Without it the encoder learns frames by heart, and a word that it never met is a random direction of full length. All of
it is arithmetic of fixed shapes on the device, as a captured step needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.demo.wordings import CONTENT_WORDS

NOISY_SHARE = 0.6  # of the wordings; the others stay as they are
MOST_PUT_IN = 0.3  # a wording's chance of a strange token at each place is uniform up to this
MOST_DROPPED = 0.4  # and so is its filler tokens' chance to go
ROOM = 12  # tokens that a wording may grow by


@dataclass(frozen=True)
class Noise:
    """filler (vocabulary,): which ids may go. strange (n,): the ids that may be put in."""

    filler: Tensor
    strange: Tensor

    @classmethod
    def of(cls, bpe: Tokenizer, device: torch.device) -> Noise:
        """Content words say what an edit is about: their pieces are never dropped and never put in; nor is a special token."""
        content = {
            i
            for word in CONTENT_WORDS
            for form in (word, word[0].upper() + word[1:], f" {word}")
            for i in bpe.encode(form, add_special_tokens=False).ids
        }
        special = {i for i, token in bpe.get_added_tokens_decoder().items() if token.special}
        filler = torch.tensor([i not in content | special for i in range(bpe.get_vocab_size())], device=device)
        return cls(filler, filler.nonzero()[:, 0])

    def __call__(self, ids: Tensor, kept: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """ids, kept (B, T) -> twice as wide: before every place, one more that may hold a strange token; which are kept."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=ids.device, generator=generator)

        rows, places = ids.shape
        noisy = uniform(rows, 1) < NOISY_SHARE
        dropped = self.filler[ids] & noisy & (uniform(rows, places) < MOST_DROPPED * uniform(rows, 1))
        put_in = kept & noisy & (uniform(rows, places) < MOST_PUT_IN * uniform(rows, 1))
        put_in &= put_in.cumsum(1) <= ROOM
        strange = self.strange[torch.randint(0, len(self.strange), (rows, places), device=ids.device, generator=generator)]
        return torch.stack([strange, ids], 2).flatten(1), torch.stack([put_in, kept & ~dropped], 2).flatten(1)


def pack_left(ids: Tensor, kept: Tensor, width: int, padding: int) -> tuple[Tensor, Tensor]:
    """The kept ids of each row (B, T) moved to the left -> (B, width) filled up with `padding`, and the rows' lengths."""
    place = torch.where(kept, kept.cumsum(1) - 1, width)
    packed = torch.full((len(ids), width + 1), padding, device=ids.device, dtype=ids.dtype).scatter_(1, place, ids)
    return packed[:, :width], kept.sum(1)
