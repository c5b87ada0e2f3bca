"""A wider grammar than wordings.py's core, and a third split of frames by which settings may be chosen.

An encoder trained on the core alone learned its frames by heart: it failed on sentences of another build that name the
same things. These frames vary the build: other verbs, the sentence's parts in another order, a remark before or after.
Many words here have no piece of their own in the vocabulary (it was made from the core), so they are read in pieces, as
a buyer's unknown words are. Nothing here may come near a held-out frame: tests compare the frames and the words.
"""

from __future__ import annotations

REMARKS = (
    *("ok, ", "so, ", "well, ", "hello, ", "alright, ", "next one: ", "edit: ", "task: ", "to do: ", "one small thing: "),
    *("for my shop, ", "for the catalog, ", "for our summer sale, ", "as agreed, ", "if possible, ", "if you have time, "),
    *("my boss asked: ", "the client wrote: ", "small change, ", "same photo again. ", "good morning! ", "final version: "),
    *("this is for the web shop. ", "we have a new listing. ", "the photo is fine, only one wish: ", "- ", "1. ", "re: photo, "),
)
ASKING = (
    *("would you mind if I asked you to ", "is it possible to ", "would it be ok to ", "why not ", "I was hoping you might "),
    *("we want to ", "we have to ", "we would love to ", "your job is to ", "help me ", "it would be great to ", "do "),
    *("I wish to ", "you should ", "you may ", "can we ", "may I ask you to ", "time to ", "the plan is to ", "we decided to "),
)
CLOSING = (
    *(" :)", "...", " - thank you!", ", cheers", " asap", ", that is all", " (nothing more)", ", as simple as that", " again"),
    *(" for the catalog", " for my shop", " in this photo", " in the picture", " here", ", if you can", " when you have time"),
    *(", everything else stays", " and do not touch anything more", ", the rest is fine", " before you send it", " today", "?"),
)
# said about what stays, so not with an edit of the background itself
CLOSING_OFF_BACKGROUND = (" and keep the background", ", same background", " without touching the background", ", background stays")

IMPERATIVES = {
    "recolor": (
        "(tint|stain|shade|spray|finish) {the} {i} (in|) {c}",
        "(bring|deliver|offer|present) {the} {i} in {c}",
        "apply {c} (paint|dye|) to {the} {i}",
        "(let|have) {c} be {the} {i}'s (color|colour)",
        "{c} is (the color|what) I want for {the} {i}, so (change|edit|update) it",
        "(swap|exchange) the (current|old) (color|colour) of {the} {i} for {c}",
        "in {c}, (show|render|draw) {the} {i}",
        "(give|paint) all of {the} {i} a coat of {c}",
    ),
    "background": (
        "(fill|tint|shade|wash) {the} (background|backdrop) (in|with) {c}",
        "(apply|add) {c} to {the} (background|backdrop)",
        "(photograph|shoot|present|display) {the} {i} (against|in front of) (plain |a plain |){c}",
        "let {the} (background|backdrop) be (plain |all |){c}",
        "keep {the} {i} but (change|recolor|repaint) what is behind it to {c}",
        "(swap|exchange) the (current|old) (background|backdrop) for (plain |a |){c}",
        "behind {the} {i}, (show|draw|paint) (nothing but |only |){c}",
        "with {the} {i} as it is, (fill|paint) the (background|backdrop) {c}",
    ),
    "set_pattern": (
        "(apply|bring|spread) {c} {p} (across|over|all over) {the} {i}",
        "let {the} {i} (have|carry|wear|show) {c} {p}",
        "(style|dress|finish) {the} {i} (in|with) {c} {p}",
        "(knit|weave|stamp|sew) {c} {p} into {the} {i}",
        "{c} {p} is what I want on {the} {i}, so (draw|add) them",
        "(turn|redesign) {the} {i} as a {pa} one, in {c}",
        "in {c}, (draw|print|paint) {p} on {the} {i}",
        "on {the} {i}, (draw|print|paint) {p} in {c}",
    ),
    "remove_pattern": (
        "(wipe|wash|strip|scrub) {the} (pattern|print) (off|from) {the} {i}",
        "let {the} {i} be plain",
        "leave out {the} (pattern|print) (of|on) {the} {i}",
        "(undo|hide|lose|skip) {the} (pattern|print) (of|on) {the} {i}",
        "I do not like {the} (pattern|print), (remove|delete|erase) it",
        "on {the} {i}, (remove|hide|erase) {the} (pattern|print)",
        "(offer|present) {the} {i} with {the} (pattern|print) removed",
    ),
    "add_logo": (
        "(stamp|sew|apply|attach|fix) a {c} {s} (logo |)(to|on|onto) {the} {i}",
        "let {the} {i} (carry|wear|show) a {c} {s} (logo|)",
        "brand {the} {i} with a {c} {s} (logo|)",
        "(mark|style|finish) {the} {i} with a {s} (logo |)in {c}",
        "on {the} {i}, (draw|print|place) a {c} {s} (logo|)",
        "a {c} {s} is our new logo, so (put|print) it on {the} {i}",
        "in {c}, (draw|print|add) a {s} (logo |)on {the} {i}",
    ),
    "remove_logo": (
        "(wipe|wash|strip|scrub|peel) {the} (logo|{s}|{s} logo) (off|from) {the} {i}",
        "leave out {the} (logo|{s}) (of|on) {the} {i}",
        "(undo|hide|lose|skip) {the} (logo|{s}|{s} logo) on {the} {i}",
        "I do not like {the} (logo|{s}), (remove|delete|erase) it",
        "on {the} {i}, (remove|hide|erase) {the} (logo|{s})",
        "(offer|present) {the} {i} with {the} (logo|{s}) removed",
    ),
    "recolor_logo": (
        "(tint|stain|shade|finish) {the} (logo|{s}|{s} logo) (in|) {c}",
        "let {the} (logo|{s}) (on {the} {i} |)be {c}",
        "(swap|exchange) the (current|old) color of {the} (logo|{s}) for {c}",
        "apply {c} to {the} (logo|{s}|{s} logo) (on {the} {i}|)",
        "on {the} {i}, (paint|recolor|dye) {the} (logo|{s}) {c}",
        "in {c}, (show|repaint) {the} (logo|{s}) of {the} {i}",
        "keep {the} (logo|{s}) but (change|switch) its color to {c}",
    ),
}

