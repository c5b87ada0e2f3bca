"""The tokenizer against transformers' Qwen2Tokenizer of the same files, in both layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

from millicent import demo
from millicent.errors import CheckpointError, IncompleteModelError
from millicent.model.prompt import IMAGE_PAD, SYSTEM_PREFIX, edit_plus_prompt
from millicent.model.tokenizer import PromptTokenizer, read_tokenizer

Pair = tuple[PromptTokenizer, Qwen2Tokenizer]

TEXTS = (
    SYSTEM_PREFIX,
    edit_plus_prompt("make the shirt navy blue", 2),
    "",
    "It's WE'LL they'Re 12345 x1y22",
    "cafe\u0301 \u212b \uf900 e\u0301\u0323",  # letters and signs that NFC joins
    "  two  blanks \t and\r\n\n lines \n",
    "衣服改成深蓝色 👕🏽 \u200d \u00a0",
    "<|image_pad|><|im_end|> <|endoftext|>\n<|vision_end|>x",
    "<tool_call> <|fim_prefix|> <|im_start",
    "\x00\x7f\ufeff",
)


def write_apart(folder: Path) -> Path:
    """As the published models have it: words and merges in files of their own, the control tokens in the config."""
    made = make_tokenizer()
    told = json.loads(made.backend_tokenizer.to_str())
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(told["model"]["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) for pair in told["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    control = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in told["added_tokens"]}
    number = len(made)
    control[str(number)] = {"content": "<tool_call>", "lstrip": False, "rstrip": True, "single_word": False, "special": False}
    control[str(number)]["normalized"] = False
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": control, "pad_token": "<|endoftext|>", "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["demo", "whole", "older whole", "apart"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "demo":
        folder = demo.folder() / "tokenizer"
    elif request.param == "apart":
        folder = write_apart(folder / "apart")
    else:
        make_tokenizer().save_pretrained(folder)
    if request.param == "older whole":
        change(folder / "tokenizer.json", join_merges)
    return read_tokenizer(folder), Qwen2Tokenizer.from_pretrained(folder)


def join_merges(told: dict[str, Any]) -> None:
    told["model"]["merges"] = [" ".join(pair) for pair in told["model"]["merges"]]


def rename_picture(told: dict[str, Any]) -> None:
    (token,) = (token for token in told["added_tokens"] if token["content"] == IMAGE_PAD)
    token["content"] = "<|picture_pad|>"


def change(path: Path, changes: Any) -> None:
    told = json.loads(path.read_text(encoding="utf-8"))
    changes(told)
    path.write_text(json.dumps(told), encoding="utf-8")


@pytest.mark.parametrize("text", TEXTS)
def test_texts_become_the_tokens_that_transformers_makes(pair: Pair, text: str) -> None:
    ours, theirs = pair
    wanted = theirs(text)["input_ids"]
    assert ours.encode(text) == wanted
    assert ours.decode(wanted) == theirs.decode(wanted, clean_up_tokenization_spaces=False)


def test_any_text_does(pair: Pair) -> None:
    ours, theirs = pair

    @given(st.text(max_size=80))
    def check(text: str) -> None:
        assert ours.encode(text) == theirs(text)["input_ids"]

    check()


def test_rows_are_filled_up_with_the_same_token(pair: Pair) -> None:
    ours, theirs = pair
    assert ours.pad_id == theirs.pad_token_id
    assert ours.backend.get_vocab() == theirs.get_vocab()


def test_an_empty_folder_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(IncompleteModelError, match=r"vocab\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(IncompleteModelError, match=r"merges\.txt"):
        read_tokenizer(tmp_path)


BROKEN = {
    "no JSON": (lambda told: told.clear(), "of the kind None"),
    "another kind": (lambda told: told["model"].update(type="Unigram"), "'Unigram'"),
    "no words": (lambda told: told["model"].pop("vocab"), "is no tokenizer: KeyError"),
    "merges of three": (lambda told: told["model"].update(merges=[["a", "b", "c"]]), "is no tokenizer: ValueError"),
    "a merge of unknown words": (lambda told: told["model"].update(merges=[["a", "no such word"]]), "contradicts itself"),
    "no control tokens": (lambda told: told.update(added_tokens=[]), "does not know"),
    "no picture's token": (rename_picture, r"does not know <\|image_pad"),
    "another number": (lambda told: told["added_tokens"][0].update(id=9999), "and its words make it"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    changes, told = BROKEN[name]
    make_tokenizer().save_pretrained(tmp_path)
    change(tmp_path / "tokenizer.json", changes)
    with pytest.raises(CheckpointError, match=told):
        read_tokenizer(tmp_path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = write_apart(tmp_path / "apart")
    (folder / "merges.txt").write_text("one\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt cannot be read"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        read_tokenizer(folder)


def test_control_tokens_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = write_apart(tmp_path / "apart")
    change(folder / "tokenizer_config.json", lambda told: told.update(added_tokens_decoder={"x": {"content": "<|a|>"}}))
    with pytest.raises(CheckpointError, match="has other control tokens"):
        read_tokenizer(folder)
