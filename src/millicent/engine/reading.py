"""Reading a prompt with its pictures, and not reading twice what was read before.

A catalog asks for several variants of one photo, and for one wording over many photos. What a picture is to the vision
tower depends on the picture alone; what the language model makes of the system text and the pictures depends on nothing
after them, as it is causal; so each is kept by the pictures' content, and a new prompt costs only its own few tokens.

The language model always runs in the same two parts, pictures first and prompt second, whether or not the first part is
kept from before: an edit must not depend, in its last bits, on what was edited earlier. The prompt is padded behind, where no
token of it looks, so that few lengths serve all prompts; on a card each length is soon one recorded graph, of the same
kernels in the same order. Nothing waits for the card: what is read may still be on its way when `read` returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from millicent.engine.caches import ByteBudgetCache, image_key, size_bytes
from millicent.engine.capture import GraphRecorder, Replays, Tensors, Work
from millicent.model.qwen_vl import (
    Grid,
    KeyValues,
    VisionPlan,
    check_config,
    cut_patches,
    encode_vision,
    plan_vision,
    put_pictures,
    rotary_text,
    run_language,
)
from millicent.model.text_encoder import TextEncoder, lay_out_tokens

# shares of the budget: keys and values are ten times what the other two are, and serve every prompt for their pictures
_PICTURES_SHARE, _OPENINGS_SHARE = 0.125, 0.625
# a catalog's photos have few shapes; a plan is some hundred kilobytes
_KEPT_PLANS = 16
# prompts are padded to a multiple of so many tokens: up to there the weights' bytes decide the time, not the tokens
TOKENS_MULTIPLE = 32
# for each shape of photo one of its patches, one of its opening and one or two of prompts
_KEPT_GRAPHS = 12


@dataclass(frozen=True, slots=True)
class Picture:
    """What a picture is to the language model. grid: (height, width) in tokens. features: (height * width, C)."""

    grid: tuple[int, int]
    features: Tensor


@dataclass(frozen=True, slots=True)
class Opening:
    """The system text and the pictures, as the language model has read them.

    past: their keys and values, as KeyValues.pack lays them out. hidden: (1, T, C) their hidden states without the system
    prefix's. next_position: of the token after them.
    """

    past: Tensor
    hidden: Tensor
    next_position: int

    @property
    def size_bytes(self) -> int:
        return size_bytes(self.hidden, self.past)


class Reader:
    """A text encoder that remembers. For one thread at a time, on one stream. The network stays on its device from here on.

    budget_bytes: what may be kept, on the device, altogether; with 0 nothing is, and the results are the same to the bit.
    uses_graphs: on a CUDA device, record what comes again as CUDA graphs; the results are the same to the bit.
    hold: gives what to enter where recorded passes run: all layers are on the card within.
    pictures, openings, embeddings: the three caches, for their counts.
    Raises CheckpointError for an encoder whose config asks for what `model.qwen_vl` does not compute.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        budget_bytes: int,
        *,
        uses_graphs: bool = True,
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.text_encoder = text_encoder
        self.hold = hold
        self._network: Any = text_encoder.network
        self._config: Any = self._network.config
        check_config(self._config)
        self.device = _device_of(text_encoder.network)
        self.replays: Replays | None = None
        self._recorder: GraphRecorder | None = None
        self.record(uses_graphs)
        pictures, openings = int(budget_bytes * _PICTURES_SHARE), int(budget_bytes * _OPENINGS_SHARE)
        self.pictures = ByteBudgetCache[str, Picture](pictures)
        self.openings = ByteBudgetCache[tuple[str, ...], Opening](openings)
        self.embeddings = ByteBudgetCache[tuple[tuple[str, ...], str], Tensor](budget_bytes - pictures - openings)
        self._normalized = text_encoder.normalize_levels().to(self.device)
        # of sizes, not of content
        self._plan = functools.lru_cache(_KEPT_PLANS)(functools.partial(_plan_on, self._config, self.device))

    def record(self, records: bool) -> None:
        """Whether what comes again is recorded as graphs from now on; on a CUDA device alone."""
        self.replays = None
        if records and self.device.type == "cuda":
            self._recorder = self._recorder or GraphRecorder(self.device)
            self._recorder.open_pool()
            self.replays = Replays(self._recorder.record, _KEPT_GRAPHS)

    def clear(self) -> None:
        """Forget everything: the weights have changed, or the memory is needed."""
        for cache in (self.pictures, self.openings, self.embeddings):
            cache.clear()
        self.record(self.replays is not None)

    @torch.no_grad()
    def read(self, prompt: str, images: Sequence[Image.Image]) -> Tensor:
        """The post-norm last hidden states (1, T, C) of a prompt with its pictures, the system prefix cut off.

        images: at least one, as the model's card sizes them. The result may be kept: it is not to be changed in place.
        Raises PromptTooLongError, and InputError for a control token in the prompt.
        """
        assert images
        self.text_encoder.check_lengths([prompt])
        text = self.text_encoder.fill_template(prompt, len(images))
        keys = tuple(image_key(image) for image in images)
        embedding = self.embeddings.get((keys, prompt))
        if embedding is None:
            embedding = self._read(text, images, keys)
            self.embeddings.put((keys, prompt), embedding, size_bytes(embedding))
        return embedding

    def _read(self, text: str, images: Sequence[Image.Image], keys: tuple[str, ...]) -> Tensor:
        ids = self.text_encoder.tokenize(text)
        # no merge of the tokenizer reaches over a special token, so what comes before this point is the same for any prompt
        end = len(ids) - ids[::-1].index(self._config.vision_end_token_id)
        opening = self.openings.get(keys)
        if opening is None:
            opening = self.open(ids[:end], images, keys)
            self.openings.put(keys, opening, opening.size_bytes)
        return torch.cat([opening.hidden, self.go_on(ids[end:], opening)], 1)

    def go_on(self, ids: Sequence[int], opening: Opening) -> Tensor:
        """The last hidden states (1, T, C) of the T tokens that follow an opening."""
        padding = [self.text_encoder.tokenizer.pad_id] * (-len(ids) % TOKENS_MULTIPLE)
        padded = [*ids, *padding]
        start = opening.next_position
        positions = torch.arange(start, start + len(padded), device=self.device).expand(3, -1)
        work = functools.partial(_run_prompt, self._network.language_model)
        (hidden,) = self._run("prompt", work, self._embed(padded)[None], positions, opening.past)
        return hidden[:, : len(ids)]

    def open(self, ids: Sequence[int], images: Sequence[Image.Image], keys: Sequence[str]) -> Opening:
        """ids: the text's tokens up to the last picture's end, one image_pad for each picture; keys: the pictures' contents."""
        pictures = [self.look(image, key) for image, key in zip(images, keys, strict=True)]
        image_token = self.text_encoder.image_token_id
        laid_out, positions = lay_out_tokens(ids, [picture.grid for picture in pictures], image_token)
        places = torch.tensor([place for place, token in enumerate(laid_out) if token == image_token])
        features = torch.cat([picture.features for picture in pictures])
        embeds = put_pictures(self._embed(laid_out), features, _upload(places, self.device))
        work = functools.partial(_run_opening, self._network.language_model, self.text_encoder.prefix_tokens)
        hidden, past = self._run("opening", work, embeds, _upload(positions, self.device))
        return Opening(past, hidden, int(positions[:, -1].max()) + 1)

    def look(self, image: Image.Image, key: str) -> Picture:
        """What a picture, whose content's key is given, is to the language model."""
        if (picture := self.pictures.get(key)) is not None:
            return picture
        levels = torch.from_numpy(np.array(self.text_encoder.size_picture(image)))
        features = self.see(_upload(levels, self.device))
        token_px = self._config.vision_config.patch_size * self._config.vision_config.spatial_merge_size
        picture = Picture((levels.shape[0] // token_px, levels.shape[1] // token_px), features)
        self.pictures.put(key, picture, size_bytes(features))
        return picture

    def see(self, levels: Tensor) -> Tensor:
        """The vision tower's tokens (N, C) of one picture. levels (H, W, 3) uint8 on the device, as the encoder sizes it."""
        patch_px = self._config.vision_config.patch_size
        plan = self._plan((1, levels.shape[0] // patch_px, levels.shape[1] // patch_px))
        (features,) = self._run("vision", functools.partial(_run_vision, self._network.visual, self._normalized, plan), levels)
        return features

    def _run(self, key: Hashable, work: Work, *inputs: Tensor) -> Tensors:
        if self.replays is None:
            return work(*inputs)
        with self.hold():
            return self.replays.run(key, work, *inputs)

    def _embed(self, ids: Sequence[int]) -> Tensor:
        """(T, C) on the device. The table may stay on the host."""
        table = self._network.language_model.embed_tokens
        embedded: Tensor = table(_upload(torch.tensor(ids), table.weight.device))
        return embedded if embedded.device == self.device else _upload(embedded, self.device)


def _device_of(network: Any) -> torch.device:
    # the embedding table may be elsewhere
    return network.visual.patch_embed.proj.weight.device


# no methods: what is recorded keeps its work, and a reader that kept itself so would outlive its last user


def _run_vision(visual: Any, normalized: Tensor, plan: VisionPlan, levels: Tensor) -> Tensors:
    return encode_vision(visual, cut_patches(levels, normalized, visual.config), plan)[:1]


def _run_opening(language_model: Any, prefix_tokens: int, embeds: Tensor, positions: Tensor) -> Tensors:
    hidden, past = run_language(language_model, embeds, *rotary_text(positions, language_model.config), None)
    return hidden[:, prefix_tokens:].clone(), past.pack()


def _run_prompt(language_model: Any, embeds: Tensor, positions: Tensor, past: Tensor) -> Tensors:
    cos_sin = rotary_text(positions, language_model.config)
    return run_language(language_model, embeds, *cos_sin, KeyValues.unpack(past))[:1]


def _plan_on(config: Any, device: torch.device, grid: Grid) -> VisionPlan:
    return plan_vision([grid], config.vision_config).to(device)


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    # a copy from memory that is not pinned may wait until the device has done all its work so far; the allocator of pinned
    # memory keeps it until the copy is done
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
