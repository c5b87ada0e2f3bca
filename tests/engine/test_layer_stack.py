"""Layers that come to the card and go: whatever the order, what runs finds its own weights, and nothing is copied twice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from millicent.engine.arena import RING_SLOTS, lay_out_arena
from millicent.engine.layer_stack import ArrivingLayers, Layer, Link, Stack, slab_bytes
from millicent.model.sizes import ALIGNMENT_BYTES

CPU = torch.device("cpu")


class Toy(nn.Module):
    """A layer as the formats have them: codes, scales, a bias or none, a number without dimensions."""

    def __init__(self, number: int, width: int, has_bias: bool) -> None:
        super().__init__()
        self.register_buffer("codes", torch.full((width, 3), float(number)).to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.full((width, 1), float(number)))
        self.register_buffer("whole", torch.tensor(float(number)))
        self.bias = nn.Parameter(torch.full((width,), number, dtype=torch.bfloat16), requires_grad=False) if has_bias else None
        self.inner = nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.inner.weight.fill_(number)

    def holds(self, number: int) -> bool:
        codes = float(torch.tensor(float(number)).to(torch.float8_e4m3fn))
        values = [self.scale, self.whole, self.inner.weight, *([] if self.bias is None else [self.bias])]
        return bool(torch.all(self.codes.float() == codes)) and all(bool(torch.all(value.float() == number)) for value in values)


def make_layers(first: int, widths: list[int]) -> list[Toy]:
    return [Toy(first + number, width, number % 2 == 0) for number, width in enumerate(widths)]


def _end(sizes: list[int], resident: int) -> int:
    return lay_out_arena(sizes, [0], resident, 1, 1 << 30)[0].end


class Pair:
    """Two stacks over one arena, as Residency has them; the second one's layers lie from the arena's end."""

    def __init__(self, widths: tuple[list[int], list[int]], resident: tuple[int, int], spare_bytes: int = 0) -> None:
        self.link = Link(CPU)
        self.toys = make_layers(1, widths[0]), make_layers(51, widths[1])
        self.stacks = (
            Stack(self.link, wraps=True, bring=lambda: self.bring(0)),
            Stack(self.link, wraps=False, bring=lambda: self.bring(1)),
        )
        for stack, toys in zip(self.stacks, self.toys, strict=True):
            for toy in toys:
                layer = Layer(toy, torch.empty(slab_bytes(toy), dtype=torch.uint8), CPU)
                layer.fill()
                layer.bind(layer.cut(layer.host))
                stack.layers.append(layer)
        first, second = ([layer.size_bytes for layer in stack.layers] for stack in self.stacks)
        least = max(_end(first, resident[0]), _end(second, resident[1]))
        self.arena = torch.empty(least + spare_bytes, dtype=torch.uint8)
        for stack, places in zip(self.stacks, lay_out_arena(first, second, *resident, len(self.arena)), strict=True):
            stack.settle(self.arena, places)

    def bring(self, number: int) -> None:
        self.stacks[1 - number].lose(self.stacks[number].places)
        self.stacks[number].fetch(self.arena)

    def run(self, number: int, first: int = 0) -> None:
        """One pass, from a layer on."""
        for place, toy in list(enumerate(self.toys[number]))[first:]:
            with self.stacks[number].at(place):
                assert toy.holds(1 + place + 50 * number), (number, place)


def test_a_slab_has_its_tensors_at_aligned_places_and_no_waste() -> None:
    assert slab_bytes(Toy(1, 5, has_bias=True)) == 5 * ALIGNMENT_BYTES
    # 1200 bytes of codes, 1600 of scales, and two small ones
    assert slab_bytes(Toy(1, 400, has_bias=False)) == (3 + 4 + 1 + 1) * ALIGNMENT_BYTES


@given(
    widths=st.tuples(*(st.lists(st.integers(1, 300), min_size=3, max_size=9),) * 2),
    kept=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    spare=st.integers(0, 20),
    passes=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=8),
)
def test_a_layer_finds_its_own_weights(
    widths: tuple[list[int], list[int]], kept: tuple[int, int], spare: int, passes: list[tuple[int, int]]
) -> None:
    resident = (min(kept[0], len(widths[0])), min(kept[1], len(widths[1])))
    pair = Pair(widths, resident, spare * ALIGNMENT_BYTES)
    for number, first in passes:
        pair.run(number, first)


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_streams_each_layer_once_a_pass(count: int) -> None:
    pair = Pair(([40] * count, [1] * 3), (0, 3))
    pair.run(0)
    size = sum(layer.size_bytes for layer in pair.stacks[0].layers)
    ahead = sum(layer.size_bytes for layer in pair.stacks[0].layers[:RING_SLOTS])  # the next pass's first are on their way
    assert pair.link.copied_bytes == size + ahead
    pair.run(0)
    assert pair.link.copied_bytes == 2 * size + ahead


def test_resident_layers_come_once() -> None:
    pair = Pair(([40] * 6, [1] * 3), (6, 3))
    for _ in range(3):
        pair.run(0)
    assert pair.link.copied_bytes == pair.stacks[0].size_bytes


def test_only_what_was_written_over_is_copied_again() -> None:
    pair = Pair(([100] * 6, [100] * 3), (6, 3))
    pair.run(0)
    pair.run(1)
    sizes = [[layer.size_bytes for layer in stack.layers] for stack in pair.stacks]
    before = pair.link.copied_bytes
    assert before == sum(sizes[0]) + sum(sizes[1])
    pair.run(0)
    begin = len(pair.arena) - sum(sizes[1])
    lost = sum(size for size, end in zip(sizes[0], itertools.accumulate(sizes[0]), strict=True) if end > begin)
    assert 0 < lost < sum(sizes[0])
    assert pair.link.copied_bytes - before == lost


def test_nothing_is_copied_again_where_both_fit() -> None:
    widths = ([100] * 4, [100] * 3)
    pair = Pair(widths, (4, 3), sum(slab_bytes(toy) for toy in make_layers(51, widths[1])))
    for number in (0, 1, 0, 1, 0):
        pair.run(number)
    assert pair.link.copied_bytes == len(pair.arena)


def test_a_pass_that_was_broken_off_leaves_no_wrong_weights() -> None:
    pair = Pair(([40] * 7, [1] * 3), (2, 3))
    with pytest.raises(RuntimeError, match="in the middle"), pair.stacks[0].at(3):
        raise RuntimeError("in the middle")
    pair.run(0)


def test_a_fetch_that_was_interrupted_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, sent = Pair(([40] * 7, [1] * 3), (2, 3)), itertools.count()
    right = pair.link.send

    def interrupted(*arguments: Any) -> Any:
        if next(sent) == 2:
            raise KeyboardInterrupt
        return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pair.link, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.run(0)
    for number in (0, 0, 1, 0):
        pair.run(number)


def test_a_loop_over_arriving_layers_sees_each_one_s_weights() -> None:
    pair = Pair(([40] * 7, [1] * 3), (2, 3))
    for number, toy in enumerate(ArrivingLayers(pair.toys[0], pair.stacks[0], 0)):
        assert isinstance(toy, Toy)
        assert toy.holds(1 + number)


def test_other_weights_are_told_from_one_s_own() -> None:
    pair = Pair(([40] * 7, [1] * 3), (0, 3))
    with pair.stacks[0].at(0):
        assert not pair.toys[0][0].holds(2)


def test_held_layers_are_all_here_and_none_is_waited_for() -> None:
    pair = Pair(([100] * 6, [100] * 3), (6, 3))
    pair.run(0)
    with pair.stacks[1].held():
        copied = pair.link.copied_bytes
        assert all(toy.holds(51 + number) for number, toy in enumerate(pair.toys[1]))
        pair.run(1)
        assert pair.link.copied_bytes == copied
    pair.run(0)  # what was written over comes again
    pair.run(1)
