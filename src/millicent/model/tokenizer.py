"""The text encoder's tokenizer: byte-level BPE over Qwen2's words, as transformers' Qwen2Tokenizer builds it of the same files.

tokenizers does the work there too. It is here without transformers, which takes a second to import, or six where files come slowly:
a card is paid for meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from millicent.errors import CheckpointError, IncompleteModelError
from millicent.model.config import read_json
from millicent.model.prompt import IMAGE_PAD

# where a word may end: a contraction, letters with one sign before them, a digit, signs, line breaks, blanks (Qwen2Tokenizer)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TEXT = "<|endoftext|>"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_FIX = "Fetch the tokenizer again."

Words = dict[str, int]
Merges = Sequence[tuple[str, str]]


@dataclass(slots=True)
class PromptTokenizer:
    """pad_id: of the token that fills a row up."""

    backend: Tokenizer
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Its tokens; a control token that stands in it is one."""
        ids: list[int] = self.backend.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, control tokens included."""
        text: str = self.backend.decode(ids, skip_special_tokens=False)
        return text


def read_tokenizer(folder: Path) -> PromptTokenizer:
    """Read a tokenizer folder: its tokenizer.json, or else vocab.json and merges.txt with the control tokens of the config.

    Raises IncompleteModelError for a file that is missing, CheckpointError for one that cannot be read or contradicts itself.
    """
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    whole = folder / "tokenizer.json"
    words, merges, control = _read_whole(whole) if whole.is_file() else _read_apart(folder, config)
    try:
        tokenizer = Tokenizer(BPE(vocab=words, merges=merges))
    except Exception as error:  # of no kind of its own
        raise CheckpointError(f"The tokenizer in {folder} contradicts itself: {error}.", _FIX) from error
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    _add_control_tokens(tokenizer, control, folder)
    pad = _content(config.get("pad_token")) or _END_OF_TEXT
    numbers = [tokenizer.token_to_id(needed) for needed in (pad, IMAGE_PAD)]
    if numbers[0] is None or numbers[1] is None:
        raise CheckpointError(f"The tokenizer in {folder} does not know {pad if numbers[0] is None else IMAGE_PAD}.", _FIX)
    return PromptTokenizer(tokenizer, numbers[0])


Control = list[tuple[int, AddedToken]]


def _read_whole(path: Path) -> tuple[Words, Merges, Control]:
    told = read_json(path)
    model = told.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise CheckpointError(f"{path} holds a tokenizer of the kind {kind!r}; Qwen-Image-Edit's is BPE.", _FIX)
    try:
        # of two words each; joined by a blank in older files
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [(left, right) for left, right in pairs]
        control = [(int(token["id"]), _control_token(token)) for token in told.get("added_tokens") or ()]
        return dict(model["vocab"]), merges, control
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no tokenizer: {error!r}.", _FIX) from error


def _read_apart(folder: Path, config: Mapping[str, Any]) -> tuple[Words, Merges, Control]:
    paths = folder / "vocab.json", folder / "merges.txt"
    for path in paths:
        if not path.is_file():
            raise IncompleteModelError(f"{path} is missing.", "Fetch the whole model again.")
    try:
        words, merges = BPE.read_file(*map(str, paths))
    except Exception as error:  # of no kind of its own
        raise CheckpointError(f"{paths[0]} and {paths[1].name} cannot be read: {error}.", _FIX) from error
    try:
        described = config.get("added_tokens_decoder") or {}
        return words, merges, [(int(number), _control_token(token)) for number, token in described.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'} has other control tokens: {error!r}.", _FIX) from error


def _control_token(told: Mapping[str, Any]) -> AddedToken:
    return AddedToken(told["content"], **{flag: bool(told[flag]) for flag in _FLAGS if flag in told})


def _add_control_tokens(tokenizer: Tokenizer, control: Iterable[tuple[int, AddedToken]], folder: Path) -> None:
    """They get the numbers after the last word, and so their own when they come in order."""
    for number, token in sorted(control, key=lambda each: each[0]):
        tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != number:
            raise CheckpointError(f"The tokenizer in {folder} calls {token.content} {number}, and its words make it {found}.", _FIX)


def _content(token: object) -> str | None:
    """A token is named by its text, or described."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
