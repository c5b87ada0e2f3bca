"""What each part of a model weighs on a card, and what each phase of an edit has alive there. Pure: sizes in, bytes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from millicent.engine.arena import RING_SLOTS
from millicent.model import sizes
from millicent.model.sizes import BF16_BYTES, ModelSizes, Workload

# CUDA's own, with its kernels: 0.76 to 0.79 GiB on an H200 (benchmarks.memory)
CONTEXT_BYTES = 800 << 20
# lost between the allocator's pieces, under caps of 8 to 16 GiB on an H200 (benchmarks.memory, commits eedd27f and 8c57786): 0.29
# to 0.41 GiB in pieces of fixed sizes, 0.10 to 0.29 where it maps pages
SLACK_BYTES = 512 << 20
TEXT_CACHE_BYTES = 256 << 20  # of what was read of pictures and prompts; 270 tokens of keys and values take 16 MB
LATENTS_CACHE_BYTES = 32 << 20  # of what the VAE made of pictures; one of 1024x1024 takes half a megabyte in BF16
# of the phases, which are recorded as graphs: as many as fit. What a host launches at once saves most where launches are many and
# small, as in the text encoder, and next where they are many
RECORDED: tuple[tuple[str, ...], ...] = (("text", "VAE encode", "denoise", "VAE decode"), ("text", "denoise"), ("text",), ())
# of the transformer's steps: a prompt's length is part of a shape, and a catalog has dozens
SHAPES_KEPT = 16
# whose graphs share one pool of memory (engine/capture.py)
_POOLS = (("text",), ("VAE encode", "VAE decode"), ("denoise",))
# how many times as large a pool is as the larger phase: what passes ask for in turn cuts it up, and nothing of it can be given
# back. At true size on an H200 (benchmarks.memory, commit 81bd45e): 0.197, 1.355 and 0.973 GiB for 0.166, 0.938 and 0.627 alive
_CUT_UP = 1.55
# beside each: cuBLAS's workspaces of its own stream, and what its graphs are fed and what they made; an estimate. At commit
# 8c57786 pools took 0.080, 1.168 and 0.686 GiB, where a plan has 0.275, 1.173 and 0.922
_RECORDER_BYTES = 160 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """What each phase of an edit has alive at its fullest, beside weights and caches, in bytes.

    abreast: more of the denoising, for each pass that goes through the blocks beside the first. shape: what another one that is
    recorded keeps, as its buffers stay where they are.
    """

    text: int
    vae_encode: int
    denoise: int
    vae_decode: int
    abreast: int = 0
    shape: int = 0

    @property
    def largest(self) -> int:
        return max(size for _, size in self.named)

    def together(self, passes: int) -> Phases:
        """With so many passes abreast."""
        return replace(self, denoise=self.denoise + (passes - 1) * self.abreast)

    def recorded_bytes(self, recorded: Sequence[str]) -> int:
        """What the graphs of some phases keep, whatever runs."""
        size_of, total = dict(self.named), 0
        for names in _POOLS:
            largest = max((size_of[name] for name in names if name in recorded), default=0)
            total += round(_CUT_UP * largest) + _RECORDER_BYTES if largest else 0
        return total + (SHAPES_KEPT - 1) * self.shape if "denoise" in recorded else total

    @property
    def named(self) -> tuple[tuple[str, int], ...]:
        return ("text", self.text), ("VAE encode", self.vae_encode), ("denoise", self.denoise), ("VAE decode", self.vae_decode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What has to lie somewhere, in bytes. kept: keys and values of references, with reuse. forwards: of a step.

    blocks: of the transformer, each; encoder_sizes: of the text encoder's layers, in the order in which they run. Of these the last
    language_layers are the language model's. Both as they lie in a slab, each tensor from a multiple of ALIGNMENT_BYTES on.
    edges, encoder_edges: what stands before, between and after them, without the table of embeddings, which is `embedding`.
    """

    blocks: tuple[int, ...]
    edges: int
    table: int
    encoder_sizes: tuple[int, ...]
    language_layers: int
    encoder_edges: int
    embedding: int
    vae: int
    kept: int
    phases: Phases
    forwards: int = 1
    caches: int = TEXT_CACHE_BYTES + LATENTS_CACHE_BYTES

    @property
    def steady(self) -> int:
        """What lies on the card under every placement."""
        return CONTEXT_BYTES + SLACK_BYTES + self.edges + self.encoder_edges + self.table + self.vae + self.caches

    def beside(self, recorded: Sequence[str] = ()) -> int:
        """On the card beside the layers. Recorded passes keep their memory while others run.

        So does what is kept of references: it stays from one edit to the next (engine/transformer.py), so that a reading has it
        beside it too.
        """
        return self.steady + self.kept + self.phases.recorded_bytes(recorded) + self.phases.largest

    @property
    def transformer(self) -> int:
        return sum(self.blocks)

    @property
    def text_encoder(self) -> int:
        return sum(self.encoder_sizes)

    @property
    def weights(self) -> int:
        """All that stays on the card under the first placement."""
        return self.transformer + self.edges + self.table + self.text_encoder + self.encoder_edges + self.vae

    @property
    def resident(self) -> int:
        """Of a card's memory, for all weights to stay there: with nothing recorded."""
        return self.beside() + self.transformer + self.text_encoder

    @property
    def least(self) -> int:
        """Of a card's memory that the last placement takes, with all weights streamed."""
        return self.beside() + RING_SLOTS * max(*self.blocks, *self.encoder_sizes)


