"""The published models' cards, and what a card file may not be."""

import datetime
from pathlib import Path

import pytest

from millicent.errors import CheckpointError, ModelNotFoundError
from millicent.facts.licenses import allows_commercial_use
from millicent.facts.models import (
    CARD_FOLDER,
    LoraCard,
    ModelCard,
    TransformerCard,
    find_any_card,
    find_card,
    list_cards,
    read_any_card,
    read_card,
)

LORA = (CARD_FOLDER / "qwen-image-edit-2511-lightning-4steps.toml").read_text(encoding="utf-8")
FUSED = (CARD_FOLDER / "qwen-image-edit-2511-fp8-lightning-4steps.toml").read_text(encoding="utf-8")
CARD = (CARD_FOLDER / "qwen-image-edit-2511.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list_cards())
def test_every_card_loads_under_its_own_name_with_its_source(name: str) -> None:
    card = find_any_card(name)
    assert card.name == name
    assert card.source.startswith("https://")
    assert datetime.date(2026, 1, 1) <= card.checked <= datetime.datetime.now(tz=datetime.UTC).date()
    assert card.repo
    assert card.repo in card.source
    assert allows_commercial_use(card.license)


def test_what_belongs_to_a_model_names_it_and_the_schedule_that_it_demands() -> None:
    models = list_cards(ModelCard)
    assert models == ("qwen-image-edit", "qwen-image-edit-2509", "qwen-image-edit-2511")
    for name in (*list_cards(LoraCard), *list_cards(TransformerCard)):
        card = find_any_card(name)
        assert isinstance(card, (LoraCard, TransformerCard))
        assert card.base in models
        assert name.startswith(card.base)
        (file,) = card.files
        is_lightning = "lightning" in name
        assert (card.schedule == "lightning") == is_lightning == ("lightning" in file.lower())
        assert (card.true_cfg, card.steps) == ((1.0, card.steps) if is_lightning else (None, None))
        assert not is_lightning or (f"{card.steps}steps" in file and f"{card.steps}steps" in name)
    assert set(list_cards()) == {*models, *list_cards(LoraCard), *list_cards(TransformerCard)}


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
    with pytest.raises(ModelNotFoundError, match="qwen-image-edit-2511-lightning-4steps"):
        find_any_card("qwen-image")


def test_a_lora_is_no_whole_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"Use one of qwen-image-edit, qwen-image-edit-2509, qwen-image-edit-2511\."):
        find_card("qwen-image-edit-2511-lightning-4steps")
    (tmp_path / "card.toml").write_text(LORA)
    with pytest.raises(CheckpointError, match="is a lora's card"):
        read_card(tmp_path / "card.toml")


def test_the_license_of_every_kind() -> None:
    assert allows_commercial_use("Apache-2.0") is True
    assert allows_commercial_use("Qwen Research License") is False
    assert allows_commercial_use("flux-1-dev-non-commercial-license") is False
    assert allows_commercial_use("cc-by-nc-sa-4.0") is False
    assert allows_commercial_use("tongyi-qianwen") is None
    assert allows_commercial_use(None) is None


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
        ('repo = "Qwen/', 'repo = "', "must be owner/name"),
        ("size_bytes = ", "size_bytes = -", "at least 1"),
        ('source = "', '# source = "', "lacks source"),
        ('unverified = ["license", ', 'unverified = ["lora", ', "calls lora unverified"),
        ("unverified = [", "files = [1]\nunverified = [", "list of names"),
        ("steps = 40", 'steps = 40\nkind = "vae"', "model, lora, transformer"),
        ("steps = 40", 'steps = 40\nkind = ["lora"]', "model, lora, transformer"),
        ("steps = 40", 'steps = 40\nkind = "lora"', "unknown key"),
    ],
)
def test_a_wrong_card_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in CARD
    (tmp_path / "card.toml").write_text(CARD.replace(old, new))
    with pytest.raises(CheckpointError, match=told) as caught:
        read_card(tmp_path / "card.toml")
    assert str(tmp_path / "card.toml") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "old", "new", "told"),
    [
        (LORA, 'base = "', '# base = "', "lacks base"),
        (LORA, 'files = ["', 'files = ["x", "', "2 files; a lora is one"),
        (FUSED, "steps = 4\n", "", "steps = None"),
        (FUSED, 'schedule = "lightning"', 'schedule = "base"', "'base' and steps = 4"),
        (FUSED, 'layout = "', 'pipeline = "edit"\nlayout = "', "unknown key pipeline"),
    ],
)
def test_a_wrong_card_of_another_kind_is_refused(tmp_path: Path, text: str, old: str, new: str, told: str) -> None:
    assert old in text
    (tmp_path / "card.toml").write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=told) as caught:
        read_any_card(tmp_path / "card.toml")
    assert str(tmp_path / "card.toml") in str(caught.value)
