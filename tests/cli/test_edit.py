"""`millicent edit` as its user runs it: what it writes, what it prints, and how it refuses."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_picture
from PIL import Image
from safetensors.torch import load_file, save_file

from millicent import demo
from millicent.cli.app import main
from millicent.cli.edit import describe_engine, tell
from millicent.engine.machine_plan import weigh_plan
from millicent.engine.placement import Placement, place_on_card
from millicent.engine.planner import plan
from millicent.engine.settings import Settings
from millicent.engine.workload import ask
from millicent.images import before_after, open_image, read_metadata, save_image

PICTURE = draw_picture(96, 128)
PROMPT = "make the shirt navy blue"


@dataclass
class Ran:
    code: int
    out: bytes
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """The command in this process, so that torch is imported once."""

    def call(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["millicent", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            main()
        assert isinstance(exited.value.code, int)
        captured = capfdbinary.readouterr()
        return Ran(exited.value.code, captured.out, captured.err.decode())

    return call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    PICTURE.save(path)
    return path


def pixels(path: Path | bytes) -> np.ndarray:
    return np.asarray(open_image(path)).astype(int)


def test_an_edit_is_written_and_told(run: Run, picture: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    ran = run("edit", picture, PROMPT, "-o", out, "--model", tiny_folder, "--seed", 3, "--steps", 2)
    assert (ran.code, ran.err) == (0, "")
    assert re.fullmatch(rf"{out}  seed 3, 2 steps, \S+\n[\d.]+ s: prepare .*, encode .*, denoise .*, decode .*\n", ran.out.decode())
    assert pixels(out).std() > 10


def test_the_metadata_is_enough_to_repeat_the_edit(run: Run, picture: Path, tiny_folder: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    options = ("--negative", "dull", "--true-cfg", 2.5, "--size", "100x80", "--fit", "crop", "--schedule", "lightning")
    assert run("edit", picture, PROMPT, "-o", first, "--model", tiny_folder, "--steps", 2, *options).code == 0
    noted = read_metadata(first)
    assert noted is not None
    assert noted["inputs_sha256"] == [hashlib.sha256(picture.read_bytes()).hexdigest()]
    assert (noted["width"], noted["height"], noted["steps"], noted["true_cfg"]) == (100, 80, 2, 2.5)
    repeated = run(
        *("edit", picture, noted["prompt"], "-o", again, "--model", tiny_folder, "--seed", noted["seed"]),
        *("--sigmas", ",".join(map(repr, noted["sigmas"][:-1])), "--true-cfg", noted["true_cfg"]),
        *("--negative", noted["negative_prompt"], "--size", f"{noted['width']}x{noted['height']}", "--fit", noted["fit"]),
    )
    assert repeated.code == 0
    assert np.array_equal(pixels(first), pixels(again))
    noted_again = read_metadata(again)
    assert noted_again is not None
    assert noted_again["weights_sha256"] == noted["weights_sha256"]


def test_json_is_one_object_with_what_was_written(run: Run, picture: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.webp"
    ran = run("edit", picture, PROMPT, "-o", out, "--model", tiny_folder, "-n", 2, "--steps", 1, "--seed", 8, "--strip", "--json")
    assert ran.err == ""
    assert [entry["path"] for entry in ran.json["outputs"]] == [str(tmp_path / f"out-{i}.webp") for i in (1, 2)]
    assert [entry["seed"] for entry in ran.json["outputs"]] == [8, 9]
    for entry in ran.json["outputs"]:
        assert read_metadata(Path(entry["path"])) == {k: v for k, v in entry.items() if k != "path"}
    assert ran.json["strips"] == [str(tmp_path / f"out-{i}-strip.webp") for i in (1, 2)]
    assert set(ran.json["timings"]) == {"prepare_s", "encode_s", "denoise_s", "decode_s", "total_s"}
    assert not out.exists()


def test_a_strip_shows_before_and_after(run: Run, picture: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert run("edit", picture, PROMPT, "-o", out, "--model", tiny_folder, "--steps", 1, "--strip", "-q").out == b""
    strip = pixels(tmp_path / "out-strip.png")
    assert np.array_equal(strip, np.asarray(before_after(PICTURE, open_image(out))))


def test_several_pictures_in_their_order(run: Run, picture: Path, tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    draw_picture(128, 96, seed=2).save(other)
    both, swapped = tmp_path / "both.png", tmp_path / "swapped.png"
    common = ("--model", tiny_folder, "--steps", 2, "--seed", 1, "-q")
    assert run("edit", picture, PROMPT, "--image", other, "-o", both, *common).code == 0
    assert run("edit", other, PROMPT, "--image", picture, "-o", swapped, *common).code == 0
    assert pixels(both).shape[:2] > pixels(swapped).shape[:2]  # portrait as the last picture, then landscape


def test_a_stand_in_is_warned_of_and_written_down(run: Run, picture: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (stored,) = (tiny_folder / "transformer").glob("*.safetensors")
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(stored).items()}, tmp_path / "cast.safetensors")
    edit = ("edit", picture, PROMPT, "-o", tmp_path / "out.png", "--model", tiny_folder, "--steps", 1)
    ran = run(*edit, "--transformer", tmp_path / "cast.safetensors", "--json")
    assert ran.code == 0
    assert ran.err.startswith("warning: The transformer is cast to FP8 without scales")
    (record,) = ran.json["outputs"]
    assert record["files"] == {"transformer": str(tmp_path / "cast.safetensors")}
    ran = run(*edit, "--transformer", tmp_path / "cast.safetensors", "-q")
    assert (ran.code, ran.err) == (0, "")


def test_a_format_is_told_and_written_down(run: Run, picture: Path, tiny_folder: Path, tmp_path: Path) -> None:
    plain, out = tmp_path / "plain.png", tmp_path / "out.png"
    edit = ("edit", picture, PROMPT, "--model", tiny_folder, "--seed", 3, "--steps", 2)
    assert run(*edit, "-o", plain, "--plain").code == 0
    ran = run(*edit, "-o", out, "--format", "fp8", "--bf16-down", "--bf16-edge-blocks", 1, "--reuse-reference")
    assert ran.code == 0
    assert "fp8" in ran.err
    noted_plain, noted = read_metadata(plain), read_metadata(out)
    assert noted_plain is not None
    assert noted is not None
    assert noted_plain["engine"] == {"format": "plain"}
    kept = {"reuse_reference": True, "bf16_down": True, "bf16_edge_blocks": 1}
    assert noted["engine"] == {"format": "fp8", "text_encoder": "bf16", "attention": "math", **kept}
    # another format rounds otherwise, and draws the same picture
    apart = np.abs(pixels(out) - pixels(plain))
    assert 0 < apart.mean() < 8


def editor_on(free_gb: float) -> Any:
    """As far as it is told of: the 20B model opened on a card of Ada's with so much memory free, which no test has."""
    asked, formats = ask("qwen-image-edit-2511"), plan(Settings(), (8, 9), "a card")
    assert formats is not None
    placement: Placement = place_on_card(weigh_plan(asked.model, asked.work, formats, (8, 9)), int(free_gb * 1e9))
    return SimpleNamespace(plan=formats, warnings=(), placement=placement, wave=12 if placement.in_turn else 1)


