"""`millicent batch`: the command from a manifest to pictures, bill and exit code, over an editor that paints in no time."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from millicent.catalog.cluster import Cluster
from millicent.cli.batch import batch, read_deadline, read_usd
from millicent.cli.batch_views import guard
from millicent.edits import EditRequest, EditResult, OnProgress, Timings
from millicent.engine.editor import Editor
from millicent.engine.settings import Settings
from millicent.errors import InputError, InputNotFoundError, MillicentError, OutputError
from millicent.images import fit_to, read_metadata

app = typer.Typer()
app.add_typer(batch, name="batch")


@app.command()
def other() -> None:
    """A group of one command would swallow its name."""


class Painter:
    """Tints a picture in a color of the seed; the product's outlines stay. Asked to copy, it copies."""

    name = "painter"
    weights_sha256 = "cd" * 32
    warnings = ()
    plan = None
    placement = None

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> EditResult:
        time.sleep(self.seconds)
        seed = request.seed or 0
        image = request.images[-1]
        color = Image.new("RGB", image.size, (seed % 200, 30, 120))
        image = image.copy() if request.prompt == "copy" else Image.blend(image, color, 0.5)
        if request.width is not None and request.height is not None:
            image = fit_to(image, request.width, request.height, request.fit)
        return EditResult(
            images=(image,),
            seeds=(seed,),
            sigmas=(1.0, 0.0),
            schedule="base",
            true_cfg=1.0,
            model=self.name,
            weights_sha256=self.weights_sha256,
            timings=Timings(0.0, 0.0, self.seconds, 0.0),
        )


def make_catalog(folder: Path, count: int = 3) -> None:
    """A CSV of `count` products with pictures of their own, and a recipe of two variants."""
    for number in range(count):
        picture = Image.open("examples/shirt.png").convert("RGB").resize((96, 96))
        picture.putpixel((0, 0), (number, 0, 0))
        picture.save(folder / f"{number}.png")
    rows = [f"P{number},shirt {number},{number}.png" for number in range(count)]
    (folder / "catalog.csv").write_text("\n".join(["sku,title,picture", *rows]) + "\n")
    (folder / "recipe.toml").write_text(
        '[variants.navy]\nprompt = "make the {title} navy blue"\n[variants.red]\nprompt = "make the {title} red"\n'
        "[checks]\nallow_shift = true\n"
    )


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_catalog(tmp_path)
    monkeypatch.setattr(Editor, "open", classmethod(lambda cls, model, **options: Painter()))
    return tmp_path


