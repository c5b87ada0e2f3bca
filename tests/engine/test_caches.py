"""The cache against a plain model of it: a list in the order of use."""

import pytest
import torch
from conftest import draw_picture
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from millicent.engine.caches import ByteBudgetCache, image_key, size_bytes

# few keys and small values against the budget, so that gets hit and puts evict
KEYS = st.integers(0, 3)
USES = st.lists(st.tuples(KEYS, st.none() | st.integers(0, 6)), max_size=40)


@given(budget=st.integers(0, 12), uses=USES)
@example(budget=2, uses=[(0, 1), (1, 1), (0, None), (2, 1), (0, None), (1, None)])
def test_the_most_recently_used_that_fit_are_kept(budget: int, uses: list[tuple[int, int | None]]) -> None:
    cache = ByteBudgetCache[int, object](budget)
    model: list[tuple[int, object, int]] = []  # key, value and size, the most recently used last
    hits = 0
    for key, size in uses:
        found = next((entry for entry in model if entry[0] == key), None)
        model = [entry for entry in model if entry is not found]
        if size is None:
            assert cache.get(key) is (found and found[1])
            hits += found is not None
            model += [found] if found else []
        else:
            cache.put(key, value := object(), size)
            model += [(key, value, size)] if budget and size <= budget else []
            while sum(entry[2] for entry in model) > budget:
                model.pop(0)
        assert cache.bytes == sum(entry[2] for entry in model) <= budget
        assert len(cache) == len(model)
    asked = sum(size is None for _, size in uses)
    assert (cache.hits, cache.misses) == (hits, asked - hits)
    assert [cache.get(entry[0]) for entry in model] == [entry[1] for entry in model]


def test_a_value_beyond_the_budget_leaves_the_others() -> None:
    cache = ByteBudgetCache[str, str](10)
    cache.put("small", "s", 10)
    cache.put("large", "l", 11)
    assert (cache.get("small"), cache.get("large"), cache.bytes) == ("s", None, 10)


def test_nothing_stays_after_clear() -> None:
    cache = ByteBudgetCache[str, str](10)
    cache.put("a", "b", 10)
    cache.clear()
    assert (cache.get("a"), cache.bytes, len(cache)) == (None, 0, 0)


def test_a_key_is_of_the_pixels() -> None:
    picture = draw_picture(6, 8)
    assert image_key(picture) == image_key(picture.copy()) == image_key(draw_picture(6, 8))
    changed = picture.copy()
    changed.putpixel((7, 5), (1, 2, 3))
    # the same bytes in another shape, in another mode, and other pixels
    others = [
        Image.frombytes("RGB", (6, 8), picture.tobytes()),
        Image.frombytes("L", (24, 6), picture.tobytes()),
        Image.frombytes("RGB", (8, 6), picture.tobytes()).convert("YCbCr"),
        changed,
    ]
    assert len({image_key(image) for image in [picture, *others]}) == 5


def test_a_palette_is_part_of_the_key() -> None:
    red, blue = (Image.new("P", (2, 2)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert red.tobytes() == blue.tobytes()
    assert image_key(red) != image_key(blue)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4), (torch.float8_e4m3fn, 1)])
def test_sizes_are_those_of_the_values(dtype: torch.dtype, size: int) -> None:
    whole = torch.zeros(3, 5, dtype=dtype)
    assert size_bytes(whole, whole[:1]) == 20 * size
    assert size_bytes() == 0
