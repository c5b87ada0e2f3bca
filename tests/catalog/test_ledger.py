"""The ledger, in SQLite and in a real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from fake_editor import WEIGHTS, FakeEditor, accept, make_recipe, make_rows

from millicent.catalog import heartbeat, ledger_database, ledger_reading, ledger_sqlite, migrations
from millicent.catalog.bill import bill_of
from millicent.catalog.ledger import Ended, Ledger, Work
from millicent.catalog.run import run_catalog
from millicent.edits import EditRequest
from millicent.errors import InputError, InputNotFoundError, MachineError, OutputError

NOBODY = 65534


def run_as_nobody(*command: str | Path) -> None:
    """PostgreSQL does not run as root."""
    as_whom = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.geteuid() == 0 else []
    ended = subprocess.run([*as_whom, *map(str, command)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A PostgreSQL of its own on 127.0.0.1; its URL without a database."""
    missing = [name for name in ("initdb", "pg_ctl", "postgres") if shutil.which(name) is None]
    assert not missing, f"{', '.join(missing)} not on the PATH: apt-get install postgresql, and add its bin folder to PATH"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = Path(f"/tmp/millicent-postgres-{os.getpid()}")  # a socket's path must be short, and nobody must be let in
    home.mkdir()
    if os.geteuid() == 0:
        os.chown(home, NOBODY, NOBODY)
    try:
        run_as_nobody("initdb", "-D", home / "data", "-A", "trust", "-U", "millicent", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home} -c fsync=off"
        run_as_nobody("pg_ctl", "-D", home / "data", "-o", options, "-l", home / "log", "-w", "start")
        try:
            yield f"postgresql://millicent@127.0.0.1:{port}"
        finally:
            run_as_nobody("pg_ctl", "-D", home / "data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home)


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> str:
    """An empty database."""
    import psycopg

    name = f"of_{abs(hash(request.node.nodeid))}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{server}/{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "ledger.sqlite") if request.param == "sqlite" else request.getfixturevalue("database")


def work(output: str = "a.png", key: str = "k", **more: object) -> Work:
    made = Work(output=output, row_line=2, row_id="a", variant="v", pictures=("a.jpg",), prompt="paint", asked="asked", key=key)
    return replace(made, **more)  # type: ignore[arg-type]


def begin(ledger: Ledger, usd_per_hour: Decimal | None = Decimal(36)) -> Ledger:
    ledger.begin_run(loading_s=2.0, cards=1, usd_per_hour=usd_per_hour)
    return ledger


def done(seconds: float = 1.0, elapsed_s: float = 1.0) -> Ended:
    stages = {"denoise_s": 0.5, "write_s": 0.25}
    return Ended(state="done", attempt_state="done", seconds=seconds, elapsed_s=elapsed_s, stages=stages, sha256="f" * 64)


def test_an_image_is_claimed_ended_and_known(url: str) -> None:
    with Ledger.open(url) as ledger:
        begin(ledger)
        claim = ledger.claim(work(), seed=2**63 - 1, elapsed_s=0.0)
        assert (claim.kind, claim.attempt) == ("mine", 1)
        assert ledger.known(["a.png", "b.png"])["a.png"].state == "running"
        assert ledger.end(work(), 1, done(seconds=1.5)) == Decimal("0.015")
        ledger.end_run(2.0, "")
    with Ledger.open(url, write=False) as ledger:
        (image,) = ledger.images()
        assert (image.state, image.attempts, image.seed, image.seconds) == ("done", 1, 2**63 - 1, 1.5)
        assert (image.usd, image.sha256, image.pictures) == (Decimal("0.015000000"), "f" * 64, ("a.jpg",))
        assert ledger.counts() == {"done": 1}
        (run,) = ledger.runs()
        assert (run.elapsed_s, run.usd_per_hour, run.stopped, run.ended_at is None) == (2.0, Decimal(36), "", False)
        bill = bill_of(ledger)
        assert bill is not None
        # 1.5 s of drawing, half a second of nothing, 2 s of loading, at a cent a second
        assert [bill.usd_of(part) for part in ("busy", "idle", "loading")] == [Decimal("0.015"), Decimal("0.005"), Decimal("0.02")]
        assert bill.total_usd == Decimal("0.04")


def test_the_same_work_is_linked_and_a_finished_one_is_not_given_out(url: str) -> None:
    with Ledger.open(url) as ledger:
        begin(ledger)
        ledger.claim(work(), 1, 0.0)
        ledger.end(work(), 1, done())
        assert ledger.claim(work(), 1, 2.0).kind == "done"
        claim = ledger.claim(work("b.png"), 1, 2.0)
        assert (claim.kind, claim.original, claim.sha256) == ("link", "a.png", "f" * 64)
        ledger.link(work("b.png"), claim.original, claim.sha256)
        assert ledger.counts() == {"done": 1, "linked": 1}
        ledger.forget("a.png")
        assert ledger.claim(work("b.png"), 1, 3.0).kind == "mine"


def test_failures_and_rejects_are_counted_and_begin_anew_with_other_work(url: str) -> None:
    def ended(state: str) -> Ended:
        return Ended(state=state, attempt_state=state, seconds=1.0, elapsed_s=1.0, why="because")  # type: ignore[arg-type]

    with Ledger.open(url) as ledger:
        begin(ledger)
        for number, state in enumerate(("failed", "rejected", "rejected"), 1):
            assert ledger.claim(work(), number, 0.0).attempt == number
            ledger.end(work(), number, ended(state))
        known = ledger.known(["a.png"])["a.png"]
        assert (known.failures, known.rejects, known.rejects_forgiven, known.lost) == (1, 2, 0, 0)
        ledger.quarantine(work(), "enough")
        assert ledger.retry_quarantined() == 1
        known = ledger.known(["a.png"])["a.png"]
        assert (known.state, known.failures, known.rejects, known.rejects_forgiven) == ("planned", 0, 2, 2)
        ledger.claim(work(key="other"), 9, 0.0)
        known = ledger.known(["a.png"])["a.png"]
        assert (known.failures, known.rejects, known.rejects_forgiven) == (0, 0, 0)
        (image,) = ledger.images()
        assert (image.attempts, image.seconds, image.usd) == (4, 3.0, Decimal("0.03"))


def test_a_killed_run_is_buried_and_what_it_was_at_is_paid_as_lost(tmp_path: Path) -> None:
    url = str(tmp_path / "ledger.sqlite")
    with Ledger.open(url) as ledger:
        begin(ledger)
        ledger.claim(work("a.png", "a"), 1, 0.0)
        ledger.end(work("a.png", "a"), 1, done(seconds=1.0, elapsed_s=1.0))
        ledger.claim(work("b.png", "b"), 1, 1.0)
        ledger.claim(work("c.png", "c"), 1, 1.0)
        ledger.beat(5.0)
    with Ledger.open(url) as ledger:
        begin(ledger)
        images = {image.output: image for image in ledger.images()}
        assert [images[name].state for name in ("a.png", "b.png", "c.png")] == ["done", "planned", "planned"]
        assert images["b.png"].seconds == images["c.png"].seconds == 2.0
        bill = bill_of(ledger)
        assert bill is not None
        assert (bill.usd_of("busy"), bill.usd_of("spot losses")) == (Decimal("0.01"), Decimal("0.04"))
        assert ledger.claim(work("b.png", "b"), 1, 0.0).attempt == 2
        ledger.adopt(work("c.png", "c"), "e" * 64)
        bill = bill_of(ledger)
        assert bill is not None
        assert (bill.usd_of("busy"), bill.usd_of("spot losses")) == (Decimal("0.03"), Decimal("0.02"))
        assert bill.accepted == 2


def test_a_claim_that_is_given_back_was_no_attempt(url: str) -> None:
    with Ledger.open(url) as ledger:
        begin(ledger)
        for number, state in enumerate(("failed", "running"), 1):
            assert ledger.claim(work(), 7, 0.0).attempt == number
            if state == "failed":
                ledger.end(work(), 1, Ended(state="failed", attempt_state="failed", seconds=1.0, elapsed_s=1.0, why="because"))
        ledger.release(work(), 2)
        known = ledger.known(["a.png"])["a.png"]
        assert (known.state, known.failures, known.lost) == ("planned", 1, 0)
        (image,) = ledger.images()
        assert (image.attempts, image.seconds, image.usd) == (1, 1.0, Decimal("0.01"))
        assert ledger.claim(work(), 7, 2.0).attempt == 2
        ledger.end(work(), 2, done())
        ledger.release(work(), 2)  # what has ended is not given back
        assert ledger.counts() == {"done": 1}
        assert [image.attempts for image in ledger.images()] == [2]


def test_images_come_in_the_manifest_s_order_a_page_at_a_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_reading, "PAGE", 3)
    with Ledger.open(url) as ledger:
        begin(ledger)
        for line in (3, 1, 2):
            for name in ("c", "a", "b"):
                ledger.quarantine(work(f"{line}/{name}", row_line=line), "so")
        assert [image.output for image in ledger.images()] == [f"{line}/{name}" for line in (1, 2, 3) for name in "abc"]
        assert len(list(ledger.images("quarantined"))) == 9
        assert not list(ledger.images("done"))