STATEMENTS = {
    "recolor": (
        "{the} {i}: {c}",
        "{c}, {the} {i}",
        "my {i} is the wrong color, I ordered {c}",
        "{c} is the new color of {the} {i}",
        "from now on {the} {i} is {c}",
        "we only sell {the} {i} in {c}",
        "color of {the} {i} = {c}",
    ),
    "background": (
        "background: {c}",
        "{c}, {the} (background|backdrop)",
        "the (background|backdrop) is wrong, I ordered {c}",
        "{c} is the new color (of the background|behind {the} {i})",
        "from now on our (background|backdrop) is {c}",
        "we only shoot on {c} (background|backdrop)",
        "{the} {i} on a {c} ground, nothing behind it",
    ),
    "set_pattern": (
        "pattern of {the} {i}: {c} {p}",
        "{c} {p}, on {the} {i}",
        "from now on {the} {i} has {c} {p}",
        "we only sell {the} {i} with {c} {p}",
        "I ordered the {pa} {i}, with {c}",
    ),
    "remove_pattern": (
        "pattern of {the} {i}: none",
        "{the} {i}, plain",
        "from now on {the} {i} is plain",
        "we only sell {the} {i} plain",
        "I ordered {the} {i} without a (pattern|print)",
    ),
    "add_logo": (
        "logo of {the} {i}: a {c} {s}",
        "a {c} {s}, on {the} {i}",
        "from now on {the} {i} has a {c} {s} (logo|)",
        "we only sell {the} {i} with a {c} {s} (logo|)",
        "I ordered {the} {i} with a {c} {s}",
    ),
    "remove_logo": (
        "logo of {the} {i}: none",
        "from now on {the} {i} has no logo",
        "we only sell {the} {i} without a logo",
        "I ordered {the} {i} without a (logo|{s})",
    ),
    "recolor_logo": (
        "color of {the} (logo|{s}): {c}",
        "{c}, {the} (logo|{s}) of {the} {i}",
        "the (logo|{s}) has the wrong color, I ordered {c}",
        "{c} is the new color of {the} (logo|{s})",
        "from now on {the} (logo|{s}) is {c}",
    ),
}

# never trained on; settings and checkpoints may be chosen by these, so that the held-out frames only measure
CHOOSING = {
    "recolor": (
        "customers prefer the {i} when it comes in {c}",
        "Don't we also stock that {i} in {c}?",
        "I imagine a {i} that is entirely {c}",
        "{c} suits the {i} best, I believe",
        "Reshoot my {i}: {c} edition",
    ),
    "background": (
        "customers prefer seeing a {c} background",
        "Don't we own a {c} backdrop?",
        "I imagine the {i} standing before a {c} background",
        "{c} suits the background best, I believe",
        "Reshoot my {i}: {c} backdrop edition",
    ),
    "set_pattern": (
        "customers prefer the {i} when it comes with {c} {p}",
        "Don't we also stock that {i} with {c} {p}?",
        "I imagine {c} {p} everywhere on that {i}",
        "{c} {p} suit the {i} best, I believe",
        "Reshoot my {i}: {c} {p} edition",
    ),
    "remove_pattern": (
        "customers prefer the {i} when it comes without any print",
        "Don't we also stock that {i} with no pattern?",
        "I imagine that {i} entirely plain",
        "Reshoot my {i}: edition without pattern",
    ),
    "add_logo": (
        "customers prefer the {i} when it bears a {c} {s}",
        "Don't we also stock that {i} with a {c} {s} logo?",
        "I imagine one {c} {s} printed upon that {i}",
        "a {c} {s} suits the {i} best, I believe",
        "Reshoot my {i}: {c} {s} logo edition",
    ),
    "remove_logo": (
        "customers prefer the {i} when it bears no logo",
        "Don't we also stock that {i} without any {s}?",
        "I imagine that {i} entirely without the logo",
        "Reshoot my {i}: edition with no {s}",
    ),
    "recolor_logo": (
        "customers prefer the logo when it comes in {c}",
        "Don't we also own that {s} in {c}?",
        "I imagine the logo on that {i} entirely {c}",
        "{c} suits the {s} best, I believe",
        "Reshoot my {i}: {c} edition of the logo",
    ),
}
