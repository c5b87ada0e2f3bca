"""A catalog run: rows in, pictures and a ledger out, and a process that may be killed anywhere.

    rows -> items -> the ledger: done already? -> pictures read and hashed -> key -> claimed in the ledger -> editor -> checked
    -> written beside, synced, renamed -> marked done

Reading and finishing are in threads; the ledger, the editor and all decisions are in the caller's. A claim is on the disk before
the drawing begins, and a picture before it is marked done. What a kill leaves between those two is a whole picture that holds its
key, which the next run recognizes and does not pay for again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from decimal import Decimal

from millicent.catalog import storage
from millicent.catalog.bill import bill_of
from millicent.catalog.choose import choose, expand_rows, read_ahead
from millicent.catalog.events import Summary
from millicent.catalog.finish import Check, check_root
from millicent.catalog.heartbeat import Heartbeat
from millicent.catalog.ledger import Ledger
from millicent.catalog.leftovers import sweep_killed
from millicent.catalog.manifest import BadRow, Row
from millicent.catalog.pictures import Pictures
from millicent.catalog.recipes import Recipe
from millicent.catalog.run_outcomes import Outcomes
from millicent.catalog.run_requests import Requests
from millicent.catalog.run_state import OnEvent, RunState
from millicent.catalog.stopping import RunLimits
from millicent.edits import SupportsEdit

READ_THREADS = 4
READ_AHEAD = 8  # pictures that are fetched before their turn
FINISH_THREADS = 2
_HOUR_S = Decimal(3600)
_NANO = Decimal("1e-9")


def run_catalog(
    editor: SupportsEdit,
    rows: Iterable[Row | BadRow],
    recipe: Recipe,
    ledger: Ledger,
    out: str,
    *,
    weights_sha256: str,
    check: Check,
    price: Decimal | None = None,
    cards: int = 1,
    loading_s: float = 0.0,
    budget_usd: Decimal | None = None,
    deadline: datetime | None = None,
    retry_failed: bool = False,
    on_event: OnEvent = lambda event: None,
    stop: threading.Event | None = None,
    fetch_limits: storage.FetchLimits | None = None,
    allowed_hosts: frozenset[str] = frozenset(),
    ahead: int = 1,
    expected_s: float | None = None,
    backoff_base_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """Make what is not made yet. The same call goes on wherever an earlier one ended or was killed.

    editor: where it has `edit_many(requests, ahead, cancelled)`, that is used. out: a folder, or s3:// or gs://.
    price: dollars for an hour of one card; cards: how many are rented. loading_s: rented seconds before this call.
    budget_usd: for the whole ledger, earlier runs, loading and idle time too; needs a price. deadline: with its time zone.
    retry_failed: what was quarantined is tried again. stop: once set, no more images are begun. It is `cancelled` of edit_many:
    what that finishes comes out, and the claims of what it does not are given back, unbilled.
    check: whether a picture is accepted, from its inputs and their fit, itself and the recipe's limits; called in threads.
    on_event: called in this thread. expected_s: seconds of an image, for budget and deadline before the first is measured.
    backoff_base_s: the pause before the first retry; it doubles.
    Raises OutputError where outputs cannot be written (before anything is drawn, or as soon as it is found), and what the
    ledger raises. A failed image raises nothing: it is in the ledger, the events and the summary.
    """
    assert budget_usd is None or price is not None, "a budget needs a price"
    assert deadline is None or deadline.tzinfo is not None, "a deadline needs a time zone"
    check_root(out)
    began = clock()
    if retry_failed:
        ledger.retry_quarantined()
    ledger.begin_run(loading_s=loading_s, cards=cards, usd_per_hour=price)
    rate = None if price is None else price * cards / _HOUR_S
    bill = bill_of(ledger)
    limits = RunLimits(
        lambda: clock() - began,
        stop or threading.Event(),
        budget_usd=budget_usd,
        spent_usd=Decimal(0) if bill is None else bill.total_usd,
        usd_per_s=rate,
        deadline=deadline,
        expected_s=expected_s,
    )
    sweep_killed(ledger, out)
    fetch = fetch_limits or storage.FetchLimits()
    reading = Pictures(lambda location: storage.read_bytes(location, fetch, allowed_hosts), out, weights_sha256, READ_THREADS)
    finishing = ThreadPoolExecutor(FINISH_THREADS, thread_name_prefix="finish")
    run = RunState(recipe, ledger, out, limits, on_event, reading, lambda: clock() - began, backoff_base_s)
    candidates = choose(expand_rows(rows, recipe, run.tell_bad_row), ledger, weights_sha256, out, run.tell_passed)
    fresh = read_ahead(candidates, reading, READ_AHEAD)
    try:
        with Heartbeat(ledger.url, ledger.run_id, run.elapsed_s), reading:
            Requests(editor, fresh, ahead, run, Outcomes(run, finishing, check)).go()
    finally:
        finishing.shutdown(cancel_futures=True)
        ledger.end_run(run.elapsed_s(), run.stopped)
    if run.error is not None:
        raise run.error
    return _summarize(run, ledger, None if rate is None else rate * Decimal(str(run.elapsed_s() + loading_s)))


def _summarize(run: RunState, ledger: Ledger, usd: Decimal | None) -> Summary:
    elapsed_s, count = run.elapsed_s(), run.counts
    return Summary(
        done=count["done"],
        linked=count["linked"],
        quarantined=count["quarantined"],
        already=count["already"],
        given_up=count["given up"],
        recovered=count["recovered"],
        rejected=count["rejected"],
        failed=count["failed"],
        bad_rows=count["bad row"],
        elsewhere=count["elsewhere"],
        waiting=run.count_waiting(),
        elapsed_s=elapsed_s,
        usd=None if usd is None else usd.quantize(_NANO),
        images_per_hour=count["done"] * 3600 / elapsed_s if count["done"] and elapsed_s else None,
        bill=bill_of(ledger),
        stopped=run.stopped,
    )
