"""Qwen2.5-VL as llama.cpp writes it: names out of `gguf`'s own tables, both files read back, and every way to have them wrong.

The writer here follows llama.cpp's converter (conversion/qwenvl.py): thirds of qkv, two frames of the patch embedding, vectors
in F32, what no block fits into in F16.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import zoo
from conftest import draw_picture
from gguf import MODEL_ARCH, MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType
from torch import Tensor
from typer.testing import CliRunner

from millicent.checkpoint import llama_cpp
from millicent.checkpoint.architecture import Found, find_part, text_encoder_tensors
from millicent.checkpoint.files import WeightFiles, open_weights
from millicent.checkpoint.folder import read_json
from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.load import load_network, read_parameters
from millicent.checkpoint.recognize import Component, recognize, recognize_files
from millicent.cli.app import app
from millicent.engine.editor import Editor
from millicent.errors import CheckpointError, IncompleteModelError, WeightsMismatchError
from millicent.model.text_encoder import build_network

QWEN_7B = {
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "temporal_patch_size": 2,
        "patch_size": 14, "spatial_merge_size": 2,
    },
}  # fmt: skip
PATCHES = "visual.patch_embed.proj.weight"
PATCH_NAMES = [f"{TENSOR_NAMES[MODEL_TENSOR.V_ENC_EMBD_PATCH]}.{end}" for end in ("weight", "weight.1")]
LANGUAGE, VISION = "Qwen2.5-VL-7B-Instruct.gguf", "mmproj-Qwen2.5-VL-7B-Instruct.gguf"
PROJECTOR = {"clip.projector_type": gguf.VisionProjectorType.QWEN25VL}
# of ||W' - W|| / ||W||
BOUNDS = {"F32": 0.0, "F16": 0.001, "BF16": 0.004, "Q8_0": 0.01, "Q5_1": 0.08, "Q5_0": 0.08, "Q4_1": 0.15, "Q4_0": 0.15}
LINEARS = 14 + 2 * 7 + 2  # seven in each of two layers, in each of two vision blocks too, where q, k and v are three; the merger

State = dict[str, Tensor]
Kinds = Callable[[str], str]  # ggml's type for a matrix, by its name in the file


@functools.cache
def name_map(arch: MODEL_ARCH) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(arch, 32)


def name_of(key: str) -> str:
    """A parameter's name in llama.cpp's files, by the tables of `gguf`; key: by Qwen's published names, or a third of a qkv."""
    arch = MODEL_ARCH.MMPROJ if key.startswith("visual.") else MODEL_ARCH.QWEN2VL
    name = name_map(arch).get_name(key, (".weight", ".bias"))
    assert name is not None, key
    return str(name)


def cut(state: Mapping[str, Tensor], fused: bool = False) -> tuple[State, State]:
    """The tensors of the two files by their names there; state: by the names of transformers in memory."""
    language, vision = {}, {}
    for key, tensor in state.items():
        if key == PATCHES:
            vision |= dict(zip(PATCH_NAMES, tensor.unbind(2), strict=True))
        elif ".qkv." in key and not fused:
            vision |= {name_of(key.replace("qkv", third)): rows for third, rows in zip("qkv", tensor.chunk(3), strict=True)}
        elif key.startswith("visual."):
            vision[name_of(key)] = tensor
        else:
            language[name_of(key.replace("language_model.", "model.", 1))] = tensor
    return language, vision


def kind_of(name: str, tensor: Tensor, kinds: Kinds) -> str:
    kind = kinds(name)
    if tensor.ndim == 1 or (tensor.ndim == 4 and kind != "F16"):
        return "F32"
    return kind if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0 else "F16"


