"""What a person sees of a search that goes on: a live screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live

from deephyper_balsam.cli.screen import Screen, one_line
from deephyper_balsam.picture import Allocation, Picture, Tally, about
from deephyper_balsam.search import Progress

__all__ = ["LiveView", "ProgressView", "live_console"]

_PLAIN_EVERY_S = 10.0


def live_console(*, stderr: bool = False) -> Console:
    """Return a console that is as large as its terminal, also when that changes.

    Rich takes $COLUMNS and $LINES for the size, whatever the terminal says; programs that read lines leave them to
    those that they start.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return Console(stderr=stderr, _environ=environment)


class LiveView:
    """Shows pictures of a search while it is open: the whole screen of a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._picture: Picture | None = None
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
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, picture: Picture) -> None:
        """Show a picture: at once on a terminal, now and then in a log."""
        self._picture, self._shown_at = picture, time.monotonic()
        if self._live is not None:
            self._live.refresh()
            return
        best = picture.best and picture.best.number
        self._say(one_line(picture), (picture.notice, best, picture.complete))

    def note(self, words: str | None) -> None:
        """Say something beside the picture, until something else is said; None: nothing any more."""
        if words == self._note:
            return
        self._note = words
        if self._live is None and words is not None:
            self._say(words, (words,))

    def _say(self, line: str, news: tuple[Any, ...]) -> None:
        now = time.monotonic()
        if news != self._said or now - self._said_at > _PLAIN_EVERY_S:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._said_at, self._said = now, news

    def _render(self) -> Any:
        if self._picture is None:
            return self._note or "Reading the search from Balsam ..."
        return Screen(self._picture, self._picture.at + time.monotonic() - self._shown_at, self._note)


class ProgressView(LiveView):
    """Shows a search while this process drives it; call it with each `Progress`."""

    def __init__(self, search: Any, console: Console | None = None) -> None:
        super().__init__(console or live_console(stderr=True))
        self._search = search
        self._tally = Tally()
        search.evaluator.on_change = self._tally.take

    def __call__(self, progress: Progress) -> None:
        """Show `progress`, with what the evaluator told of the trials meanwhile."""
        self.show(self._picture_of(progress))

    def _picture_of(self, progress: Progress) -> Picture:
        search, evaluator, tally = self._search, self._search.evaluator, self._tally
        now = evaluator.gateway.now()
        allocations = [
            Allocation(
                row["id"], site.name, row["num_nodes"], row["state"], row["wall_time_min"], site.allocations.left_s(row)
            )
            for site in evaluator.sites
            for row in site.allocations.alive
        ]
        return Picture(
            name=search.name,
            about=about(search.method, search.problem.name, [site.name for site in evaluator.sites]),
            at=now,
            begun_at=evaluator.begun_at,
            states=progress.states,
            best=tally.best,
            steps=tally.steps,
            running=tally.running(allocations),
            last=tally.last,
            failures=tally.failures,
            allocations=allocations,
            busy=tally.busy(now, allocations),
            evaluations_per_min=progress.evaluations_per_min,
            elapsed_s=progress.elapsed_s,
            max_evals=progress.max_evals,
            timeout_s=progress.timeout_s,
            driver="this process",
            notice=progress.notice,
        )
