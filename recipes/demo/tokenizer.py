"""The demo's tokenizer: Qwen2's own kind, byte-level BPE, with a vocabulary of the words that the demo knows.

Any UTF-8 still encodes, byte by byte.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from millicent.model.prompt import SYSTEM_TEXT
from recipes.demo.wordings import HELD_OUT, core_wording
from recipes.demo.world import ANY_ITEM, CLASSES, COLOR_NAMES, ITEM_WORDS, LOGOS, OPS, PATTERNS

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
# Qwen2's: contractions, words with their space, single digits, punctuation, white space
PRETOKENIZATION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS_WORDINGS = 20000


def corpus(seed: int = 0) -> list[str]:
    """The core's wordings, the template's words, and every word of the world and of the held-out frames on its own.

    The held-out frames' words get pieces of their own, which training never sees in those frames' order.
    """
    rng = random.Random(seed)
    lines = [
        core_wording(rng.randrange(len(OPS)), rng.randrange(25), rng.randrange(3), rng.randrange(8), rng)
        for _ in range(CORPUS_WORDINGS)
    ]
    words = [*COLOR_NAMES, *LOGOS, *ANY_ITEM, *(w for c in CLASSES for w in ITEM_WORDS[c]), *(w for p in PATTERNS for w in p)]
    plain = [w.strip(".,?") for frames in HELD_OUT.values() for f in frames for w in f.split() if "{" not in w]
    lines += [f" {word}" for word in (*words, *plain)] * 20
    return lines + [f"system\n{SYSTEM_TEXT}", "user\n", "assistant\n", "Picture 1: "] * 20


def train(folder: Path) -> None:
    """Train and write what `Qwen2Tokenizer.from_pretrained` reads."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZATION), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=4000, min_frequency=2, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.save_pretrained(folder)
