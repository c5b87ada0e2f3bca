"""Headers: what the real writers wrote is read as they wrote it; whatever else comes is refused with a reason."""

import json
import random
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.checkpoint.header import DTYPE_BITS, read_header
from millicent.checkpoint.source import HttpSource, open_source
from millicent.errors import CheckpointError, InputNotFoundError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip


class Bytes:
    """A source in memory that counts what is asked of it."""

    def __init__(self, data: bytes) -> None:
        self.name, self.data, self.size_bytes, self.asked = "memory", data, len(data), 0

    def read(self, begin: int, end: int) -> bytes:
        assert 0 <= begin <= end <= self.size_bytes, "a reader must not ask for what is not there"
        self.asked += end - begin
        return self.data[begin:end]


def make_tensors() -> dict[str, torch.Tensor]:
    made = {
        name: torch.randn(3, 5).to(dtype) if dtype.is_floating_point else torch.ones(3, 5).to(dtype)
        for name, dtype in DTYPES.items()
    }
    return {**made, "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "vector": torch.arange(7.0)}


def safetensors_bytes(metadata: dict[str, str] | None = None) -> bytes:
    return bytes(safetensors.torch.save(make_tensors(), metadata))


def with_header(header: dict[str, Any] | str, data: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def gguf_bytes(tmp_path: Path) -> bytes:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen_image")
    writer.add_uint32("some.number", 7)
    writer.add_array("some.words", ["a", "bc", "def"])
    writer.add_array("some.numbers", [1, 2, 3])
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.standard_normal((3, 5)).astype(np.float32))
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        blocks = gguf.quants.quantize(rng.standard_normal((4, 64)).astype(np.float32), kind)
        writer.add_tensor(f"as_{kind.name}", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_safetensors_is_read_as_its_own_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"format": "pt", "note": "é"}))
    header = read_header(path)
    assert header.metadata == {"format": "pt", "note": "é"}
    assert (header.container, header.size_bytes) == ("safetensors", path.stat().st_size)
    data = path.read_bytes()
    tensors = make_tensors()
    with safetensors.safe_open(path, "pt") as file:
        assert set(header.tensors) == set(file.keys()) == set(tensors)
        for key, info in header.tensors.items():
            tensor = file.get_tensor(key)
            assert info.shape == tuple(tensor.shape)
            assert info.dtype == next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
            raw = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
            if tensor.ndim == 0:
                raw = tensor[None].view(torch.uint8)
            assert data[info.begin : info.end] == bytes(raw.tolist()), key


def test_gguf_is_read_as_its_own_library_reads_it(tmp_path: Path) -> None:
    data = gguf_bytes(tmp_path)
    header = read_header(Bytes(data))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert header.container == "gguf"
    assert header.metadata["general.architecture"] == "qwen_image"
    assert header.metadata["some.number"] == 7
    assert header.metadata["some.words"] == "array of 3"
    assert len(reader.tensors) == len(header.tensors) == 3
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.dtype == tensor.tensor_type.name
        assert info.shape == tuple(int(side) for side in reversed(tensor.shape))
        assert (info.begin, info.end) == (tensor.data_offset, tensor.data_offset + tensor.n_bytes)


def test_gguf_headers_longer_than_the_first_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf_bytes(tmp_path)
    expected = read_header(Bytes(data))
    monkeypatch.setattr("millicent.checkpoint.header.FIRST_READ_BYTES", 40)
    source = Bytes(data)
    assert read_header(source) == expected
    assert source.asked <= 2 * expected.header_bytes


@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_a_file_that_broke_off_is_refused_wherever_it_broke(tmp_path: Path, container: str) -> None:
    data = safetensors_bytes() if container == "safetensors" else gguf_bytes(tmp_path)
    whole = read_header(Bytes(data))
    last = max(info.end for info in whole.tensors.values())
    for length in range(last):
        with pytest.raises(CheckpointError):
            read_header(Bytes(data[:length]))


def test_bytes_behind_the_last_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match="3 bytes follow its last tensor"):
        read_header(Bytes(safetensors_bytes() + b"abc"))


