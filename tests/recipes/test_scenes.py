"""The drawn world: repeatable, each edit changes what it names and nothing else, and held-out outlines stay out."""

import dataclasses

import pytest
import torch
from torch import Tensor

from recipes.demo.examples import EXAMPLES, draw_examples
from recipes.demo.renderer import Scene
from recipes.demo.scenes import Edit, Scenes
from recipes.demo.world import CLASSES, COLORS, LOGOS, OP_SHARES, OPS, PATTERNS

BATCH = 96
CHANGED_FIELDS = {
    "recolor": {"body"},
    "background": {"background", "backdrop"},
    "set_pattern": {"pattern", "pattern_color"},
    "remove_pattern": {"pattern"},
    "add_logo": {"logo", "logo_color"},
    "remove_logo": {"logo"},
    "recolor_logo": {"logo_color"},
}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(torch.device("cpu"))


@pytest.fixture(scope="module")
def pairs(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor, Edit]:
    return scenes.pairs(BATCH, torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def sampled(scenes: Scenes) -> tuple[Scene, Scene, Edit]:
    return scenes.sample(2000, torch.Generator().manual_seed(6), held_out=False)


def rows_that_differ(a: Scene, b: Scene, field: str) -> Tensor:
    x, y = getattr(a, field), getattr(b, field)
    return (x != y).flatten(1).any(1) if x.ndim > 1 else x != y


def test_the_same_seed_draws_the_same_pairs(scenes: Scenes, pairs: tuple[Tensor, Tensor, Tensor, Edit]) -> None:
    again = scenes.pairs(BATCH, torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(pairs[:3], again[:3], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(pairs[3], again[3], strict=True))
    other = scenes.pairs(8, torch.Generator().manual_seed(7))
    assert not torch.equal(pairs[0][:8], other[0])


def test_pictures_are_in_range_and_not_flat(pairs: tuple[Tensor, Tensor, Tensor, Edit]) -> None:
    for pictures in pairs[:2]:
        assert pictures.shape == (BATCH, 3, 256, 256)
        assert 0 <= pictures.min() < 0.2
        assert 0.8 < pictures.max() <= 1
        assert (pictures.flatten(1).std(1) > 0.02).all()


def test_every_edit_shows_and_its_mask_covers_it(pairs: tuple[Tensor, Tensor, Tensor, Edit]) -> None:
    source, target, mask, edit = pairs
    difference = (source - target).abs().amax(1)
    assert (difference[~mask] <= 2.5 / 255).all()
    area = mask.flatten(1).float().mean(1)
    assert (area > 0.002).all(), [OPS[op] for op in edit.op[area <= 0.002]]
    assert (difference.flatten(1).amax(1) > 0.1).all()


def test_an_edit_changes_the_field_that_it_names_and_no_other(sampled: tuple[Scene, Scene, Edit]) -> None:
    source, target, edit = sampled
    for field in dataclasses.fields(Scene):
        changed = rows_that_differ(source, target, field.name)
        allowed = torch.tensor([field.name in CHANGED_FIELDS[OPS[op]] for op in edit.op])
        assert not (changed & ~allowed).any(), field.name
    for op, name in enumerate(OPS):
        rows = edit.op == op
        shown = torch.stack([rows_that_differ(source, target, field) for field in CHANGED_FIELDS[name]]).any(0)
        assert shown[rows].all(), name


def test_the_new_color_is_the_one_that_the_edit_names(sampled: tuple[Scene, Scene, Edit]) -> None:
    _, target, edit = sampled
    palette = torch.tensor(list(COLORS.values())) / 255
    for name, field in [
        ("recolor", "body"),
        ("background", "background"),
        ("set_pattern", "pattern_color"),
        ("add_logo", "logo_color"),
        ("recolor_logo", "logo_color"),
    ]:
        rows = edit.op == OPS.index(name)
        assert torch.equal(getattr(target, field)[rows], palette[edit.color[rows]])
    assert torch.equal(target.pattern[edit.op == OPS.index("set_pattern")], edit.aux[edit.op == OPS.index("set_pattern")] + 1)
    assert torch.equal(target.logo[edit.op == OPS.index("add_logo")], edit.aux[edit.op == OPS.index("add_logo")] + 1)
    assert (target.pattern[edit.op == OPS.index("remove_pattern")] == 0).all()


def test_operations_come_in_their_shares(sampled: tuple[Scene, Scene, Edit]) -> None:
    counts = sampled[2].op.bincount(minlength=len(OPS)) / 2000
    # four standard deviations of a share near a quarter
    assert (counts - torch.tensor(OP_SHARES)).abs().max() < 0.04
    assert set(sampled[2].cls.tolist()) == set(range(len(CLASSES)))
    assert set(sampled[2].aux.tolist()) == set(range(max(len(PATTERNS), len(LOGOS))))


def test_held_out_outlines_are_never_trained_on(scenes: Scenes, sampled: tuple[Scene, Scene, Edit]) -> None:
    held, _, _ = scenes.sample(500, torch.Generator().manual_seed(8), held_out=True)
    assert not set(held.variant.tolist()) & set(sampled[0].variant.tolist())
    textures = scenes.renderer.textures.view(len(CLASSES), scenes.variants, -1)
    for outlines in textures:  # and they differ from all that are trained on
        trained, held_out = outlines[: -scenes.variants // 8], outlines[-scenes.variants // 8 :]
        distances = torch.cdist(held_out, trained, compute_mode="donot_use_mm_for_euclid_dist")
        assert distances.min() > 1


def test_the_examples_in_the_repository_are_the_drawn_ones() -> None:
    from pathlib import Path

    import numpy as np
    from PIL import Image

    folder = Path(__file__).parents[2] / "examples"
    for name, picture in draw_examples().items():
        kept = np.asarray(Image.open(folder / f"{name}.png")).astype(int)
        # a sine may differ in its last bit from one processor to the next, and tip a rounding
        assert np.abs(kept - np.asarray(picture).astype(int)).max() <= 1, name
    assert set(EXAMPLES) == {path.stem for path in folder.glob("*.png")}