def test_where_weights_lie_is_told_where_not_all_are_on_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    tell(editor_on(80))
    assert capsys.readouterr().err.splitlines() == list(editor_on(80).plan.because)
    tell(editor_on(24))  # as are graphs of fewer phases, which are slower
    assert "graphs are recorded of text alone" in capsys.readouterr().err.splitlines()[-1]
    tell(editor_on(18))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 + len(editor_on(18).plan.because)
    assert "they lie on the card in turn" in told[-1]
    tell(editor_on(12))
    in_turn, transformer = capsys.readouterr().err.splitlines()[-2:]
    assert "they lie on the card in turn" in in_turn
    assert re.fullmatch(
        r"transformer: \d+ of 60 layers fit; [\d.]+ GiB cross the link in every step, for 2 pictures together", transformer
    )


def test_where_weights_lay_is_written_down() -> None:
    def noted(free_gb: float) -> tuple[object, ...]:
        engine = describe_engine(editor_on(free_gb))
        assert engine["format"] == "fp8"
        return engine["weights"], engine["resident_blocks"], engine["wave"]

    assert noted(80) == ("on the card", 60, 1)
    assert noted(18) == ("in turn", 60, 12)
    weights, blocks, wave = noted(12)
    assert (weights, wave) == ("streamed", 12)
    assert isinstance(blocks, int)
    assert 0 < blocks < 60


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--memory", 0), "memory_gb is 0.0"),
        (("--memory", -8), "memory_gb is -8.0"),
        (("--memory", 8), "this is a CPU"),
        (("--memory", 8, "--plain"), "--plain"),
    ],
)
def test_a_limit_of_memory_that_cannot_be_kept(
    run: Run, picture: Path, tiny_folder: Path, tmp_path: Path, options: tuple[object, ...], told: str
) -> None:
    out = tmp_path / "out.png"
    ran = run("edit", picture, PROMPT, "-o", out, "--model", tiny_folder, "--device", "cpu", *options)
    assert (ran.code, ran.out) == (10, b"")
    assert told in ran.err
    assert not out.exists()