DAMAGED = {
    "longer than the file": (struct.pack("<Q", 10_000) + b"{}", "longer than the file"),
    "endless": (struct.pack("<Q", 2**63) + b"{}", "no safetensors and no GGUF"),
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "no JSON": (with_header("{'a': 1}"), "no JSON"),
    "deep JSON": (with_header('{"a":' + "[" * 200_000), "no JSON"),
    "no object": (with_header("[1, 2]"), "no safetensors"),
    "twice": (with_header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', bytes(8)), "twice"),
    "no entry": (with_header({"a": [1]}), "not a dtype"),
    "an extra field": (with_header({"a": {**entry(), "scale": 2}}, bytes(8)), "not a dtype"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}}), "table of strings"),
    "unknown dtype": (with_header({"a": entry("F7")}, bytes(8)), "unknown dtype 'F7'"),
    "negative shape": (with_header({"a": entry(shape=(-2,))}, bytes(8)), "the shape"),
    "shape of truths": (with_header({"a": entry(shape=(True, 2))}, bytes(8)), "the shape"),
    "shape of fractions": (with_header({"a": entry(shape=(2.0,))}, bytes(8)), "the shape"),
    "one offset": (with_header({"a": entry(offsets=(8,))}, bytes(8)), "the offsets"),
    "backwards": (with_header({"a": entry(offsets=(8, 0))}, bytes(8)), "bytes where F32"),
    "wrong size": (with_header({"a": entry(shape=(3,))}, bytes(8)), "takes 12"),
    "half a byte": (with_header({"a": entry("F4", (3,), (0, 1))}, bytes(1)), "takes 1.5"),
    "a gap": (with_header({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "begins at byte"),
    "an overlap": (with_header({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "begins at byte"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "LFS pointer"),
    "zip pickle": (b"PK\x03\x04" + bytes(40), "pickle"),
    "old pickle": (b"\x80\x02" + bytes(40), "pickle"),
    "web page": (b"\n<!DOCTYPE html><html>", "web page"),
}


@pytest.mark.parametrize(("data", "found"), DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_no_whole_weight_file_is_refused_by_name(data: bytes, found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(Bytes(data))
    assert found in caught.value.message
    assert caught.value.fix


def test_a_real_pickle_is_refused_unopened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    for zipped in (True, False):
        path = tmp_path / "weights.pt"
        torch.save({"w": torch.ones(2), "b": Bomb()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="pickle"):
            read_header(path)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_damaged_header_does_more_than_raise(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["safetensors", "gguf", "noise"]))
    if kind == "noise":
        damaged = data.draw(st.binary(max_size=300))
    else:
        whole = FUZZED[kind]
        rng = random.Random(data.draw(st.integers(0, 2**32)))
        damaged_array = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(min(len(whole), 1500))
            damaged_array[at] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        damaged = bytes(damaged_array)
    source = Bytes(damaged)
    try:
        header = read_header(source)
    except CheckpointError:
        header = None
    assert source.asked <= 4 * len(damaged)
    if header is not None:
        assert all(0 <= info.begin <= info.end <= len(damaged) for info in header.tensors.values())


@pytest.fixture(scope="module", autouse=True)
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> None:
    FUZZED["safetensors"] = safetensors_bytes({"a": "b"})
    FUZZED["gguf"] = gguf_bytes(tmp_path_factory.mktemp("gguf"))


FUZZED: dict[str, bytes] = {}


def test_every_dtype_of_the_safetensors_library_is_known() -> None:
    assert set(DTYPES) <= set(DTYPE_BITS)


class Server:
    """A file server on 127.0.0.1 whose manners can be changed."""

    def __init__(self, data: bytes, size_bytes: int) -> None:
        self.data, self.size_bytes = data, size_bytes  # what lies behind the data is zeros
        self.manners, self.sent_bytes, self.authorizations = "good", 0, list[tuple[str, str | None]]()
        handler = type("Handler", (Handler,), {"shared": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def url(self, path: str = "/model.safetensors") -> str:
        return f"http://127.0.0.1:{self.http.server_port}{path}"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Handler(BaseHTTPRequestHandler):
    shared: Server

    def do_GET(self) -> None:
        server = self.shared
        server.authorizations.append((self.path, self.headers.get("Authorization")))
        if self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", server.url("/model.safetensors?signature=secret"))
            self.end_headers()
            return
        if server.manners.isdecimal():
            self.send_response(int(server.manners))
            self.end_headers()
            return
        begin, end = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-"))
        if server.manners == "ignores ranges":
            self.send_response(200)
            self.send_header("Content-Length", str(server.size_bytes))
            self.end_headers()
            self.send_body(0, server.size_bytes)
            return
        shown = end + 1 if server.manners == "another range" else end
        self.send_response(206)
        total = {"no size": "*", "shrinks": 10}.get(server.manners, server.size_bytes)
        self.send_header("Content-Range", f"bytes {begin}-{shown}/{total}")
        self.send_header("Content-Length", str(end + 1 - begin))
        self.end_headers()
        self.send_body(begin, (begin + end) // 2 if server.manners == "hangs up" else end + 1)

    def send_body(self, begin: int, end: int) -> None:
        while begin < end:
            part = self.shared.data[begin : min(end, begin + 65536)]
            part = part or bytes(min(65536, end - begin))
            try:
                self.wfile.write(part)
            except OSError:  # the client has seen enough
                return
            self.shared.sent_bytes += len(part)
            begin += len(part)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    data = safetensors_bytes()
    made = Server(data, len(data))
    yield made
    made.close()


def test_a_header_over_http_is_the_files(server: Server) -> None:
    assert read_header(server.url()).tensors == read_header(Bytes(server.data)).tensors


def test_a_header_of_forty_gigabytes_costs_two_megabytes() -> None:
    """1933 bfloat16 tensors of a true size, of which nothing but the header exists."""
    header, end = {}, 0
    for i in range(1933):
        header[f"transformer_blocks.{i // 32}.attn.some_projection_{i}.weight"] = entry(
            "BF16", (3072, 3440), (end, end + 3072 * 3440 * 2)
        )
        end += 3072 * 3440 * 2
    data = with_header(header)
    server = Server(data, len(data) + end)
    try:
        source = HttpSource(server.url())
        assert len(read_header(source).tensors) == 1933
        assert source.size_bytes > 40e9
        assert source.bytes_read <= 2_000_000
        assert server.sent_bytes <= 2_000_000
    finally:
        server.close()


@pytest.mark.parametrize(
    ("manners", "error", "found"),
    [
        ("ignores ranges", CheckpointError, "would send the whole file"),
        ("another range", CheckpointError, "was asked for bytes"),
        ("no size", CheckpointError, "was asked for bytes"),
        ("hangs up", CheckpointError, "cannot be read|ends early"),
        ("404", InputNotFoundError, "nothing at"),
        ("401", CheckpointError, "wants a login"),
        ("403", CheckpointError, "wants a login"),
        ("500", CheckpointError, "status 500"),
    ],
)
def test_a_server_without_manners_is_refused(server: Server, manners: str, error: type[Exception], found: str) -> None:
    server.manners = manners
    with pytest.raises(error, match=found):
        read_header(server.url())


def test_a_server_that_ignores_ranges_is_not_listened_to() -> None:
    server = Server(safetensors_bytes(), 2_000_000_000)
    server.manners = "ignores ranges"
    try:
        with pytest.raises(CheckpointError):
            open_source(server.url())
    finally:
        server.close()
    assert server.sent_bytes < 20_000_000  # what the sockets' buffers took, of 2 GB


def test_the_token_stays_with_the_first_server_and_no_secret_is_shown(server: Server) -> None:
    source = open_source(server.url("/elsewhere?password=hidden"), token="hf_secret")
    read_header(source)
    assert {path.split("?")[0]: authorization for path, authorization in server.authorizations} == {
        "/elsewhere": "Bearer hf_secret",
        "/model.safetensors": None,
    }
    assert "hidden" not in source.name
    assert "secret" not in source.name


def test_no_server_at_all() -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_source("http://127.0.0.1:9/model.safetensors")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(InputNotFoundError):
            read_header(path)
