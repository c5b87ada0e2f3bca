"""The parts of a model before they are loaded: stand-ins, what they must agree with, and what they take."""

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from conftest import draw_picture
from safetensors.torch import load_file, save_file
from torch import nn

from millicent import demo
from millicent.checkpoint import digests
from millicent.checkpoint.load import load_network
from millicent.checkpoint.recognize import Distilled
from millicent.edits import EditRequest
from millicent.engine import parts
from millicent.engine.editor import Editor
from millicent.engine.laying_out import lay_out
from millicent.engine.loading import load_model
from millicent.engine.parts import check_memory, find_part, fused_steps, tell_expanded, with_distillation
from millicent.engine.planner import plan
from millicent.engine.settings import Settings
from millicent.errors import CheckpointError, InputNotFoundError, MachineError, WeightsMismatchError
from millicent.facts.models import find_card, read_card
from millicent.hardware import memory
from millicent.hardware.memory import Memory
from millicent.model.config import MMDiTConfig
from millicent.model.mmdit import MMDiT

CPU = torch.device("cpu")
CARD = find_card("qwen-image-edit-2511")
REQUEST = EditRequest(images=(draw_picture(64, 64),), prompt="make it navy", seed=5, steps=2)

Write = Callable[[str], zoo.Written]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.make_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    return lambda name: zoo.written(name, tmp_path_factory.getbasetemp())


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "own")


def find(path: Path, folder: Path) -> parts.FoundPart:
    return find_part("transformer", folder / "transformer", path, folder)


def configure(model: Path, **changes: Any) -> None:
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def draw(editor: Editor) -> np.ndarray:
    return np.asarray(editor.edit(REQUEST).image).astype(int)


# which model


def test_a_file_of_another_variant_than_the_folder_s_is_refused(write: Write, own: Path) -> None:
    """2511 and 2509 have the same tensors; drawn as the other, either is noise."""
    marked = write("comfy old").path
    find(marked, own)
    configure(own, zero_cond_t=False)
    with pytest.raises(CheckpointError, match=r"says that it is Qwen-Image-Edit-2511; .* is Qwen-Image-Edit or -2509"):
        find(marked, own)
    find(write("lightx2v fp8").path, own)  # without a mark nothing can be told
    with pytest.raises(CheckpointError, match="says that it is Qwen-Image-Edit-2511"):
        find(write("bf16 folder").path, own)


def test_an_older_variant_in_a_folder_of_the_newer_is_refused(write: Write, folder: Path, tmp_path: Path) -> None:
    older = tmp_path / "older.safetensors"
    save_file(load_file(write("bf16").path), older, {"config": json.dumps({"zero_cond_t": False})})
    with pytest.raises(CheckpointError, match=r"says that it is Qwen-Image-Edit or -2509; .* is Qwen-Image-Edit-2511"):
        find(older, folder)


def test_a_lora_is_no_base(folder: Path, tmp_path: Path) -> None:
    layers = [f"transformer_blocks.{i}.attn.to_q" for i in range(2)]
    lora = {f"{layer}.lora_{end}.weight": torch.zeros(4, 4) for layer in layers for end in ("down", "up")}
    save_file(lora, tmp_path / "lora.safetensors")
    for network in parts.NETWORKS:
        with pytest.raises(CheckpointError, match=r"lora\.safetensors is a LoRA, not a"):
            find_part(network, folder / network, tmp_path / "lora.safetensors", folder)


