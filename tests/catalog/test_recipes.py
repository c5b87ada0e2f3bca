"""Recipes: what a TOML file may say, and what a row and a variant come to."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.catalog.items import Item, derive_seed
from millicent.catalog.manifest import BadRow, Row, read_manifest
from millicent.catalog.recipes import Recipe, Variant, expand, expand_all, read_recipe
from millicent.catalog.templates import FillError, fill, parse_template
from millicent.errors import InputError, InputNotFoundError
from millicent.images import open_image

Make = Callable[[str], Recipe]
EXAMPLE = Path(__file__).parents[2] / "examples" / "catalog"
ROW = Row(
    7, "A1", "/p/a1.png", ("/p/ref.png",), {"sku": "A1", "Title": " Cotton Tee ", "color": "navy", "empty": " ", "odd: name": "x"}
)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def read(text: str) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return read_recipe(str(path))

    return read


def variant(prompt: str = "make it navy", output: str = "{id}/{variant}.png", **others: object) -> Variant:
    return Variant(name="navy", prompt=prompt, output=output, **others)  # type: ignore[arg-type]


def test_a_whole_recipe(make: Make) -> None:
    recipe = make(
        """
        format = "jpeg"
        redo_rejects = 0
        retries = 5
        [variants.navy]
        prompt = "make the {title} navy"
        [variants.sand]
        prompt = "put the {title} on sand"
        negative_prompt = "text"
        size = [1024, 768]
        fit = "pad"
        steps = 8
        seed = 7
        true_cfg = 4
        schedule = "base"
        output = "sand/{id}.jpeg"
        [checks]
        max_shift = 0.01
        allow_copy = true
        """
    )
    navy, sand = recipe.variants
    assert navy == Variant(name="navy", prompt="make the {title} navy", output="{id}/{variant}.jpg")
    assert sand == Variant(
        name="sand",
        prompt="put the {title} on sand",
        output="sand/{id}.jpeg",
        negative_prompt="text",
        size=(1024, 768),
        fit="pad",
        steps=8,
        seed=7,
        true_cfg=4.0,
        schedule="base",
    )
    assert (recipe.format, recipe.redo_rejects, recipe.retries) == ("jpeg", 0, 5)
    assert (recipe.checks.max_shift, recipe.checks.allow_copy) == (0.01, True)


def test_defaults(make: Make) -> None:
    recipe = make('[variants.a]\nprompt = "x"')
    assert (recipe.format, recipe.redo_rejects, recipe.retries, recipe.variants[0].output) == ("png", 2, 3, "{id}/{variant}.png")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no variants"),
        ("variants = 3", "no variants"),
        ("variants = {a = 3}", "The variant a is 3"),
        ('[variants.a]\nprompt = "x"\nstep = 3', "variant a has the unknown key step"),
        ('colour = 1\n[variants.a]\nprompt = "x"', "recipe has the unknown key colour"),
        ('[variants."a/b"]\nprompt = "x"', "'a/b'"),
        ("[variants.a]\nseed = 1", "no prompt"),
        ('[variants.a]\nprompt = ""', "prompt is empty"),
        ("[variants.a]\nprompt = 3", "prompt = 3"),
        ('[variants.a]\nprompt = "{"', "stray '{'"),
        ('[variants.a]\nprompt = "a } b"', "stray '}' at character 3"),
        ('[variants.a]\nprompt = "{}"', "stray"),
        ('[variants.a]\nprompt = "x"\nsize = [8, 8]', "In the variant a: The output size is 8x8"),
        ('[variants.a]\nprompt = "x"\nsize = [512]', r"size = \[512\]"),
        ('[variants.a]\nprompt = "x"\nsize = [512, 512.0]', "size"),
        ('[variants.a]\nprompt = "x"\nsteps = true', "steps = True"),
        ('[variants.a]\nprompt = "x"\nsteps = 0', "0 steps"),
        ('[variants.a]\nprompt = "x"\nseed = -1', "The seed is -1"),
        ('[variants.a]\nprompt = "x"\ntrue_cfg = nan', "true_cfg is nan"),
        ('[variants.a]\nprompt = "x"\nfit = "zoom"', "fit is 'zoom'"),
        ('[variants.a]\nprompt = "x"\nschedule = "turbo"', "turbo"),
        ('[variants.a]\nprompt = "x"\noutput = "../{id}.png"', r"has '\.\.' between slashes"),
        ('[variants.a]\nprompt = "x"\noutput = "{id}/../x.png"', r"has '\.\.' between slashes"),
        ('[variants.a]\nprompt = "x"\noutput = "/tmp/{id}.png"', "has '' between slashes"),
        ('[variants.a]\nprompt = "x"\noutput = "C:\\\\{id}.png"', "backslash or a colon"),
        ('[variants.a]\nprompt = "x"\noutput = "{id}.jpg"', "format is png"),
        ('[variants.a]\nprompt = "x"\noutput = "{id}"', "End the pattern with .png"),
        ('[variants.a]\nprompt = "x"\noutput = "{id}/{ending}"', "End the pattern with .png"),
        ('[variants.a]\nprompt="x"\noutput="{id}.png"\n[variants.b]\nprompt="x"\noutput="{id}.png"', "Two variants write to"),
        ('format = "gif"\n[variants.a]\nprompt = "x"', "format = 'gif'"),
        ('retries = -1\n[variants.a]\nprompt = "x"', "retries = -1"),
        ('redo_rejects = 1.5\n[variants.a]\nprompt = "x"', "redo_rejects = 1.5"),
        ('checks = 1\n[variants.a]\nprompt = "x"', "checks = 1"),
        ('[variants.a]\nprompt = "x"\n[checks]\nmax_shfit = 1', "max_shfit"),
        ('[variants.a]\nprompt = "x"\n[checks]\nmax_shift = -1', "max_shift is -1"),
        ("[variants.a\n", "cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Make, text: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        make(text)
    assert "recipe.toml" in caught.value.message
    assert caught.value.fix


def test_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError):
        read_recipe(str(tmp_path / "none.toml"))


def test_an_item() -> None:
    assert expand(ROW, variant("put the {color} {title} on {{sand}}", size=(512, 768), steps=4)) == Item(
        row_line=7,
        row_id="A1",
        variant="navy",
        pictures=("/p/a1.png", "/p/ref.png"),
        prompt="put the navy Cotton Tee on {sand}",
        width=512,
        height=768,
        steps=4,
        seed=derive_seed("A1", "navy"),
        output="A1/navy.png",
    )


def test_columns_and_own_names_that_are_the_same() -> None:
    row = Row(7, "A1", "a.png", (), {"line": "Summer", "Variant": "Red / L", "id": "17"})
    item = expand(row, variant("{line} {variant} {id}", "{line}/{variant}-{id}.png"))
    assert isinstance(item, Item)
    assert item.prompt == "Summer Red / L 17"
    assert item.output == "7/navy-A1.png"


@pytest.mark.parametrize(
    ("row_variant", "why"),
    [
        (variant("{colour}"), "Row 'A1', variant navy: There is no column 'colour'; there are sku, Title, color"),
        (variant("{empty}"), "Row 'A1', variant navy: The column 'empty' is empty"),
        (variant(output="{brand}/{id}.png"), "no column 'brand'"),
    ],
)
def test_a_row_without_what_the_templates_name(row_variant: Variant, why: str) -> None:
    found = expand(ROW, row_variant)
    assert isinstance(found, BadRow)
    assert found.line == 7
    assert why in found.why


@pytest.mark.parametrize("row_id", ["../../etc/cron.d/x", "/etc/passwd", "..", "x" * 300, "a\nb", "con", "a//b"])
def test_no_id_leads_out_of_the_folder(row_id: str) -> None:
    found = expand(Row(3, row_id, "a.png", (), {}), variant(output="{id}/x.png"))
    assert isinstance(found, BadRow), found
    assert "output name" in found.why


def test_no_value_makes_folders_but_the_id() -> None:
    item = expand(Row(3, "AB/12", "a.png", (), {"title": "../1/2 size"}), variant(output="{title}/{id}.png"))
    assert isinstance(item, Item)
    assert item.output == "%2E.%2F1%2F2 size/AB/12.png"


def test_a_value_is_not_read_as_a_template() -> None:
    item = expand(Row(3, "A", "a.png", (), {"title": "{color} {0.__class__}"}), variant("the {title}"))
    assert isinstance(item, Item)
    assert item.prompt == "the {color} {0.__class__}"


def test_a_prompt_of_ten_thousand_characters_expands() -> None:
    item = expand(Row(3, "A", "a.png", (), {"prompt": "x" * 10_000}), variant("{prompt}"))
    assert isinstance(item, Item)
    assert len(item.prompt) == 10_000


def test_outputs_that_would_overwrite_each_other(make: Make) -> None:
    recipe = make('[variants.a]\nprompt = "x"\noutput = "{title}/{variant}.png"\n[variants.b]\nprompt = "x"')
    rows: list[Row | BadRow] = [
        Row(line, f"id{line}", "a.png", (), {"title": title})
        for line, title in enumerate(["Caf\u00e9", "Tea", "cafe\u0301", "TEA", "Milk"], start=2)
    ]
    found = list(expand_all([*rows, BadRow(9, "bad")], recipe))
    outputs = [item.output for item in found if isinstance(item, Item)]
    assert outputs == [
        "Caf\u00e9/a.png", "id2/b.png", "Tea/a.png", "id3/b.png", "id4/b.png", "id5/b.png", "Milk/a.png", "id6/b.png",
    ]  # fmt: skip
    bad = {row.line: row.why for row in found if isinstance(row, BadRow)}
    assert sorted(bad) == [4, 5, 9]
    assert "the output 'TEA/a.png' is line 3's already" in bad[5]


def test_two_variants_whose_outputs_meet(make: Make) -> None:
    recipe = make('[variants.a]\nprompt = "x"\noutput = "{id}{title}.png"\n[variants.b]\nprompt = "x"\noutput = "{title}{id}.png"')
    one, other = expand_all([Row(2, "x", "a.png", (), {"title": "X"})], recipe)
    assert isinstance(one, Item)
    assert isinstance(other, BadRow)


def test_the_example_is_whole() -> None:
    recipe = read_recipe(str(EXAMPLE / "recipe.toml"))
    items = list(expand_all(read_manifest(str(EXAMPLE / "products.csv")), recipe))
    assert len(recipe.variants) == 2
    assert len(items) == 16
    for item in items:
        assert isinstance(item, Item), item
        assert open_image(Path(item.pictures[0])).width > 0


@given(st.text())
def test_a_doubled_text_is_itself(text: str) -> None:
    doubled = text.replace("{", "{{").replace("}", "}}")
    assert fill(parse_template(doubled), ()) == text


@given(st.text(alphabet="{}ab "))
def test_any_template_is_parsed_or_refused(text: str) -> None:
    try:
        template = parse_template(text)
    except InputError:
        return
    values = {"a": "1", "b": "2"}
    if set(template.names) <= values.keys():
        assert len(fill(template, (values,))) == sum(map(len, template.texts)) + len(template.names)
    else:
        with pytest.raises(FillError, match="no column"):
            fill(template, (values,))
