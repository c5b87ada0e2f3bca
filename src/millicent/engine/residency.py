"""Carrying out a placement: which weights lie on the card, which wait on the host, and how they change places.

Where everything fits, all of it lies on the card and nothing here moves. Else every layer has a slab of page-locked memory on the
host, and all weights on the card lie in one arena (engine/arena.py), allocated once, so that weights never leave holes in the
card's memory. Transformer and text encoder are never needed at once: where their places overlap, what one has written over the
other is all that is copied when that other is needed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from millicent.engine.allocator import let_segments_grow
from millicent.engine.arena import lay_out_arena
from millicent.engine.host_memory import HostMemory, allocate
from millicent.engine.layer_stack import ArrivingLayers, Layer, Link, Stack, slab_bytes
from millicent.engine.placement import Placement


class Residency:
    """What moves a model's weights, by its placement.

    placement: as it is carried out now. wave: how many edits share one exchange, where the networks lie on the card in turn.
    limit_bytes: of the card's memory, what may be used; None for all.
    transformer, text_encoder: their layers, where those have slabs on the host.
    """

    def __init__(self, placement: Placement, device: torch.device, limit_bytes: int | None = None) -> None:
        self.placement, self.limit_bytes = placement, limit_bytes
        self.wave = 1
        self.link = Link(device)
        self.transformer = Stack(self.link, wraps=True, bring=lambda: self._bring(self.transformer))
        self.text_encoder = Stack(self.link, wraps=False, bring=lambda: self._bring(self.text_encoder))
        self._device = device
        self._host: HostMemory | None = None
        self._host_taken = 0
        self._arena: Tensor | None = None

    @property
    def in_turn(self) -> bool:
        """Whether text encoder and transformer lie on the card in turn."""
        return self.placement.in_turn

    @property
    def copied_bytes(self) -> int:
        """From the host to the card, since the model was opened; loading it not counted."""
        return self.link.copied_bytes

    @property
    def has_slabs(self) -> bool:
        return self._host is not None

    @property
    def is_filled(self) -> bool:
        """Whether another process of this host has written the slabs already."""
        return self._host is not None and self._host.is_filled

    def open_slabs(self, size_bytes: int, key: str | None) -> None:
        """Page-locked memory for all layers. key: names their content; None for memory of this process alone.

        Raises MachineError.
        """
        self.close()
        self._host = allocate(size_bytes, key, self._device)
        self._host_taken = 0

    def close(self) -> None:
        """Let go of the slabs, whose layers nobody may read any more; another process may have waited for them to be filled."""
        if self._host is not None:
            self._host.close()
            self._host = None

    def take(self, stack: Stack, module: nn.Module) -> None:
        """Give a layer's tensors the next piece of the slabs; the module reads from there until the stack is settled.

        Its tensors lie anywhere, and are let go; on the meta device where the slabs are filled.
        """
        assert self._host is not None
        end = self._host_taken + slab_bytes(module)
        layer = Layer(module, self._host.tensor[self._host_taken : end], self._device)
        if not self._host.is_filled:
            layer.fill()
        layer.bind(layer.cut(layer.host))
        stack.layers.append(layer)
        self._host_taken = end

    @torch.inference_mode(False)  # its tensors outlive the edit in which they may be made
    def settle(self, placement: Placement) -> None:
        """Give every layer its place on the card, as a placement has it.

        Nothing is copied before it is needed, unless all of it stays.
        """
        assert self._host is not None
        self._wait()  # the slabs are written, and nobody reads the old arena
        if not self._host.is_filled:
            self._host.publish()
        self.placement = placement
        self._arena = None
        for stack in self._stacks:
            stack.leave_arena()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # or the allocator would keep the old arena beside the new one
            if placement.in_turn:
                let_segments_grow(self._device)
        stays = not placement.in_turn
        arena_bytes = sum(stack.size_bytes for stack in self._stacks) if stays else placement.arena_bytes
        self._arena = torch.empty(arena_bytes, dtype=torch.uint8, device=self._device)
        blocks, layers = ([layer.size_bytes for layer in stack.layers] for stack in self._stacks)
        places = lay_out_arena(blocks, layers, placement.resident_blocks, placement.resident_encoder_layers, arena_bytes)
        for stack, place in zip(self._stacks, places, strict=True):
            stack.settle(self._arena, place)
        if stays:
            for stack in self._stacks:
                stack.fetch(self._arena)
                stack.stays = True
            self._wait()

    @property
    def _stacks(self) -> tuple[Stack, Stack]:
        return self.transformer, self.text_encoder

    def _wait(self) -> None:
        """For all work on the card."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _bring(self, wanted: Stack) -> None:
        if self._arena is None:  # there was no memory for it when it was settled
            self.settle(self.placement)
        assert self._arena is not None
        for stack in self._stacks:
            if stack is not wanted:
                stack.lose(wanted.places)
        wanted.fetch(self._arena)


def encoder_layers(network: Any) -> list[nn.Module]:
    """The text encoder's, in the order in which they run; what is in none of them is small."""
    return [*network.visual.blocks, network.visual.merger.mlp, *network.language_model.layers]


def stream_encoder(network: Any, stack: Stack) -> None:
    """Let a text encoder's passes wait for its layers, which the stack has in encoder_layers' order."""
    tower, language = network.visual, network.language_model
    first_language = len(tower.blocks) + 1
    tower.blocks = ArrivingLayers(tower.blocks, stack, 0)
    merger = first_language - 1
    tower.merger.mlp.register_forward_pre_hook(lambda *_: stack.arrive(merger))
    tower.merger.mlp.register_forward_hook(lambda *_: stack.leave(merger))
    language.layers = ArrivingLayers(language.layers, stack, first_language)