def test_an_all_in_one_checkpoint_stands_in_for_every_part(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    save_file(zoo.all_in_one(folder), path)
    editor = Editor.open(folder, transformer=path, text_encoder=path, vae=path, device="cpu")
    off = np.abs(draw(editor) - draw(Editor.open(folder, device="cpu"))).mean()
    assert 0 < off < 1


def test_a_vae_in_wan_s_names_draws_the_same(folder: Path, tmp_path: Path) -> None:
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({zoo.to_wan_key(key): tensor for key, tensor in vae.items()}, tmp_path / "vae.safetensors")
    editor = Editor.open(folder, vae=tmp_path / "vae.safetensors", device="cpu")
    assert np.array_equal(draw(editor), draw(Editor.open(folder, device="cpu")))


def test_a_vae_for_transparency_is_not_the_folder_s(folder: Path, tmp_path: Path) -> None:
    """Layered's, of four channels."""
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    vae["encoder.conv_in.weight"] = torch.zeros(8, 4, 3, 3, 3)
    save_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(WeightsMismatchError, match=r"encoder\.conv_in\.weight"):
        Editor.open(folder, vae=tmp_path / "vae.safetensors", device="cpu")


# which layout


@pytest.mark.parametrize(("quantize", "scheme"), [(zoo.comfy_nvfp4, "nvfp4, comfy"), (zoo.modelopt_nvfp4, "nvfp4, modelopt")])
def test_nvfp4_without_a_mark_is_decided_by_the_base(quantize: Any, scheme: str, own: Path, tmp_path: Path) -> None:
    tensors = zoo.by_matrix(quantize)(zoo.read_state(own / "transformer")).tensors
    path = tmp_path / "nvfp4.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith("input_scale")}, path)
    layout = find(path, own).component.layout
    assert layout is not None
    assert layout.schemes == {scheme: 28, "plain": 6}
    # a base that is quantized itself proves nothing, and one that is not there neither
    fp8 = zoo.by_matrix(zoo.fp8_rows)(zoo.read_state(own / "transformer")).tensors
    weights = own / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(fp8, weights)
    for change in (lambda: None, weights.unlink):
        change()
        with pytest.raises(CheckpointError, match="nothing in the file says which"):
            find(path, own)


def test_nvfp4_that_neither_reading_fits_is_refused(folder: Path, tmp_path: Path) -> None:
    """FLUX.2's nibbles with ModelOpt's rows: nobody publishes Qwen-Image so."""
    tensors = zoo.by_matrix(zoo.modelopt_nvfp4)(zoo.read_state(folder / "transformer")).tensors
    for key, tensor in tensors.items():
        if tensor.dtype == torch.uint8:
            tensors[key] = tensor << 4 | tensor >> 4
    path = tmp_path / "nvfp4.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith("input_scale")}, path)
    with pytest.raises(CheckpointError, match="nothing in the file says which"):
        find(path, folder)


def test_a_fine_tune_passes_and_another_model_does_not(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    state = zoo.read_state(folder / "transformer")
    path = tmp_path / "tuned.safetensors"
    for strength, passes in ((0.02, True), (0.08, True), (0.3, False), (1.0, False)):
        tuned = {
            key: t + strength * t.std() * torch.randn(t.shape, generator=generator) if t.ndim == 2 else t
            for key, t in state.items()
        }
        save_file(zoo.by_matrix(zoo.fp8_rows)(tuned).tensors, path)
        if passes:
            find(path, folder)
        else:
            with pytest.raises(CheckpointError, match="no version of the base model's"):
                find(path, folder)


def test_a_folder_may_hold_no_weights_of_the_part_that_is_replaced(write: Write, own: Path) -> None:
    """Its configs alone: who replaces 40 GB need not fetch them."""
    (own / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    editor = Editor.open(own, transformer=write("comfy old").path, device="cpu")
    assert draw(editor).std() > 10


# distillation


def renamed(write: Write, tmp_path: Path, name: str) -> Path:
    return Path(shutil.copy(write("comfy old").path, tmp_path / name))


def test_a_distilled_transformer_waits_for_the_caller_s_word(write: Write, folder: Path, tmp_path: Path) -> None:
    path = renamed(write, tmp_path, "qwen_image_edit_2511_fp8_lightning_4steps.safetensors")
    with pytest.raises(CheckpointError, match=r"seems to be distilled .* its name says 'lightning'.*--distilled 4"):
        Editor.open(folder, transformer=path, device="cpu")
    said = Editor.open(folder, transformer=path, distilled_steps=4, device="cpu")
    assert (said.card.steps, said.card.schedule, said.card.true_cfg) == (4, "lightning", 1.0)
    denied = Editor.open(folder, transformer=path, distilled_steps=0, device="cpu")
    assert (denied.card.steps, denied.card.schedule) == (2, "base")
    request = dataclasses.replace(REQUEST, steps=None)
    assert said.edit(request).sigmas == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    assert len(denied.edit(request).sigmas) == 3


def test_our_own_metadata_needs_no_word(write: Write, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "fused.safetensors"
    save_file(load_file(write("comfy old").path), path, {"millicent": json.dumps({"distilled_steps": 8})})
    card = Editor.open(folder, transformer=path, device="cpu").card
    assert (card.steps, card.schedule, card.true_cfg) == (8, "lightning", 1.0)
    # the word of who says otherwise counts more
    assert Editor.open(folder, transformer=path, distilled_steps=0, device="cpu").card.schedule == "base"


def lora_for(folder: Path, path: Path) -> Path:
    down, up = torch.zeros(4, 256), torch.zeros(256, 4)
    layer = "transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(4.0)}, path)
    return path


def test_a_lightning_lora_on_a_distilled_transformer_is_refused(write: Write, folder: Path, tmp_path: Path) -> None:
    path = renamed(write, tmp_path, "fused-4steps.safetensors")
    lightning = lora_for(folder, tmp_path / "Lightning-4steps.safetensors")
    with pytest.raises(CheckpointError, match=r"Lightning-4steps\.safetensors and the transformer itself are each distilled"):
        Editor.open(folder, transformer=path, distilled_steps=4, loras=[(lightning, 1.0)], device="cpu")
    # any other LoRA may go on top, and the Lightning one on a file that is not distilled
    style = lora_for(folder, tmp_path / "style.safetensors")
    assert Editor.open(folder, transformer=path, distilled_steps=4, loras=[(style, 1.0)], device="cpu").card.steps == 4
    editor = Editor.open(folder, transformer=path, distilled_steps=0, loras=[(lightning, 1.0)], device="cpu")
    assert (editor.card.steps, editor.card.schedule) == (4, "lightning")


def test_the_card_s_own_lora_stays_off_a_distilled_transformer(write: Write, own: Path, tmp_path: Path) -> None:
    lora_for(own, own / "lightning-4steps.safetensors")
    card = own / "card.toml"
    card.write_text(card.read_text() + 'lora = "lightning-4steps.safetensors"\n')
    path = renamed(write, tmp_path, "fused-8steps.safetensors")
    fused = Editor.open(own, transformer=path, distilled_steps=8, device="cpu")
    assert fused.card.steps == 8
    plain = Editor.open(own, transformer=path, distilled_steps=0, device="cpu")
    # only what was fused in counts in the name of the weights
    (own / "lightning-4steps.safetensors").unlink()
    assert Editor.open(own, transformer=path, distilled_steps=8, device="cpu").weights_sha256 == fused.weights_sha256
    assert plain.weights_sha256 != fused.weights_sha256


def test_who_says_what_of_distillation() -> None:
    by_name = Distilled(None, "its name says 'turbo'")
    assert fused_steps(None, None) is None
    assert fused_steps(None, 4) == 4
    assert fused_steps(by_name, 0) is None
    assert fused_steps(by_name, 6) == 6
    assert fused_steps(Distilled(8, "", is_certain=True), None) == 8
    with pytest.raises(CheckpointError, match="--distilled 4"):
        fused_steps(by_name, None)


def test_a_card_changes_only_where_something_is_distilled(tmp_path: Path) -> None:
    assert with_distillation(CARD, None, [], []) == CARD
    changed = with_distillation(CARD, 8, [], [])
    assert changed == dataclasses.replace(CARD, steps=8, schedule="lightning", true_cfg=1.0)
    with pytest.raises(InputNotFoundError, match="There is no LoRA"):
        with_distillation(CARD, None, [], [(tmp_path / "nothing.safetensors", 1.0)])


# memory


@pytest.mark.parametrize("name", zoo.LAYOUTS)
def test_what_a_transformer_takes_is_told_before(name: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never less than what its parameters and codes take when loaded; scales are not counted, and are small."""
    recognized = zoo_part(write(name).path)
    with torch.device("meta"):
        module: nn.Module = MMDiT(MMDiTConfig.from_dict({**recognized.component.config, "zero_cond_t": True}))
    load_network(module, recognized.component, recognized.source, torch.bfloat16, keep_codes=True)
    held = {key: tensor for key, tensor in module.state_dict().items() if not key.endswith("weight_scale")}
    taken = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    monkeypatch.setattr(parts, "free_host_bytes", lambda: taken)
    check_memory([recognized], True, torch.bfloat16, CPU)
    monkeypatch.setattr(parts, "free_host_bytes", lambda: taken - 1)
    with pytest.raises(MachineError, match="GiB are free"):
        check_memory([recognized], True, torch.bfloat16, CPU)


def test_what_a_planned_transformer_takes_is_told_before() -> None:
    """The demo's in codes of one byte; scales are not counted."""
    chosen = plan(Settings(format="fp8"), (9, 0), "a card")
    assert chosen is not None
    found = find_part("transformer", demo.folder() / "transformer", None, demo.folder())
    model = load_model(demo.folder(), read_card(demo.folder() / "card.toml"), CPU, torch.bfloat16)
    blocks = lay_out(model.mmdit, chosen, CPU, torch.bfloat16).network.blocks
    linears = [linear for block in blocks for half in (block.img, block.txt) for linear in (half.qkv, half.out, half.up, half.down)]
    held = [*linears, *(model.mmdit.get_submodule(name) for name in ("img_in", "txt_in", "txt_norm", "proj_out"))]
    states = [module.state_dict() for module in held if isinstance(module, nn.Module)]
    taken = sum(tensor.nbytes for state in states for key, tensor in state.items() if not key.endswith("weight_scale"))
    told = parts._needed_bytes(found.component, True, torch.bfloat16, chosen)
    # norms within the blocks, and the biases that FP8's products want in BF16
    assert 0.97 * told <= taken <= told


def zoo_part(path: Path) -> parts.FoundPart:
    found = parts.recognize(path)
    return parts.FoundPart(found.components["transformer"], found.source, found.distilled)


@pytest.mark.parametrize("keep_codes", [True, False])
@pytest.mark.parametrize("name", zoo.LAYOUTS)
def test_what_is_multiplied_out_is_told_before(name: str, keep_codes: bool, write: Write) -> None:
    """All that a matrix takes beside its file's pages, which codes and plain numbers stay in."""
    recognized = zoo_part(write(name).path)
    with torch.device("meta"):
        module: nn.Module = MMDiT(MMDiTConfig.from_dict({**recognized.component.config, "zero_cond_t": True}))
    load_network(module, recognized.component, recognized.source, torch.bfloat16, keep_codes=keep_codes)
    stored = {} if recognized.component.layout is None else recognized.component.layout.matrices
    matrices = [each.nbytes for each in module.state_dict().values() if each.dim() == 2 and each.dtype == torch.bfloat16]
    plain = [2 * math.prod(each.shape) for each in stored.values() if each.scheme.name == "plain"]
    taken = sum(matrices) - sum(plain) if stored else 0
    assert parts.expanded_bytes(recognized, keep_codes, torch.bfloat16) == taken


def test_a_host_without_room_for_what_is_made_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "free_host_bytes", lambda: 3 << 30)
    parts.check_host(3 << 30, "It")
    with pytest.raises(MachineError, match=r"It takes 3\.0 GiB of this host's memory, and 3\.0 GiB are free") as caught:
        parts.check_host((3 << 30) + 1, "It")
    assert "millicent convert" in str(caught.value)
    monkeypatch.setattr(parts, "free_host_bytes", lambda: sys.maxsize)
    parts.check_host(1 << 60, "It")


def test_too_little_memory_is_told_before_anything_is_loaded(write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "read_memory", lambda: Memory(1 << 40, 2000, 1000))  # a container on a large host
    with pytest.raises(MachineError, match=r"The weights take .* GiB in float32, and 0\.0 GiB are free"):
        Editor.open(folder, transformer=write("comfy old").path, device="cpu")
    monkeypatch.setattr(memory, "read_memory", lambda: Memory(0, None, 0))  # a system that does not say
    Editor.open(folder, device="cpu")


def test_codes_that_a_lora_is_fused_into_are_not_kept(write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [zoo_part(write("comfy old").path)]

    def needed(keep_codes: bool, dtype: torch.dtype) -> int:
        low, high = 0, 1 << 30
        while low < high:
            middle = (low + high) // 2
            monkeypatch.setattr(parts, "free_host_bytes", lambda middle=middle: middle)
            try:
                check_memory(found, keep_codes, dtype, CPU)
                high = middle
            except MachineError:
                low = middle + 1
        return low

    assert needed(True, torch.bfloat16) < needed(False, torch.bfloat16) < needed(False, torch.float32)


# the name of the weights


def test_a_stand_in_changes_the_name_of_the_weights(write: Write, folder: Path, tmp_path: Path) -> None:
    def name(**files: Path) -> str:
        return Editor.open(folder, device="cpu", **files).weights_sha256

    fp8 = write("comfy old").path
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = [
        name(),
        name(transformer=fp8),
        name(transformer=write("lightx2v fp8").path),
        name(vae=vae),
        name(transformer=fp8, vae=vae),
    ]
    assert len(set(names)) == len(names)
    # what a file is called and where it lies does not count
    assert name(transformer=Path(shutil.copy(fp8, tmp_path / "other.safetensors"))) == names[1]
    changed = load_file(fp8)
    changed[f"{zoo.COMFY_PREFIX}img_in.bias"] += 1
    save_file(changed, tmp_path / "changed.safetensors")
    assert name(transformer=tmp_path / "changed.safetensors") != names[1]


def test_the_name_is_made_once_where_hashes_are_kept(
    write: Write, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with a file from elsewhere; all files count as large, and as left alone for long."""
    now = time.time_ns
    monkeypatch.setattr(digests, "_LEAST_BYTES", 0)
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + 10_000_000_000)
    open_it = partial(Editor.open, folder, transformer=write("comfy old").path, device="cpu")
    name = open_it().weights_sha256
    assert open_it(digests=tmp_path / "digests").weights_sha256 == name
    monkeypatch.setattr(digests, "_hash", lambda *_: pytest.fail("a file was read again"))
    assert open_it(digests=tmp_path / "digests").weights_sha256 == name


def test_every_file_of_a_stand_in_counts(write: Write, folder: Path, tmp_path: Path) -> None:
    blocks = shutil.copytree(write("lightx2v fp8 by block").path, tmp_path / "blocks")
    found = find(blocks, folder)
    assert [path.name for path in found.paths] == ["block_0.safetensors", "block_1.safetensors", "non_block.safetensors"]
    before = Editor.open(folder, transformer=blocks, device="cpu").weights_sha256
    last = load_file(blocks / "non_block.safetensors")
    last["proj_out.bias"] += 1
    save_file(last, blocks / "non_block.safetensors")
    assert Editor.open(folder, transformer=blocks, device="cpu").weights_sha256 != before


def test_what_to_know_of_the_weights_is_told(folder: Path, write: Write, tmp_path: Path) -> None:
    assert find(write("bf16").path, folder).warnings == ()
    (cast,) = Editor.open(folder, transformer=write("raw e4m3").path, device="cpu").warnings
    assert "cast to FP8 without scales" in cast
    state = zoo.read_state(folder / "transformer")
    key = "transformer_blocks.0.attn.to_q.weight"
    save_file({**state, key: state[key] * 1.05}, tmp_path / "tuned.safetensors")
    (tuned,) = find(tmp_path / "tuned.safetensors", folder).warnings
    assert "as a fine-tune does: by 5.0% in transformer_blocks.0.attn.to_q" in tuned


def test_codes_that_do_not_stay_are_told(folder: Path, write: Write) -> None:
    def tell(name: str, keep_codes: bool) -> list[str]:
        return tell_expanded(zoo_part(write(name).path), keep_codes, torch.bfloat16)

    assert tell("bf16", keep_codes=True) == tell("comfy old", keep_codes=True) == tell("raw e4m3", keep_codes=True) == []
    assert tell("comfy old", keep_codes=False) == ["The transformer is stored as fp8 and expanded: it takes 0.0 GiB in bfloat16."]
    (told,) = Editor.open(folder, transformer=write("comfy nvfp4").path, device="cpu").warnings
    assert told == "The transformer is stored as nvfp4 and expanded: it takes 0.0 GiB in float32."
