"""The published models' cards, and what a card file may not be."""

import datetime
from pathlib import Path

import pytest

from millicent.errors import CheckpointError, ModelNotFoundError
from millicent.facts.models import CARD_FOLDER, find_card, list_cards, read_card

CARD = (CARD_FOLDER / "qwen-image-edit-2511.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list_cards())
def test_every_card_loads_under_its_own_name_with_its_source(name: str) -> None:
    card = find_card(name)
    assert card.name == name
    assert card.source.startswith("https://")
    assert datetime.date(2026, 1, 1) <= card.checked <= datetime.datetime.now(tz=datetime.UTC).date()
    assert card.lora is None


@pytest.mark.parametrize(
    ("name", "pipeline", "encoder_area_px", "steps"),
    [
        ("qwen-image-edit", "edit", 1024 * 1024, 50),
        ("qwen-image-edit-2509", "edit-plus", 384 * 384, 40),
        ("qwen-image-edit-2511", "edit-plus", 384 * 384, 40),
    ],
)
def test_the_published_models(name: str, pipeline: str, encoder_area_px: int, steps: int) -> None:
    card = find_card(name)
    assert (card.pipeline, card.encoder_area_px, card.steps) == (pipeline, encoder_area_px, steps)
    assert (card.vae_area_px, card.true_cfg, card.negative_prompt) == (1024 * 1024, 4.0, " ")
    assert (card.schedule, card.max_prompt_tokens, card.license) == ("base", 1024, "Apache-2.0")


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError, match="qwen-image-edit-2511"):
        find_card("qwen-image")


def test_a_whole_number_will_do_for_true_cfg(tmp_path: Path) -> None:
    (tmp_path / "card.toml").write_text(CARD.replace("true_cfg = 4.0", "true_cfg = 1"))
    assert read_card(tmp_path / "card.toml").true_cfg == 1.0


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("steps = 40", "step = 40", "unknown key step"),
        ("steps = 40\n", "", "lacks steps"),
        ("steps = 40", 'steps = "40"', "steps = '40'"),
        ("steps = 40", "steps = true", "steps = True"),
        ("steps = 40", "steps = 0", "at least 1"),
        ("true_cfg = 4.0", "true_cfg = nan", "true_cfg = nan"),
        ('pipeline = "edit-plus"', 'pipeline = "inpaint"', "edit or edit-plus"),
        ("checked = 2026-11-23", "checked = 2026-11-23T00:00:00", "checked"),
        ("steps = 40", "steps = = 40", "cannot be read"),
    ],
)
def test_a_wrong_card_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in CARD
    (tmp_path / "card.toml").write_text(CARD.replace(old, new))
    with pytest.raises(CheckpointError, match=told) as caught:
        read_card(tmp_path / "card.toml")
    assert str(tmp_path / "card.toml") in str(caught.value)
