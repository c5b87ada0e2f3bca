"""How people ask for an edit: training wordings from a grammar, and held-out frames that it can never produce.

The core of the grammar is here, and made the vocabulary; phrases.py widens it. In a frame, (a|b) is a choice and {the} an
article; {i} is the product's word, {c} a color, {p} and {pa} a pattern as noun and adjective ("stripes", "striped"), {s} a
logo's shape.
"""

from __future__ import annotations

import random
import re

from recipes.demo import phrases
from recipes.demo.world import ANY_ITEM, CLASSES, COLOR_NAMES, ITEM_WORDS, LOGOS, OPS, PATTERNS

ARTICLES = ("the", "the", "the", "this", "my", "that")
ASKING = (
    *("", "", "", "", "please ", "please ", "can you ", "could you ", "could you please ", "would you ", "I want you to "),
    *("I'd like you to ", "I need you to ", "let's ", "now ", "just ", "kindly ", "go ahead and ", "try to ", "hi, "),
)
CLOSING = (
    *("", "", "", "", "", ".", ".", " please", ", please", "!", " thanks", ", thank you", " for me", " now"),
    *(" and keep everything else", " but leave the rest as it is", " and change nothing else", ", nothing more"),
)

# what follows an asking phrase
IMPERATIVES = {
    "recolor": (
        "(make|turn|paint|color|dye|recolor|render|have) {the} {i} {c}",
        "(change|set|switch|turn|convert) {the} {i} to {c}",
        "(change|set|switch|update|edit) the color of {the} {i} to {c}",
        "(change|set|switch|turn) {the} (color|colour) of {the} {i} (to|into) {c}",
        "(change|set|switch|turn) {the} {i}'s color to {c}",
        "(change|set|switch|turn) {the} {i} color to {c}",
        "(give|get) {the} {i} a {c} color",
        "(make|turn|paint) the color of {the} {i} {c}",
        "(make|turn) {the} {i} into a {c} one",
        "(show|give) me {the} {i} in {c}",
        "(show|put|render|recolor|dye|paint|see) {the} {i} in {c}",
        "use {c} (for|on) {the} {i}",
        "replace the color of {the} {i} with {c}",
        "replace {the} {i} (with|by) a {c} {i}",
    ),
    "background": (
        "(make|turn|paint|color|recolor) {the} (background|backdrop) {c}",
        "(change|set|switch|turn) {the} (background|backdrop) to (plain |solid |a plain |)({c})",
        "(change|set|switch) the color of {the} (background|backdrop) to {c}",
        "(change|set) {the} (background|backdrop) color to {c}",
        "(replace|swap) {the} (background|backdrop) (with|for) (plain |solid |a |){c}",
        "(put|place|show|set) {the} {i} (on|against|before|in front of) a (plain |solid |){c} (background|backdrop)",
        "use a (plain |solid |){c} (background|backdrop)",
        "(give|get) {the} {i} a (plain |){c} (background|backdrop)",
        "have a {c} (background|backdrop) (behind|for) {the} {i}",
        "(make|paint|color) (everything|what is) behind {the} {i} {c}",
        "remove {the} background and use {c}",
        "(put|use) {c} (behind|as the background of) {the} {i}",
        "(change|turn) the background behind {the} {i} (to|into) {c}",
    ),
    "set_pattern": (
        "(add|put|print|draw|place) {c} {p} (to|on|onto|over) {the} {i}",
        "(give|get) {the} {i} {c} {p}",
        "(give|get) {the} {i} a {c} {pa} pattern",
        "make {the} {i} {pa} (with|in) {c}",
        "make {the} {i} {c} {pa}",
        "(change|set|switch|turn) {the} pattern (of|on) {the} {i} (to|into) {c} {p}",
        "(change|set|switch|turn) {the} {i}'s pattern to {c} {p}",
        "(change|turn) {the} {i} pattern into {c} {p}",
        "cover {the} {i} (with|in) {c} {p}",
        "(decorate|fill|design) {the} {i} with {c} {p}",
        "use {c} {p} (on|for) {the} {i}",
        "(have|show) {c} {p} on {the} {i}",
        "(add|put) a pattern of {c} {p} (to|on) {the} {i}",
        "(show|give) me {the} {i} with {c} {p}",
        "(add|put|print) {p} in {c} (to|on) {the} {i}",
        "replace the print on {the} {i} with {c} {p}",
    ),
    "remove_pattern": (
        "(remove|delete|erase|clear|drop) {the} (pattern|print) (from|on|of) {the} {i}",
        "(take|get) {the} (pattern|print) off {the} {i}",
        "(remove|delete|erase|clear) {the} {i}'s (pattern|print)",
        "(remove|delete|erase) {the} (pattern|print)",
        "(make|turn|leave) {the} {i} plain",
        "make {the} {i} (a solid color|one color|a single color)",
        "make {the} {i} plain with no (pattern|print)",
        "(turn|change) {the} {i} (into|to) a plain {i}",
        "get rid of {the} (pattern|print) on {the} {i}",
        "(show|give) me {the} {i} without {the} (pattern|print)",
        "(have|show) no (pattern|print) on {the} {i}",
        "use no pattern on {the} {i}",
    ),
    "add_logo": (
        "(add|put|place|print|draw|stick|paint) a {c} {s} (to|on|onto) {the} {i}",
        "(add|put|place|print|draw|stick) a {c} {s} logo (to|on|onto) {the} {i}",
        "(add|put|place|print) a logo (to|on) {the} {i}, a {c} {s}",
        "(give|get) {the} {i} a {c} {s} (logo|)",
        "(add|put|print|draw) a {s} (logo |)in {c} (to|on) {the} {i}",
        "decorate {the} {i} with a {c} {s} (logo|)",
        "(have|show) a {c} {s} (logo |)on {the} {i}",
        "(show|give) me {the} {i} with a {c} {s} (logo|)",
        "use a {c} {s} as {the} logo of {the} {i}",
        "(add|put|place) a {c} logo in the shape of a {s} on {the} {i}",
    ),
    "remove_logo": (
        "(remove|delete|erase|clear|drop) {the} (logo|{s}|{s} logo) (from|on|of) {the} {i}",
        "(take|get) {the} (logo|{s}|{s} logo) off {the} {i}",
        "(remove|delete|erase|clear) {the} {i}'s (logo|{s})",
        "(remove|delete|erase|take away) {the} (logo|{s}|{s} logo)",
        "get rid of {the} (logo|{s}|{s} logo) on {the} {i}",
        "(show|give) me {the} {i} without {the} (logo|{s})",
        "(have|show) no (logo|{s}) on {the} {i}",
        "make {the} {i} plain with no logo",
    ),
    "recolor_logo": (
        "(make|turn|paint|color|dye|recolor) {the} (logo|{s}|{s} logo) {c}",
        "(make|turn|paint|color|recolor) {the} (logo|{s}|{s} logo) on {the} {i} {c}",
        "(change|set|switch|turn) {the} (logo|{s}|{s} logo) to {c}",
        "(change|set|switch|turn) {the} (logo|{s}|{s} logo) on {the} {i} to {c}",
        "(change|set|switch) the color of {the} (logo|{s}|{s} logo) to {c}",
        "(change|set|switch) the color of {the} (logo|{s}) on {the} {i} to {c}",
        "(change|set|switch) {the} (logo|{s}) color to {c}",
        "(give|get) {the} (logo|{s}) a {c} color",
        "(show|put|render) {the} (logo|{s}) in {c}",
        "use {c} for {the} (logo|{s}|{s} logo)",
        "replace {the} color of {the} (logo|{s}) with {c}",
    ),
}