def test_settings_that_exclude_each_other(run: Run, picture: Path, tmp_path: Path) -> None:
    ran = run("edit", picture, PROMPT, "-o", tmp_path / "out.png", "--plain", "--format", "fp8")
    assert ran.code != 0
    assert "--plain" in ran.err


def test_standard_output_and_input(tiny_folder: Path, picture: Path, tmp_path: Path) -> None:
    common = [PROMPT, "--model", str(tiny_folder), "--steps", "1", "--seed", "4"]
    command = [sys.executable, "-m", "millicent", "edit"]
    ran = subprocess.run([*command, "-", *common, "-o", "-"], input=picture.read_bytes(), capture_output=True, check=True)
    assert ran.stdout.startswith(b"\x89PNG")
    assert read_metadata(ran.stdout)["seed"] == 4  # type: ignore[index]
    out = tmp_path / "out.png"
    subprocess.run([*command, str(picture), *common, "-o", str(out)], capture_output=True, check=True)
    assert np.array_equal(pixels(ran.stdout), pixels(out))


@pytest.mark.parametrize("size", [None, "64x160"])
def test_alpha_is_flattened_or_kept(run: Run, tiny_folder: Path, tmp_path: Path, size: str | None) -> None:
    source, out = tmp_path / "cut.png", tmp_path / "out.png"
    alpha = Image.radial_gradient("L").resize(PICTURE.size)
    cut = PICTURE.copy()
    cut.putalpha(alpha)
    cut.save(source)
    common = ("--model", tiny_folder, "--steps", 1, "--seed", 1, "-q", *(("--size", size, "--fit", "pad") if size else ()))
    assert run("edit", source, PROMPT, "-o", out, *common).code == 0
    flat = pixels(out)
    assert flat.shape[2] == 3
    assert run("edit", source, PROMPT, "-o", out, "--alpha", "keep", *common).code == 0
    kept = pixels(out)
    assert np.array_equal(kept[..., :3], flat)
    if size is None:
        assert np.array_equal(kept[..., 3], np.asarray(alpha.resize(kept.shape[1::-1], Image.Resampling.LANCZOS)))
    else:
        assert (kept[:40, :, 3] == 0).all()


def test_exif_orientation_reaches_the_model(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, out = tmp_path / "turned.jpg", tmp_path / "out.png"
    PICTURE.save(turned, exif=exif)
    assert run("edit", turned, PROMPT, "-o", out, "--model", tiny_folder, "--steps", 1, "-q").code == 0
    height, width = pixels(out).shape[:2]
    assert height > width


def png_bomb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def jpeg() -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "JPEG")
    return buffer.getvalue()


