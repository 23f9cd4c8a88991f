"""What a person sees while a search runs: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deephyper_balsam.search import Progress
from deephyper_balsam.trial import TrialState

_PLAIN_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """Return `seconds` as a person says it: ``45s``, ``3m05s``, ``2h10m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def left(progress: Progress) -> str:
    """Return what is left of the budgets."""
    parts = []
    if progress.max_evals is not None:
        rest = max(0, progress.max_evals - progress.evaluated)
        parts.append(f"{rest} evaluations")
        if rest and progress.evaluations_per_min:
            parts[-1] += f" (about {duration(60 * rest / progress.evaluations_per_min)})"
    if progress.timeout_s is not None:
        parts.append(duration(max(0.0, progress.timeout_s - progress.elapsed_s)))
    return " or ".join(parts)


def one_line(progress: Progress) -> str:
    """Return the whole progress as one line of a log."""
    states = progress.states
    best = "none" if progress.best is None else f"{progress.best['objective']:.6g} (trial {progress.best['job_id']})"
    line = (
        f"{duration(progress.elapsed_s):>6}  done {states[TrialState.DONE]}  running {states[TrialState.RUNNING]}  "
        f"waiting {states[TrialState.READY]}  failed {states[TrialState.FAILED]}  best {best}  "
        f"{progress.evaluations_per_min:.1f}/min  left {left(progress)}"
    )
    return line + (f"  [{progress.notice}]" if progress.notice else "")


class ProgressView:
    """Shows progress while it is open; call it with each `Progress`."""

    def __init__(self, name: str, console: Console | None = None) -> None:
        self._name = name
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._said_at = -1e9
        self._said: tuple[Any, ...] = ()

    def __enter__(self) -> ProgressView:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Show `progress`: at once on a terminal, now and then in a log."""
        if self._live is not None:
            self._live.update(self._panel(progress))
            return
        now = time.monotonic()
        news = (progress.notice, progress.best and progress.best["job_id"])
        if news != self._said or now - self._said_at > _PLAIN_EVERY_S:
            self._console.print(one_line(progress), highlight=False, markup=False, soft_wrap=True)
            self._said_at, self._said = now, news

    def _panel(self, progress: Progress) -> Group:
        states = progress.states
        table = Table.grid(padding=(0, 2))
        table.add_row(
            Text(self._name, style="bold"),
            Text(duration(progress.elapsed_s)),
            f"{states[TrialState.DONE]} done",
            f"{states[TrialState.RUNNING]} running of {progress.capacity}",
            f"{states[TrialState.READY]} waiting",
            Text(f"{states[TrialState.FAILED]} failed", style="red" if states[TrialState.FAILED] else ""),
            f"{progress.evaluations_per_min:.1f}/min",
        )
        rows: list[Any] = [table]
        if progress.max_evals is not None:
            rows.append(ProgressBar(total=progress.max_evals, completed=progress.evaluated, width=60))
        if progress.best is not None:
            rows.append(
                Text(f"best {progress.best['objective']:.6g} (trial {progress.best['job_id']})", style="bold green")
            )
        rows.append(Text(f"left: {left(progress)}"))
        if progress.notice:
            rows.append(Text(progress.notice, style="yellow"))
        return Group(*rows)
