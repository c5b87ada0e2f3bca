"""Where a model's parts lie while it draws: on the card, on the card in turn, streamed to it block by block, or on the host.

Pure: bytes in, a placement out. The first of these that fits is taken, so that more memory never streams more:

1. everything stays on the card but the table of embeddings, of which an edit reads a few rows: it stays on the host;
2. no passes are recorded as graphs, whose memory no one else may use;
3. text encoder and transformer lie on the card in turn, and a wave of pictures shares one exchange;
4. of the transformer only so many blocks stay as there is room for; the others come through a ring of two, in every step;
5. the text encoder comes layer by layer too.

1 is what the engine does today, and of 2 to 5 what carries them out is still to be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from millicent.errors import MachineError
from millicent.model import sizes
from millicent.model.sizes import BF16_BYTES, ModelSizes, Workload

Where = Literal["card", "card in turn", "streamed", "host"]

# CUDA's own, with its kernels, and what is lost between the allocator's pieces: of a 24 GB card 22.5 GiB are usable; not measured
CONTEXT_BYTES = 600 << 20
SLACK_BYTES = 256 << 20
CACHE_BYTES = (512 + 64) << 20  # of what was read and encoded (engine/loading.py)
# Python, torch and CUDA's libraries, and a weight file's buffers while it loads; an estimate
HOST_BASE_BYTES = 4 << 30
RING_SLOTS = 2
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """What each phase of an edit has alive at its fullest, beside weights and caches, in bytes."""

    text: int
    vae_encode: int
    denoise: int
    vae_decode: int

    @property
    def drawing(self) -> int:
        """The largest of those that do not need the text encoder."""
        return max(self.vae_encode, self.denoise, self.vae_decode)

    @property
    def largest(self) -> int:
        return max(self.text, self.drawing)

    @property
    def recorded(self) -> int:
        """Of all of them, as each graph keeps the memory of its own."""
        return self.text + self.vae_encode + self.denoise + self.vae_decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What has to lie somewhere, in bytes. blocks: of the transformer, each. kept: keys and values of references, with reuse.

    text_encoder: without its table of embeddings, which is `embedding`.
    """

    blocks: tuple[int, ...]
    edges: int
    table: int
    text_encoder: int
    encoder_layers: int
    embedding: int
    vae: int
    kept: int
    phases: Phases
    caches: int = CACHE_BYTES

    @property
    def steady(self) -> int:
        """What lies on the card under every placement."""
        return CONTEXT_BYTES + SLACK_BYTES + self.edges + self.table + self.vae + self.caches

    @property
    def transformer(self) -> int:
        return sum(self.blocks)

    @property
    def weights(self) -> int:
        """All that stays on the card under the first placement."""
        return self.transformer + self.edges + self.table + self.text_encoder + self.vae

    @property
    def whole(self) -> int:
        """Of a card's memory that the first placement takes, which is the one that today's engine carries out."""
        return self.steady + self.transformer + self.text_encoder + self.kept + self.phases.recorded

    @property
    def least(self) -> int:
        """Of a card's memory that the last placement takes, with all weights streamed."""
        reading = self.steady + self.encoder_ring + self.phases.text
        return max(reading, self.steady + self.kept + self.ring + self.phases.drawing)

    @property
    def ring(self) -> int:
        return RING_SLOTS * max(self.blocks)

    @property
    def encoder_ring(self) -> int:
        return RING_SLOTS * self.text_encoder // self.encoder_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedPart:
    """card_bytes: what lies on the card of it at a time; host_bytes: what the host must hold meanwhile."""

    name: str
    where: Where
    size_bytes: int
    card_bytes: int
    host_bytes: int
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where everything is.

    in_turn: text encoder and transformer are exchanged for each wave of pictures. records_graphs: passes are recorded.
    resident_blocks: of the transformer. exchanged_bytes: over the link, once a wave; streamed_step_bytes: in each forward of the
    transformer; streamed_text_bytes: in each of the text encoder's. pinned_bytes: of the host's memory, for what crosses the link.
    peaks: (phase, bytes on the card), everything counted.
    """

    parts: tuple[PlacedPart, ...]
    in_turn: bool
    records_graphs: bool
    resident_blocks: int
    exchanged_bytes: int
    streamed_step_bytes: int
    streamed_text_bytes: int
    pinned_bytes: int
    peaks: tuple[tuple[str, int], ...]
    free_bytes: int
    because: str

    @property
    def peak_bytes(self) -> int:
        return max(size for _, size in self.peaks)

    @property
    def host_bytes(self) -> int:
        """For what waits there; needed_host_bytes has the engine's own beside it."""
        return sum(part.host_bytes for part in self.parts)

    @property
    def needed_host_bytes(self) -> int:
        return HOST_BASE_BYTES + self.host_bytes

    @property
    def is_carried_out(self) -> bool:
        """Whether the engine does it today: it keeps everything on the card but the table of embeddings, and records graphs."""
        return self.records_graphs and not self.in_turn


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
    """blocks: bytes of each of the transformer's, in their formats; number_format: of the blocks, text_encoder: of its linears.

    has_fp8: whether the card's tensor cores have it.
    """
    transformer, encoder = model.transformer, model.text_encoder
    # keys and values; 8-bit attention keeps INT8 codes of keys, and FP8 ones of values where the card has FP8
    kept = 1 + (1 if has_fp8 else BF16_BYTES) if attention == "int8" else 2 * BF16_BYTES
    per_token = kept * transformer.dim * transformer.num_layers
    return Components(
        blocks=tuple(blocks),
        edges=sizes.edge_bytes(transformer),
        table=sizes.table_bytes(transformer, work.steps),
        text_encoder=sizes.encoder_bytes(encoder, text_encoder),
        encoder_layers=encoder.layers,
        embedding=sizes.embedding_bytes(encoder),
        vae=sizes.vae_bytes(model.vae),
        kept=work.reference_tokens * per_token * work.forwards if reuses else 0,
        phases=Phases(
            text=_text_phase(model, work),
            vae_encode=_vae_phase(model, work.reference_px),
            denoise=_denoise_phase(model, work, number_format),
            vae_decode=_vae_phase(model, work.width * work.height),
        ),
    )


