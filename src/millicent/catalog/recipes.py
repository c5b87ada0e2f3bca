"""Recipes: the variants that are drawn of every row, read from a TOML file, and what a row and a variant come to.

format = "png"                      # or jpeg, webp
redo_rejects = 2                    # new seeds for a picture that a check rejects
retries = 3                         # of failures

[variants.navy]
prompt = "make the {title} navy blue"
size = [1024, 1024]                 # width, height
fit = "pad"
seed = 7
output = "{id}/{variant}.png"

[checks]
max_shift = 0.005
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from millicent.catalog.items import ENDINGS, Item, PictureFormat, derive_seed
from millicent.catalog.names import SeenNames, as_part, as_path, check_name
from millicent.catalog.rows import BadRow, Row
from millicent.catalog.templates import FillError, fill, parse_template
from millicent.edits import EditRequest, Schedule
from millicent.errors import InputError, InputNotFoundError, MillicentError, OutputError
from millicent.images import Fit
from millicent.quality.limits import Limits, read_limits

REDO_REJECTS, RETRIES, MAX_TRIES = 2, 3, 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One picture of each row. `None` means, as in EditRequest: as the model's card says.

    prompt: a template over the row's columns, as "put the {color} {title} on sand"; {{ and }} are braces.
    output: a pattern as "{id}/{variant}.png". In both, {id}, {variant} and {line} are the row's and the variant's own; where a
        column has one of these names, a prompt means the column.
    size: width and height in pixels, exactly. seed: None for one of the row's id and the variant's name; with a fixed one, rows
        that show the same picture and ask the same of it are one piece of work.
    """

    name: str
    prompt: str
    output: str
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    fit: Fit = "fit"
    steps: int | None = None
    seed: int | None = None
    true_cfg: float | None = None
    schedule: Schedule | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """checks: when a picture counts as accepted. redo_rejects: new seeds tried for a rejected one. retries: of failures."""

    variants: tuple[Variant, ...]
    checks: Limits
    redo_rejects: int = REDO_REJECTS
    retries: int = RETRIES
    format: PictureFormat = "png"


def read_recipe(path: str) -> Recipe:
    """Raises InputNotFoundError, and InputError for what cannot be meant, before anything is drawn."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputNotFoundError(f"There is no recipe {path}.", "Check the path.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"The recipe {path} cannot be read: {error}.", "Correct it.") from error
    try:
        return parse_recipe(values)
    except MillicentError as error:
        raise InputError(f"The recipe {path} cannot be used. {error.message}", error.fix) from error


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe of the values of its TOML. Raises InputError."""
    _check_keys(values, {"format", "redo_rejects", "retries", "variants", "checks"}, "The recipe")
    file_format = values.get("format", "png")
    if file_format not in get_args(PictureFormat):
        raise InputError(f"It says format = {file_format!r}.", f"Use {', '.join(get_args(PictureFormat))}.")
    variants, checks = values.get("variants"), values.get("checks", {})
    if not isinstance(variants, dict) or not variants:
        raise InputError("It has no variants.", "Write one, as [variants.studio] with prompt = ...")
    if not isinstance(checks, dict):
        raise InputError(f"It says checks = {checks!r}.", "Write a table, [checks].")
    recipe = Recipe(
        variants=tuple(_parse_variant(name, table, file_format) for name, table in variants.items()),
        checks=read_limits(checks),
        redo_rejects=_tries(values, "redo_rejects", REDO_REJECTS),
        retries=_tries(values, "retries", RETRIES),
        format=file_format,
    )
    _check_distinct(recipe)
    return recipe


def _check_keys(values: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(values.keys() - known):
        raise InputError(f"{what} has the unknown key {', '.join(unknown)}.", f"Use {', '.join(sorted(known))}.")


def _tries(values: Mapping[str, Any], name: str, default: int) -> int:
    found = values.get(name, default)
    if type(found) is not int or not 0 <= found <= MAX_TRIES:
        raise InputError(f"It says {name} = {found!r}.", f"Use a whole number from 0 to {MAX_TRIES}.")
    return found


def _parse_variant(name: str, table: object, file_format: PictureFormat) -> Variant:
    if not _NAME.fullmatch(name):
        raise InputError(f"A variant is named {name!r}.", "Use up to 64 letters, digits, - and _.")
    if not isinstance(table, dict):
        raise InputError(f"The variant {name} is {table!r}.", f"Write a table, [variants.{name}].")
    _check_keys(table, {field.name for field in fields(Variant)} - {"name"}, f"The variant {name}")
    for key, value in table.items():
        if not _has_type(key, value):
            raise InputError(f"The variant {name} says {key} = {value!r}.", _WANTED[key])
    if "prompt" not in table:
        raise InputError(f"The variant {name} has no prompt.", 'Write one, as prompt = "put the {title} on a sand backdrop".')
    values = {"output": "{id}/{variant}" + next(end for end, kind in ENDINGS.items() if kind == file_format), **table}
    if "size" in values:
        values["size"] = tuple(values["size"])
    if "true_cfg" in values:
        values["true_cfg"] = float(values["true_cfg"])
    variant = Variant(name=name, **values)
    _check_variant(variant, file_format)
    return variant


_WANTED = {
    "prompt": "Write a text.",
    "output": 'Write a pattern, as "{id}/{variant}.png".',
    "negative_prompt": "Write a text.",
    "size": "Write width and height in pixels, as [1024, 1024].",
    "fit": "Use fit, pad or crop.",
    "steps": "Use a whole number.",
    "seed": "Use a whole number.",
    "true_cfg": "Use a number.",
    "schedule": "Use base or lightning.",
}


def _has_type(key: str, value: object) -> bool:
    # bool is an int to isinstance
    if key == "size":
        return isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)
    if key == "true_cfg":
        return type(value) in (int, float)
    return type(value) is (int if key in ("steps", "seed") else str)


