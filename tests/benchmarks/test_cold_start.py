"""The folder that the cold start is measured with, at the tiny size: what the converter writes, and what opens and draws."""

import json
from pathlib import Path

import pytest

from benchmarks import cold_start
from benchmarks.converted_folder import make_folder, text_encoder_entries, transformer_entries
from benchmarks.true_size import TINY, TRUE
from millicent import demo
from millicent.checkpoint.folder import read_json
from millicent.checkpoint.header import Header, read_header
from millicent.checkpoint.recognize import recognize
from millicent.checkpoint.write import Entry, outline
from millicent.engine.convert import TRANSFORMER_FILE, ConvertRequest, convert
from millicent.engine.modulation import LightningTable
from millicent.model.config import MMDiTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model") / "tiny"
    made.mkdir()
    make_folder(TINY, made)
    return made


def entries(header: Header) -> dict[str, Entry]:
    return {name: Entry(info.dtype, info.shape) for name, info in header.tensors.items()}


def test_the_transformer_is_laid_out_as_the_converter_does(tmp_path: Path) -> None:
    convert("demo", tmp_path / "fp8", ConvertRequest("fp8"))
    config = read_json(demo.folder() / "transformer" / "config.json")
    ours = transformer_entries(config, LightningTable(MMDiTConfig.from_dict(config), "lightning", 4))
    converted = read_header(tmp_path / "fp8" / TRANSFORMER_FILE)
    assert ours == entries(converted)
    metadata = json.loads(converted.metadata["millicent"])
    assert (metadata["steps"], metadata["modulation_weights"]) == (4, False)


def test_its_parts_are_recognized(folder: Path) -> None:
    transformer, encoder, vae = (recognize(folder / part) for part in ("transformer", "text_encoder", "vae"))
    assert transformer.distilled is not None
    assert (transformer.distilled.steps, transformer.distilled.is_certain) == (4, True)
    component = transformer.components["transformer"]
    assert component.layout is not None
    assert len(component.table) == 2 * (2 * TINY.layers + 1 + 1)
    schemes = {name: stored.scheme.name for name, stored in component.layout.matrices.items()}
    assert {schemes[name] for name in schemes if name.startswith("transformer_blocks.")} == {"fp8 per row"}
    layout = encoder.components["text_encoder"].layout
    assert layout is not None
    assert [name for name, stored in layout.matrices.items() if stored.scheme.name != "fp8 per row"] == [
        "language_model.embed_tokens"
    ]
    assert not (*transformer.warnings, *encoder.warnings, *vae.warnings)


def test_the_true_size_takes_21_gb() -> None:
    from benchmarks.converted_folder import transformer_config
    from benchmarks.true_size import _text_encoder_config

    config = transformer_config(TRUE)
    table = LightningTable(MMDiTConfig.from_dict(config), "lightning", 4)
    files = transformer_entries(config, table), text_encoder_entries(_text_encoder_config(TRUE).to_dict())
    sizes_gb = [outline(each, {}).size_bytes / 1e9 for each in files]
    assert sum(sizes_gb) == pytest.approx(22, abs=1), sizes_gb


def test_a_folder_is_kept_and_another_size_is_refused(folder: Path) -> None:
    file = folder / TRANSFORMER_FILE
    before = file.stat().st_mtime_ns
    make_folder(TINY, folder)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="another model"):
        make_folder(TRUE, folder)


def test_a_process_tells_what_each_step_took(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = cold_start.measure(TINY, folder, tmp_path, runs=1)
    cold_start.show(rows)
    (row,) = rows
    assert (row["benchmark"], row["size"], row["compiled"]) == ("cold_start", "tiny", False)
    steps = [row[name] for name in cold_start.STEPS]
    assert all(isinstance(seconds, float) and seconds >= 0 for seconds in steps)
    assert row["first picture"] == pytest.approx(sum(steps[:-1]), abs=0.01)  # type: ignore[arg-type]
    assert {"open: headers", "open: transformer", "open: text encoder", "first edit: denoise_s"} <= row.keys()
    assert "first picture" in capsys.readouterr().out


def test_what_was_read_once_is_counted(folder: Path) -> None:
    count, seconds = cold_start.read_once(folder)
    assert count == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert seconds > 0
