"""What an edit needs of a machine, in bytes, for the checks to compare; engine/needs.py fills it in from the plan."""

from __future__ import annotations

from dataclasses import dataclass

from millicent.facts.formats import ENGINE_FORMATS, Format, Support, list_capabilities, support

# so much more than the bytes to come, as for `millicent pull`: other programs write to the same disk meanwhile
DISK_MARGIN = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """model: a card's name. repo: where it is published. format: of the transformer's blocks. In bytes:

    download_bytes: what is still to be fetched. weights_bytes, working_bytes: on the card, where all weights stay there, as the
    engine of today has it; beside the weights is what an edit works in, its graphs and caches, and CUDA's own.
    least_card_bytes: on the card, where all weights are streamed. host_bytes: of the host's memory, under the plan; pinned_bytes:
    of these locked, for what crosses the link; block_bytes: one block of the transformer, which is what is locked at a time.
    link_bytes: over the link for one picture by itself.

    planned: in words, what the plan does on a card with less room than card_bytes; the engine of today does not. None where there
    is room, and where there is no plan. other_formats: those that the engine of today draws in on a card with less room.
    """

    model: str
    format: Format
    download_bytes: int
    weights_bytes: int
    working_bytes: int
    least_card_bytes: int
    host_bytes: int
    block_bytes: int
    pinned_bytes: int = 0
    link_bytes: int = 0
    repo: str | None = None
    planned: str | None = None
    other_formats: tuple[Format, ...] = ()

    @property
    def card_bytes(self) -> int:
        """Free memory of a card on which today's engine draws."""
        return self.weights_bytes + self.working_bytes

    @property
    def rounded_pinned_bytes(self) -> int:
        """Host memory that is locked where torch's own allocator does it, which rounds each block up to a power of two."""
        blocks = -(-self.pinned_bytes // self.block_bytes)
        return blocks * (1 << (self.block_bytes - 1).bit_length())

    @property
    def disk_bytes(self) -> int:
        return int(self.download_bytes * DISK_MARGIN)


def support_of(chosen: Format, capability: tuple[int, int]) -> Support | None:
    """What is known of a format's products on a card of this capability; None where the table does not know the capability."""
    return support(ENGINE_FORMATS[chosen], capability) if capability in list_capabilities() else None


def runs_on_card(chosen: Format, capability: tuple[int, int]) -> bool:
    """The tensor cores run the format's products, and BF16's, which everything around them is computed in."""
    return all((found := support_of(each, capability)) is not None and found.runs for each in (chosen, "bf16"))
