"""Wordings: the held-out frames cannot come out of the training grammar, and the vocabulary is Qwen2's in kind."""

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Tokenizer

from millicent.model.prompt import SYSTEM_PREFIX, edit_plus_prompt
from recipes.demo import tokenizer
from recipes.demo.prompts import EDITS, PromptTable, read_tokenizer, wordings_in_order
from recipes.demo.scenes import Edit
from recipes.demo.wordings import HELD_OUT, IMPERATIVES, STATEMENTS, held_out_wording, training_wording
from recipes.demo.world import ANY_ITEM, CLASSES, COLOR_NAMES, ITEM_WORDS, LOGOS, OPS, PATTERNS

DEMO = Path(__file__).parents[2] / "src" / "millicent" / "demo"


def all_edits() -> list[tuple[int, int, int, int]]:
    return [(op, color, aux, cls) for op in range(len(OPS)) for color in (0, 15) for aux in range(3) for cls in range(len(CLASSES))]


def skeleton(text: str) -> str:
    """A wording without its words for things: what is left is the frame."""
    things = [w for words in (ANY_ITEM, *ITEM_WORDS.values()) for w in words]
    things += [*COLOR_NAMES, *LOGOS, *(word for pattern in PATTERNS for word in pattern)]
    pattern = r"\b(" + "|".join(sorted(map(re.escape, things), key=len, reverse=True)) + r")\b"
    return re.sub(r"[^a-z#]+", " ", re.sub(pattern, "#", text.lower())).strip()


def test_each_wording_names_what_the_edit_is_about() -> None:
    rng = random.Random(0)
    for edit in all_edits() * 3:
        op, color, aux, cls = edit
        for text in (training_wording(*edit, rng), held_out_wording(*edit, rng.randrange(10**6))):
            lower = text.lower()
            if not OPS[op].startswith("remove"):
                assert COLOR_NAMES[color] in lower, text
            if OPS[op] == "set_pattern":
                assert any(word in lower for word in PATTERNS[aux]), text
            if OPS[op] == "add_logo":
                assert LOGOS[aux] in lower, text
            assert "{" not in text
            assert "|" not in text
            assert "  " not in text
            if OPS[op] == "recolor":
                assert any(word in lower for word in (*ANY_ITEM, *ITEM_WORDS[CLASSES[cls]])), text


def test_no_training_wording_has_the_frame_of_a_held_out_one() -> None:
    rng = random.Random(1)
    trained = {skeleton(training_wording(*edit, rng)) for edit in all_edits() * 60}
    held = {skeleton(held_out_wording(*edit, seed)) for edit in all_edits() for seed in range(8)}
    assert len(trained) > 5000
    assert len(held) > 25
    assert not trained & held


def test_every_operation_has_frames_of_each_kind() -> None:
    assert set(IMPERATIVES) == set(STATEMENTS) == set(HELD_OUT) == set(OPS)


def test_the_shipped_tokenizer_is_the_recipes_and_transformers_reads_it_alike() -> None:
    bpe = read_tokenizer(DEMO)
    theirs = Qwen2Tokenizer.from_pretrained(DEMO / "tokenizer")
    rng = random.Random(2)
    for edit in all_edits():
        prompt = edit_plus_prompt(training_wording(*edit, rng), 1)
        assert bpe.encode(prompt, add_special_tokens=False).ids == theirs(prompt)["input_ids"]
    assert len(bpe.encode(SYSTEM_PREFIX, add_special_tokens=False).ids) == 64  # as many as with the real vocabulary
    assert bpe.get_vocab_size() < 1024


def test_training_the_tokenizer_again_gives_the_shipped_one(tmp_path: Path) -> None:
    tokenizer.train(tmp_path / "tokenizer")
    assert read_tokenizer(tmp_path).get_vocab() == read_tokenizer(DEMO).get_vocab()


def test_wordings_stand_where_the_table_looks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wording an edit, which names all four of its numbers: the row that `pick` takes must be that edit's."""
    from safetensors.torch import save_file

    rows = wordings_in_order(lambda op, color, aux, cls, rng: f"{op} {color} {aux} {cls}", 1)
    assert len(rows) == EDITS
    tables = {
        f"training.{k}": v for k, v in (("ids", torch.arange(EDITS)[:, None].to(torch.int16)), ("lengths", torch.ones(EDITS)))
    }
    save_file(tables, tmp_path / "wordings.safetensors")
    (tmp_path / "tokenizer").symlink_to(DEMO / "tokenizer")
    table = PromptTable(tmp_path, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    edit = Edit(*(torch.randint(0, n, (50,), generator=generator) for n in (len(OPS), len(COLOR_NAMES), len(LOGOS), len(CLASSES))))
    ids, mask = table.training(edit, generator)
    assert mask.all()
    assert [rows[i] for i in ids[:, -1].tolist()] == [
        f"{o} {c} {a} {k}" for o, c, a, k in zip(*(f.tolist() for f in edit), strict=True)
    ]
