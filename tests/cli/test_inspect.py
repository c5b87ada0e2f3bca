"""`millicent inspect` as its user runs it: files, folders, and 40 GB behind a URL of which at most 2 MB are read."""

import json
import pickle
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.load import true_config, write_empty
from millicent import demo
from millicent.checkpoint.architecture import transformer_tensors
from millicent.cli.app import app

MAX_REMOTE_BYTES = 2_000_000


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def run_json(*args: str) -> dict[str, Any]:
    found = json.loads(run(*args, "--json")[1])
    assert isinstance(found, dict)
    return found


def test_a_model_folder_shows_each_part() -> None:
    code, text = run(str(demo.folder()))
    assert code == 0
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == [
        str(demo.folder() / part) for part in ("transformer", "text_encoder", "vae")
    ]
    parts = run_json(str(demo.folder()))["parts"]
    assert [part["what"] for part in parts] == ["transformer", "text_encoder", "vae"]
    assert parts[0]["variant"] == "2511"
    assert parts[0]["layouts"] == {"transformer": {"plain": 90}}
    assert all(part["loads"] == "natively" and part["refused"] is None for part in parts)


def test_a_lora_is_told_with_its_distillation() -> None:
    found = run_json(str(demo.folder() / "lightning-4steps.safetensors"))
    assert (found["what"], found["loads"]) == ("lora", "natively")
    assert "lightning" in found["distilled"]


def scaled(blocks_only: bool) -> dict[str, torch.Tensor]:
    """The demo's transformer as ComfyUI's old layout has it, without its numbers."""
    state = load_file(demo.folder() / "transformer" / "diffusion_pytorch_model.safetensors")
    stored = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn), "__index_timestep_zero__": torch.zeros(0)}
    for key, tensor in state.items():
        if tensor.ndim == 2 and (key.startswith("transformer_blocks.") or not blocks_only):
            stored |= {key: tensor.to(torch.float8_e4m3fn), f"{key.removesuffix('weight')}scale_weight": torch.ones(())}
        else:
            stored[key] = tensor
    return {f"model.diffusion_model.{key}": tensor for key, tensor in stored.items()}


def test_a_comfy_file_is_told_by_layout_maker_prefix_and_what_stays_plain(tmp_path: Path) -> None:
    path = tmp_path / "demo_fp8_scaled.safetensors"
    save_file(scaled(blocks_only=True), path)
    found = run_json(str(path))
    assert (found["maker"], found["prefix"], found["variant"]) == ("comfy", "model.diffusion_model.", "2511")
    assert found["layouts"] == {"transformer": {"comfy scaled fp8": 84, "plain": 6}}
    assert found["formats"] == {"transformer": {"fp8": 84, "bf16": 6}}
    assert "proj_out" in found["high_precision"]
    assert found["loads"] == "natively"
    assert found["size_bytes"] == path.stat().st_size


def test_what_is_refused_is_told_with_the_reason_and_what_to_get(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = scaled(blocks_only=False)
    del tensors["model.diffusion_model.proj_out.scale_weight"]
    save_file(tensors, path)
    code, text = run(str(path))
    assert code == 30
    assert re.search(r"loads +no", text)
    assert re.search(r"refused .*proj_out.*\. .*another file", text)
    assert run_json(str(path))["what"] == "transformer"


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(Exception, match="pickle"):
        run(str(path))
    assert not (tmp_path / "sprung").exists()


class RangeServer(ThreadingHTTPServer):
    """Serves one file by ranges and counts what it sends."""

    path: Path
    sent = 0
    tokens: set[str | None]

    def __init__(self, path: Path) -> None:
        super().__init__(("127.0.0.1", 0), RangeHandler)
        self.path, self.tokens = path, set()


class RangeHandler(BaseHTTPRequestHandler):
    server: RangeServer

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        begin, end = (int(each) for each in self.headers["Range"].removeprefix("bytes=").split("-"))
        with self.server.path.open("rb") as file:
            file.seek(begin)
            data = file.read(end + 1 - begin)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end}/{self.server.path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.server.sent += len(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Any]:
    servers = []

    def start(path: Path) -> RangeServer:
        server = RangeServer(path)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def write_comfy(path: Path) -> None:
    """The header of a whole file of 20 GB in ComfyUI's layout with a note for each layer, and holes for the codes."""
    note = json.dumps({"format": "float8_e4m3fn"}).encode()
    entries: dict[str, Any] = {}
    notes: dict[str, int] = {}
    end = 0

    def add(key: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
        nonlocal end
        entries[f"model.diffusion_model.{key}"] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size

    expected = transformer_tensors(true_config(60))
    matrices = {key for key, shape in expected.items() if len(shape) == 2 and key.startswith("transformer_blocks.")}
    for key, shape in expected.items():
        size = torch.Size(shape).numel()
        add(key, *(("F8_E4M3", shape, size) if key in matrices else ("BF16", shape, 2 * size)))
    for key in sorted(matrices):
        add(f"{key}_scale", "F32", (), 4)
    for key in sorted(matrices):
        notes[key] = end
        add(f"{key.removesuffix('weight')}comfy_quant", "U8", (len(note),), len(note))
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for place in notes.values():
            file.seek(8 + len(header) + place)
            file.write(note)
        file.truncate(8 + len(header) + end)


@pytest.mark.parametrize(("write", "size", "layouts"), [
    (write_empty, 40.8e9, {"plain": 846}),
    (write_comfy, 20.4e9, {"fp8 per tensor": 840, "plain": 6}),
])  # fmt: skip
def test_a_whole_model_behind_a_url_costs_two_megabytes(
    tmp_path: Path, serve: Any, write: Any, size: float, layouts: dict[str, int]
) -> None:
    path = tmp_path / "qwen_image_edit_2511.safetensors"
    write(path)
    server = serve(path)
    found = run_json(f"http://127.0.0.1:{server.server_port}/{path.name}")
    assert found["size_bytes"] > size
    assert found["layouts"] == {"transformer": layouts}
    assert found["variant"].startswith("unknown")
    assert 0 < server.sent < MAX_REMOTE_BYTES


def test_the_hubs_token_goes_to_the_hub_alone(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(demo.folder() / "lightning-4steps.safetensors")
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run(f"{address}/lora.safetensors")
    assert server.tokens == {None}
    server.tokens.clear()
    monkeypatch.setenv("HF_ENDPOINT", address)
    run(f"{address}/lora.safetensors")
    assert server.tokens == {"Bearer hf_secret"}
