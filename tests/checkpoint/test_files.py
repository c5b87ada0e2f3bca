"""One header and one long file, of however many files a path holds."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zoo
from hub_server import FakeHub, serve_hub
from safetensors.torch import load_file, save_file

from millicent.checkpoint.files import JoinedSource, open_weights
from millicent.checkpoint.load import MappedFiles
from millicent.checkpoint.recognize import recognize
from millicent.checkpoint.source import open_source, read_together
from millicent.errors import CheckpointError, IncompleteModelError, InputNotFoundError, WeightsMismatchError

STATE = {f"blocks.{i}.weight": torch.arange(5 * i, 5 * i + 7).float() for i in range(12)} | {"empty": torch.empty(0, 3)}
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def check(where: Path, state: zoo.State = STATE) -> None:
    """Every tensor where the header says, by both ways of reading."""
    files = open_weights(where)
    assert files.header.tensors.keys() == state.keys()
    mapped = MappedFiles(files.source)
    for key, info in files.header.tensors.items():
        assert torch.equal(mapped.tensor(info), state[key]), key
        assert files.source.read(info.begin, info.end) == state[key].numpy().tobytes(), key


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    zoo.write_shards(STATE, tmp_path)
    return tmp_path


def test_one_file_under_any_name(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "my own.safetensors")
    check(tmp_path / "my own.safetensors")
    check(tmp_path)


def test_shards_are_one_file(shards: Path) -> None:
    check(shards)
    files = open_weights(shards)
    assert [Path(file.name).name for file in files.source.files] == sorted(path.name for path in shards.glob("*.safetensors"))
    assert files.header.size_bytes == files.source.size_bytes == sum(path.stat().st_size for path in shards.glob("*.safetensors"))


def test_a_file_for_each_block_in_the_order_of_numbers(tmp_path: Path) -> None:
    state = {f"transformer_blocks.{key.removeprefix('blocks.')}": t for key, t in STATE.items() if key != "empty"}
    zoo.write_blocks(state | {"txt_norm.weight": torch.ones(3)}, tmp_path)
    check(tmp_path, state | {"txt_norm.weight": torch.ones(3)})
    names = [Path(file.name).name for file in open_weights(tmp_path).source.files]
    assert names == [*(f"block_{i}.safetensors" for i in range(12)), "non_block.safetensors"]
    (tmp_path / "non_block.safetensors").unlink()
    with pytest.raises(IncompleteModelError, match=r"12 block files, but no non_block\.safetensors"):
        open_weights(tmp_path)


def test_bytes_of_the_second_file_begin_where_the_first_ends(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, data in zip(paths, (b"01234", b"56", b"789"), strict=True):
        path.write_bytes(data)
    source = JoinedSource("all", [open_source(path) for path in paths])
    assert (source.name, source.size_bytes) == ("all", 10)
    for begin, end, name in ((0, 5, "a"), (3, 4, "a"), (5, 7, "b"), (6, 7, "b"), (7, 10, "c"), (9, 10, "c")):
        assert source.read(begin, end) == b"0123456789"[begin:end]
        file, place = source.locate(begin)
        assert (Path(file.name).name, file.read(place, place + 1)) == (name, b"0123456789"[begin : begin + 1])
    assert source.read(10, 10) == b""
    with pytest.raises(CheckpointError, match="ends early"):
        source.read(9, 12)


def test_small_reads_may_go_on_in_the_next_file(shards: Path) -> None:
    """Notes of two shards may be one read: they lie near in the long file."""
    files = open_weights(shards)
    places = {key: (info.begin, info.end) for key, info in files.header.tensors.items() if info.values}
    found = read_together(files.source, places)
    assert found == {key: STATE[key].numpy().tobytes() for key in places}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_shard_alone_is_told_by_its_number(number: int, shards: Path) -> None:
    with pytest.raises(IncompleteModelError, match=f"shard {number} of 3, not a whole model.*Give the folder"):
        open_weights(shards / f"diffusion_pytorch_model-{number:05}-of-00003.safetensors")


def test_a_folder_of_one_shard_is_no_model(shards: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(shards / "diffusion_pytorch_model-00001-of-00003.safetensors", alone)
    with pytest.raises(IncompleteModelError, match="holds shards such as"):
        open_weights(alone)
    shutil.copy(shards / INDEX, alone)
    with pytest.raises(IncompleteModelError, match="00002-of-00003"):
        open_weights(alone)


def test_an_index_and_its_shards_agree(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    for change in ({"more": "diffusion_pytorch_model-00001-of-00003.safetensors"}, {"empty": "../outside.safetensors"}):
        (shards / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(CheckpointError):
            open_weights(shards)
    moved = dict(index["weight_map"])
    moved["empty"] = next(shard for shard in moved.values() if shard != moved["empty"])
    (shards / INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(WeightsMismatchError, match="differ in empty"):
        open_weights(shards)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    zoo.write_blocks({"transformer_blocks.0.a": torch.ones(2), "txt_norm.weight": torch.ones(3)}, tmp_path)
    save_file(load_file(tmp_path / "non_block.safetensors"), tmp_path / "block_1.safetensors")
    with pytest.raises(CheckpointError, match=r"holds txt_norm\.weight in more than one file"):
        open_weights(tmp_path)


def test_two_models_side_by_side_are_refused(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(STATE, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="several sets of weights"):
        open_weights(tmp_path)


def test_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(IncompleteModelError, match="holds no"):
        open_weights(tmp_path)
    with pytest.raises(InputNotFoundError, match=r"There is no file .*nothing\.safetensors"):
        open_weights(tmp_path / "nothing.safetensors")


def test_the_config_beside_the_weights_is_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).config == {}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}}))
    assert open_weights(tmp_path).config == {"quantization_config": {"quant_method": "modelopt"}}
    (tmp_path / "config.json").write_text(json.dumps({"zero_cond_t": True}))
    assert open_weights(tmp_path).config == {"zero_cond_t": True, "quantization_config": {"quant_method": "modelopt"}}
    own = {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert open_weights(tmp_path).config == own
    # a file alone speaks for itself
    assert open_weights(tmp_path / "model.safetensors").config == {}
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        open_weights(tmp_path)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.make_folder(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("name", ["comfy fp8", "comfy int8 convrot", "comfy fp8, metadata", "raw e4m3", "gguf Q4_K"])
def test_a_file_far_away_is_recognized_in_a_few_requests(name: str, hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    """The notes of all layers lie together, so that they are one request; of the weights hardly anything is read."""
    written = zoo.write(zoo.LAYOUTS[name], zoo.read_state(folder / "transformer"), tmp_path)
    hub.add("a/b", {written.path.name: written.path.read_bytes()})
    found = recognize(f"{hub.endpoint}/a/b/resolve/main/{written.path.name}")
    here = recognize(written.path)
    layout, expected = found.components["transformer"].layout, here.components["transformer"].layout
    assert layout is not None
    assert expected is not None
    assert layout.matrices.keys() == expected.matrices.keys()
    assert [m.scheme for m in layout.matrices.values()] == [m.scheme for m in expected.matrices.values()]
    reads = [request for request in hub.requests if request.sent]
    # the size, the header, the notes, and four looks at a raw cast
    assert len(reads) <= 3 + 4 * name.startswith("raw")
    assert sum(request.sent for request in reads) < 1.4e6
