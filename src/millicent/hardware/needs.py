"""What an edit needs of a machine, in bytes, for the checks to compare; engine/needs.py fills it in from the plan."""

from __future__ import annotations

from dataclasses import dataclass

from millicent.facts.formats import ENGINE_FORMATS, Format, Support, list_capabilities, support

# so much more than the bytes to come, as for `millicent pull`: other programs write to the same disk meanwhile
DISK_MARGIN = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """model: a card's name. repo: where it is published. format: of the transformer's blocks. In bytes:

    download_bytes: what is still to be fetched. weights_bytes, working_bytes: on the card, where all weights stay there; beside the
    weights is what an edit works in, its caches, and CUDA's own. least_card_bytes: on the card, where all weights are
    streamed. host_bytes: of the host's memory, under the plan; pinned_bytes: of these locked, for what crosses the link.
    link_bytes: over the link for one picture by itself.

    placed: in words, where the weights lie on a card that has not room for all of them and all graphs, and what it costs. None
    where there is room, and where there is no plan. slower: how many times longer an edit takes there for what is streamed; 1 for
    nothing, None where it is not known. other_formats: those in which all weights stay on a card with less room.
    """

    model: str
    format: Format
    download_bytes: int
    weights_bytes: int
    working_bytes: int
    least_card_bytes: int
    host_bytes: int
    pinned_bytes: int = 0
    link_bytes: int = 0
    repo: str | None = None
    placed: str | None = None
    slower: float | None = 1.0
    other_formats: tuple[Format, ...] = ()

    @property
    def card_bytes(self) -> int:
        """Free memory of a card on which all weights stay."""
        return self.weights_bytes + self.working_bytes

    @property
    def disk_bytes(self) -> int:
        return int(self.download_bytes * DISK_MARGIN)


def support_of(chosen: Format, capability: tuple[int, int]) -> Support | None:
    """What is known of a format's products on a card of this capability; None where the table does not know the capability."""
    return support(ENGINE_FORMATS[chosen], capability) if capability in list_capabilities() else None


def runs_on_card(chosen: Format, capability: tuple[int, int]) -> bool:
    """The tensor cores run the format's products, and BF16's, which everything around them is computed in."""
    return all((found := support_of(each, capability)) is not None and found.runs for each in (chosen, "bf16"))
