"""A Ray cluster as one editor, on a cluster of this machine alone: same pictures, and what a worker's death costs."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest
import ray
import ray.cloudpickle
import torch
from PIL import Image

from millicent.catalog.cluster import Cluster, Failure, Outcome
from millicent.catalog.events import Event, Summary
from millicent.catalog.ledger import Ledger
from millicent.catalog.manifest import Row
from millicent.catalog.recipes import parse_recipe
from millicent.catalog.run import run_catalog
from millicent.edits import EditRequest, EditResult, OnProgress, SupportsEdit, Timings
from millicent.engine.editor import Editor
from millicent.errors import InputError, MachineError, ModelNotFoundError, ScheduleError
from millicent.quality.sanity import Verdict

# a worker's process cannot import this file
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


class Painter:
    """Fills a picture with a color that follows from the seed, and writes down who drew what and when."""

    name = "painter"
    weights_sha256 = "ab" * 32

    def __init__(self, diary: Path, seconds: float, deadly_seed: int | None = None) -> None:
        self.diary = diary
        self.seconds = seconds
        self.deadly_seed = deadly_seed

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> EditResult:
        seed = request.seed or 0
        with (self.diary / str(os.getpid())).open("a") as file:
            file.write(f"{seed}\n")
        if seed == self.deadly_seed:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == 13:
            raise ScheduleError("13 is no seed.", "Take another.")
        if seed == 14:
            raise ZeroDivisionError("a bug")
        time.sleep(self.seconds)
        image = Image.new("RGB", request.images[0].size, (seed % 256, 7, 7))
        timings = Timings(0.0, 0.0, self.seconds, 0.0)
        return EditResult(
            images=(image,),
            seeds=(seed,),
            sigmas=(1.0, 0.0),
            schedule="base",
            true_cfg=1.0,
            model=self.name,
            weights_sha256=self.weights_sha256,
            timings=timings,
        )


def painter(diary: Path, seconds: float = 0.0, deadly_seed: int | None = None) -> Painter:
    return Painter(diary, seconds, deadly_seed)


def request(seed: int) -> EditRequest:
    return EditRequest(images=(Image.new("RGB", (32, 32), "white"),), prompt="make it red", seed=seed)


def shade(outcome: Outcome) -> int:
    assert isinstance(outcome, EditResult), outcome
    pixel = outcome.image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster for all tests here, which connect to it and leave it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield started.address_info["address"]
    ray.shutdown()


@pytest.fixture
def open_cluster(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    """`Cluster.open` that stays connected: connecting and leaving would end the cluster of the tests."""
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    opened: list[Cluster] = []

    def open_one(open_editor: Callable[[], object], actors: int | None = 2) -> Cluster:
        opened.append(Cluster.open(address, open_editor, actors))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for cluster in opened:
        cluster.close()


def test_results_come_in_order_from_all_workers(open_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = open_cluster(partial(painter, tmp_path, 0.01))
    assert (cluster.name, cluster.weights_sha256, cluster.cards) == ("painter", "ab" * 32, 2)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        assert [shade(each) for each in cluster.edit_many(request(seed) for seed in range(60, 100))] == list(range(60, 100))
    assert len(list(tmp_path.iterdir())) == 2, "only one worker has drawn"


def test_an_error_comes_in_its_place_and_the_others_go_on(open_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    outcomes = list(open_cluster(partial(painter, tmp_path), 1).edit_many(request(seed) for seed in (12, 13, 15)))
    assert [shade(outcomes[0]), shade(outcomes[2])] == [12, 15]
    assert isinstance(outcomes[1], ScheduleError)
    assert (outcomes[1].message, outcomes[1].fix) == ("13 is no seed.", "Take another.")


def test_a_bug_in_a_worker_ends_the_run(open_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        list(open_cluster(partial(painter, tmp_path), 1).edit_many(request(seed) for seed in (14, 15)))


def test_a_killed_worker_costs_what_it_had_in_hand(open_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = open_cluster(partial(painter, tmp_path, 0.05))
    outcomes, lost = [], 0
    for number, outcome in enumerate(cluster.edit_many(request(seed) for seed in range(20, 80))):
        outcomes.append(outcome)
        if number == 10:
            victim = int(max(tmp_path.iterdir(), key=lambda page: page.stat().st_mtime).name)
            os.kill(victim, signal.SIGKILL)
    assert len(outcomes) == 60
    for seed, outcome in zip(range(20, 80), outcomes, strict=True):
        if isinstance(outcome, MachineError):
            assert "died" in outcome.message
            lost += 1
        else:
            assert shade(outcome) == seed
    assert 1 <= lost <= 2, "a worker whose editor draws one at a time has two in hand: one it draws, and one that waits"
    assert shade(cluster.edit(request(99))) == 99


def test_what_kills_every_worker_ends_the_run_with_why(open_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = open_cluster(partial(painter, tmp_path, 0.0, 66), 1)
    with pytest.raises(MachineError, match=r"No worker is left.*died"):
        list(cluster.edit_many(request(66) for _ in range(50)))


def test_a_run_may_be_left_early(open_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = open_cluster(partial(painter, tmp_path, 0.01), 1)
    run = cluster.edit_many(request(seed) for seed in range(20, 60))
    assert shade(next(run)) == 20
    run.close()  # type: ignore[attr-defined]
    assert [shade(each) for each in cluster.edit_many(request(seed) for seed in (70, 71))] == [70, 71]


class WavePainter(Painter):
    """Takes eight requests before it draws the first of them, and writes down how many they were."""

    wave = 8

    def edit_many(
        self, requests: Iterable[EditRequest], ahead: int = 1, cancelled: threading.Event | None = None
    ) -> Iterator[Outcome]:
        source = iter(requests)
        while wave := list(itertools.islice(source, self.wave)):
            with (self.diary / "waves").open("a") as file:
                file.write(f"{len(wave)}\n")
            for each in wave:
                yield self.edit(each)


def wave_painter(diary: Path, seconds: float = 0.0) -> WavePainter:
    return WavePainter(diary, seconds)


def test_a_worker_that_draws_in_waves_has_a_whole_one_in_hand(open_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = open_cluster(partial(wave_painter, tmp_path), 1)
    found = [shade(each) for each in cluster.edit_many(request(seed) for seed in range(60, 84))]
    assert found == list(range(60, 84))
    assert (tmp_path / "waves").read_text().split() == ["8", "8", "8"]


def test_cancelled_no_request_is_taken_and_what_is_in_hand_is_finished_but_in_waves(
    open_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    for open_editor in (painter, wave_painter):
        cancelled, taken = threading.Event(), list[int]()

        def source(taken: list[int] = taken) -> Iterator[EditRequest]:
            for seed in range(60, 160):  # many more than a worker has room for
                taken.append(seed)
                yield request(seed)

        results = open_cluster(partial(open_editor, tmp_path, 0.05), 1).edit_many(source(), cancelled=cancelled)
        assert shade(next(results)) == 60
        before = len(taken)
        cancelled.set()
        found = [shade(each) for each in results]
        assert found == taken[1 : 1 + len(found)]
        assert len(taken) == before < 100
        assert (len(found) == before - 1) == (open_editor is painter)


def test_what_opening_a_model_raises_is_told(open_cluster: Callable[..., Cluster]) -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        open_cluster(partial(Editor.open, "no-such-model"), 1)


def test_workers_that_do_not_fit_are_refused(open_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no GPU"):
        open_cluster(partial(painter, tmp_path), None)
    with pytest.raises(MachineError, match="3 workers were asked for, and the cluster has 2 CPUs"):
        open_cluster(partial(painter, tmp_path), 3)


def test_ahead_is_checked_at_once(open_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ahead is 0"):
        open_cluster(partial(painter, tmp_path), 1).edit_many([], ahead=0)


def test_no_cluster_is_told(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"There is no Ray cluster at 127\.0\.0\.1:1"):
        Cluster.open("127.0.0.1:1", partial(painter, tmp_path))


def open_and_tell(diary: Path) -> Painter:
    (diary / "threads").write_text(str(os.environ.get("OMP_NUM_THREADS")))
    return Painter(diary, 0.0)


def test_a_worker_has_as_many_threads_as_a_local_run(open_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    open_cluster(partial(open_and_tell, tmp_path), 1)
    assert (tmp_path / "threads").read_text() == "None", "Ray's one thread would draw other pictures on a CPU"


def test_errors_survive_the_way_between_processes() -> None:
    error = Failure.of(MachineError("found", "do")).to_error()
    assert isinstance(error, MachineError)
    assert (error.message, error.fix) == ("found", "do")


def test_a_catalog_on_a_cluster_with_a_killed_worker_comes_to_the_same_files(
    open_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    diary, rows = tmp_path / "diary", []
    diary.mkdir()
    for number in range(25):
        Image.new("RGB", (40, 30), (number, 200, 100)).save(tmp_path / f"{number}.png")
        columns = {"title": f"mug {number}"}
        rows.append(Row(number + 2, f"P{number}", str(tmp_path / f"{number}.png"), (), columns))
    recipe = parse_recipe({"variants": {"red": {"prompt": "make the {title} red"}, "sand": {"prompt": "put the {title} on sand"}}})

    def draw(editor: SupportsEdit, out: str, on_event: Callable[[Event], None] = lambda event: None) -> Summary:
        (tmp_path / out).mkdir()
        with Ledger.open(str(tmp_path / f"{out}.sqlite")) as ledger:
            return run_catalog(
                editor,
                rows,
                recipe,
                ledger,
                str(tmp_path / out),
                weights_sha256=Painter.weights_sha256,
                check=lambda sources, result, limits: Verdict(True, (), {}),
                price=Decimal(1),
                on_event=on_event,
                backoff_base_s=0.01,
            )

    def kill_once(event: Event) -> None:
        if event.kind == "done" and not killed:
            killed.append(int(max(diary.iterdir(), key=lambda page: page.stat().st_mtime).name))
            os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    far = draw(open_cluster(partial(painter, diary, 0.03)), "far", kill_once)
    local = draw(Painter(diary, 0.0), "local")
    assert (local.done, local.failed) == (50, 0)
    assert (far.done, far.quarantined) == (50, 0)
    assert 1 <= far.failed <= 2, "what was in the dead worker's hands is tried again, and is in the bill"
    assert far.bill is not None
    assert far.bill.usd_of("retries") > 0
    files = sorted(path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*.png"))
    assert len(files) == 50
    for file in files:
        assert (tmp_path / "far" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()


def open_demo() -> Editor:
    torch.set_num_threads(1)  # as in the tests' own process: on a CPU, pictures depend on how many threads share a sum
    return Editor.open("demo")


def test_the_demo_model_draws_the_same_pictures_to_the_byte(open_cluster: Callable[..., Cluster]) -> None:
    cluster, editor = open_cluster(open_demo, 1), Editor.open("demo")
    picture = Image.open("examples/shirt.png").convert("RGB").resize((96, 96))
    asked = [EditRequest(images=(picture,), prompt=f"make the shirt {color}", seed=3) for color in ("navy blue", "red", "green")]
    local, far = [editor.edit(each) for each in asked], list(cluster.edit_many(asked))
    assert cluster.weights_sha256 == editor.weights_sha256
    for one, other in zip(local, far, strict=True):
        assert isinstance(other, EditResult), other
        assert other.image.tobytes() == one.image.tobytes()
        assert (other.seeds, other.sigmas, other.schedule) == (one.seeds, one.sigmas, one.schedule)
