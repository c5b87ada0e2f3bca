"""Wordings: no held-out frame can come out of the training grammar, noise spares content, the vocabulary is Qwen2's in kind."""

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Tokenizer

from millicent.model.prompt import SYSTEM_PREFIX, edit_plus_prompt
from recipes.demo import noise, phrases, tokenizer
from recipes.demo.noise import Noise, pack_left
from recipes.demo.prompts import EDITS, PromptTable, read_tokenizer, template, wordings_in_order
from recipes.demo.scenes import Edit
from recipes.demo.wordings import (
    CONTENT_WORDS,
    HELD_OUT,
    IMPERATIVES,
    STATEMENTS,
    choosing_wording,
    core_wording,
    held_out_wording,
    training_wording,
)
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
        seed = rng.randrange(10**6)
        for text in (training_wording(*edit, rng), held_out_wording(*edit, seed), choosing_wording(*edit, seed)):
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
    choosing = {skeleton(choosing_wording(*edit, seed)) for edit in all_edits() for seed in range(8)}
    assert len(trained) > 15000
    assert len(held) > 25
    assert len(choosing) > 25
    assert not trained & held
    assert not trained & choosing
    assert not choosing & held


def test_no_held_out_frame_stands_inside_a_training_wording() -> None:
    """Not with a remark before it or thanks after it, either."""
    rng = random.Random(5)
    trained = [f" {skeleton(training_wording(*edit, rng))} " for edit in all_edits() * 20]
    held = {f" {skeleton(held_out_wording(*edit, seed))} " for edit in all_edits() for seed in range(8)}
    assert not [text for text in trained if any(frame in text for frame in held)]


@pytest.mark.parametrize(
    "words", ["needs", "pick", "go with", "instead", "what would", "look", "take this # and", "could the", "go away"]
)
def test_the_training_grammar_has_none_of_the_turns_that_the_held_out_frames_are_made_of(words: str) -> None:
    rng = random.Random(6)
    held = {skeleton(held_out_wording(*edit, seed)) for edit in all_edits() for seed in range(8)}
    assert any(re.search(rf"\b{words}(\b|$)", text) for text in held)
    assert not [
        t for t in (skeleton(training_wording(*edit, rng)) for edit in all_edits() * 20) if re.search(rf"\b{words}(\b|$)", t)
    ]


def test_every_operation_has_frames_of_each_kind() -> None:
    assert set(IMPERATIVES) == set(STATEMENTS) == set(HELD_OUT) == set(OPS)
    assert set(phrases.IMPERATIVES) == set(phrases.STATEMENTS) == set(phrases.CHOOSING) == set(OPS)


def test_noise_drops_and_puts_in_only_what_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "NOISY_SHARE", 1.0)
    bpe, rng, generator = read_tokenizer(DEMO), random.Random(3), torch.Generator().manual_seed(0)
    strangers = Noise.of(bpe, torch.device("cpu"))
    rows = [bpe.encode(training_wording(*edit, rng), add_special_tokens=False).ids for edit in all_edits()]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    kept = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    end = bpe.get_vocab_size() - 1
    noisy, lengths = pack_left(*strangers(ids, kept, generator), width + noise.ROOM, end)
    for before, after, length in zip(rows, noisy.tolist(), lengths.tolist(), strict=True):
        content = [i for i in before if not strangers.filler[i]]
        assert [i for i in after[:length] if not strangers.filler[i]] == content
        assert after[length:] == [end] * (len(after) - length)
    changed = [before != after[:length] for before, after, length in zip(rows, noisy.tolist(), lengths.tolist(), strict=True)]
    assert sum(changed) > 0.8 * len(rows)
    assert max(lengths) > width - noise.ROOM
    words = {word for text in CONTENT_WORDS for word in text.split()}
    assert {"red", "stripes", "background", "without", "mug"} <= words
    assert not {"please", "the", "make"} & words


def test_the_shipped_tokenizer_is_the_recipes_and_transformers_reads_it_alike() -> None:
    bpe = read_tokenizer(DEMO)
    theirs = Qwen2Tokenizer.from_pretrained(DEMO / "tokenizer")
    rng = random.Random(2)
    for edit in all_edits():
        wording = rng.choice((core_wording, training_wording))(*edit, rng)
        prompt = edit_plus_prompt(wording, 1)
        ids = bpe.encode(prompt, add_special_tokens=False).ids
        assert ids == theirs(prompt)["input_ids"]
        head, tail = template(bpe)  # the training table's prompts are put together from parts, with one id for each picture token
        once = [i for n, i in enumerate(head) if n == 0 or i != head[n - 1]]
        assert once + bpe.encode(wording, add_special_tokens=False).ids + tail == ids
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
    rng = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 4, (EDITS,), generator=rng)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    ids = torch.arange(EDITS).repeat_interleave(lengths).to(torch.int16)  # each row its own number, one to three times
    save_file({"training.ids": ids, "training.starts": starts}, tmp_path / "wordings.safetensors")
    (tmp_path / "tokenizer").symlink_to(DEMO / "tokenizer")
    table = PromptTable(tmp_path, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    edit = Edit(*(torch.randint(0, n, (50,), generator=generator) for n in (len(OPS), len(COLOR_NAMES), len(LOGOS), len(CLASSES))))
    ids, kept = table.pick(edit, generator, "training")
    assert [rows[i] for i in ids[:, 0].tolist()] == [
        f"{o} {c} {a} {k}" for o, c, a, k in zip(*(f.tolist() for f in edit), strict=True)
    ]
    assert torch.equal(kept.sum(1), lengths[ids[:, 0]])
    assert all((row == row[0])[mask].all() for row, mask in zip(ids, kept, strict=True))
    whole, mask = table.prompts(ids, kept, 3)
    head, tail = table.head.tolist(), table.tail.tolist()
    for row, own, length, m in zip(whole.tolist(), ids[:, 0].tolist(), lengths[ids[:, 0]].tolist(), mask, strict=True):
        used = head + [own] * length + tail
        assert row == used + [table.special["<|endoftext|>"]] * (len(row) - len(used))
        assert m.sum() == len(used) - table.prefix_tokens
