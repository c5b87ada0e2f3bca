"""Where a model's parts lie while it draws: on the card, on the card in turn, streamed to it layer by layer, or on the host.

Pure: bytes in, a placement out. The first of these that fits is taken, so that more memory never streams more:

1. everything stays on the card but the table of embeddings, of which an edit reads a few rows: it stays on the host;
2. fewer passes are recorded as graphs, whose memory no one else may use, or none;
3. text encoder and transformer share one arena of the card's memory and lie there in turn: what of them overlaps is exchanged,
   and a wave of pictures shares one exchange;
4. of the transformer only so many blocks stay as there is room for; the others come through a ring of two, in every step;
5. the text encoder's layers too.

engine/residency.py carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from millicent.errors import MachineError
from millicent.model import sizes
from millicent.model.sizes import ALIGNMENT_BYTES, BF16_BYTES, ModelSizes, Workload

Where = Literal["card", "card in turn", "streamed", "host"]

# CUDA's own, with its kernels: 0.76 to 0.79 GiB on an H200 (benchmarks.memory)
CONTEXT_BYTES = 800 << 20
SLACK_BYTES = 256 << 20  # lost between the allocator's pieces
CACHE_BYTES = (512 + 64) << 20  # of what was read and encoded (engine/loading.py)
# Python, torch and CUDA's libraries, and a weight file's buffers while it loads; an estimate
HOST_BASE_BYTES = 4 << 30
RING_SLOTS = 2
# of the phases, which are recorded as graphs: as many as fit. What a host launches at once saves most where launches are many and
# small, as in the text encoder. With one pool fewer than all nothing would be won: what a phase does not keep it takes as it runs
RECORDED: tuple[tuple[str, ...], ...] = (("text", "VAE encode", "denoise", "VAE decode"), ("text",), ())
# whose graphs share one pool of memory (engine/capture.py), as large as the largest of them
_POOLS = (("text",), ("VAE encode", "VAE decode"), ("denoise",))
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

    def recorded_bytes(self, recorded: Sequence[str]) -> int:
        """What the graphs of some phases keep, whatever runs."""
        size_of = dict(self.named)
        return sum(max((size_of[name] for name in pool if name in recorded), default=0) for pool in _POOLS)

    @property
    def named(self) -> tuple[tuple[str, int], ...]:
        return ("text", self.text), ("VAE encode", self.vae_encode), ("denoise", self.denoise), ("VAE decode", self.vae_decode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What has to lie somewhere, in bytes. kept: keys and values of references, with reuse.

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
    caches: int = CACHE_BYTES

    @property
    def steady(self) -> int:
        """What lies on the card under every placement."""
        return CONTEXT_BYTES + SLACK_BYTES + self.edges + self.encoder_edges + self.table + self.vae + self.caches

    @property
    def beside(self) -> int:
        """On the card beside layers that lie there in turn: the text encoder's recorded passes keep their memory while others draw.

        What is kept of references stays from one edit to the next (engine/transformer.py), so that a reading has it beside it too.
        """
        return self.steady + self.kept + self.phases.text + self.phases.drawing

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
    def whole(self) -> int:
        """Of a card's memory that the first placement takes."""
        return self.steady + self.transformer + self.text_encoder + self.kept + self.phases.recorded_bytes(RECORDED[0])

    @property
    def least(self) -> int:
        """Of a card's memory that the last placement takes, with all weights streamed."""
        return self.beside + RING_SLOTS * max(*self.blocks, *self.encoder_sizes)


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

    in_turn: text encoder and transformer lie on the card in turn, and share arena_bytes of it.
    recorded: the phases whose passes are recorded as graphs, one of RECORDED.
    resident_blocks: of the transformer, resident_encoder_layers: of the text encoder; the others are streamed.
    exchanged_bytes: over the link, once a wave, both ways together; streamed_step_bytes: in each forward of the transformer;
    streamed_text_bytes: in one pass of the whole text encoder, of which streamed_language_bytes are the language model's.
    pinned_bytes: of the host's memory, for what crosses the link. peaks: (phase, bytes on the card), everything counted.
    """

    parts: tuple[PlacedPart, ...]
    in_turn: bool
    recorded: tuple[str, ...]
    arena_bytes: int
    resident_blocks: int
    resident_encoder_layers: int
    exchanged_bytes: int
    streamed_step_bytes: int
    streamed_text_bytes: int
    streamed_language_bytes: int
    pinned_bytes: int
    peaks: tuple[tuple[str, int], ...]
    free_bytes: int
    because: str

    @property
    def records_graphs(self) -> bool:
        """Of every phase."""
        return self.recorded == RECORDED[0]

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
    def streams(self) -> bool:
        return bool(self.streamed_step_bytes or self.streamed_text_bytes)

    @property
    def weights(self) -> Literal["on the card", "in turn", "streamed"]:
        """Where they are, in a word."""
        return "streamed" if self.streams else "in turn" if self.in_turn else "on the card"

    def reading_bytes(self, work: Workload) -> int:
        """Streamed in one edit's reading, of pictures and wordings that were not read before.

        The vision tower sees each picture by itself; the language model reads system text and pictures, and then each wording.
        """
        vision = self.streamed_text_bytes - self.streamed_language_bytes
        return work.references * vision + (1 + work.forwards) * self.streamed_language_bytes

    def edit_bytes(self, work: Workload) -> int:
        """Streamed in one edit; what a wave exchanges is not among it."""
        return self.reading_bytes(work) + work.forwards * work.steps * self.streamed_step_bytes


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
    """All weights on the card, and as many phases recorded as fit; None where not even none do."""
    for recorded in RECORDED:
        peaks = _peaks(parts, parts.transformer + parts.text_encoder, recorded)
        if max(size for _, size in peaks) <= free_bytes:
            told = f"all weights stay on the card: {peaks_told(peaks)} of {free_bytes / _GIB:.1f} GiB free"
            return Placement(
                parts=(
                    _on_card("transformer", parts.transformer, "it fits"),
                    _on_card("text encoder", parts.text_encoder, "it fits beside the transformer"),
                    _embedding(parts),
                    *_small(parts, recorded),
                ),
                in_turn=False,
                recorded=recorded,
                arena_bytes=0,
                resident_blocks=len(parts.blocks),
                resident_encoder_layers=len(parts.encoder_sizes),
                exchanged_bytes=0,
                streamed_step_bytes=0,
                streamed_text_bytes=0,
                streamed_language_bytes=0,
                pinned_bytes=0,
                peaks=peaks,
                free_bytes=free_bytes,
                because=f"{told}{_tell_recorded(recorded)}",
            )
    return None


def _tell_recorded(recorded: tuple[str, ...]) -> str:
    if recorded == RECORDED[0]:
        return ""
    if not recorded:
        return "; graphs are not recorded, as their memory would not fit"
    return f"; graphs are recorded of {' and '.join(recorded)} alone, as the others' memory would not fit"


def _peaks(parts: Components, layers_bytes: int, recorded: tuple[str, ...] = ()) -> tuple[tuple[str, int], ...]:
    """Of each phase, with so many bytes of layers on the card. What is recorded keeps its memory when others run."""
    others = parts.steady + parts.kept + layers_bytes + parts.phases.recorded_bytes(recorded)
    return tuple((name, others + (0 if name in recorded else size)) for name, size in parts.phases.named)


def _place_in_turn(parts: Components, free_bytes: int) -> Placement:
    """Text encoder first, then transformer, each whole or in pieces. Raises MachineError where not even pieces fit."""
    _check_least(parts, free_bytes)
    blocks, layers = parts.blocks, parts.encoder_sizes
    # all that lies there begins at a multiple
    arena_bytes = min(free_bytes - parts.beside, parts.transformer + parts.text_encoder) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    resident, resident_layers = count_resident(blocks, arena_bytes), count_resident(layers, arena_bytes)
    drawing, reading = lay_out_arena(blocks, layers, resident, resident_layers, arena_bytes)
    streamed_step = streamed_bytes(blocks, spread(len(blocks), resident))
    stays = spread(len(layers), resident_layers)
    first_language = len(layers) - parts.language_layers
    streamed_language = streamed_bytes(layers[first_language:], stays[first_language:])
    streamed_text = streamed_language + streamed_bytes(layers[:first_language], stays[:first_language])
    exchanged = overlapped_bytes(blocks, drawing, reading) + overlapped_bytes(layers, reading, drawing)
    # while a recorded pass runs all layers are there (Stack.held)
    recorded = ("text",) if resident_layers == len(layers) else ()
    told = f"text encoder and transformer do not fit together: they lie on the card in turn, in {arena_bytes / _GIB:.1f} GiB"
    return Placement(
        parts=(
            _in_turn("transformer", blocks, resident, drawing, f"{streamed_step / _GIB:.1f} GiB cross the link in every step"),
            _in_turn("text encoder", layers, resident_layers, reading, f"{streamed_text / _GIB:.1f} GiB cross the link in a pass"),
            _embedding(parts),
            *_small(parts, recorded),
        ),
        in_turn=True,
        recorded=recorded,
        arena_bytes=arena_bytes,
        resident_blocks=resident,
        resident_encoder_layers=resident_layers,
        exchanged_bytes=exchanged,
        streamed_step_bytes=streamed_step,
        streamed_text_bytes=streamed_text,
        streamed_language_bytes=streamed_language,
        pinned_bytes=parts.text_encoder + parts.transformer,
        peaks=_peaks(parts, arena_bytes, recorded),
        free_bytes=free_bytes,
        because=f"{told}; {exchanged / _GIB:.1f} GiB are exchanged for a wave of pictures" if exchanged else told,
    )


def _in_turn(name: str, layer_sizes: Sequence[int], resident: int, places: Places, streamed_told: str) -> PlacedPart:
    is_whole = resident == len(layer_sizes)
    return PlacedPart(
        name=name,
        where="card in turn" if is_whole else "streamed",
        size_bytes=sum(layer_sizes),
        card_bytes=places.end - places.begin,
        host_bytes=sum(layer_sizes),
        because="it fits alone" if is_whole else f"{resident} of {len(layer_sizes)} layers fit; {streamed_told}",
    )


# the arena


@dataclass(frozen=True, slots=True)
class Places:
    """Where one network's layers lie in the arena, in bytes from its beginning.

    begins: of each layer, None for one that is streamed. slots: of its ring, none where nothing is streamed. begin, end: of all of
    it, the ring included.
    """

    begins: tuple[int | None, ...]
    slots: tuple[int, ...]
    begin: int
    end: int


def lay_out_arena(
    blocks: Sequence[int], encoder_sizes: Sequence[int], resident_blocks: int, resident_encoder_layers: int, arena_bytes: int
) -> tuple[Places, Places]:
    """The transformer's layers from the arena's beginning, and the text encoder's from its end; both networks' sizes are in bytes.

    Between them lie their rings, which keep nothing from one pass to the next: so they overlap first.
    """
    drawing, reading = _line_up(blocks, resident_blocks), _line_up(encoder_sizes, resident_encoder_layers)
    slot = _slot_bytes(encoder_sizes, resident_encoder_layers)
    shift = arena_bytes - reading.end
    assert max(drawing.end, reading.end) <= arena_bytes, (drawing.end, reading.end, arena_bytes)
    first = shift + len(reading.slots) * slot
    return drawing, Places(
        begins=tuple(None if begin is None else first + begin for begin in reading.begins),
        slots=tuple(shift + number * slot for number in range(len(reading.slots))),
        begin=shift,
        end=arena_bytes,
    )


def _line_up(layer_sizes: Sequence[int], resident: int) -> Places:
    """The layers that stay, one after another from 0 on, and then the ring."""
    stays, slot = spread(len(layer_sizes), resident), _slot_bytes(layer_sizes, resident)
    ends = list(accumulate((size if here else 0 for size, here in zip(layer_sizes, stays, strict=True)), initial=0))
    slots = tuple(ends[-1] + number * slot for number in range(RING_SLOTS)) if slot else ()
    begins = tuple(begin if here else None for begin, here in zip(ends[:-1], stays, strict=True))
    return Places(begins=begins, slots=slots, begin=0, end=ends[-1] + len(slots) * slot)


def _slot_bytes(layer_sizes: Sequence[int], resident: int) -> int:
    """The largest layer's that is streamed; 0 where none is."""
    stays = spread(len(layer_sizes), resident)
    return max((size for size, here in zip(layer_sizes, stays, strict=True) if not here), default=0)


