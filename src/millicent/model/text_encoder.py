"""Qwen2.5-VL as the text encoder: it reads the prompt together with the pictures, and its last hidden state is what
the transformer is told. The template, the token layout and the positions are ours, so that they cannot change with the version
of transformers.

The network comes in two kinds with the same parameters: transformers' own, which TextEncoder.encode runs, and ours, without
a forward pass, for model/qwen_vl.py. transformers is imported with the former alone: it takes two seconds, or eight where files
come slowly.

Without positions of its own a call to transformers 5 falls back on plain text positions, in silence, for picture tokens
too (huggingface/diffusers issue 14194); the model was trained with rows and columns.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from millicent.errors import CheckpointError, PromptTooLongError
from millicent.model.picture_processor import PictureProcessor
from millicent.model.prompt import IMAGE_PAD, SYSTEM_PREFIX, edit_plus_prompt, edit_prompt
from millicent.model.qwen_vl_config import QwenVLConfig
from millicent.model.qwen_vl_layers import QwenVL
from millicent.model.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# of the plain network alone, and of the same extra: told before anything is read
if importlib.util.find_spec("transformers") is None:
    raise ModuleNotFoundError("No module named 'transformers'", name="transformers")


class TextEncoder:
    """Prompts with their pictures in, hidden states out.

    network: of build_network, or of build_plain_network for `encode`. pictures: how they are cut into patches.
    template: "edit" (one picture) or "edit-plus" (any number, each with its "Picture n: ").
    max_prompt_tokens: the longest prompt, counted without the template and the pictures.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: PromptTokenizer,
        pictures: PictureProcessor,
        *,
        template: Literal["edit", "edit-plus"],
        max_prompt_tokens: int,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.pictures = pictures
        self.template = template
        self.max_prompt_tokens = max_prompt_tokens
        (self.image_token_id,) = self.tokenize(IMAGE_PAD)
        self.prefix_tokens = len(self.tokenize(SYSTEM_PREFIX))
        _check_image_token(network, self.image_token_id)

    def encode(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> tuple[Tensor, Tensor | None]:
        """The post-norm last hidden state of each prompt with its pictures, the system prefix cut off.

        prompts: B texts. images: the pictures of each, as the model's card sizes them.
        Returns hidden states (B, T, C), shorter rows padded with zeros on the right, and the mask (B, T), true for
        tokens; None in its place where nothing is padded. Every row is what it would be alone. transformers runs the network.
        Raises PromptTooLongError, and InputError for a control token in a prompt.
        """
        assert len(prompts) == len(images)
        self.check_lengths(prompts)
        pixels, grids = self._preprocess(images)
        rows = [
            lay_out_tokens(self.tokenize(self.fill_template(prompt, len(pictures))), grid, self.image_token_id)
            for prompt, pictures, grid in zip(prompts, images, grids, strict=True)
        ]
        hidden = self._run(rows, pixels, grids)
        kept = [states[self.prefix_tokens : len(ids)] for states, (ids, _) in zip(hidden, rows, strict=True)]
        padded = nn.utils.rnn.pad_sequence(kept, batch_first=True)
        lengths = torch.tensor([len(states) for states in kept], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return padded, None if bool(mask.all()) else mask

    def tokenize(self, text: str) -> list[int]:
        """Its tokens, one for each <|image_pad|> still."""
        return self.tokenizer.encode(text)

    def fill_template(self, prompt: str, images: int) -> str:
        """The text that the model reads for a prompt with so many pictures. Raises InputError for a control token in it."""
        if self.template == "edit":
            assert images == 1
            return edit_prompt(prompt)
        return edit_plus_prompt(prompt, images)

    def check_lengths(self, prompts: Sequence[str]) -> None:
        """Raises PromptTooLongError for a prompt of more than max_prompt_tokens."""
        for prompt in prompts:
            tokens = len(self.tokenize(prompt))
            if tokens > self.max_prompt_tokens:
                raise PromptTooLongError(
                    f"The prompt has {tokens} tokens; the model reads at most {self.max_prompt_tokens}.",
                    "Shorten it.",
                )

    def size_picture(self, image: Image.Image) -> Image.Image:
        """In RGB, of the size in which the network sees it: a whole number of tokens a side."""
        return self.pictures.size_picture(image)

    def normalize_levels(self) -> Tensor:
        """(3, 256) FP32: what the network is told for each level of each color."""
        return self.pictures.normalize_levels()

    @functools.cached_property
    def image_processor(self) -> Qwen2VLImageProcessorPil:
        """transformers' own, with the same numbers."""
        return build_image_processor(self.pictures)

    def _preprocess(self, images: Sequence[Sequence[Image.Image]]) -> tuple[Any, list[list[tuple[int, int]]]]:
        """The vision tower's patches of all pictures, and the (height, width) of each in tokens, by prompt."""
        processed = self.image_processor(images=[image for row in images for image in row], return_tensors="pt")
        merge = self.pictures.merge
        grids = iter([(height // merge, width // merge) for _, height, width in processed["image_grid_thw"].tolist()])
        return processed, [[next(grids) for _ in row] for row in images]

    def _run(self, rows: Sequence[tuple[list[int], Tensor]], processed: Any, grids: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
        """Last hidden states (B, T, C). Padded on the right, where a causal network's tokens never look: no mask."""
        device = next(self.network.parameters()).device
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_id, dtype=torch.long)
        positions = torch.zeros((3, len(rows), longest), dtype=torch.long)
        for row, (ids, row_positions) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            positions[:, row, : len(ids)] = row_positions
        output = self.network(
            input_ids=input_ids.to(device),
            position_ids=positions.to(device),
            pixel_values=processed["pixel_values"].to(device),
            image_grid_thw=processed["image_grid_thw"].to(device),
            use_cache=False,
        )
        return output.last_hidden_state


def lay_out_tokens(ids: Sequence[int], grids: Sequence[tuple[int, int]], image_token_id: int) -> tuple[list[int], Tensor]:
    """Give each picture its tokens, and every token its place.

    ids: a text's tokens, one `image_token_id` for each picture. grids: (height, width) of each picture in tokens.
    Returns the longer ids and M-RoPE positions (3, T): time, row and column. Text counts on all three; a picture
    stays at one time and spreads over rows and columns, and the text after it goes on past its longer side
    (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    grid = iter(grids)
    laid_out: list[int] = []
    pieces: list[Tensor] = []
    place = 0
    for is_picture, run in groupby(ids, lambda token: token == image_token_id):
        tokens = list(run)
        if not is_picture:
            pieces.append(torch.arange(place, place + len(tokens)).expand(3, -1))
            laid_out += tokens
            place += len(tokens)
            continue
        for token in tokens:
            height, width = next(grid)
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            pieces.append(torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1) + place)
            laid_out += [token] * (height * width)
            place += max(height, width)
    assert next(grid, None) is None, "every picture needs its image_pad"
    return laid_out, torch.cat(pieces, 1)


def build_network(config: Mapping[str, Any]) -> QwenVL:
    """Qwen2.5-VL without its LM head from text_encoder/config.json, its parameters on the meta device; model.qwen_vl runs it.

    Raises CheckpointError for another architecture.
    """
    read = QwenVLConfig.from_dict(config)
    with torch.device("meta"):
        network = QwenVL(read)
    return network.requires_grad_(False).eval()


def build_plain_network(config: Mapping[str, Any]) -> nn.Module:
    """transformers' own network with the parameters of build_network's, which it runs itself, and model.qwen_vl runs as well."""
    QwenVLConfig.from_dict(config)  # transformers would build another architecture, or take sizes that are missing from elsewhere
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    with _parameters_on_meta():
        network: nn.Module = Qwen2_5_VLModel(Qwen2_5_VLConfig.from_dict(dict(config)))
    return network.train(False)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    # a whole build under torch.device("meta") would lose the rotary buffers, which no checkpoint holds
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_image_processor(pictures: PictureProcessor) -> Qwen2VLImageProcessorPil:
    """transformers' own image processor, which cuts pictures into patches, with our numbers."""
    # by its own module: the name in the package's root asks for torchvision
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": pictures.least_area_px, "longest_edge": pictures.most_area_px},
        patch_size=pictures.patch_px,
        merge_size=pictures.merge,
        temporal_patch_size=pictures.patch_frames,
        resample=pictures.resample,
        rescale_factor=pictures.rescale_factor,
        image_mean=list(pictures.mean),
        image_std=list(pictures.std),
    )


def _check_image_token(network: nn.Module, image_token_id: int) -> None:
    expected = getattr(network.config, "image_token_id", None)
    if expected != image_token_id:
        raise CheckpointError(
            f"{IMAGE_PAD} is token {image_token_id} to the tokenizer and {expected} to the text encoder.",
            "Take both from the same model.",
        )
