"""Repair of an encoder that saw the core of the grammar and no noise. `python -m recipes.demo.repair_encoder --work build/demo`.

Not needed after train_editor, which does it before its first step: silence every word that training never showed
(encoder.silence). Rewrites editor.safetensors; nothing is trained, and what the core's own wordings do stays as it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from recipes.demo.encoder import silence
from recipes.demo.prompts import PromptTable, read_tokenizer, wordings_in_order
from recipes.demo.train_editor import build_editor
from recipes.demo.wordings import core_wording

WORDINGS = 8  # of each edit: every word of the core comes up, as a test says


def core_ids(work: Path) -> torch.Tensor:
    """The ids (n,) of a good sample of the core's wordings, with repetitions."""
    rows = read_tokenizer(work).encode_batch(wordings_in_order(core_wording, WORDINGS), add_special_tokens=False)
    return torch.tensor([i for row in rows for i in row.ids])


def repair(work: Path) -> int:
    """Returns how many ids were silenced."""
    prompts = PromptTable(work, torch.device("cpu"))
    editor = build_editor(prompts, torch.device("cpu"), torch.float32)
    stored = load_file(work / "editor.safetensors")
    editor.load_state_dict(stored)
    unmet = prompts.unmet(core_ids(work))
    silence(editor.encoder, unmet)
    state = editor.state_dict()
    save_file({name: state[name].to(tensor.dtype).contiguous() for name, tensor in stored.items()}, work / "editor.safetensors")
    return int(unmet.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    print(f"silenced {repair(parser.parse_args().work)} words that training never showed")


if __name__ == "__main__":
    main()
