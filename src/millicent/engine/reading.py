"""Reading a prompt with its pictures, and not reading twice what was read before.

A catalog asks for several variants of one photo, and for one wording over many photos. What a picture is to the vision
tower depends on the picture alone; what the language model makes of the system text and the pictures depends on nothing
after them, as it is causal; so each is kept by the pictures' content, and a new prompt costs only its own few tokens.

The language model always runs in the same two parts, pictures first and prompt second, whether or not the first part is
kept from before: an edit must not depend, in its last bits, on what was edited earlier.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from millicent.engine.caches import ByteBudgetCache, image_key, size_bytes
from millicent.model.qwen_vl import (
    Grid,
    KeyValues,
    VisionPlan,
    check_config,
    embed,
    encode_vision,
    plan_vision,
    rotary_text,
    run_language,
)
from millicent.model.text_encoder import TextEncoder, lay_out_tokens

# shares of the budget: keys and values are ten times what the other two are, and serve every prompt for their pictures
_PICTURES_SHARE, _OPENINGS_SHARE = 0.125, 0.625
# a catalog's photos have few shapes; a plan is some hundred kilobytes
_KEPT_PLANS = 16


@dataclass(frozen=True, slots=True)
class Picture:
    """What a picture is to the language model. grid: (height, width) in tokens. features: (height * width, C)."""

    grid: tuple[int, int]
    features: Tensor


@dataclass(frozen=True, slots=True)
class Opening:
    """The system text and the pictures, as the language model has read them.

    past: their keys and values. hidden: (1, T, C) their hidden states without the system prefix's. next_position: of the
    token after them.
    """

    past: KeyValues
    hidden: Tensor
    next_position: int

    @property
    def size_bytes(self) -> int:
        return size_bytes(self.hidden, *self.past.keys, *self.past.values)


class Reader:
    """A text encoder that remembers. For one thread at a time.

    budget_bytes: what may be kept, on the device, altogether; with 0 nothing is, and the results are the same to the bit.
    pictures, openings, embeddings: the three caches, for their counts.
    Raises CheckpointError for an encoder whose config asks for what `model.qwen_vl` does not compute.
    """

    def __init__(self, text_encoder: TextEncoder, budget_bytes: int) -> None:
        self.text_encoder = text_encoder
        self._network: Any = text_encoder.network
        self._config: Any = self._network.config
        check_config(self._config)
        pictures, openings = int(budget_bytes * _PICTURES_SHARE), int(budget_bytes * _OPENINGS_SHARE)
        self.pictures = ByteBudgetCache[str, Picture](pictures)
        self.openings = ByteBudgetCache[tuple[str, ...], Opening](openings)
        self.embeddings = ByteBudgetCache[tuple[tuple[str, ...], str], Tensor](budget_bytes - pictures - openings)
        # of sizes, not of content
        self._plan = functools.lru_cache(_KEPT_PLANS)(functools.partial(_plan_on, self._config))

    def clear(self) -> None:
        """Forget everything: the weights have changed, or the memory is needed."""
        for cache in (self.pictures, self.openings, self.embeddings):
            cache.clear()

    @torch.no_grad()
    def read(self, prompt: str, images: Sequence[Image.Image]) -> Tensor:
        """The post-norm last hidden states (1, T, C) of a prompt with its pictures, the system prefix cut off.

        images: at least one, as the model's card sizes them. The result may be kept: it is not to be changed in place.
        Raises PromptTooLongError, and InputError for a control token in the prompt.
        """
        assert images
        self.text_encoder._check_lengths([prompt])
        text = self.text_encoder._fill_template(prompt, len(images))
        keys = tuple(image_key(image) for image in images)
        embedding = self.embeddings.get((keys, prompt))
        if embedding is None:
            embedding = self._read(text, images, keys)
            self.embeddings.put((keys, prompt), embedding, size_bytes(embedding))
        return embedding

    def _read(self, text: str, images: Sequence[Image.Image], keys: tuple[str, ...]) -> Tensor:
        ids = self.text_encoder._tokenize(text)
        # no merge of the tokenizer reaches over a special token, so what comes before this point is the same for any prompt
        end = len(ids) - ids[::-1].index(self._config.vision_end_token_id)
        opening = self.openings.get(keys)
        if opening is None:
            opening = self._open(ids[:end], images, keys)
            self.openings.put(keys, opening, opening.size_bytes)
        start = opening.next_position
        positions = torch.arange(start, start + len(ids) - end, device=self._device).expand(3, -1)
        embeds = self._network.language_model.embed_tokens(self._ids(ids[end:])).to(self._device, non_blocking=True)[None]
        hidden, _ = run_language(self._network.language_model, embeds, *self._rotary(positions), opening.past)
        return torch.cat([opening.hidden, hidden], 1)

    def _open(self, ids: Sequence[int], images: Sequence[Image.Image], keys: Sequence[str]) -> Opening:
        """ids: the text's tokens up to the last picture's end, one image_pad for each picture."""
        pictures = [self._look(image, key) for image, key in zip(images, keys, strict=True)]
        image_token = self.text_encoder.image_token_id
        laid_out, positions = lay_out_tokens(ids, [picture.grid for picture in pictures], image_token)
        places = torch.tensor([place for place, token in enumerate(laid_out) if token == image_token])
        features = torch.cat([picture.features for picture in pictures])
        embeds = embed(self._network, self._ids(laid_out), features, _upload(places, self._device))
        cos_sin = self._rotary(_upload(positions, self._device))
        hidden, past = run_language(self._network.language_model, embeds, *cos_sin, None)
        kept = hidden[:, self.text_encoder.prefix_tokens :].clone()
        # a copy: the new keys lie between queries that nobody asks for again
        return Opening(past.prefix(len(laid_out)), kept, int(positions[:, -1].max()) + 1)

    def _look(self, image: Image.Image, key: str) -> Picture:
        if (picture := self.pictures.get(key)) is not None:
            return picture
        processed, [[grid]] = self.text_encoder._preprocess([[image]])
        [grid_thw] = processed["image_grid_thw"].tolist()
        plan = self._plan(self._device, tuple(grid_thw))
        features, _ = encode_vision(self._network.visual, _upload(processed["pixel_values"], self._device), plan)
        picture = Picture(grid, features)
        self.pictures.put(key, picture, size_bytes(features))
        return picture

    def _ids(self, ids: Sequence[int]) -> Tensor:
        # the table may stay on the host
        return _upload(torch.tensor(ids), next(self._network.language_model.embed_tokens.parameters()).device)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_text(positions, self._config.text_config)

    @property
    def _device(self) -> torch.device:
        return next(self._network.visual.parameters()).device


def _plan_on(config: Any, device: torch.device, grid: Grid) -> VisionPlan:
    return plan_vision([grid], config.vision_config).to(device)


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    # a plain copy would wait until the device has done all its work so far; from memory that is not pinned the driver has
    # taken the values when the call returns, so the tensor may go
    return tensor.to(device, non_blocking=True)
