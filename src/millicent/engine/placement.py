"""Where a model's parts lie while it draws: on the card, on the card in turn, streamed to it layer by layer, or on the host.

Pure: bytes in, a placement out. The first of these that fits is taken, so that more memory never streams more that is waited for:

1. everything stays on the card but the table of embeddings, of which an edit reads a few rows: it stays on the host;
2. fewer passes are recorded as graphs, whose memory no one else may use, or none;
3. text encoder and transformer share one arena of the card's memory and lie there in turn: what of them overlaps is exchanged,
   and a wave of pictures shares one exchange;
4. of the transformer only so many blocks stay as there is room for; the others come through a ring of two, in every step, once for
   several pictures that are drawn together;
5. the text encoder's layers too.

engine/residency.py carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from millicent.engine.arena import Places, count_resident, lay_out_arena, overlapped_bytes, spread, streamed_bytes
from millicent.engine.weighing import CONTEXT_BYTES, RECORDED, SLACK_BYTES, Components
from millicent.errors import MachineError
from millicent.model.sizes import ALIGNMENT_BYTES, Workload

Where = Literal["card", "card in turn", "streamed", "host"]

# Python, torch and CUDA's libraries, and a weight file's buffers while it loads; an estimate
HOST_BASE_BYTES = 4 << 30
# pictures are drawn together until no larger share of the blocks comes for each: as much comes while the others run, even where a
# step is as fast as on an H200 and the link as slow as an RTX 4090's
_HIDDEN_SHARE = 0.25
MOST_ABREAST = 4
_GIB = 1 << 30


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

    in_turn: text encoder and transformer lie on the card in turn, and share arena_bytes of it. abreast: how many passes of the
    transformer share a block that is streamed.
    recorded: the phases whose passes are recorded as graphs, one of RECORDED.
    resident_blocks: of the transformer, resident_encoder_layers: of the text encoder; the others are streamed.
    exchanged_bytes: over the link, once a wave, both ways together; streamed_step_bytes: in each forward of the transformer;
    streamed_text_bytes: in one pass of the whole text encoder, of which streamed_language_bytes are the language model's.
    pinned_bytes: of the host's memory, for what crosses the link. peaks: (phase, bytes on the card), everything counted.
    """

    parts: tuple[PlacedPart, ...]
    in_turn: bool
    abreast: int
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
        """Streamed in one edit by itself; what a wave exchanges is not among it."""
        return self.reading_bytes(work) + work.steps * self.streamed_step_bytes * work.forwards // self.passes_together(work, 1)

    def passes_together(self, work: Workload, pictures: int) -> int:
        """How many passes share what is streamed, of so many pictures that wait to be drawn."""
        together = min(pictures, max(1, self.abreast // work.forwards))
        return min(self.abreast, together * work.forwards)


def place(parts: Components, free_bytes: int, host_bytes: int) -> Placement:
    """free_bytes: of the card, before CUDA is opened there; host_bytes: what the host has free.

    Raises MachineError for a card that is too small even with everything streamed, and for too small a host to stream from.
    """
    placement = place_on_card(parts, free_bytes)
    check_host_room(placement, host_bytes)
    return placement


def check_host_room(placement: Placement, host_bytes: int) -> None:
    """Raises MachineError for a host that has less than the placement needs of it."""
    needed = placement.needed_host_bytes
    if needed > host_bytes:
        raise MachineError(
            f"With {placement.free_bytes / _GIB:.1f} GiB free on the card, the host needs {needed / _GIB:.1f} GiB of memory, "
            f"{placement.host_bytes / _GIB:.1f} GiB of them for weights that wait there, and has {host_bytes / _GIB:.1f} GiB free.",
            "Use a card or a host with more memory, or a format with fewer bytes.",
        )


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
                abreast=1,
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
    return f"; graphs are recorded of {describe_recorded(recorded)} alone, as the others' memory would not fit"


def describe_recorded(recorded: tuple[str, ...]) -> str:
    """ "all phases", or their names."""
    return "all phases" if recorded == RECORDED[0] else " and ".join(recorded)


def _peaks(parts: Components, layers_bytes: int, recorded: tuple[str, ...] = ()) -> tuple[tuple[str, int], ...]:
    """Of each phase, with so many bytes of layers on the card.

    What is recorded keeps its memory when others run, and when a shape of its own phase runs as it is: before that is recorded too.
    """
    others = parts.steady + parts.kept + layers_bytes + parts.phases.recorded_bytes(recorded)
    return tuple((name, others + size) for name, size in parts.phases.named)


def _place_in_turn(parts: Components, free_bytes: int) -> Placement:
    """Text encoder first, then transformer, each whole or in pieces. Raises MachineError where not even pieces fit."""
    _check_least(parts, free_bytes)
    abreast, recorded = _share_blocks(parts, free_bytes)
    parts = replace(parts, phases=parts.phases.together(abreast))
    blocks, layers = parts.blocks, parts.encoder_sizes
    arena_bytes = _arena_bytes(parts, free_bytes, recorded)
    resident, resident_layers = count_resident(blocks, arena_bytes), count_resident(layers, arena_bytes)
    drawing, reading = lay_out_arena(blocks, layers, resident, resident_layers, arena_bytes)
    streamed_step = streamed_bytes(blocks, spread(len(blocks), resident))
    stays = spread(len(layers), resident_layers)
    first_language = len(layers) - parts.language_layers
    streamed_language = streamed_bytes(layers[first_language:], stays[first_language:])
    streamed_text = streamed_language + streamed_bytes(layers[:first_language], stays[:first_language])
    exchanged = overlapped_bytes(blocks, drawing, reading) + overlapped_bytes(layers, reading, drawing)
    pictures = max(1, abreast // parts.forwards)
    passings = -(-pictures * parts.forwards // abreast)
    streamed_told = f"{passings * streamed_step / _GIB:.1f} GiB cross the link in every step"
    if pictures > 1:
        streamed_told += f", for {pictures} pictures together"
    told = f"text encoder and transformer do not fit together: they lie on the card in turn, in {arena_bytes / _GIB:.1f} GiB"
    return Placement(
        parts=(
            _in_turn("transformer", blocks, resident, drawing, streamed_told),
            _in_turn("text encoder", layers, resident_layers, reading, f"{streamed_text / _GIB:.1f} GiB cross the link in a pass"),
            _embedding(parts),
            *_small(parts, recorded),
        ),
        in_turn=True,
        abreast=abreast,
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


def _arena_bytes(parts: Components, free_bytes: int, recorded: tuple[str, ...]) -> int:
    """Of what is free, as much as both networks' layers take at most; all that lies there begins at a multiple."""
    size_bytes = min(free_bytes - parts.beside(recorded), parts.transformer + parts.text_encoder)
    return size_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES


def _share_blocks(parts: Components, free_bytes: int) -> tuple[int, tuple[str, ...]]:
    """How many passes to take through the blocks together, and what to record.

    As few as hide what is streamed, as each takes a little more of the memory. The text encoder's passes are recorded where that is
    at the cost of no more blocks than are hidden; all of its layers are there while a recorded pass runs (Stack.held).
    What is kept of references is each picture's own, and too large for more than one.
    """
    together = [replace(parts, phases=parts.phases.together(passes)) for passes in range(1, 2 if parts.kept else MOST_ABREAST + 1)]
    recorded = RECORDED[-2]
    for passes, of in enumerate(together, 1):
        arena_bytes = _arena_bytes(of, free_bytes, recorded)
        if count_resident(of.encoder_sizes, arena_bytes) == len(of.encoder_sizes) and _is_hidden(of, arena_bytes, passes):
            return passes, recorded
    chosen = 1
    for passes, of in enumerate(together, 1):
        if of.least > free_bytes:
            break
        chosen = passes
        if _is_hidden(of, _arena_bytes(of, free_bytes, ()), passes):
            break
    return chosen, ()


def _is_hidden(parts: Components, arena_bytes: int, abreast: int) -> bool:
    """Whether the blocks that are streamed come while the others run."""
    streamed = len(parts.blocks) - count_resident(parts.blocks, arena_bytes)
    return streamed <= _HIDDEN_SHARE * abreast * len(parts.blocks)


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
    phases = parts.phases
    named = [
        ("transformer's edges", parts.edges, "what stands before and after the blocks"),
        ("text encoder's edges", parts.encoder_edges, "what stands before and after its layers"),
        ("modulation table", parts.table, "in place of a third of the transformer's weights"),
        ("VAE", parts.vae, "small"),
        ("kept keys and values", parts.kept, "of the references, which later steps do not compute again"),
        ("activations", phases.largest, "of the fullest phase"),
        ("recorded graphs", phases.recorded_bytes(recorded), f"of {describe_recorded(recorded)}"),
        ("caches", parts.caches, "of pictures and prompts that come again"),
        ("CUDA and slack", CONTEXT_BYTES + SLACK_BYTES, "of its kernels, and between the allocator's pieces"),
    ]
    return tuple(_on_card(name, size, because) for name, size, because in named if size)


def peaks_told(peaks: Sequence[tuple[str, int]]) -> str:
    """The fullest phase in words: "21.9 GiB"."""
    return f"{max(size for _, size in peaks) / _GIB:.1f} GiB"