def weigh(
    model: ModelSizes,
    work: Workload,
    blocks: Sequence[int],
    *,
    number_format: str,
    text_encoder: str,
    attention: str,
    reuses: bool,
    has_fp8: bool = True,
) -> Components:
    """blocks: bytes of each of the transformer's, as slabs. number_format: of the blocks, text_encoder: of its linears.

    has_fp8: whether the card's tensor cores have it.
    """
    transformer, encoder = model.transformer, model.text_encoder
    layers = sizes.encoder_layers(encoder, text_encoder)
    # keys and values; 8-bit attention keeps INT8 codes of keys, and FP8 ones of values where the card has FP8
    kept = 1 + (1 if has_fp8 else BF16_BYTES) if attention == "int8" else 2 * BF16_BYTES
    per_token = kept * transformer.dim * transformer.num_layers
    return Components(
        blocks=tuple(blocks),
        edges=sizes.edge_bytes(transformer),
        table=sizes.table_bytes(transformer, work.steps),
        encoder_sizes=tuple(sizes.slab_bytes(tensors) for tensors in layers),
        language_layers=encoder.layers,
        encoder_edges=sizes.encoder_edge_bytes(encoder),
        embedding=sizes.embedding_bytes(encoder),
        vae=sizes.vae_bytes(model.vae),
        kept=work.reference_tokens * per_token * work.forwards if reuses else 0,
        phases=Phases(
            text=_text_phase(model, work),
            vae_encode=_vae_phase(model, work.reference_px, 3.0),
            denoise=_denoise_phase(model, work, number_format),
            vae_decode=_vae_phase(model, work.width * work.height, 3.5),
            abreast=_abreast_bytes(model, work),
            shape=_drawing_bytes(model, work),
        ),
        forwards=work.forwards,
    )


def _text_phase(model: ModelSizes, work: Workload) -> int:
    """The widest layer's gate, up and their product; the causal mask; and the keys and values of all layers, twice while packed."""
    encoder, tokens = model.text_encoder, sizes.SYSTEM_TOKENS + work.text_tokens
    patches = work.picture_tokens * encoder.vision_merge**2
    language = tokens * (4 * encoder.hidden + 3 * encoder.intermediate) * BF16_BYTES
    vision = patches * (4 * encoder.vision_hidden + 3 * encoder.vision_intermediate) * BF16_BYTES
    return max(language, vision) + 2 * tokens * sizes.key_value_bytes(encoder)


def _vae_phase(model: ModelSizes, pixels: int, pictures: float) -> int:
    """So many pictures of the narrowest layer's channels at full size.

    Three for the encoder: what came into a block, its norm, and a convolution's result. Three and a half for the decoder, where the
    last level begins: half a one that came in, two that it is made twice as large in, and a convolution's result.
    """
    return round(pictures * model.vae.base_dim * pixels * BF16_BYTES)


def _denoise_phase(model: ModelSizes, work: Workload, number_format: str) -> int:
    """Where the MLP's GELU is taken: the stream (2 bytes a channel), attention's result (2), its product (2), the codes that went
    into the MLP (c), the MLP's inside (8) and its codes (4 c); c is 2 for plain numbers and 1 for codes.

    Beside it the buffers of each of the step's drawings. A prompt of another length has its own, 38 MB at true size.
    """
    code = 1 if number_format in ("fp8", "int8") else 2
    dim, tokens = model.transformer.dim, sizes.step_flop(model.transformer, work).tokens
    alive = tokens * dim * (14 + 5 * code)
    buffers = work.forwards * _drawing_bytes(model, work)
    if number_format == "int8-weight":
        alive += 6 * 4 * dim**2  # the largest weight, multiplied out in FP32 and then in BF16
    if number_format == "nvfp4":
        alive += 24 * 4 * dim * tokens  # the widest rows in FP32, their quotients and the codes as 64-bit numbers
    return alive + buffers


def _drawing_bytes(model: ModelSizes, work: Workload) -> int:
    """Of one drawing's buffers: what comes in once for each picture, rotations, and a step's modulation."""
    dim, tokens = model.transformer.dim, sizes.step_flop(model.transformer, work).tokens
    rows = (work.reference_tokens + work.text_tokens) * dim * BF16_BYTES
    angles = tokens * model.transformer.attention_head_dim * 4
    return rows + angles + sizes.table_bytes(model.transformer, 1)


def _abreast_bytes(model: ModelSizes, work: Workload) -> int:
    """What a pass has alive while another one is in a block: the stream, what the MLP adds to it, and attention's result."""
    dim, tokens = model.transformer.dim, sizes.step_flop(model.transformer, work).tokens
    return 3 * tokens * dim * BF16_BYTES + _drawing_bytes(model, work)