def test_without_a_price_there_is_no_bill(url: str) -> None:
    with Ledger.open(url) as ledger:
        begin(ledger, None)
        ledger.claim(work(), 1, 0.0)
        assert ledger.end(work(), 1, done()) is None
        assert bill_of(ledger) is None


def test_heartbeat_tells_how_far_a_run_is(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.01)
    with Ledger.open(url) as ledger:
        begin(ledger)
        with heartbeat.Heartbeat(url, ledger.run_id, lambda: 7.5):
            deadline = time.monotonic() + 5
            while ledger.runs()[0].elapsed_s != 7.5:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_where_a_rejected_picture_is_kept_is_told_until_it_is_drawn_again(url: str) -> None:
    ended = Ended(
        state="rejected", attempt_state="rejected", seconds=1.0, elapsed_s=1.0, why="blank", set_aside="_rejected/1/a.png"
    )
    with Ledger.open(url) as ledger:
        begin(ledger)
        ledger.claim(work(), 1, 0.0)
        ledger.end(work(), 1, ended)
        ledger.quarantine(work("b.png"), "the same", "_rejected/1/a.png")
        assert [image.set_aside for image in ledger.images()] == ["_rejected/1/a.png"] * 2
        ledger.claim(work(), 2, 1.0)
        ledger.end(work(), 2, done())
        assert [image.set_aside for image in ledger.images()] == [None, "_rejected/1/a.png"]


