"""When a run is to stop: asked to, out of money, or out of time.

Money and time count what is in flight, and that is finished; only a run that is asked to stop gives back what is not drawn yet.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal

RECENT = 16  # images that the next one's seconds are guessed from, or as many as were in flight


class RunLimits:
    """Asked before each image. usd_per_s: of all cards together. spent_usd: by earlier runs on the ledger, and by loading.

    expected_s: of one image, until one has been measured; without it the first is drawn alone, where there is a budget or deadline.
    elapsed_s: the run's clock, which never goes back; the wall clock is asked once, for how far away the deadline is.
    """

    def __init__(
        self,
        elapsed_s: Callable[[], float],
        stop: threading.Event,
        *,
        budget_usd: Decimal | None,
        spent_usd: Decimal,
        usd_per_s: Decimal | None,
        deadline: datetime | None,
        expected_s: float | None,
    ) -> None:
        self.stop = stop
        self._elapsed_s = elapsed_s
        self._budget_usd, self._spent_usd, self._usd_per_s = budget_usd, spent_usd, usd_per_s
        self._deadline = deadline
        self._deadline_s = None if deadline is None else elapsed_s() + (deadline - datetime.now(tz=UTC)).total_seconds()
        self._expected_s = expected_s or 0.0
        self._recent = deque[float]()
        self._most_in_flight = 0

    def note(self, seconds: float) -> None:
        """What an image has taken of the run."""
        self._recent.append(seconds)
        # the first of a wave takes the whole wave's reading with it: where fewer were looked at, most would have been drawn only
        while len(self._recent) > max(RECENT, self._most_in_flight):
            self._recent.popleft()

    def why_stop(self, in_flight: int) -> str | None:
        """Why no more images are begun; None while the next one, after all those in flight, fits into the limits."""
        if self.stop.is_set():
            return "It was asked to stop."
        self._most_in_flight = max(self._most_in_flight, in_flight + 1)
        if self._deadline_s is None and self._budget_usd is None:
            return None
        if in_flight and not self._recent and not self._expected_s:
            return "No image has been measured yet."
        each_s = sum(self._recent) / len(self._recent) if self._recent else self._expected_s
        end_s = self._elapsed_s() + each_s * (in_flight + 1)
        if self._deadline_s is not None and end_s > self._deadline_s:
            return f"The next image would not be done by {self._deadline:%Y-%m-%d %H:%M:%S %Z}."
        if self._budget_usd is not None and self._usd_per_s is not None:
            usd = self._spent_usd + Decimal(str(end_s)) * self._usd_per_s
            if usd > self._budget_usd:
                spent = self._spent_usd + Decimal(str(self._elapsed_s())) * self._usd_per_s
                return f"The next image would exceed the budget of ${self._budget_usd}; ${spent:.4f} are spent, all runs together."
        return None