def _text_phase(model: ModelSizes, work: Workload) -> int:
    """The widest layer's gate, up and their product; the causal mask; and the keys and values of all layers, twice while packed."""
    encoder, tokens = model.text_encoder, sizes.SYSTEM_TOKENS + work.text_tokens
    patches = work.picture_tokens * encoder.vision_merge**2
    language = tokens * (4 * encoder.hidden + 3 * encoder.intermediate) * BF16_BYTES
    vision = patches * (4 * encoder.vision_hidden + 3 * encoder.vision_intermediate) * BF16_BYTES
    return max(language, vision) + 2 * tokens * sizes.key_value_bytes(encoder)


def _vae_phase(model: ModelSizes, pixels: int) -> int:
    """Four pictures of the narrowest layer's channels at full size: what came in, its norm, and two convolutions' results."""
    return 4 * model.vae.base_dim * pixels * BF16_BYTES


def _denoise_phase(model: ModelSizes, work: Workload, number_format: str) -> int:
    """Where the MLP's GELU is taken: the stream (2 bytes a channel), q, k and v (6), attention's result (2), its product (2), the
    codes that went into the MLP (c), the MLP's inside (8) and its codes (4 c); c is 2 for plain numbers and 1 for codes.

    Beside it the buffers of each of the step's drawings. A prompt of another length has its own, 38 MB at true size.
    """
    code = 1 if number_format in ("fp8", "int8") else 2
    dim, tokens = model.transformer.dim, sizes.step_flop(model.transformer, work).tokens
    alive = tokens * dim * (20 + 5 * code)
    rows = (work.reference_tokens + work.text_tokens) * dim * BF16_BYTES
    angles = tokens * model.transformer.attention_head_dim * 4
    buffers = work.forwards * (rows + angles + sizes.table_bytes(model.transformer, 1))
    if number_format == "int8-weight":
        alive += 6 * 4 * dim**2  # the largest weight, multiplied out in FP32 and then in BF16
    if number_format == "nvfp4":
        alive += 24 * 4 * dim * tokens  # the widest rows in FP32, their quotients and the codes as 64-bit numbers
    return alive + buffers