# whole sentences, which take no asking phrase
STATEMENTS = {
    "recolor": (
        "{the} {i} should be {c}",
        "I (want|need|would like) {the} {i} (in |to be ){c}",
        "I (want|need) a {c} {i}",
        "{c} {i}",
        "{the} {i} in {c}",
        "how about a {c} {i}",
    ),
    "background": (
        "{the} (background|backdrop) should be (plain |){c}",
        "I (want|need|would like) a (plain |){c} (background|backdrop)",
        "I (want|need) {the} (background|backdrop) (in |to be ){c}",
        "{c} (background|backdrop)",
        "{the} {i} on {c}",
        "how about a {c} background",
    ),
    "set_pattern": (
        "{the} {i} should have {c} {p}",
        "I (want|need|would like) {c} {p} on {the} {i}",
        "I (want|need) {the} {i} with {c} {p}",
        "{c} {p} on {the} {i}",
        "a {pa} {i} in {c}",
    ),
    "remove_pattern": (
        "{the} {i} should (be plain|have no pattern|have no print)",
        "I (want|need|would like) {the} {i} plain",
        "I want {the} {i} without {the} (pattern|print)",
        "no (pattern|print) on {the} {i}",
        "plain {i}",
    ),
    "add_logo": (
        "{the} {i} should have a {c} {s} (logo|)",
        "I (want|need|would like) a {c} {s} (logo |)on {the} {i}",
        "{c} {s} (logo |)on {the} {i}",
        "I want {the} {i} with a {c} {s}",
    ),
    "remove_logo": (
        "{the} {i} should have no (logo|{s})",
        "I (want|need|would like) {the} {i} without {the} (logo|{s})",
        "no (logo|{s}) on {the} {i}",
        "no logo",
    ),
    "recolor_logo": (
        "{the} (logo|{s}|{s} logo) should be {c}",
        "{the} (logo|{s}) on {the} {i} should be {c}",
        "I (want|need|would like) {the} (logo|{s}) (in |to be ){c}",
        "{c} for {the} (logo|{s})",
    ),
}