def invoke(*words: object) -> Result:
    result = CliRunner().invoke(app, ["batch", *map(str, words)])
    if isinstance(result.exception, MillicentError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def run(folder: Path, *more: object) -> Result:
    return invoke(folder / "catalog.csv", "-o", folder / "out", "--recipe", folder / "recipe.toml", *more)


def events(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


# the run


def test_a_catalog_is_drawn_and_the_same_command_finds_it_done(catalog: Path) -> None:
    first = run(catalog, "--price", "0.34")
    assert first.exit_code == 0, first.output
    assert "6 done" in first.stdout
    assert "per accepted image" in first.stdout
    pictures = sorted(path.relative_to(catalog / "out").as_posix() for path in (catalog / "out").glob("P*/*.png"))
    assert pictures == [f"P{number}/{variant}.png" for number in range(3) for variant in ("navy", "red")]
    assert (read_metadata(catalog / "out/P1/red.png") or {})["prompt"] == "make the shirt 1 red"
    again = run(catalog, "--price", "0.34")
    assert again.exit_code == 0
    assert "6 already" in again.stdout
    assert "done" not in again.stdout.splitlines()[0]


def test_json_lines_tell_every_event_and_the_summary_last(catalog: Path) -> None:
    told = events(run(catalog, "--json", "--price", "1"))
    assert [each["event"] for each in told].count("done") == 6
    assert told[-1]["event"] == "summary"
    assert (told[-1]["done"], told[-1]["bad_rows"], told[-1]["stopped"]) == (6, 0, "")
    assert Decimal(told[-1]["bill"]["total_usd"]) > 0
    done = next(each for each in told if each["event"] == "done")
    assert {"row_id", "variant", "output", "seed", "elapsed_s"} <= done.keys()


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_good_edit_that_is_padded_or_cropped_is_accepted(catalog: Path, fit: str) -> None:
    (catalog / "recipe.toml").write_text(
        f'redo_rejects = 0\n[variants.wide]\nprompt = "make it navy"\nsize = [192, 96]\nfit = "{fit}"\n'
        "[checks]\nrequire_registration = true\n"
    )
    result = run(catalog)
    assert "3 done" in result.stdout, result.output
    with Image.open(catalog / "out/P0/wide.png") as image:
        assert image.size == (192, 96)


def test_a_bad_row_is_named_and_the_others_are_drawn(catalog: Path) -> None:
    with (catalog / "catalog.csv").open("a") as file:
        file.write("P9,lost,\n")
    result = run(catalog)
    assert result.exit_code == 1
    assert "6 done" in result.stdout
    assert "line 5:" in result.stderr


def test_a_picture_that_is_not_there_is_quarantined_with_its_reason(catalog: Path) -> None:
    with (catalog / "catalog.csv").open("a") as file:
        file.write("P9,lost,nowhere.png\n")
    result = run(catalog)
    assert result.exit_code == 1
    assert "quarantined P9/navy.png" in result.stderr
    assert "nowhere.png" in result.stderr
    assert "2 given up" in run(catalog).stdout
    assert "2 quarantined" in run(catalog, "--retry-failed").stdout
    Image.open(catalog / "1.png").save(catalog / "nowhere.png")
    result = run(catalog)
    assert result.exit_code == 0
    assert "2 done, 6 already" in result.stdout


def test_a_budget_stops_the_run_before_it_is_exceeded(catalog: Path) -> None:
    result = run(catalog, "--price", "1000", "--budget", "0.000001usd")
    assert result.exit_code == 3
    assert "budget" in result.stdout
    assert "The same command goes on from here." in result.stdout


def test_a_budget_without_a_price_is_refused_before_anything_is_made(catalog: Path) -> None:
    with pytest.raises(InputError, match="no price of the card"):
        run(catalog, "--budget", "20usd")
    assert not (catalog / "out").exists()


def test_the_price_of_a_named_card_is_used(catalog: Path) -> None:
    (summary,) = [each for each in events(run(catalog, "--json", "--gpu", "RTX 4090")) if each["event"] == "summary"]
    assert summary["usd"] is not None


def test_a_limit_of_memory_reaches_the_editor(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Settings] = []

    def open_editor(cls: type[Editor], /, model: str, *, settings: Settings, **options: object) -> Painter:
        opened.append(settings)
        return Painter()

    monkeypatch.setattr(Editor, "open", classmethod(open_editor))
    assert run(catalog, "--memory", "11.5").exit_code == 0
    assert opened == [Settings(memory_gb=11.5)]
    with pytest.raises(InputError, match="memory_gb is 0"):
        run(catalog, "--memory", 0)


def test_a_limit_of_memory_reaches_the_workers_of_a_cluster(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers are given crosses to their processes as bytes."""
    given: list[bytes] = []

    def open_cluster(address: str, open_editor: Callable[[], Editor], actors: int | None) -> Any:
        given.append(pickle.dumps(open_editor.keywords["settings"]))  # type: ignore[attr-defined]  # a partial
        return contextlib.nullcontext(Painter())

    monkeypatch.setattr(Cluster, "open", open_cluster)
    assert run(catalog, "--ray", "local", "--memory", 9).exit_code == 0
    assert [pickle.loads(settings) for settings in given] == [Settings(memory_gb=9)]


def test_waves_are_told_before_the_first_picture(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Painter, "wave", 7, raising=False)
    assert "in waves of 7:" in run(catalog).stderr
    assert "waves" not in run(catalog, "-q").stderr


def test_cloud_outputs_need_a_ledger_of_their_own(catalog: Path) -> None:
    with pytest.raises(OutputError, match="cannot hold the ledger"):
        invoke(catalog / "catalog.csv", "-o", "s3://bucket/out", "--recipe", catalog / "recipe.toml")


def test_the_textfile_holds_the_figures(catalog: Path) -> None:
    assert run(catalog, "--price", "0.34", "--textfile", catalog / "batch.prom").exit_code == 0
    lines = dict(line.rsplit(" ", 1) for line in (catalog / "batch.prom").read_text().splitlines() if not line.startswith("#"))
    assert (float(lines["millicent_batch_total"]), float(lines["millicent_batch_accepted"])) == (6, 6)
    assert float(lines["millicent_batch_usd"]) > 0
    with pytest.raises(OutputError, match="textfile collector"):
        run(catalog, "--textfile", catalog / "batch.txt")


def test_a_manifest_may_be_called_as_a_command_is(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = catalog / "status"
    pictures.mkdir()
    (catalog / "0.png").rename(pictures / "0.png")
    monkeypatch.chdir(catalog)
    (catalog / "recipe.toml").write_text('[variants.navy]\nprompt = "make it navy"\n[checks]\nallow_shift = true\n')
    assert "1 done" in invoke("./status", "-o", "out", "--recipe", "recipe.toml").stdout


# before the run


def test_a_dry_run_counts_shows_prompts_and_draws_nothing(catalog: Path) -> None:
    with (catalog / "catalog.csv").open("a") as file:
        file.write("P9,lost,\n")
    result = run(catalog, "--dry-run", "--price", "0.34")
    assert result.exit_code == 0
    assert "3 rows, 6 images to draw, 1 bad" in result.stdout
    assert "line 5:" in result.stdout
    assert "P0/navy.png  make the shirt 0 navy blue" in result.stdout
    assert "measured here" in result.stdout
    assert "an accepted image *" in result.stdout
    assert not (catalog / "out").exists()


def test_a_dry_run_for_a_named_card_opens_no_model(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Editor, "open", classmethod(lambda cls, model, **options: pytest.fail("a model was opened")))
    told = json.loads(run(catalog, "--dry-run", "--json", "--gpu", "RTX 4090", "--model", "qwen-image-edit-2511").stdout)
    assert (told["rows"], told["images"]) == (3, 6)
    assert 0.5 < float(told["seconds_per_image"]) < 30
    assert float(told["total_usd"]) > 0
    assert "RTX 4090" in told["because"]
    assert "waves" not in told["because"]
    limited = ("--dry-run", "--json", "--gpu", "RTX 4090", "--model", "qwen-image-edit-2511", "--memory", 16)
    assert ", in waves of " in json.loads(run(catalog, *limited).stdout)["because"]
    told = json.loads(run(catalog, "--dry-run", "--json", "--gpu", "RTX 3090", "--model", "qwen-image-edit-2511").stdout)
    assert ", in waves of 9" in told["because"]


# after the run


def test_status_counts_and_bills_all_runs(catalog: Path) -> None:
    run(catalog, "--price", "0.34")
    run(catalog, "--price", "0.34")
    told = json.loads(invoke("status", catalog / "out", "--json").stdout)
    assert told["images"] == {"done": 6}
    assert told["attempts"] == {"done": 6}
    assert len(told["runs"]) == 2
    assert Decimal(told["bill"]["accepted"]) == 6
    shown = invoke("status", catalog / "nowhere", "--ledger", catalog / "out/ledger.sqlite").stdout
    assert "6 images: 6 done" in shown
    assert "per accepted image" in shown


def test_an_export_has_every_image_in_the_order_of_the_manifest(catalog: Path) -> None:
    run(catalog)
    rows = list(csv.DictReader(io.StringIO(invoke("export", catalog / "out").stdout)))
    assert [row["output"] for row in rows] == [f"P{number}/{variant}.png" for number in range(3) for variant in ("navy", "red")]
    assert {row["state"] for row in rows} == {"done"}
    assert "6 images" in invoke("export", catalog / "out", "-o", catalog / "all.jsonl").stdout
    lines = [json.loads(line) for line in (catalog / "all.jsonl").read_text().splitlines()]
    assert [line["row_id"] for line in lines] == ["P0", "P0", "P1", "P1", "P2", "P2"]
    assert lines[0]["pictures"][0].endswith("0.png")
    assert invoke("export", catalog / "out", "--state", "quarantined").stdout.count("\n") == 1


def test_an_export_is_refused_where_it_cannot_be(catalog: Path) -> None:
    with pytest.raises(InputNotFoundError, match="There is no ledger"):
        invoke("export", catalog / "nowhere")
    run(catalog)
    with pytest.raises(OutputError, match=r"ending '\.xlsx'"):
        invoke("export", catalog / "out", "-o", catalog / "all.xlsx")
    assert invoke("export", catalog / "out", "--state", "drawn").exit_code == 2


def test_the_gallery_shows_before_and_after_and_what_was_rejected(catalog: Path) -> None:
    (catalog / "recipe.toml").write_text(
        'redo_rejects = 0\n[variants.navy]\nprompt = "make it <b>navy</b>"\n[variants.copy]\nprompt = "copy"\n'
    )
    assert run(catalog).exit_code == 1
    shown = invoke("gallery", catalog / "out")
    page = (catalog / "out/gallery.html").read_text()
    assert shown.stdout.startswith(str(catalog / "out/gallery.html"))
    assert page.count("<article") == 6
    assert "&lt;b&gt;navy" in page
    assert page.count("<img") == 12, "each has a before and an after, also those that were rejected"
    assert page.count("a copy of the input") == 3
    rows = [row for row in csv.DictReader(io.StringIO(invoke("export", catalog / "out").stdout)) if row["state"] == "quarantined"]
    assert [row["set_aside"] for row in rows] == [f"_rejected/1/P{number}/copy.png" for number in range(3)]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@A1", "\tx"])
def test_a_spreadsheet_takes_no_text_for_a_formula(text: str) -> None:
    assert guard(text) == f"'{text}"


def test_numbers_stay_numbers() -> None:
    assert (guard(-1.5), guard("P-1"), guard(None)) == (-1.5, "P-1", None)


# what is said on the command line


@pytest.mark.parametrize("text", ["20usd", "20", "$20", "20 USD", "20.00"])
def test_dollars_are_read(text: str) -> None:
    assert read_usd(text) == 20


@pytest.mark.parametrize("text", ["twenty", "-1", "0", "inf", "20eur", ""])
def test_what_is_no_sum_of_dollars_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        read_usd(text)


def test_a_deadline_is_a_span_or_a_time() -> None:
    now = datetime.datetime.now().astimezone()
    assert datetime.timedelta(hours=5.9) < read_deadline("6h") - now < datetime.timedelta(hours=6.1)
    assert read_deadline("90m") > now
    assert read_deadline("2199-01-01T08:00").tzinfo is not None
    for wrong in ("soon", "2001-01-01T00:00", "6d"):
        with pytest.raises(typer.BadParameter):
            read_deadline(wrong)


# signals, in a process of their own

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_batch import Painter, app
from millicent.engine.editor import Editor
Editor.open = classmethod(lambda cls, model, **options: Painter({seconds}))
app(["batch", *sys.argv[1:]])
"""


@pytest.fixture
def child(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of many images, of so many seconds each, once its second image is done."""
    make_catalog(tmp_path, 20)
    script = CHILD.format(folder=str(Path(__file__).parent), seconds=request.param)
    words = [tmp_path / "catalog.csv", "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.toml", "--json"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None
        done = 0
        while done < 2:
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            done += json.loads(line)["event"] == "done"
        yield process
        process.kill()


@pytest.mark.parametrize("child", [0.2], indirect=True)
def test_ctrl_c_begins_no_more_and_leaves_nothing_claimed(child: subprocess.Popen[str], tmp_path: Path) -> None:
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=20)
    summary = json.loads(stdout.splitlines()[-1])
    assert child.returncode == 3
    assert summary["event"] == "summary"
    assert 2 <= summary["done"] < 40
    assert "what is not drawn is given back" in stderr
    counts = json.loads(invoke("status", tmp_path / "out", "--json").stdout)["images"]
    assert counts.get("running", 0) == 0
    assert counts["done"] == summary["done"] == len(list((tmp_path / "out").glob("P*/*.png")))


@pytest.mark.parametrize("child", [3.0], indirect=True)  # the second signal comes while the third image is drawn
def test_a_second_ctrl_c_stops_at_once_and_the_next_run_goes_on(
    child: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None
    while "given back" not in (line := child.stderr.readline()):
        assert line, "it ended without a word"
    asked_s = time.monotonic()
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=20)
    assert child.returncode == 130
    assert time.monotonic() - asked_s < 2
    monkeypatch.setattr(Editor, "open", classmethod(lambda cls, model, **options: Painter()))
    result = run(tmp_path, "--json")
    assert result.exit_code == 0
    assert len(list((tmp_path / "out").glob("P*/*.png"))) == 40
    assert sorted(path.name for path in (tmp_path / "out" / "P0").iterdir()) == ["navy.png", "red.png"]
