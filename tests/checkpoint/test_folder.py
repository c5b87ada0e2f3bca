"""Folders that are whole, half, broken or of another kind."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from millicent.checkpoint.folder import PARTS, find_weight_files, open_folder, read_json, show_some
from millicent.errors import CheckpointError, IncompleteModelError, WeightsMismatchError

SINGLE = "diffusion_pytorch_model.safetensors"


def shard(part: Path, count: int = 3) -> list[Path]:
    """Split the single file of a part into shards with an index, as diffusers writes them."""
    tensors = load_file(part / SINGLE)
    (part / SINGLE).unlink()
    weight_map, paths = {}, []
    for number in range(count):
        keys = sorted(tensors)[number::count]
        paths.append(part / f"diffusion_pytorch_model-{number + 1:05}-of-{count:05}.safetensors")
        save_file({key: tensors[key] for key in keys}, paths[-1])
        weight_map.update(dict.fromkeys(keys, paths[-1].name))
    (part / f"{SINGLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_diffusers_wrote_opens(tiny_folder: Path) -> None:
    folder = open_folder(tiny_folder)
    assert folder.pipeline == "edit-plus"
    assert find_weight_files(tiny_folder / "transformer") == [tiny_folder / "transformer" / SINGLE]
    assert find_weight_files(tiny_folder / "text_encoder") == [tiny_folder / "text_encoder" / "model.safetensors"]


def test_without_an_index_of_the_model_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IncompleteModelError, match=r"model_index\.json is missing"):
        open_folder(tmp_path)


@pytest.mark.parametrize("part", PARTS)
def test_each_missing_part_is_named(own_folder: Path, part: str) -> None:
    (own_folder / part).rename(own_folder / f"no-{part}")
    with pytest.raises(IncompleteModelError, match=f"{part} is missing"):
        open_folder(own_folder)


@pytest.mark.parametrize("name", ["QwenImagePipeline", "QwenImageLayeredPipeline", "FluxPipeline", None])
def test_another_pipeline_is_refused(own_folder: Path, name: str | None) -> None:
    edit_json(own_folder / "model_index.json", _class_name=name)
    with pytest.raises(CheckpointError, match=str(name)):
        open_folder(own_folder)


@pytest.mark.parametrize("found", [["diffusers", "AutoencoderKL"], [None, None], None, "vae"])
def test_another_class_of_part_is_refused(own_folder: Path, found: object) -> None:
    edit_json(own_folder / "model_index.json", vae=found)
    with pytest.raises(CheckpointError, match="as the vae"):
        open_folder(own_folder)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_shards_are_found_through_their_index(own_folder: Path) -> None:
    paths = shard(own_folder / "transformer")
    assert find_weight_files(own_folder / "transformer") == paths


def test_a_missing_shard_is_named(own_folder: Path) -> None:
    paths = shard(own_folder / "transformer")
    paths[1].unlink()
    with pytest.raises(IncompleteModelError, match=f"{paths[1].name} is missing"):
        find_weight_files(own_folder / "transformer")


def test_shards_without_their_index_are_no_model(own_folder: Path) -> None:
    shard(own_folder / "vae")
    (own_folder / "vae" / f"{SINGLE}.index.json").unlink()
    with pytest.raises(IncompleteModelError, match="no index"):
        find_weight_files(own_folder / "vae")


def test_an_index_that_names_another_key_is_refused(own_folder: Path) -> None:
    shard(own_folder / "vae")
    index = own_folder / "vae" / f"{SINGLE}.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "extra.weight": next(iter(weight_map.values()))})
    with pytest.raises(WeightsMismatchError, match=r"extra\.weight"):
        find_weight_files(own_folder / "vae")


def test_a_key_in_another_shard_than_the_index_says_is_refused(own_folder: Path) -> None:
    paths = shard(own_folder / "vae")
    index = own_folder / "vae" / f"{SINGLE}.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    key = next(key for key, name in weight_map.items() if name == paths[0].name)
    edit_json(index, weight_map={**weight_map, key: paths[1].name})
    with pytest.raises(WeightsMismatchError, match=key):
        find_weight_files(own_folder / "vae")


def test_a_shard_outside_the_folder_is_refused(own_folder: Path) -> None:
    shard(own_folder / "vae")
    edit_json(own_folder / "vae" / f"{SINGLE}.index.json", weight_map={"a": "../transformer/x.safetensors"})
    with pytest.raises(CheckpointError, match="outside"):
        find_weight_files(own_folder / "vae")


def test_two_sets_of_weights_are_refused(own_folder: Path) -> None:
    part = own_folder / "transformer"
    (part / "diffusion_pytorch_model.fp16.safetensors").write_bytes((part / SINGLE).read_bytes())
    with pytest.raises(CheckpointError, match=r"fp16\.safetensors, .*Keep one"):
        find_weight_files(part)


def test_a_part_without_weights_is_named(own_folder: Path) -> None:
    (own_folder / "vae" / SINGLE).unlink()
    with pytest.raises(IncompleteModelError, match="vae holds no"):
        find_weight_files(own_folder / "vae")


def test_many_names_are_cut_short() -> None:
    assert show_some(list("abc")) == "a, b, c"
    assert show_some(list("abcdefg")) == "a, b, c, d, e, and 2 more"