def as_stored(tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    values = np.ascontiguousarray(tensor.numpy())
    if kind in ("F32", "F16"):
        return values.astype(np.float32 if kind == "F32" else np.float16)
    return zoo.gguf_bytes(torch.from_numpy(values), kind)


def write(
    path: Path, architecture: str, tensors: Mapping[str, Tensor], kinds: Kinds, metadata: Mapping[str, str] = PROJECTOR
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_string(key, value)
    for name, tensor in tensors.items():
        kind = kind_of(name, tensor, kinds)
        writer.add_tensor(name, as_stored(tensor, kind), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_both(folder: Path, state: Mapping[str, Tensor], kinds: Kinds, fused: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    language, vision = cut(state, fused)
    write(folder / LANGUAGE, gguf.MODEL_ARCH_NAMES[MODEL_ARCH.QWEN2VL], language, kinds, {})
    write(folder / VISION, gguf.MODEL_ARCH_NAMES[MODEL_ARCH.MMPROJ], vision, kinds)
    return folder


def read(folder: Path) -> tuple[Component, State]:
    recognized = recognize(folder)
    assert recognized.part == "text_encoder"
    component = recognized.components["text_encoder"]
    parameters = list(read_parameters(component, recognized.source))
    assert len(dict(parameters)) == len(parameters)
    return component, dict(parameters)


def bare(state: State) -> State:
    return {key: tensor for key, tensor in state.items() if not key.startswith("lm_head.")}


def only(kind: str) -> Kinds:
    return lambda name: kind


@pytest.fixture(scope="module")
def state(tiny_folder: Path) -> State:
    return zoo.read_text_encoder(tiny_folder)


@pytest.fixture(scope="module")
def pair(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In F32; not to be changed."""
    return write_both(tmp_path_factory.mktemp("pair"), state, only("F32"))


# names


def test_every_name_of_the_published_size_is_ggufs() -> None:
    expected = text_encoder_tensors(QWEN_7B)
    stored, joined = llama_cpp.split(expected, {})
    names = {PATCH_NAMES[int(piece[-1])]: piece for piece in joined[PATCHES].pieces}
    names |= {name_of(key.replace("language_model.", "model.", 1)): key for key in stored if key not in names.values()}
    assert len(names) == len(stored) == 338 + 519  # of the language model without its head, and of the vision tower
    assert {name: llama_cpp.own_name(name) for name in names} == names
    assert llama_cpp.own_name(name_of("lm_head.weight")) == "lm_head.weight"
    assert all(len(shape) <= 4 for shape in stored.values())


def test_pieces_make_up_what_they_were_cut_from() -> None:
    expected = text_encoder_tensors(QWEN_7B)
    stored, joined = llama_cpp.split(expected, {})
    assert stored.keys() - expected.keys() == {piece for join in joined.values() for piece in join.pieces}
    assert expected.keys() - stored.keys() == joined.keys()
    assert len(joined) == 1 + 2 * 32
    for key, join in joined.items():
        pieces = [torch.empty(stored[piece], device="meta") for piece in join.pieces]
        assert torch.stack(pieces, join.axis).reshape(join.shape).shape == expected[key]
    assert stored[f"{PATCHES}.1"] == (1280, 3, 14, 14)
    assert stored["visual.blocks.31.attn.v.weight"] == (1280, 1280)


def test_the_published_size_is_told_from_shapes() -> None:
    stored, _ = llama_cpp.split(text_encoder_tensors(QWEN_7B), {})
    tensors = {key: TensorInfo("F16", shape, 0, 0) for key, shape in stored.items()}
    assert llama_cpp.with_whole_patches(tensors)[PATCHES].shape == (1280, 3, 2, 14, 14)


def test_the_metadata_is_ggufs() -> None:
    assert gguf.MODEL_ARCH_NAMES[MODEL_ARCH.QWEN2VL] == llama_cpp.LANGUAGE_ARCHITECTURES[0]
    assert gguf.MODEL_ARCH_NAMES[MODEL_ARCH.MMPROJ] == llama_cpp.VISION_ARCHITECTURE
    assert gguf.VisionProjectorType.QWEN25VL == llama_cpp.PROJECTOR
    assert gguf.Keys.Clip.PROJECTOR_TYPE == "clip.projector_type"
    assert gguf.Keys.General.ARCHITECTURE == "general.architecture"


@pytest.mark.parametrize(
    "key", ["blk.0.attn_q.scale", "blk.x.attn_q.weight", "v.blk.0.attn_norm.weight", "v.patch_embd.weight.2", ""]
)
def test_other_names_stay(key: str) -> None:
    assert llama_cpp.own_name(key) == key


def test_no_torch_is_needed(pair: Path) -> None:
    code = (
        f"import sys; from millicent.checkpoint.recognize import recognize; recognize({str(pair)!r}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "False"


# values


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", BOUNDS)
def test_every_parameter_comes_back_once(kind: str, fused: bool, state: State, tmp_path: Path) -> None:
    component, found = read(write_both(tmp_path / "encoder", state, only(kind), fused))
    truth = bare(state)
    assert {key: tensor.shape for key, tensor in found.items()} == {key: tensor.shape for key, tensor in truth.items()}
    assert component.layout is not None
    narrow = 2  # the vision MLP's second matrices, of 48 columns: stored in F16
    quantized = LINEARS + 1 - narrow - (4 if fused else 0)
    schemes = {"plain": quantized + narrow} if kind in ("F32", "F16", "BF16") else {f"gguf {kind}": quantized, "plain": narrow}
    assert component.layout.schemes == schemes
    for key, tensor in found.items():
        if BOUNDS[kind] == 0 or tensor.ndim == 1:
            assert torch.equal(tensor, truth[key]), key
        else:
            assert float((tensor.float() - truth[key]).norm() / truth[key].norm()) < BOUNDS[kind], key


def test_the_values_are_those_that_gguf_reads(state: State, tmp_path: Path) -> None:
    folder = write_both(tmp_path / "encoder", state, only("Q8_0"))
    _, found = read(folder)
    held = {t.name: t for name in (LANGUAGE, VISION) for t in gguf.GGUFReader(folder / name).tensors}

    def truth(name: str) -> np.ndarray[Any, Any]:
        return gguf.quants.dequantize(held[name].data, held[name].tensor_type)

    block = "v.blk.1.attn_{}.weight"
    np.testing.assert_array_equal(
        found["visual.blocks.1.attn.qkv.weight"].numpy(), np.concatenate([truth(block.format(third)) for third in "qkv"])
    )
    np.testing.assert_array_equal(found["language_model.embed_tokens.weight"].numpy(), truth("token_embd.weight"))
    np.testing.assert_array_equal(found[PATCHES].numpy(), np.stack([truth(name) for name in PATCH_NAMES], 2))


def wide_state() -> State:
    """Rows of 256 values, which the K types' blocks need."""
    config = {
        "vocab_size": 40, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "vision_config": {
            "hidden_size": 256, "out_hidden_size": 256, "intermediate_size": 300, "depth": 2, "temporal_patch_size": 2,
            "patch_size": 14, "spatial_merge_size": 2,
        },
    }  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    return {key: torch.randn(shape, generator=generator) for key, shape in text_encoder_tensors(config).items()}


def mixed(name: str) -> str:
    """As llama-quantize's Q4_K_M: each third of a qkv may be of another type."""
    if name.startswith(("v.", "mm.")):
        return {"attn_q": "Q8_0", "attn_k": "F16", "attn_v": "BF16", "attn_out": "Q5_K"}.get(name.split(".")[-2], "Q8_0")
    return "Q6_K" if "attn_v" in name or name == "token_embd.weight" else "Q4_K"


def test_types_may_be_mixed(tmp_path: Path) -> None:
    state = wide_state()
    component, found = read(write_both(tmp_path / "encoder", state, mixed))
    assert component.layout is not None
    assert set(component.layout.schemes) == {"gguf Q4_K", "gguf Q5_K", "gguf Q6_K", "gguf Q8_0", "plain"}
    assert found.keys() == state.keys()
    for key, tensor in found.items():
        error = float((tensor.float() - state[key]).norm() / state[key].norm())
        assert error < (0.1 if "language" in key else 0.05), (key, error)


def hidden_states(editor: Editor) -> Tensor:
    with torch.inference_mode():
        states, _ = editor._model.text_encoder.encode(["make the shirt navy"], [[draw_picture(56, 84)]])
    return states


@pytest.mark.parametrize(("kind", "bound"), [("F32", 0.0), ("F16", 0.001), ("Q8_0", 0.03)])
def test_an_editor_reads_what_the_folders_own_encoder_reads(
    kind: str, bound: float, state: State, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = write_both(tmp_path / "encoder", state, only(kind))
    wanted = hidden_states(Editor.open(tiny_folder, device="cpu"))
    found = hidden_states(Editor.open(tiny_folder, text_encoder=folder, device="cpu"))
    assert float((found - wanted).norm() / wanted.norm()) <= bound


def test_a_model_folder_may_have_them_as_its_own(state: State, tiny_folder: Path, own_folder: Path) -> None:
    """Beside the config.json, which says the sizes then."""
    (own_folder / "text_encoder" / "model.safetensors").unlink()
    write_both(own_folder / "text_encoder", state, only("F32"))
    assert torch.equal(hidden_states(Editor.open(own_folder, device="cpu")), hidden_states(Editor.open(tiny_folder, device="cpu")))


def test_a_config_of_another_number_of_frames_is_refused(state: State, own_folder: Path) -> None:
    part = own_folder / "text_encoder"
    (part / "model.safetensors").unlink()
    config = read_json(part / "config.json")
    config["vision_config"]["temporal_patch_size"] = 1
    (part / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsMismatchError, match=rf"1 not the network's: {PATCHES}\.1"):
        recognize(write_both(part, state, only("F32")))


@pytest.mark.parametrize(
    ("name", "value"), [("v.blk.1.attn_v.weight", np.nan), (PATCH_NAMES[1], np.inf), ("v.blk.0.attn_k.bias", np.nan)]
)
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_pieces_that_are_not_finite_are_refused(name: str, value: float, kind: str, state: State, tmp_path: Path) -> None:
    language, vision = cut(state)
    vision[name] = vision[name].clone()
    vision[name].view(-1)[5] = value
    write(tmp_path / LANGUAGE, "qwen2vl", language, only(kind), {})
    with np.errstate(invalid="ignore"):
        write(tmp_path / VISION, "clip", vision, only(kind))
    with pytest.raises(CheckpointError, match="not finite"):
        read(tmp_path)


# `millicent inspect`


def inspect(path: Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return result.exit_code, found


def test_inspect_tells_both_files_as_one(state: State, tmp_path: Path) -> None:
    folder = write_both(tmp_path / "encoder", state, only("Q8_0"))
    code, found = inspect(folder)
    assert code == 0
    assert (found["what"], found["container"], found["loads"]) == ("text_encoder", "gguf", "by dequantizing to BF16")
    assert found["layouts"] == {"text_encoder": {"gguf Q8_0": LINEARS - 1, "plain": 2}}
    assert found["size_bytes"] == sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "told"),
    [(LANGUAGE, "without its vision tower.*mmproj file beside it"), (VISION, r"\(mmproj\) without its language model")],
)
def test_one_file_alone_is_refused(name: str, told: str, pair: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Also where the other one lies beside it: the folder is asked for."""
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / name).symlink_to(pair / name)
    for path in (pair / name, folder):
        with pytest.raises(IncompleteModelError, match=f"{told}.*give the folder"):
            recognize(path)
        with pytest.raises(IncompleteModelError, match=told):
            Editor.open(tiny_folder, text_encoder=path, device="cpu")
        code, found = inspect(path)
        assert (code, found["what"], found["loads"]) == (30, "text_encoder", "no")


# what is refused


def test_without_any_of_its_tensors_it_is_refused(pair: Path) -> None:
    files = open_weights(pair)
    for key in files.header.tensors:
        rest = {name: info for name, info in files.header.tensors.items() if name != key}
        short = WeightFiles(dataclasses.replace(files.header, tensors=rest), files.source, files.config)
        if key == "output.weight":
            assert recognize_files(short).components
            continue
        with pytest.raises(CheckpointError, match=r"is missing|no whole network: \d+ missing|no five dimensions"):
            recognize_files(short)


EXTRA = ["blk.0.attn_q_norm.weight", "blk.2.attn_norm.weight", "v.blk.0.ln1.bias", "v.position_embd.weight", "v.patch_embd.bias"]
EXTRA += ["v.blk.0.attn_qkv.weight", "mm.1.weight", "a.blk.0.ln1.weight", "v.post_ln.bias", "blk.0.attn_q.scale"]


@pytest.mark.parametrize("key", EXTRA)
def test_a_tensor_more_is_refused(key: str, state: State, tmp_path: Path) -> None:
    language, vision = cut(state)
    (language if key.startswith("blk.") else vision)[key] = torch.ones(32)
    write(tmp_path / LANGUAGE, "qwen2vl", language, only("F32"), {})
    write(tmp_path / VISION, "clip", vision, only("F32"))
    with pytest.raises(WeightsMismatchError, match=r"no whole network: \d+ (not the network's|missing): "):
        recognize(tmp_path)


def test_a_tensor_by_both_names_is_refused(state: State, tmp_path: Path) -> None:
    language, vision = cut(state)
    write(tmp_path / LANGUAGE, "qwen2vl", {**language, "visual.merger.ln_q.weight": torch.ones(32)}, only("F32"), {})
    write(tmp_path / VISION, "clip", vision, only("F32"))
    with pytest.raises(CheckpointError, match=r"visual\.merger\.ln_q\.weight twice, once as v\.post_ln\.weight"):
        recognize(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        [("a.gguf", "qwen2vl", 0), ("b.gguf", "qwen2vl", 0)],
        [("a.gguf", "clip", 1), ("b.gguf", "clip", 1)],
        [("a.gguf", "qwen2vl", 0), ("b.gguf", "qwen2vl", 0), ("mmproj.gguf", "clip", 1)],
        [("a.gguf", "qwen2vl", 0), ("mmproj-f16.gguf", "clip", 1), ("mmproj-q8.gguf", "clip", 1)],
        [("a.gguf", "qwen2", 0), ("mmproj.gguf", "clip", 1)],  # Qwen2.5's shapes are the same
        [("a.gguf", "qwen2vl", 0), ("b.gguf", "qwen_image", 1)],
    ],
)
def test_other_sets_of_files_are_refused(files: list[tuple[str, str, int]], state: State, tmp_path: Path) -> None:
    for name, architecture, part in files:
        write(tmp_path / name, architecture, cut(state)[part], only("F32"))
    with pytest.raises(IncompleteModelError, match=rf"holds {len(files)} GGUF files: a\.gguf \({files[0][1]}\), .*wanted.*Keep"):
        recognize(tmp_path)


@pytest.mark.parametrize("metadata", [{"clip.projector_type": "qwen2vl_merger"}, {"clip.projector_type": "qwen3vl_merger"}, {}])
def test_another_models_vision_tower_is_refused(metadata: dict[str, str], state: State, tmp_path: Path) -> None:
    language, vision = cut(state)
    write(tmp_path / LANGUAGE, "qwen2vl", language, only("F32"), {})
    write(tmp_path / VISION, "clip", vision, only("F32"), metadata)
    with pytest.raises(CheckpointError, match=r"vision tower of another model \(.*wanted qwen2\.5vl_merger\)"):
        recognize(tmp_path)


def test_a_vision_tower_of_another_size_is_refused(state: State, tmp_path: Path) -> None:
    write(tmp_path / LANGUAGE, "qwen2vl", cut(state)[0], only("F32"), {})
    write(tmp_path / VISION, "clip", cut(wide_state())[1], only("F32"))
    with pytest.raises(WeightsMismatchError, match=r"vision tower gives \[256\] values a token.*takes \[64\].*same model size"):
        recognize(tmp_path)


def test_another_size_than_the_folders_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    recognized = recognize(write_both(tmp_path / "encoder", wide_state(), only("F32")))
    network = build_network(read_json(tiny_folder / "text_encoder" / "config.json"))
    with pytest.raises(WeightsMismatchError, match="of another shape"):
        load_network(network, recognized.components["text_encoder"], recognized.source, torch.float32, keep_codes=True)


def test_other_models_of_llama_cpps_are_named() -> None:
    """Llama's keys have no biases; a plain vision tower's MLP is not gated."""
    for key in ("blk.0.attn_q.weight", "v.blk.0.attn_q.weight", "v.blk.0.attn_qkv.weight"):
        assert find_part([key]) == Found("other", family="another language or vision model of llama.cpp's")


def test_a_shape_that_is_not_the_networks_is_refused(state: State, tmp_path: Path) -> None:
    language, vision = cut(state)
    vision["v.blk.1.attn_k.weight"] = torch.ones(64, 32)
    write(tmp_path / LANGUAGE, "qwen2vl", language, only("F32"), {})
    write(tmp_path / VISION, "clip", vision, only("F32"))
    with pytest.raises(CheckpointError, match=r"visual\.blocks\.1\.attn\.k"):
        recognize(tmp_path)
