"""Fetching from a hub that is real HTTP on this machine, and misbehaves in every way that a hub or a network can."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.file_download
import numpy as np
import pytest
from hub_server import COMMIT, FakeHub, serve_hub
from safetensors.numpy import save

from millicent.checkpoint.fetch import RECORD, FetchProgress, fetch, list_model
from millicent.checkpoint.folder import PARTS, find_weight_files, open_folder
from millicent.checkpoint.hub import Hub
from millicent.errors import (
    CheckpointError,
    InputError,
    InputNotFoundError,
    MachineError,
    ModelNotFoundError,
    OutputError,
)

REPO = "someone/some-lora"
FILE = "sub/lora.safetensors"
TOKEN = "hf_secret"


def make_lora(rank: int = 16, seed: int = 0) -> bytes:
    """A LoRA of one layer, of 12 KB a rank."""
    numbers = np.random.default_rng(seed)
    layer = "transformer_blocks.0.attn.to_q"
    shapes = {f"{layer}.lora_down.weight": (rank, 1536), f"{layer}.lora_up.weight": (1536, rank), f"{layer}.alpha": ()}
    return save({key: numbers.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()})


LORA = make_lora()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    # small files in small pieces, and no waiting between attempts
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    with serve_hub() as hub:
        hub.add(REPO, {"README.md": b"# A LoRA\n", FILE: LORA})
        yield hub


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def pull(hub: FakeHub, folder: Path, *files: str, repo: str = REPO, token: str | None = None, **options: bool) -> set[str]:
    """The paths that were fetched."""
    known = Hub(hub.endpoint, token)
    return set(fetch(list_model(repo, files, hub=known), folder, known, **options).fetched)


def test_what_comes_is_whole_and_written_down(hub: FakeHub, tmp_path: Path) -> None:
    told: list[FetchProgress] = []
    known = Hub(hub.endpoint)
    listing = list_model(REPO, hub=known)
    assert (listing.license, listing.commercial, listing.size_bytes) == ("apache-2.0", True, len(LORA))
    fetched = fetch(listing, tmp_path, known, on_progress=told.append)
    assert (tmp_path / FILE).read_bytes() == LORA
    assert fetched.fetched_bytes == len(LORA) == hub.downloaded_bytes(FILE)
    assert files_in(tmp_path) == {FILE, RECORD}
    assert json.loads((tmp_path / RECORD).read_text())["sources"] == [
        {
            "repo": REPO,
            "revision": None,
            "commit": COMMIT,
            "license": "apache-2.0",
            "commercial_use": True,
            "license_accepted": False,
            "files": {FILE: {"size_bytes": len(LORA), "sha256": hashlib.sha256(LORA).hexdigest()}},
        }
    ]
    assert list(dict.fromkeys(progress.stage for progress in told)) == ["check", "inspect", "fetch"]
    assert (told[-1].done_bytes, told[-1].total_bytes) == (len(LORA), len(LORA))


def test_nothing_comes_twice(hub: FakeHub, tmp_path: Path) -> None:
    assert pull(hub, tmp_path, FILE) == {FILE}
    hub.requests.clear()
    assert pull(hub, tmp_path, FILE) == set()
    assert [request for request in hub.requests if request.sent] == []


def test_a_file_that_is_not_in_lfs_is_checked_by_gits_hash(hub: FakeHub, tmp_path: Path) -> None:
    text = LORA[:9000]
    hub.add(REPO, {"README.md": text, FILE: LORA})
    hub.cut_after = [4096]  # of what a hub would compress, if it was let
    assert pull(hub, tmp_path / "right", "README.md") == {"README.md"}
    assert [request.begin for request in hub.downloads("README.md")] == [0, 4096]
    hub.contents["README.md"] = text[::-1]
    with pytest.raises(CheckpointError, match="other bytes"):
        pull(hub, tmp_path / "wrong", "README.md")


def test_a_cut_connection_is_taken_up_where_it_broke(hub: FakeHub, tmp_path: Path) -> None:
    half = len(LORA) // 2 // 1024 * 1024
    hub.cut_after = [half, 1024]
    assert pull(hub, tmp_path, FILE) == {FILE}
    assert (tmp_path / FILE).read_bytes() == LORA
    assert [request.begin for request in hub.downloads(FILE)] == [0, half, half + 1024]
    assert hub.downloaded_bytes(FILE) == len(LORA)


def test_a_network_that_stays_away_leaves_what_came_for_the_next_run(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after = [8192, *[0] * 20]
    with pytest.raises(CheckpointError, match=r"broke off.*go on from here"):
        pull(hub, tmp_path, FILE)
    (part,) = (tmp_path / "sub").iterdir()
    assert part.read_bytes() == LORA[:8192]
    hub.cut_after = []
    told: list[FetchProgress] = []
    known = Hub(hub.endpoint)
    fetched = fetch(list_model(REPO, hub=known), tmp_path, known, on_progress=told.append)
    assert fetched.fetched_bytes == len(LORA) - 8192
    assert next(progress.done_bytes for progress in told if progress.stage == "fetch") == 8192
    assert hub.downloaded_bytes(FILE) == told[-1].done_bytes == len(LORA)
    assert files_in(tmp_path) == {FILE, RECORD}


def test_a_killed_run_is_taken_up(hub: FakeHub, tmp_path: Path) -> None:
    """A real process with the library's own pieces of 10 MiB: one of them is on disk when it dies."""
    data, piece = make_lora(rank=2000), 10 << 20
    hub.add(REPO, {FILE: data})
    hub.stall_after = piece + 4096
    code = f"""
from pathlib import Path
from millicent.checkpoint.fetch import fetch, list_model
from millicent.checkpoint.hub import Hub
hub = Hub({hub.endpoint!r})
fetch(list_model({REPO!r}, hub=hub), Path({str(tmp_path)!r}), hub)"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size == piece for path in tmp_path.glob("sub/*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.released.set()
    assert files_in(tmp_path) == {f"{FILE}.{hashlib.sha256(data).hexdigest()[:12]}.part"}
    hub.stall_after = None
    assert pull(hub, tmp_path) == {FILE}
    assert hub.downloads(FILE)[-1].begin == piece
    assert (tmp_path / FILE).read_bytes() == data
    assert files_in(tmp_path) == {FILE, RECORD}


def test_a_part_that_is_longer_than_the_file_is_begun_again(hub: FakeHub, tmp_path: Path) -> None:
    part = tmp_path / f"{FILE}.{hashlib.sha256(LORA).hexdigest()[:12]}.part"
    part.parent.mkdir()
    part.write_bytes(LORA + b"more")
    assert pull(hub, tmp_path) == {FILE}
    assert files_in(tmp_path) == {FILE, RECORD}


def test_wrong_bytes_are_deleted(hub: FakeHub, tmp_path: Path) -> None:
    hub.contents[FILE] = LORA[:-1] + bytes([LORA[-1] ^ 1])
    with pytest.raises(CheckpointError, match=r"other bytes.*hash is not.*deleted"):
        pull(hub, tmp_path)
    assert files_in(tmp_path) == set()


def test_a_length_that_is_a_lie(hub: FakeHub, tmp_path: Path) -> None:
    hub.length_too_large = 100
    with pytest.raises(CheckpointError, match="broke off"):
        pull(hub, tmp_path / "long")
    assert not (tmp_path / "long" / FILE).exists()
    hub.length_too_large = -100
    with pytest.raises(CheckpointError, match=r"came with.*deleted"):
        pull(hub, tmp_path / "short")
    assert files_in(tmp_path / "short") == set()


def test_a_server_with_another_size_than_the_hub_lists(hub: FakeHub, tmp_path: Path) -> None:
    hub.contents[FILE] = make_lora(rank=8)
    with pytest.raises(CheckpointError, match=f"{len(LORA)} bytes, and its server has {len(hub.contents[FILE])}"):
        pull(hub, tmp_path)
    assert hub.downloads(FILE) == []


def test_a_server_that_ignores_ranges_is_refused_before_a_body_is_read(hub: FakeHub, tmp_path: Path) -> None:
    data = make_lora(rank=2000)
    hub.add(REPO, {FILE: data})
    hub.ignores_ranges = True
    with pytest.raises(CheckpointError, match="would send the whole file"):
        pull(hub, tmp_path)
    hub.wait()
    assert [request for request in hub.requests if request.server == "cdn" and request.sent] == []
    assert files_in(tmp_path) == set()


def test_a_server_that_ignores_ranges_later_sends_the_file_from_its_beginning(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after = [8192, *[0] * 20]
    with pytest.raises(CheckpointError):
        pull(hub, tmp_path, "README.md", FILE)
    hub.cut_after = []
    known = Hub(hub.endpoint)
    listing = list_model(REPO, [FILE], hub=known)
    told: list[FetchProgress] = []

    def tell(progress: FetchProgress) -> None:
        hub.ignores_ranges = progress.stage == "fetch"
        told.append(progress)

    fetch(listing, tmp_path, known, on_progress=tell)
    assert (tmp_path / FILE).read_bytes() == LORA
    assert hub.downloads(FILE)[-1].sent == len(LORA)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "LFS pointer": ("x.safetensors", POINTER, "LFS pointer"),
    "pickle": ("x.bin", b"PK\x03\x04" + bytes(500), "pickle"),
    "pickle under a good name": ("x.safetensors", b"\x80\x04" + bytes(500), "pickle"),
    "web page": ("x.safetensors", b"<!doctype html><title>Sorry</title>", "web page"),
    "truncated": ("x.safetensors", LORA[:-100], "broke off"),
    "another network": ("x.safetensors", save({"double_blocks.0.img_attn.qkv.weight": np.zeros((4, 4), np.float32)}), "Flux"),
    "no network": ("x.safetensors", save({"a": np.zeros(4, np.float32)}), "unknown network"),
}


@pytest.mark.parametrize(("name", "data", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_a_file_that_would_not_load_is_never_downloaded(hub: FakeHub, tmp_path: Path, name: str, data: bytes, told: str) -> None:
    hub.add(REPO, {name: data, "other.safetensors": LORA})
    with pytest.raises(CheckpointError, match=told):
        pull(hub, tmp_path, "other.safetensors", name)
    assert [request for request in hub.requests if request.is_download and request.sent and request.server == "cdn"] == []
    assert files_in(tmp_path) == set()


def test_a_shard_alone(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(REPO, {f"x-0000{n}-of-00002.safetensors": LORA for n in (1, 2)})
    with pytest.raises(CheckpointError, match="1 of 2 are chosen"):
        pull(hub, tmp_path, "x-00001-of-00002.safetensors")


def test_too_little_disk(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    free = len(LORA)  # enough for the file, but not for the margin
    with pytest.raises(MachineError, match="Make room"):
        pull(hub, tmp_path / "a" / "b")
    assert asked == [tmp_path]
    assert [request for request in hub.requests if request.sent] == []
    hub.cut_after = [len(LORA) // 2 // 1024 * 1024, *[0] * 20]
    free = 10 * len(LORA)
    with pytest.raises(CheckpointError):
        pull(hub, tmp_path)
    hub.cut_after, free = [], len(LORA)  # half is there: now there is room
    assert pull(hub, tmp_path) == {FILE}


def test_a_login_goes_to_the_hub_alone(hub: FakeHub, tmp_path: Path) -> None:
    hub.wanted_token = TOKEN
    assert pull(hub, tmp_path, FILE, "README.md", token=TOKEN) == {FILE, "README.md"}
    assert {(request.server, request.authorization) for request in hub.requests} == {("hub", f"Bearer {TOKEN}"), ("cdn", None)}


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("file", [FILE, "README.md"])
def test_a_gated_repository(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, file: str) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # a library does not look for it
    hub.wanted_token, hub.gated_status = TOKEN, status
    with pytest.raises(CheckpointError, match=r"gated|login") as caught:
        pull(hub, tmp_path, file)
    assert not isinstance(caught.value, ModelNotFoundError)
    assert {request.authorization for request in hub.requests} == {None}


def test_what_is_not_there(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no repository someone/nothing"):
        pull(hub, tmp_path, repo="someone/nothing")
    with pytest.raises(ModelNotFoundError, match="no such revision"):
        list_model(REPO, revision="v9", hub=Hub(hub.endpoint))
    with pytest.raises(InputError, match=r"no file nothing\.gguf"):
        pull(hub, tmp_path, "nothing.gguf")
    with pytest.raises(ModelNotFoundError, match="qwen-image-edit-2511-lightning-4steps"):
        pull(hub, tmp_path, repo="qwen-image")
    with pytest.raises(ModelNotFoundError, match="owner/name"):
        pull(hub, tmp_path, repo="some/one/else")
    hub.files[REPO][FILE] = LORA
    hub.listed_path = lambda path: f"{path}.safetensors"
    with pytest.raises(InputNotFoundError, match="nothing at"):
        pull(hub, tmp_path, f"{FILE}.safetensors")


def test_no_hub_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1:9 broke off"):
        list_model(REPO, hub=Hub("http://127.0.0.1:9"))


def test_a_server_that_is_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "listing", lambda repo: ["not a listing"])
    with pytest.raises(CheckpointError, match="not answer as a hub"):
        list_model(REPO, hub=Hub(hub.endpoint))


@pytest.mark.parametrize("path", ["../up.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "a\\b.safetensors", "a//b"])
def test_a_path_that_leads_out_of_the_folder(hub: FakeHub, path: str) -> None:
    hub.listed_path = lambda listed: path
    with pytest.raises(CheckpointError, match="a file named"):
        list_model(REPO, hub=Hub(hub.endpoint))


@pytest.mark.parametrize(
    "damage", [{"sha": None}, {"siblings": [{"rfilename": "x.gguf", "size": 5}]}, {"siblings": [{"rfilename": "x.gguf"}]}]
)
def test_a_listing_that_cannot_be_checked(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, damage: dict[str, object]) -> None:
    listing = hub.listing(REPO)
    monkeypatch.setattr(hub, "listing", lambda repo: listing | damage)
    with pytest.raises(CheckpointError, match="The hub lists"):
        list_model(REPO, hub=Hub(hub.endpoint))


def test_a_license_without_commercial_use_is_accepted_or_nothing_comes(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(REPO, {FILE: LORA}, license="other", license_name="qwen-research")
    with pytest.raises(InputError, match=r"qwen-research.*--accept-license"):
        pull(hub, tmp_path)
    assert [request for request in hub.requests if request.sent] == []
    assert pull(hub, tmp_path, accept_license=True) == {FILE}
    (source,) = json.loads((tmp_path / RECORD).read_text())["sources"]
    assert (source["license"], source["commercial_use"], source["license_accepted"]) == ("qwen-research", False, True)


def test_an_unknown_license_is_said_to_be(hub: FakeHub) -> None:
    for declared, license_name in (({"license": None}, None), ({"license": "other"}, "other")):
        hub.add(REPO, {FILE: LORA}, **declared)
        listing = list_model(REPO, hub=Hub(hub.endpoint))
        assert (listing.license, listing.commercial) == (license_name, None)


def test_several_weight_files_must_be_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(REPO, {"a.safetensors": LORA, "b.safetensors": LORA, "c.txt": b""})
    with pytest.raises(InputError, match=r"2 weight files.*a\.safetensors, b\.safetensors"):
        pull(hub, tmp_path)
    assert pull(hub, tmp_path, "?.safetensors", "c.txt") == {"a.safetensors", "b.safetensors", "c.txt"}


def test_a_file_of_ones_own_is_never_replaced(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / FILE).write_bytes(b"mine")
    with pytest.raises(OutputError, match="is there already"):
        pull(hub, tmp_path)
    assert (tmp_path / FILE).read_bytes() == b"mine"
    (tmp_path / FILE).write_bytes(LORA)  # the same file, from somewhere else
    assert pull(hub, tmp_path) == set()


def test_another_revision_replaces_what_an_earlier_one_brought(hub: FakeHub, tmp_path: Path) -> None:
    assert pull(hub, tmp_path, FILE, "README.md") == {FILE, "README.md"}
    hub.add(REPO, {"README.md": b"# A LoRA\n", FILE: make_lora(seed=1)})
    hub.commit = 40 * "1"
    assert pull(hub, tmp_path, FILE) == {FILE}
    older, newer = json.loads((tmp_path / RECORD).read_text())["sources"]
    assert (older["commit"], set(older["files"])) == (COMMIT, {"README.md"})
    assert (newer["commit"], set(newer["files"])) == (hub.commit, {FILE})
    (tmp_path / FILE).write_bytes(b"changed here since")
    with pytest.raises(OutputError, match="is there already"):
        pull(hub, tmp_path, FILE)


def test_what_another_revision_left_half_is_not_taken_up(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after = [8192, *[0] * 20]
    with pytest.raises(CheckpointError):
        pull(hub, tmp_path, FILE)
    newer = make_lora(seed=1)
    hub.add(REPO, {FILE: newer})
    hub.cut_after, hub.commit = [], 40 * "1"
    assert pull(hub, tmp_path, FILE) == {FILE}
    assert (tmp_path / FILE).read_bytes() == newer
    assert hub.downloads(FILE)[-1].begin == 0


def test_a_record_that_is_none(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(OutputError, match="no record"):
        pull(hub, tmp_path)


@pytest.mark.parametrize(
    ("card", "wanted"), [("qwen-image-edit-2511-lightning-4steps", None), ("qwen-image-edit-2511-fp8-scaled", "a transformer")]
)
def test_a_card_says_what_its_file_must_hold(hub: FakeHub, tmp_path: Path, card: str, wanted: str | None) -> None:
    from millicent.facts.models import find_any_card

    said = find_any_card(card)
    assert said.repo
    hub.add(said.repo, {said.files[0]: LORA, "other.safetensors": LORA}, license=None)
    if wanted:
        with pytest.raises(CheckpointError, match=f"holds a lora; {wanted} is wanted"):
            pull(hub, tmp_path, repo=card)
        return
    assert pull(hub, tmp_path, repo=card) == {said.files[0]}
    assert json.loads((tmp_path / RECORD).read_text())["sources"][0]["license"] == "Apache-2.0"
    with pytest.raises(InputError, match="says which files"):
        pull(hub, tmp_path, "other.safetensors", repo=card)


def folder_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_whole_model_comes_without_what_it_does_not_need(hub: FakeHub, tiny_folder: Path, tmp_path: Path) -> None:
    model = folder_files(tiny_folder)
    extra = {"README.md": b"#", "vae/other.bin": b"PK\x03\x04", "LICENSE": b"Apache", "picture.png": b"\x89PNG"}
    hub.add("Qwen/Qwen-Image-Edit-2511", model | extra)
    assert pull(hub, tmp_path, repo="qwen-image-edit-2511") == (model.keys() - {"card.toml"}) | {"LICENSE"}
    open_folder(tmp_path)
    for part in PARTS:
        if part in ("transformer", "text_encoder", "vae"):
            assert find_weight_files(tmp_path / part)


def test_a_whole_model_with_its_parts_in_the_wrong_places(hub: FakeHub, tiny_folder: Path, tmp_path: Path) -> None:
    model = folder_files(tiny_folder)
    weights = {path.partition("/")[0]: path for path in model if path.endswith(".safetensors")}
    model[weights["vae"]] = model[weights["transformer"]]
    hub.add("Qwen/Qwen-Image-Edit-2511", model)
    with pytest.raises(CheckpointError, match="holds a transformer; a vae is wanted"):
        pull(hub, tmp_path, repo="qwen-image-edit-2511")
    assert files_in(tmp_path) == set()


def test_a_config_that_names_a_foreign_format_is_read_before_the_weights_come(
    hub: FakeHub, tiny_folder: Path, tmp_path: Path
) -> None:
    model = folder_files(tiny_folder)
    config = json.loads(model["transformer/config.json"]) | {"quantization_config": {"quant_method": "gptq"}}
    hub.add("Qwen/Qwen-Image-Edit-2511", model | {"transformer/config.json": json.dumps(config).encode()})
    with pytest.raises(CheckpointError, match="quantized by gptq"):
        pull(hub, tmp_path, repo="qwen-image-edit-2511")
    assert files_in(tmp_path) == set()


def test_importing_it_loads_neither_torch_nor_the_library() -> None:
    code = """
import sys, millicent.checkpoint.fetch
print([m for m in ('torch', 'numpy', 'huggingface_hub', 'httpx2') if m in sys.modules])"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