HELD_OUT = {
    "recolor": (
        "The {i} needs to be {c}.",
        "Pick {c} as the color of the {i}.",
        "Go with {c} for the {i}, please.",
        "Could the {i} be {c} instead?",
        "what would the {i} look like in {c}",
        "Take this {i} and make it {c}",
    ),
    "background": (
        "The backdrop needs to be {c}.",
        "Pick {c} as the color of the background.",
        "Could the background be {c} instead?",
        "Go with a {c} backdrop, please.",
        "what would a {c} background look like",
        "Take this {i} and put it on plain {c}",
    ),
    "set_pattern": (
        "The {i} needs {c} {p}.",
        "Could the {i} have {c} {p} instead?",
        "Go with {c} {p} for the {i}, please.",
        "what would {c} {p} look like on the {i}",
        "Take this {i} and add {c} {p} to it",
    ),
    "remove_pattern": (
        "The {i} needs no pattern.",
        "Could the {i} be plain instead?",
        "Go without the print on the {i}, please.",
        "what would the {i} look like with no pattern",
        "Take this {i} and remove its print",
    ),
    "add_logo": (
        "The {i} needs a {c} {s}.",
        "Could the {i} have a {c} {s} logo?",
        "Go with a {c} {s} on the {i}, please.",
        "what would a {c} {s} look like on the {i}",
        "Take this {i} and add a {c} {s} to it",
    ),
    "remove_logo": (
        "The {i} needs no logo.",
        "Could the logo on the {i} go away?",
        "Go without the {s} on the {i}, please.",
        "what would the {i} look like with no {s}",
        "Take this {i} and remove its logo",
    ),
    "recolor_logo": (
        "The logo needs to be {c}.",
        "Pick {c} as the color of the {s}.",
        "Could the {s} on the {i} be {c} instead?",
        "Go with {c} for the logo, please.",
        "what would the logo on the {i} look like in {c}",
    ),
}

CORE_SHARE = 0.3
REMARK_SHARE = 0.25