BAD_INPUT: dict[str, tuple[bytes | None, tuple[str, ...], int, str]] = {
    "not an image": (b"# a text\n", (), 11, "not a JPEG, PNG or WebP"),
    "truncated": (jpeg()[:900], (), 12, "missing or damaged"),
    "bomb": (png_bomb(), (), 13, "million pixels"),
    "empty prompt": (jpeg(), ("prompt=",), 14, "prompt is empty"),
    "prompt too long": (jpeg(), ("prompt=" + "navy " * 3000,), 15, "tokens"),
    "size 0": (jpeg(), ("--size", "0x0"), 16, "0x0"),
    "size of one number": (jpeg(), ("--size", "512"), 16, "'512'"),
    "endless size": (jpeg(), ("--size", "60000x60000"), 16, "60000x60000"),
    "nan sigmas": (jpeg(), ("--sigmas", "1,nan,0.5"), 17, "nan"),
    "words for sigmas": (jpeg(), ("--sigmas", "high,low"), 17, "high,low"),
    "zero steps": (jpeg(), ("--steps", "0"), 17, "0 steps"),
    "missing input": (None, (), 18, "There is no file"),
    "negative seed": (jpeg(), ("--seed", "-1"), 10, "-1"),
    "no variants": (jpeg(), ("-n", "0"), 10, "0 variants"),
    "no such model": (jpeg(), ("--model", "demon"), 31, "'demon'"),
    "no such device": (jpeg(), ("--device", "tpu"), 10, "'tpu'"),
    "unknown option": (jpeg(), ("--stepz", "4"), 2, "--stepz"),
}


