"""How large the networks are and how much they compute, by arithmetic alone: parameters, bytes, operations. No torch.

A test holds the bytes equal to the real modules', laid out as the engine lays them out. FLOP counts two for each multiply-add.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

from millicent.errors import CheckpointError
from millicent.model.config import MMDiTConfig, VAEConfig

BF16_BYTES = 2
SCALE_BYTES = 4  # FP32
# a layer's tensors lie one after another on the host and in the card's arena; each begins at a multiple, more than kernels ask for
ALIGNMENT_BYTES = 512
MULTIPLE = 16  # of both sides of an 8-bit product's weight
TIMESTEP_CHANNELS = 256
PATCH_PX = 16  # a side of one token of the transformer: 8 pixels a latent, 2 latents a token
PICTURE_PX = 28  # a side of one token of the text encoder
PROMPT_TOKENS = 60  # a short wording with the template around it; with a picture of 196 tokens it is the benchmark's 256
SYSTEM_TOKENS = 64  # the system prefix, which the encoder reads and the transformer never sees
PIXELS_PER_LATENT = 8
LATENT_CHANNELS = 16


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear of the engine's: weight (rows, columns), a bias or none. name: of the first linear that it was stacked from."""

    name: str
    rows: int
    columns: int
    has_bias: bool = True

    @property
    def values(self) -> int:
        return self.rows * self.columns

    def tensors(self, number_format: str) -> tuple[int, ...]:
        """Bytes of its codes, its scales and its bias, as formats/ holds them. number_format: one of FORMATS' names."""
        bias = (BF16_BYTES * self.rows,) if self.has_bias else ()
        return (*WEIGHT_TENSORS[number_format](self.rows, self.columns), *bias)

    def size_bytes(self, number_format: str) -> int:
        """Of all of them."""
        return sum(self.tensors(number_format))


def _plain(rows: int, columns: int) -> tuple[int, ...]:
    return (BF16_BYTES * rows * columns,)


def _one_byte(rows: int, columns: int) -> tuple[int, ...]:
    return rows * columns, SCALE_BYTES * rows


def _nvfp4(rows: int, columns: int) -> tuple[int, ...]:
    # half a byte a code, a byte for each 16 in tiles of 128 x 4, and one FP32 scale for the tensor
    return rows * columns // 2, _round_up(rows, 128) * _round_up(columns // 16, 4), SCALE_BYTES


WEIGHT_TENSORS: Mapping[str, Callable[[int, int], tuple[int, ...]]] = {
    "bf16": _plain,
    "fp8": _one_byte,
    "int8": _one_byte,
    "int8-weight": _one_byte,
    "nvfp4": _nvfp4,
}


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def slab_bytes(tensors: Iterable[int]) -> int:
    """Of a layer whose tensors lie one after another, each from a multiple of ALIGNMENT_BYTES on."""
    return sum(_round_up(size, ALIGNMENT_BYTES) for size in tensors)


# the transformer