def place(parts: Components, free_bytes: int, host_bytes: int) -> Placement:
    """free_bytes: of the card, before CUDA is opened there; host_bytes: what the host has free.

    Raises MachineError for a card that is too small even with everything streamed, and for too small a host to stream from.
    """
    placement = place_on_card(parts, free_bytes)
    needed = placement.needed_host_bytes
    if needed > host_bytes:
        raise MachineError(
            f"With {free_bytes / _GIB:.1f} GiB free on the card, the host needs {needed / _GIB:.1f} GiB of memory, "
            f"{placement.host_bytes / _GIB:.1f} GiB of them for weights that wait there, and has {host_bytes / _GIB:.1f} GiB free.",
            "Use a card or a host with more memory, or a format with fewer bytes.",
        )
    return placement


def place_on_card(parts: Components, free_bytes: int) -> Placement:
    """As `place`, whatever the host has. Raises MachineError for a card that is too small even with everything streamed."""
    return _place_all(parts, free_bytes) or _place_in_turn(parts, free_bytes)


def _place_all(parts: Components, free_bytes: int) -> Placement | None:
    """All weights on the card, perhaps without graphs; None where that does not fit."""
    for records in (True, False):
        peaks = _peaks_of_all(parts, records)
        if max(size for _, size in peaks) <= free_bytes:
            told = f"all weights stay on the card: {peaks_told(peaks)} of {free_bytes / _GIB:.1f} GiB free"
            return Placement(
                parts=(
                    _on_card("transformer", parts.transformer, "it fits"),
                    _on_card("text encoder", parts.text_encoder, "it fits beside the transformer"),
                    _embedding(parts),
                    *_small(parts, records),
                ),
                in_turn=False,
                records_graphs=records,
                resident_blocks=len(parts.blocks),
                exchanged_bytes=0,
                streamed_step_bytes=0,
                streamed_text_bytes=0,
                pinned_bytes=0,
                peaks=peaks,
                free_bytes=free_bytes,
                because=told if records else f"{told}; graphs are not recorded, as their memory would not fit",
            )
    return None


def _peaks_of_all(parts: Components, records: bool) -> tuple[tuple[str, int], ...]:
    phases, others = parts.phases, parts.whole - parts.phases.recorded
    # a graph keeps its memory when others run; before one is recorded, what is cached is given back
    sizes_of = {"text": phases.text, "VAE encode": phases.vae_encode, "denoise": phases.denoise, "VAE decode": phases.vae_decode}
    return tuple((name, parts.whole if records else others + size) for name, size in sizes_of.items())