@pytest.mark.parametrize(("data", "options", "code", "found"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_and_its_own_exit_code(
    run: Run, tmp_path: Path, data: bytes | None, options: tuple[str, ...], code: int, found: str
) -> None:
    source, out = tmp_path / "in.jpg", tmp_path / "out.png"
    if data is not None:
        source.write_bytes(data)
    out.write_bytes(b"older")
    prompt = PROMPT
    if options and options[0].startswith("prompt="):
        prompt, options = options[0].removeprefix("prompt="), ()
    ran = run("edit", source, prompt, "-o", out, *options)
    assert (ran.code, ran.out) == (code, b"")
    assert found in ran.err
    assert "Traceback" not in ran.err
    if code != 2:  # usage errors are typer's, in a box
        assert re.fullmatch(r"error: [^\n]+\.\n|error: [^\n]+\n", ran.err)
    assert out.read_bytes() == b"older"
    assert {path.name for path in tmp_path.iterdir()} <= {"in.jpg", "out.png"}


def test_each_kind_of_bad_input_has_a_code_of_its_own() -> None:
    """The codes that the table above holds the command to; a folder that is not whole has 32, an output 20."""
    kinds = ("not an image", "truncated", "bomb", "empty prompt", "prompt too long", "size 0", "nan sigmas", "missing input")
    codes = [BAD_INPUT[kind][2] for kind in (*kinds, "no such model")]
    assert len({*codes, 32, 20}) == len(codes) + 2


@pytest.mark.parametrize("link", [False, True])
def test_an_input_is_never_replaced(run: Run, picture: Path, tmp_path: Path, link: bool) -> None:
    before, out = picture.read_bytes(), picture
    if link:
        out = tmp_path / "link.png"
        out.symlink_to(picture)
    ran = run("edit", picture, PROMPT, "-o", out, "--model", "never looked at")
    assert (ran.code, "is one of the inputs" in ran.err) == (20, True)
    strip = tmp_path / "x-strip.png"
    strip.write_bytes(before)
    ran = run("edit", picture, PROMPT, "--image", strip, "-o", tmp_path / "x.png", "--strip", "--model", "never looked at")
    assert (ran.code, "x-strip.png is one of the inputs" in ran.err) == (20, True)
    assert picture.read_bytes() == strip.read_bytes() == before


def test_half_a_model_folder(run: Run, picture: Path, own_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    shutil.rmtree(own_folder / "vae")
    ran = run("edit", picture, PROMPT, "-o", out, "--model", own_folder)
    assert (ran.code, ran.out) == (32, b"")
    assert "vae" in ran.err
    assert ran.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "found"),
    [
        ("nowhere/out.png", "does not exist"),
        ("out.gif", ".gif"),
        ("folder.png", "is a folder"),
        ("/proc/out.png", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_any_work(
    run: Run, picture: Path, tmp_path: Path, out: str, found: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    ran = run("edit", picture, PROMPT, "-o", tmp_path / out, "--model", "never looked at")
    assert (ran.code, ran.out) == (20, b"")
    assert found in ran.err


@pytest.mark.parametrize("options", [("--json",), ("--strip",), ("-n", "2")])
def test_standard_output_takes_one_picture_alone(run: Run, picture: Path, options: tuple[str, ...]) -> None:
    assert run("edit", picture, PROMPT, "-o", "-", *options).code == 2


def test_transparency_and_jpeg_do_not_go_together(run: Run, picture: Path, tmp_path: Path) -> None:
    assert run("edit", picture, PROMPT, "-o", tmp_path / "out.jpg", "--alpha", "keep").code == 20


def test_ctrl_c_ends_with_130_and_leaves_the_older_file(picture: Path, tmp_path: Path, tiny_folder: Path) -> None:
    out = tmp_path / "out.png"
    save_image(PICTURE, out)
    older = out.read_bytes()
    # a shell has what it runs in the background ignore Ctrl-C, and this test may run there
    listening = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_module('millicent')"
    command = [sys.executable, "-c", listening, "edit", str(picture), PROMPT, "-o", str(out), "--model", str(tiny_folder)]
    # a console of its own, so that the signal meets this process alone; far more steps than fit into the wait
    process = subprocess.Popen([*command, "--steps", "1000", "--size", "1024x1024"], stderr=subprocess.PIPE, start_new_session=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():  # the command runs by then, however busy the machine is
        time.sleep(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert out.read_bytes() == older
    assert {path.name for path in tmp_path.iterdir()} == {"in.png", "out.png"}


def test_the_version(run: Run) -> None:
    assert re.fullmatch(rb"millicent \d+\.\d+\.\d+\n", run("--version").out)


def test_a_real_process_refuses_without_a_traceback(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "millicent", "edit", "nowhere.png", PROMPT, "-o", "out.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (18, "")
    assert ran.stderr == "error: There is no file nowhere.png. Check the path.\n"


def test_a_lora_with_its_strength(run: Run, picture: Path, tmp_path: Path) -> None:
    lora, out = demo.folder() / "lightning-4steps.safetensors", tmp_path / "out.png"
    ran = run("edit", picture, PROMPT, "-o", out, "--model", "demo-base", "--lora", f"{lora}:0.5", "--json")
    (record,) = ran.json["outputs"]
    assert (record["steps"], record["schedule"], record["loras"]) == (4, "lightning", [f"{lora}:0.5"])
    assert read_metadata(out) == {key: value for key, value in record.items() if key != "path"}


def test_a_lora_that_is_not_there_or_has_no_sensible_strength(run: Run, picture: Path, tmp_path: Path) -> None:
    ran = run("edit", picture, PROMPT, "-o", tmp_path / "out.png", "--lora", "nowhere.safetensors")
    assert (ran.code, ran.err) == (18, "error: There is no LoRA nowhere.safetensors. Check the path.\n")
    lora = demo.folder() / "lightning-4steps.safetensors"
    ran = run("edit", picture, PROMPT, "-o", tmp_path / "out.png", "--model", "demo-base", "--lora", f"{lora}:nan")
    assert ran.code == 10
    assert "strength" in ran.err