def block_matrices(config: MMDiTConfig, number: int) -> tuple[Matrix, ...]:
    """The eight linears of a block of the fast transformer, pictures' first: q, k and v as one."""
    dim, name = config.dim, f"transformer_blocks.{number}."
    streams = (
        ("attn.to_q", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2"),
        ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    return tuple(
        Matrix(name + linear, rows * dim, columns * dim)
        for linears in streams
        for linear, rows, columns in zip(linears, (3, 1, 4, 1), (1, 1, 1, 4), strict=True)
    )


def block_tensors(config: MMDiTConfig, number: int, format_of: Callable[[str, int], str]) -> tuple[int, ...]:
    """Bytes of each of a block's on the card, modulation not among them. format_of: as engine.planner.Plan's."""
    norms = 4 * config.attention_head_dim * BF16_BYTES
    matrices = block_matrices(config, number)
    return (*(size for matrix in matrices for size in matrix.tensors(format_of(matrix.name, config.num_layers))), norms)


def block_bytes(config: MMDiTConfig, number: int, format_of: Callable[[str, int], str]) -> int:
    """Of all of block_tensors."""
    return sum(block_tensors(config, number, format_of))


def edge_matrices(config: MMDiTConfig) -> tuple[Matrix, ...]:
    """What stands before and after the blocks, in BF16; the last norm's own linear stays on the host, as with the modulation."""
    return (
        Matrix("img_in", config.dim, config.in_channels),
        Matrix("txt_in", config.dim, config.joint_attention_dim),
        Matrix("proj_out", config.patch_size**2 * config.out_channels, config.dim),
        Matrix("time_text_embed.timestep_embedder.linear_1", config.dim, TIMESTEP_CHANNELS),
        Matrix("time_text_embed.timestep_embedder.linear_2", config.dim, config.dim),
    )


def edge_bytes(config: MMDiTConfig) -> int:
    return sum(matrix.size_bytes("bf16") for matrix in edge_matrices(config)) + BF16_BYTES * config.joint_attention_dim


def modulation_parameters(config: MMDiTConfig) -> int:
    """Of the layers that see the timestep alone, and that a table of `table_bytes` replaces: a third of the network."""
    per_linear = 6 * config.dim * (config.dim + 1)
    return 2 * config.num_layers * per_linear + 2 * config.dim * (config.dim + 1)


def transformer_parameters(config: MMDiTConfig) -> int:
    """All that a checkpoint holds: 20.43e9 for the true size."""
    blocks = config.num_layers * (sum(m.values + m.rows for m in block_matrices(config, 0)) + 4 * config.attention_head_dim)
    edges = sum(m.values + m.rows for m in edge_matrices(config)) + config.joint_attention_dim
    return blocks + edges + modulation_parameters(config)


def table_bytes(config: MMDiTConfig, timesteps: int) -> int:
    """Of engine.blocks.Mods: six vectors for references, target and text in each block, two for the last norm."""
    return timesteps * (config.num_layers * 3 * 6 + 2) * config.dim * BF16_BYTES


# the text encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenVLSizes:
    """Qwen2.5-VL's shape; the defaults are the 7B model's, which every Qwen-Image-Edit has (its config.json)."""

    layers: int = 28
    hidden: int = 3584
    intermediate: int = 18944
    heads: int = 28
    kv_heads: int = 4
    vocab: int = 152064
    vision_layers: int = 32
    vision_hidden: int = 1280
    vision_intermediate: int = 3420
    vision_patch_px: int = 14
    vision_patch_frames: int = 2
    vision_merge: int = 2
    vision_channels: int = 3

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a text_encoder/config.json, of either of transformers' layouts. Raises CheckpointError for a missing key."""
        text, vision = config.get("text_config", config), config.get("vision_config", {})
        try:
            return cls(
                layers=text["num_hidden_layers"],
                hidden=text["hidden_size"],
                intermediate=text["intermediate_size"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                vocab=text["vocab_size"],
                vision_layers=vision["depth"],
                vision_hidden=vision["hidden_size"],
                vision_intermediate=vision["intermediate_size"],
                vision_patch_px=vision.get("patch_size", 14),
                vision_patch_frames=vision.get("temporal_patch_size", 2),
                vision_merge=vision.get("spatial_merge_size", 2),
                vision_channels=vision.get("in_channels", vision.get("in_chans", 3)),
            )
        except KeyError as error:
            raise CheckpointError(
                f"The text encoder's config.json lacks {error.args[0]}.", "Use the text encoder of a Qwen-Image-Edit folder."
            ) from error

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def language_layers(sizes: QwenVLSizes) -> Iterator[tuple[Matrix, ...]]:
    """The linears of each of the language model's layers, as engine/fast_encoder.py lays them out.

    The head that writes words is never loaded.
    """
    width = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    inner = _round_up(sizes.intermediate, MULTIPLE)
    for layer in range(sizes.layers):
        name = f"language_model.layers.{layer}"
        yield (
            Matrix(f"{name}.self_attn.qkv_proj", width, sizes.hidden),
            Matrix(f"{name}.self_attn.o_proj", sizes.hidden, sizes.heads * sizes.head_dim, has_bias=False),
            Matrix(f"{name}.mlp.gate_up_proj", 2 * inner, sizes.hidden, has_bias=False),
            Matrix(f"{name}.mlp.down_proj", sizes.hidden, inner, has_bias=False),
        )


def vision_blocks(sizes: QwenVLSizes) -> Iterator[tuple[Matrix, ...]]:
    """The linears of each of the vision tower's blocks; their MLPs are made wider, to a multiple of 16, with zeros."""
    hidden, inner = sizes.vision_hidden, _round_up(sizes.vision_intermediate, MULTIPLE)
    for layer in range(sizes.vision_layers):
        name = f"visual.blocks.{layer}"
        yield (
            Matrix(f"{name}.attn.qkv", 3 * hidden, hidden),
            Matrix(f"{name}.attn.proj", hidden, hidden),
            Matrix(f"{name}.mlp.gate_up_proj", 2 * inner, hidden),
            Matrix(f"{name}.mlp.down_proj", hidden, inner),
        )


def merger_matrices(sizes: QwenVLSizes) -> tuple[Matrix, ...]:
    """What makes the vision tower's tokens the language model's."""
    merged = sizes.vision_hidden * sizes.vision_merge**2
    return Matrix("visual.merger.mlp.0", merged, merged), Matrix("visual.merger.mlp.2", sizes.hidden, merged)


@cache
def encoder_layers(sizes: QwenVLSizes, number_format: str) -> tuple[tuple[int, ...], ...]:
    """Bytes of each tensor of each layer, as they run: the vision tower's blocks, its merger, the language model's layers.

    number_format: "bf16", or "fp8" where 16 divides both sides.
    """

    def tensors(matrices: Iterable[Matrix]) -> tuple[int, ...]:
        formats = ((m, number_format if m.rows % MULTIPLE == m.columns % MULTIPLE == 0 else "bf16") for m in matrices)
        return tuple(size for m, wanted in formats for size in m.tensors(wanted))

    vision_norms, norms = ((BF16_BYTES * width,) * 2 for width in (sizes.vision_hidden, sizes.hidden))
    return (
        *((*tensors(block), *vision_norms) for block in vision_blocks(sizes)),
        tensors(merger_matrices(sizes)),
        *((*tensors(layer), *norms) for layer in language_layers(sizes)),
    )


def encoder_edge_bytes(sizes: QwenVLSizes) -> int:
    """What is in no layer but the table of embeddings: the patch embedding, the merger's norm and the last one."""
    patches = sizes.vision_hidden * sizes.vision_channels * sizes.vision_patch_frames * sizes.vision_patch_px**2
    return BF16_BYTES * (sizes.hidden + sizes.vision_hidden + patches)


def encoder_bytes(sizes: QwenVLSizes, number_format: str) -> int:
    """All of the text encoder but its table of embeddings. number_format: as encoder_layers'."""
    return sum(sum(tensors) for tensors in encoder_layers(sizes, number_format)) + encoder_edge_bytes(sizes)


def embedding_bytes(sizes: QwenVLSizes) -> int:
    """The table of embeddings: a lookup, which may stay on the host."""
    return BF16_BYTES * sizes.vocab * sizes.hidden


def key_value_bytes(sizes: QwenVLSizes) -> int:
    """Of one token, in all layers."""
    return 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * BF16_BYTES


# the VAE


@dataclass(frozen=True, slots=True)
class Conv:
    """A 2-D convolution with a bias. area: its output's pixels for each pixel of the picture. norm: channels of the norm before."""

    inputs: int
    outputs: int
    side: int
    area: float
    norm: int = 0

    @property
    def parameters(self) -> int:
        return self.outputs * (self.inputs * self.side**2 + 1) + self.norm

    @property
    def flop_per_pixel(self) -> float:
        return 2 * self.outputs * self.inputs * self.side**2 * self.area


def _residual(inputs: int, outputs: int, area: float) -> Iterator[Conv]:
    yield Conv(inputs, outputs, 3, area, norm=inputs)
    yield Conv(outputs, outputs, 3, area, norm=outputs)
    if inputs != outputs:
        yield Conv(inputs, outputs, 1, area)


def _middle(channels: int, area: float) -> Iterator[Conv]:
    yield from _residual(channels, channels, area)
    yield Conv(channels, 3 * channels, 1, area, norm=channels)
    yield Conv(channels, channels, 1, area)
    yield from _residual(channels, channels, area)


def vae_encoder(config: VAEConfig) -> Iterator[Conv]:
    widths = [config.base_dim * m for m in (1, *config.dim_mult)]
    area = 1.0
    yield Conv(config.input_channels, widths[0], 3, area)
    for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        yield from _residual(inputs, outputs, area)
        for _ in range(config.num_res_blocks - 1):
            yield from _residual(outputs, outputs, area)
        if level < len(config.dim_mult) - 1:
            area /= 4
            yield Conv(outputs, outputs, 3, area)
    yield from _middle(widths[-1], area)
    yield Conv(widths[-1], 2 * config.z_dim, 3, area, norm=widths[-1])
    yield Conv(2 * config.z_dim, 2 * config.z_dim, 1, area)


def vae_decoder(config: VAEConfig) -> Iterator[Conv]:
    widths = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    area = 1 / config.scale_factor**2
    yield Conv(config.z_dim, config.z_dim, 1, area)
    yield Conv(config.z_dim, widths[0], 3, area)
    yield from _middle(widths[0], area)
    for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        yield from _residual(inputs if level == 0 else inputs // 2, outputs, area)
        for _ in range(config.num_res_blocks):
            yield from _residual(outputs, outputs, area)
        if level < len(config.dim_mult) - 1:
            area *= 4
            yield Conv(outputs, outputs // 2, 3, area)
    yield Conv(widths[-1], config.input_channels, 3, area, norm=widths[-1])


def vae_bytes(config: VAEConfig) -> int:
    """Both halves in BF16, of each kernel the one temporal tap that a still picture meets."""
    return BF16_BYTES * sum(conv.parameters for conv in itertools.chain(vae_encoder(config), vae_decoder(config)))


def vae_flop(config: VAEConfig, convs: Iterator[Conv], pixels: int) -> float:
    """Of one pass over a picture of `pixels`: the convolutions, and the one attention over all latent pixels."""
    channels = config.base_dim * config.dim_mult[-1]
    return sum(conv.flop_per_pixel for conv in convs) * pixels + 4 * (pixels / config.scale_factor**2) ** 2 * channels


# an edit


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One edit, by its sizes alone.

    width, height: of the drawn picture, in pixels. references: pictures that are read, each of reference_px pixels for the VAE
    and encoder_px for the text encoder. prompt_tokens: of the wording with the template, the system prefix not among them.
    guided: a second forward in each step, for the negative prompt.
    """

    width: int = 1024
    height: int = 1024
    references: int = 1
    steps: int = 4
    reference_px: int = 1_048_576
    encoder_px: int = 147_456
    prompt_tokens: int = PROMPT_TOKENS
    guided: bool = False

    @property
    def target_tokens(self) -> int:
        return (self.width // PATCH_PX) * (self.height // PATCH_PX)

    @property
    def reference_tokens(self) -> int:
        return self.references * self.reference_px // PATCH_PX**2

    @property
    def picture_tokens(self) -> int:
        """Of each reference in the text encoder: 196 for 384 x 384."""
        return round(math.sqrt(self.encoder_px) / PICTURE_PX) ** 2

    @property
    def text_tokens(self) -> int:
        """What the transformer sees of the text encoder's."""
        return self.prompt_tokens + self.references * self.picture_tokens

    @property
    def forwards(self) -> int:
        """Of the transformer in one step."""
        return 2 if self.guided else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """The shapes of a whole model; the defaults are those of every Qwen-Image-Edit."""

    transformer: MMDiTConfig = field(default_factory=MMDiTConfig)
    text_encoder: QwenVLSizes = field(default_factory=QwenVLSizes)
    vae: VAEConfig = field(default_factory=VAEConfig)


@dataclass(frozen=True, slots=True)
class StepFlop:
    """One forward of the transformer. linear: the blocks' products; attention: scores and sums; tokens: that take part."""

    linear: float
    attention: float
    tokens: int

    @property
    def total(self) -> float:
        return self.linear + self.attention


def step_flop(config: MMDiTConfig, work: Workload, *, reuses: bool = False) -> StepFlop:
    """reuses: a step after the first with the references' keys and values kept; they take no part but as keys.

    Of the last block only the target's tokens are drawn from, as engine/transformer.py has it.
    """
    dim, target, text = config.dim, work.target_tokens, work.text_tokens
    references = 0 if reuses else work.reference_tokens
    asking, seen = references + target + text, work.reference_tokens + target + text
    qkv, rest = 3 * dim**2, 9 * dim**2
    layers = config.num_layers
    linear = 2.0 * (layers * qkv * asking + rest * ((layers - 1) * asking + target))
    attention = 4.0 * dim * seen * ((layers - 1) * asking + target)
    return StepFlop(linear, attention, asking)


@cache
def encoder_flop(sizes: QwenVLSizes, work: Workload) -> float:
    """The vision tower over every picture's patches, then the language model over all tokens, the system prefix included."""
    tokens = SYSTEM_TOKENS + work.text_tokens
    patches = work.references * work.picture_tokens * sizes.vision_merge**2
    language = 2.0 * tokens * sum(m.values for layer in language_layers(sizes) for m in layer)
    vision = 2.0 * patches * sum(m.values for block in vision_blocks(sizes) for m in block)
    return language + 2.0 * tokens**2 * sizes.hidden * sizes.layers + vision