def _check_variant(variant: Variant, file_format: PictureFormat) -> None:
    """What no row could make right."""
    try:
        parse_template(variant.prompt)
        pattern = parse_template(variant.output)
        # with harmless values: what is refused now, every row would be refused for
        check_name("x".join(pattern.texts))
        width, height = variant.size or (None, None)
        EditRequest(
            images=(Image.new("RGB", (1, 1)),),
            prompt=variant.prompt,
            negative_prompt=variant.negative_prompt,
            steps=variant.steps,
            schedule=variant.schedule,
            seed=variant.seed,
            true_cfg=variant.true_cfg,
            height=height,
            width=width,
            fit=variant.fit,
        )
    except (InputError, OutputError) as error:
        raise InputError(f"In the variant {variant.name}: {error.message}", error.fix) from error
    if ENDINGS.get("." + pattern.texts[-1].rpartition(".")[2].lower()) != file_format:
        raise InputError(
            f"The variant {variant.name} writes {variant.output!r}, and the recipe's format is {file_format}.",
            f"End the pattern with {' or '.join(end for end, kind in ENDINGS.items() if kind == file_format)}.",
        )


def _check_distinct(recipe: Recipe) -> None:
    """Two variants with one pattern that does not name them would overwrite each other's pictures."""
    patterns = [variant.output for variant in recipe.variants if "variant" not in parse_template(variant.output).names]
    if twice := {pattern for pattern in patterns if patterns.count(pattern) > 1}:
        raise InputError(f"Two variants write to {min(twice)!r}.", "Put {variant} into the pattern.")


def expand(row: Row, variant: Variant) -> Item | BadRow:
    """The picture of one row and one variant; a BadRow where the row lacks what the variant's templates name."""
    own = {"id": row.id, "variant": variant.name, "line": str(row.line)}
    width, height = variant.size or (None, None)
    try:
        prompt = fill(parse_template(variant.prompt), (row.columns, own))
        output = check_name(fill(parse_template(variant.output), (own, row.columns), _guard))
    except FillError as error:
        return BadRow(row.line, f"Row {row.id!r}, variant {variant.name}: {error}")
    except OutputError as error:
        return BadRow(row.line, f"Row {row.id!r}, variant {variant.name}: {error.message} {error.fix}")
    return Item(
        row_line=row.line,
        row_id=row.id,
        variant=variant.name,
        pictures=(row.picture, *row.more_pictures),
        prompt=prompt,
        negative_prompt=variant.negative_prompt,
        width=width,
        height=height,
        fit=variant.fit,
        steps=variant.steps,
        seed=derive_seed(row.id, variant.name) if variant.seed is None else variant.seed,
        true_cfg=variant.true_cfg,
        schedule=variant.schedule,
        output=output,
        mask=row.mask,
    )


def _guard(name: str, value: str) -> str:
    return as_path(value) if name == "id" else as_part(value)


def expand_all(rows: Iterable[Row | BadRow], recipe: Recipe) -> Iterator[Item | BadRow]:
    """Every picture of every row, row by row; what is not, as BadRow.

    An item whose output another one has already is refused, also where only case or Unicode's composition tells the two apart:
    on many systems the second picture would overwrite the first.
    """
    seen = SeenNames()
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        for variant in recipe.variants:
            item = expand(row, variant)
            before = seen.add(item.output, row.line) if isinstance(item, Item) else None
            if before is not None:
                assert isinstance(item, Item)
                yield BadRow(
                    row.line, f"Row {row.id!r}, variant {variant.name}: the output {item.output!r} is line {before}'s already."
                )
            else:
                yield item