def test_a_ledger_of_an_earlier_version_gets_what_it_lacks(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(ledger_database, "MIGRATIONS", migrations.MIGRATIONS[:1])
        database = ledger_database.connect(url, create=True)
        ledger_database.migrate(url, database, write=True)
        database.execute(
            "INSERT INTO images (output, row_line, row_id, variant, pictures, prompt, asked, state, run_id)"
            " VALUES ('a.png', 2, 'a', 'v', '[]', 'paint', 'asked', 'planned', 'r')"
        )
        database.close()
    with Ledger.open(url) as ledger:
        (image,) = ledger.images()
        assert (image.output, image.set_aside) == ("a.png", None)


def test_attempts_that_were_lost_are_told(tmp_path: Path) -> None:
    url = str(tmp_path / "ledger.sqlite")
    with Ledger.open(url) as ledger:
        begin(ledger)
        ledger.claim(work("a.png", "a"), 1, 0.0)
        ledger.claim(work("b.png", "b"), 1, 0.0)
    with Ledger.open(url) as ledger:
        begin(ledger)
        assert sorted(ledger.lost()) == [("a.png", 1), ("b.png", 1)]
        ledger.claim(work("a.png", "a"), 1, 0.0)
        assert ledger.lost() == [("b.png", 1)], "it is being drawn"


def test_migrations_are_taken_once_and_a_later_version_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger.open(url).close()
    more = (*migrations.MIGRATIONS, ("ALTER TABLE images ADD COLUMN note TEXT",))
    monkeypatch.setattr(ledger_database, "MIGRATIONS", more)
    with pytest.raises(InputError, match="earlier version"):
        Ledger.open(url, write=False)
    Ledger.open(url).close()
    Ledger.open(url, write=False).close()
    monkeypatch.setattr(ledger_database, "MIGRATIONS", migrations.MIGRATIONS)
    with pytest.raises(InputError, match="later version"):
        Ledger.open(url)


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database at all, but some words that somebody wrote down" * 20)
    with pytest.raises(InputError, match="is no ledger"):
        Ledger.open(str(path))
    with pytest.raises(InputNotFoundError):
        Ledger.open(str(tmp_path / "none.sqlite"), write=False)
    with pytest.raises(OutputError):
        Ledger.open(str(tmp_path / "no/such/folder/ledger.sqlite"))


def test_a_dead_holder_s_lock_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    held = ledger_sqlite.hold(path)
    with pytest.raises(InputError, match="Another run is using"):
        Ledger.open(str(path))
    held.close()  # as the kernel does for a process that was killed; what it wrote about itself stays
    assert path.with_name("ledger.sqlite.lock").read_text()
    Ledger.open(str(path)).close()


def test_the_ledger_is_read_beside_a_run(tmp_path: Path) -> None:
    url = str(tmp_path / "ledger.sqlite")
    with Ledger.open(url) as ledger:
        begin(ledger)
        ledger.claim(work(), 1, 0.0)
        with Ledger.open(url, write=False) as reader:
            assert reader.counts() == {"running": 1}


def test_a_damaged_ledger_is_told(tmp_path: Path) -> None:
    url = str(tmp_path / "ledger.sqlite")
    Ledger.open(url).close()
    with sqlite3.connect(url) as connection:
        connection.execute("DROP TABLE images")
    with Ledger.open(url) as ledger:
        begin(ledger)
        with pytest.raises(OutputError, match="no such table"):
            ledger.known(["a.png"])


def test_a_postgresql_that_is_not_there_is_told_without_its_password() -> None:
    with pytest.raises(MachineError, match=r"127\.0\.0\.1:1/x cannot be used") as caught:
        Ledger.open("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)


def test_two_writers_never_hold_the_same_image_or_the_same_work(database: str) -> None:
    with Ledger.open(database) as one, Ledger.open(database) as two:
        begin(one)
        begin(two)
        assert one.claim(work("a.png", "k"), 1, 0.0).kind == "mine"
        assert two.claim(work("a.png", "k"), 1, 0.0).kind == "held"
        assert two.claim(work("b.png", "k"), 1, 0.0).kind == "held"
        one.end(work("a.png", "k"), 1, done())
        assert two.claim(work("a.png", "k"), 1, 0.0).kind == "done"
        assert two.claim(work("b.png", "k"), 1, 0.0).kind == "link"


def test_a_writer_that_is_not_heard_of_loses_what_it_held(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_database, "LEASE_S", -1.0)  # over as soon as it is given
    with Ledger.open(database) as one, Ledger.open(database) as two:
        begin(one)
        one.claim(work(), 1, 0.0)
        begin(two)
        assert two.claim(work(), 1, 0.0).attempt == 2
        # the first was only slow: its picture is the same one, and its attempt is paid; the image is the second's
        one.end(work(), 1, done())
        assert two.known(["a.png"])["a.png"].state == "running"
        two.end(work(), 2, done())
        (image,) = two.images()
        assert (image.state, image.attempts, image.seconds, image.usd) == ("done", 2, 2.0, Decimal("0.02"))


def test_two_runs_share_a_catalog(database: str, tmp_path: Path) -> None:
    rows, drawn = make_rows(tmp_path / "in", 60, pictures=30), []

    def draw(request: EditRequest) -> None:
        drawn.append(request.prompt)
        time.sleep(0.002)

    def start() -> None:
        with Ledger.open(database) as ledger:
            run_catalog(
                FakeEditor(draw=draw), rows, make_recipe(), ledger, str(tmp_path / "out"), weights_sha256=WEIGHTS, check=accept
            )

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drawn) == sorted(f"paint it red {number}, 0" for number in range(60))
    with Ledger.open(database, write=False) as ledger:
        assert ledger.counts() == {"done": 60}
        assert len({run.id for run in ledger.runs()}) == 2
        assert all(spent.attempts > 5 for spent in ledger.spent())
