"""From a model's name to sizes and tokens, with what was assumed told."""

import json
import shutil
from pathlib import Path

import pytest

from millicent import demo
from millicent.engine.workload import ask, read_sizes
from millicent.errors import CheckpointError, InputError, ModelNotFoundError
from millicent.facts.models import LoraCard, TransformerCard, find_any_card, list_cards
from millicent.model.config import MMDiTConfig
from millicent.model.sizes import ModelSizes


def test_a_whole_model_is_asked_for_four_steps() -> None:
    asked = ask()
    assert (asked.work.steps, asked.work.guided) == (4, False)
    assert (asked.work.width, asked.work.height) == (1024, 1024)
    assert (asked.work.reference_px, asked.work.encoder_px) == (1024**2, 384**2)
    assert asked.model == ModelSizes(transformer=MMDiTConfig(zero_cond_t=True))
    assert asked.told == ("4 steps without guidance, as with a Lightning LoRA",)


def test_many_steps_are_guided() -> None:
    asked = ask(steps=40)
    assert (asked.work.steps, asked.work.forwards) == (40, 2)
    assert "two forwards each" in asked.told[0]


@pytest.mark.parametrize("name", list_cards())
def test_every_card_can_be_asked_for(name: str) -> None:
    card, asked = find_any_card(name), ask(name)
    if isinstance(card, (LoraCard, TransformerCard)) and card.steps is not None:
        assert (asked.work.steps, asked.work.guided) == (card.steps, False)
    assert asked.model.transformer.num_layers == 60


def test_the_first_model_reads_its_picture_large() -> None:
    assert ask("qwen-image-edit").work.text_tokens > 1400
    with pytest.raises(InputError, match="edits one picture"):
        ask("qwen-image-edit", references=2)


def test_the_demo_is_as_its_files_say() -> None:
    asked = ask("demo")
    assert asked.model == read_sizes(demo.folder())
    assert asked.model.transformer.num_layers == 6
    assert asked.work.steps == 4
    assert ask(str(demo.folder())) == asked


def test_a_folder_of_another_network_is_refused(tmp_path: Path) -> None:
    for part in ("transformer", "text_encoder", "vae"):
        (tmp_path / part).mkdir()
        shutil.copy(demo.folder() / part / "config.json", tmp_path / part)
    shutil.copy(demo.folder() / "card.toml", tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": True}))
    with pytest.raises(CheckpointError, match="guidance_embeds"):
        ask(str(tmp_path))


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((1024, 1024), (1024, 1024)), ((512, 512), (512, 512)), ((2048, 2048), (1024, 1024)), ((2048, 1024), (1456, 720))],
)
def test_no_more_is_drawn_than_the_model_can(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    asked = ask(size=size)
    assert (asked.work.width, asked.work.height) == drawn
    assert any("drawn at" in line for line in asked.told) == (size != drawn)


@pytest.mark.parametrize("size", [(8, 64), (16384, 512), (20000, 20000), (0, 0)])
def test_a_size_that_cannot_be_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="The size is"):
        ask(size=size)


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="0 references"):
        ask(references=0)
    with pytest.raises(InputError, match="201 steps"):
        ask(steps=201)
    with pytest.raises(InputError, match="0 steps"):
        ask(steps=0)
    with pytest.raises(ModelNotFoundError, match="no model named 'nonesuch'"):
        ask("nonesuch")
