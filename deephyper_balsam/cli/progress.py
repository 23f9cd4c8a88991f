"""What a person sees of a search that goes on: a live screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from deephyper_balsam.cli.screen import Screen, one_line
from deephyper_balsam.cli.streams import unwrapped
from deephyper_balsam.common.wording import printable, without_numbers
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.monitor.search_snapshot import AllocationView, SearchSnapshot, Tally, about
from deephyper_balsam.store.trial_rows import trial_tags

if TYPE_CHECKING:
    from deephyper_balsam.driver.balsam_session import BalsamEvaluator
    from deephyper_balsam.driver.search import Search

__all__ = ["LiveView", "ProgressView", "live_console"]

_PLAIN_EVERY_S = 10.0


def live_console(*, stderr: bool = False) -> Console:
    """Return a console that is as large as its terminal, also when that changes.

    Rich takes $COLUMNS and $LINES for the size, whatever the terminal says; programs that read lines leave them to
    those that they start.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    # Given by name: rich's live display puts a stream of its own before ours, and would then draw through ours
    return Console(file=unwrapped(sys.stderr if stderr else sys.stdout), _environ=environment)


class LiveView:
    """Shows snapshots of a search while it is open: the whole screen of a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._snapshot: SearchSnapshot | None = None
        self._shown_at = 0.0
        self._note: str | None = None
        self._said_at = -1e9
        self._said: tuple[Any, ...] = ()

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, screen=True, refresh_per_second=2, get_renderable=self._render, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            with self._whatever_becomes_of_the_output():
                self._live.stop()
            self._live = None

    def show(self, snapshot: SearchSnapshot) -> None:
        """Show a snapshot: at once on a terminal, now and then in a log."""
        self._snapshot, self._shown_at = snapshot, time.monotonic()
        if self._live is not None:
            with self._whatever_becomes_of_the_output():
                self._live.refresh()
            return
        best = snapshot.best and snapshot.best.number
        notice = without_numbers(snapshot.notice or "")  # one that counts seconds is no news each time
        self._say(one_line(snapshot), (notice, best, snapshot.complete))

    def note(self, words: str | None) -> None:
        """Say something beside the snapshot, until something else is said; None: nothing any more."""
        if words == self._note:
            return
        self._note = words
        if self._live is None and words is not None:
            self._say(words, (words,))

    def _say(self, line: str, news: tuple[Any, ...]) -> None:
        now = time.monotonic()
        if news != self._said or now - self._said_at > _PLAIN_EVERY_S:
            with self._whatever_becomes_of_the_output():
                self._console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
            self._said_at, self._said = now, news

    @contextlib.contextmanager
    def _whatever_becomes_of_the_output(self) -> Iterator[None]:
        """Go on without a terminal that has gone, a reader that has left, or room on the disk."""
        try:
            yield
        except OSError:
            self._console.quiet = True
        except SystemExit:  # Rich's answer to a reader that has left
            self._console.quiet = True

    def _render(self) -> Any:
        if self._snapshot is None:
            return self._note or "Reading the search from Balsam ..."
        return Screen(self._snapshot, self._snapshot.at + time.monotonic() - self._shown_at, self._note)


class ProgressView(LiveView):
    """Shows a search while this process drives it; call it with each `Progress`."""

    def __init__(self, search: Search[BalsamEvaluator], console: Console | None = None) -> None:
        super().__init__(console or live_console(stderr=True))
        self._search = search
        self._tally = Tally()
        search.evaluator.on_change = self._tally.take

    def __call__(self, progress: Progress) -> None:
        """Show `progress`, with what the evaluator told of the trials meanwhile."""
        self.show(self._snapshot_of(progress))

    def _snapshot_of(self, progress: Progress) -> SearchSnapshot:
        search, evaluator, tally = self._search, self._search.evaluator, self._tally
        now, sites = evaluator.gateway.now(), list(evaluator.sites or ())
        allocations = [
            AllocationView(
                row["id"], site.name, row["num_nodes"], row["state"], row["wall_time_min"], site.allocations.left_s(row)
            )
            for site in sites
            for row in site.allocations.alive
        ]
        batch_jobs = [row for site in sites for row in site.allocations.seen]
        return SearchSnapshot(
            name=search.name,
            about=about(search.method, search.problem.name, [site.name for site in sites]),
            at=now,
            begun_at=evaluator.begun_at,
            states=progress.states,
            best=tally.best,
            steps=tally.steps,
            running=tally.running(allocations),
            last=tally.last,
            failures=tally.failures,
            allocations=allocations,
            busy=tally.busy(now, batch_jobs, trial_tags(search.name)),
            evaluations_per_min=progress.evaluations_per_min,
            elapsed_s=progress.elapsed_s,
            max_evals=progress.max_evals,
            timeout_s=progress.timeout_s,
            driver="this process",
            notice=progress.notice,
            minimize=progress.minimize,
        )