# what tells one edit from another: things, colors, and the words that name the place or the direction of the change
CONTENT_WORDS = (
    *(*ANY_ITEM, *(w for words in ITEM_WORDS.values() for w in words), *COLOR_NAMES, *LOGOS, *(w for p in PATTERNS for w in p)),
    *("background", "backdrop", "behind", "front", "against", "before", "ground", "pattern", "print", "logo", "on", "in", "with"),
    *("no", "none", "without", "nothing", "plain", "solid", "one", "single", "remove", "removed", "delete", "erase", "clear"),
    *("drop", "take", "get", "off", "rid", "away", "leave", "out", "wipe", "wash", "strip", "peel", "undo", "hide", "lose", "skip"),
    *("add", "put", "place", "to", "color", "colour"),
)

_CHOICE = re.compile(r"\(([^()]*)\)")


def choose(frame: str, rng: random.Random) -> str:
    """Settle every choice of a frame."""
    return _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), frame)


def fill(frame: str, op: int, color: int, aux: int, cls: int, rng: random.Random) -> str:
    """Put words into a frame's slots: any word for the class, or now and then just "item"."""
    words = ANY_ITEM if rng.random() < 0.1 else ITEM_WORDS[CLASSES[cls]]
    noun, adjective = PATTERNS[aux] if OPS[op] == "set_pattern" else PATTERNS[0]
    shape = LOGOS[aux] if OPS[op].endswith("logo") else LOGOS[0]
    while "{the}" in frame:
        frame = frame.replace("{the}", rng.choice(ARTICLES), 1)
    return frame.format(i=rng.choice(words), c=COLOR_NAMES[color], p=noun, pa=adjective, s=shape)


def core_wording(op: int, color: int, aux: int, cls: int, rng: random.Random) -> str:
    """One wording from the core of the grammar; the arguments are indices as in scenes.Edit."""
    name = OPS[op]
    if rng.random() < 0.75:
        core = rng.choice(ASKING) + choose(rng.choice(IMPERATIVES[name]), rng)
    else:
        core = choose(rng.choice(STATEMENTS[name]), rng)
    text = " ".join(fill(core, op, color, aux, cls, rng).split()) + rng.choice(CLOSING)
    return text[0].upper() + text[1:] if rng.random() < 0.4 else text


def training_wording(op: int, color: int, aux: int, cls: int, rng: random.Random) -> str:
    """One wording from the whole grammar: the core's and phrases.py's frames, remarks and closings, freely mixed."""
    if rng.random() < CORE_SHARE:
        return core_wording(op, color, aux, cls, rng)
    name = OPS[op]
    if rng.random() < 0.75:
        asking = rng.choice(rng.choice((ASKING, phrases.ASKING)))
        core = asking + choose(rng.choice(rng.choice((IMPERATIVES, phrases.IMPERATIVES))[name]), rng)
    else:
        core = choose(rng.choice(rng.choice((STATEMENTS, phrases.STATEMENTS))[name]), rng)
    closings = CLOSING, phrases.CLOSING, phrases.CLOSING if name == "background" else phrases.CLOSING_OFF_BACKGROUND
    remark = rng.choice(phrases.REMARKS) if rng.random() < REMARK_SHARE else ""
    text = remark + " ".join(fill(core, op, color, aux, cls, rng).split()) + rng.choice(rng.choice(closings))
    return text[0].upper() + text[1:] if rng.random() < 0.4 else text


def held_out_wording(op: int, color: int, aux: int, cls: int, seed: int) -> str:
    """One wording from the held-out frames, the same for the same seed."""
    rng = random.Random(seed)
    return fill(rng.choice(HELD_OUT[OPS[op]]), op, color, aux, cls, rng)


def choosing_wording(op: int, color: int, aux: int, cls: int, seed: int) -> str:
    """One wording from the third split: neither trained on nor measured by, only chosen by."""
    rng = random.Random(seed)
    return fill(rng.choice(phrases.CHOOSING[OPS[op]]), op, color, aux, cls, rng)