def _place_in_turn(parts: Components, free_bytes: int) -> Placement:
    """Text encoder first, then transformer, each whole or in pieces. Raises MachineError where not even pieces fit."""
    _check_least(parts, free_bytes)
    reads_whole = parts.steady + parts.text_encoder + parts.phases.text <= free_bytes
    room = free_bytes - parts.steady - parts.kept - parts.phases.drawing
    draws_whole = parts.transformer <= room
    largest = max(parts.blocks)
    resident = len(parts.blocks) if draws_whole else min(len(parts.blocks) - 1, (room - parts.ring) // largest)
    streamed = sum(sorted(parts.blocks, reverse=True)[: len(parts.blocks) - resident])
    encoder_card = parts.text_encoder if reads_whole else parts.encoder_ring
    drawing_card = parts.transformer - streamed + (0 if draws_whole else parts.ring)
    transformer = PlacedPart(
        name="transformer",
        where="card in turn" if draws_whole else "streamed",
        size_bytes=parts.transformer,
        card_bytes=drawing_card,
        host_bytes=parts.transformer,
        because="it does not fit beside the text encoder"
        if draws_whole
        else f"{resident} of {len(parts.blocks)} blocks fit; {streamed / _GIB:.1f} GiB cross the link in every step",
    )
    encoder = PlacedPart(
        name="text encoder",
        where="card in turn" if reads_whole else "streamed",
        size_bytes=parts.text_encoder,
        card_bytes=encoder_card,
        host_bytes=parts.text_encoder,
        because="a wave of pictures is read before the transformer comes" if reads_whole else "it does not fit even alone",
    )
    drawing = parts.steady + drawing_card + parts.kept
    return Placement(
        parts=(transformer, encoder, _embedding(parts), *_small(parts, records=False)),
        in_turn=True,
        records_graphs=False,
        resident_blocks=resident,
        exchanged_bytes=(parts.text_encoder if reads_whole else 0) + parts.transformer - streamed,
        streamed_step_bytes=streamed,
        streamed_text_bytes=0 if reads_whole else parts.text_encoder,
        pinned_bytes=parts.text_encoder + parts.transformer,
        peaks=(
            ("text", parts.steady + encoder_card + parts.phases.text),
            ("VAE encode", drawing + parts.phases.vae_encode),
            ("denoise", drawing + parts.phases.denoise),
            ("VAE decode", drawing + parts.phases.vae_decode),
        ),
        free_bytes=free_bytes,
        because="text encoder and transformer do not fit together, and lie on the card in turn, for a wave of pictures each",
    )


def _check_least(parts: Components, free_bytes: int) -> None:
    if parts.least > free_bytes:
        kept = f", {parts.kept / _GIB:.1f} GiB of them keys and values that are kept" if parts.kept else ""
        raise MachineError(
            f"This edit takes {parts.least / _GIB:.1f} GiB of the card's memory even with all weights streamed{kept}, "
            f"and {free_bytes / _GIB:.1f} GiB are free.",
            "Use a card with more memory, draw a smaller picture, give fewer references, or reuse none.",
        )


def _on_card(name: str, size_bytes: int, because: str) -> PlacedPart:
    return PlacedPart(name=name, where="card", size_bytes=size_bytes, card_bytes=size_bytes, host_bytes=0, because=because)


def _embedding(parts: Components) -> PlacedPart:
    return PlacedPart(
        name="table of embeddings",
        where="host",
        size_bytes=parts.embedding,
        card_bytes=0,
        host_bytes=parts.embedding,
        because="an edit reads a few rows of it",
    )


def _small(parts: Components, records: bool) -> tuple[PlacedPart, ...]:
    phases = parts.phases
    named = [
        ("transformer's edges", parts.edges, "what stands before and after the blocks"),
        ("modulation table", parts.table, "in place of a third of the transformer's weights"),
        ("VAE", parts.vae, "small"),
        ("kept keys and values", parts.kept, "of the references, which later steps do not compute again"),
        ("activations", phases.largest, "of the fullest phase"),
        ("recorded graphs", phases.recorded - phases.largest if records else 0, "of the other phases"),
        ("caches", parts.caches, "of pictures and prompts that come again"),
        ("CUDA and slack", CONTEXT_BYTES + SLACK_BYTES, "of its kernels, and between the allocator's pieces"),
    ]
    return tuple(_on_card(name, size, because) for name, size, because in named if size)


def peaks_told(peaks: Sequence[tuple[str, int]]) -> str:
    """The fullest phase in words: "21.9 GiB"."""
    return f"{max(size for _, size in peaks) / _GIB:.1f} GiB"