def spread(count: int, resident: int) -> tuple[bool, ...]:
    """Which of so many layers are resident: the others come evenly among them, each as late as it may.

    Then the ring is filled while layers run that are here.
    """
    streamed = count - resident
    comes = {-(-(number + 1) * count // streamed) - 1 for number in range(streamed)}
    return tuple(number not in comes for number in range(count))


def count_resident(layer_sizes: Sequence[int], arena_bytes: int) -> int:
    """As many layers as fit: all, or some beside a ring for the others. With a ring alone it is 0."""
    return next((n for n in range(len(layer_sizes), 0, -1) if _line_up(layer_sizes, n).end <= arena_bytes), 0)


def streamed_bytes(layer_sizes: Sequence[int], stays: Sequence[bool]) -> int:
    return sum(size for size, here in zip(layer_sizes, stays, strict=True) if not here)


def overlapped_bytes(layer_sizes: Sequence[int], places: Places, others: Places) -> int:
    """Of one network's layers that the other's places are written over: they are copied again when the network is needed."""
    return sum(
        size
        for size, begin in zip(layer_sizes, places.begins, strict=True)
        if begin is not None and begin < others.end and others.begin < begin + size
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


def _small(parts: Components, recorded: tuple[str, ...]) -> tuple[PlacedPart, ...]:
    # where all is recorded the fullest phase's memory is a recording's too
    alive = max((size for name, size in parts.phases.named if name not in recorded), default=parts.phases.largest)
    recordings = parts.phases.recorded_bytes(recorded) - (alive if recorded == RECORDED[0] else 0)
    is_partly = 0 < len(recorded) < len(RECORDED[0])
    named = [
        ("transformer's edges", parts.edges, "what stands before and after the blocks"),
        ("text encoder's edges", parts.encoder_edges, "what stands before and after its layers"),
        ("modulation table", parts.table, "in place of a third of the transformer's weights"),
        ("VAE", parts.vae, "small"),
        ("kept keys and values", parts.kept, "of the references, which later steps do not compute again"),
        ("activations", alive, "of the fullest phase that is not recorded" if is_partly else "of the fullest phase"),
        ("recorded graphs", recordings, f"of {' and '.join(recorded)}" if is_partly else "of the other phases"),
        ("caches", parts.caches, "of pictures and prompts that come again"),
        ("CUDA and slack", CONTEXT_BYTES + SLACK_BYTES, "of its kernels, and between the allocator's pieces"),
    ]
    return tuple(_on_card(name, size, because) for name, size, because in named if size)


def peaks_told(peaks: Sequence[tuple[str, int]]) -> str:
    """The fullest phase in words: "21.9 GiB"."""
    return f"{max(size for _, size in peaks) / _GIB:.1f} GiB"
