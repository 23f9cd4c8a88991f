"""How a search stands, and how that is said: a line on a terminal, a bar in a notebook, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import html
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TextIO

from deephyper_balsam.common.objective import turned
from deephyper_balsam.common.wording import by_kind, counted, printable
from deephyper_balsam.trial import TrialState

_LINE_EVERY_S = 0.5
_PLAIN_EVERY_S = 10.0
_MOST_REASONS = 3


@dataclass(frozen=True)
class Progress:
    """How a search stands, for whoever watches it.

    Attributes
    ----------
    states
        Number of trials in each state.
    best
        The line of the best trial so far, or None.
    elapsed_s
        Seconds that drivers have driven the search, over all its drivers.
    evaluations_per_min
        Over the last minutes of this driver.
    max_evals, timeout_s
        The budgets of the whole search; None: no limit.
    capacity
        How many trials can run at once now.
    notice
        What a person should know, or None.
    minimize
        Whether the objective in `best`, which is maximised, is minus what the run function returned.
    """

    states: dict[TrialState, int]
    best: dict[str, Any] | None
    elapsed_s: float
    evaluations_per_min: float
    max_evals: int | None
    timeout_s: float | None
    capacity: int
    notice: str | None
    minimize: bool = False

    @property
    def evaluated(self) -> int:
        """Trials that count against `max_evals`: done and failed."""
        return self.states[TrialState.DONE] + self.states[TrialState.FAILED]

    @property
    def left(self) -> tuple[int | None, float | None]:
        """Evaluations and seconds that are left of the budgets; None: no limit."""
        return (
            None if self.max_evals is None else max(0, self.max_evals - self.evaluated),
            None if self.timeout_s is None else max(0.0, self.timeout_s - self.elapsed_s),
        )


@dataclass
class Rate:
    """Evaluations a minute over the last `window_s` seconds."""

    window_s: float = 300.0
    _times: deque[float] = field(default_factory=deque)

    def add(self, count: int, now: float) -> None:
        """Count results that came at `now` (seconds)."""
        self._times.extend([now] * count)
        while self._times and now - self._times[0] > self.window_s:
            self._times.popleft()

    def per_min(self, now: float, began_at: float) -> float:
        """Return the rate at `now` of a driver that began at `began_at`, seconds on the same clock."""
        span_s = min(self.window_s, max(now - began_at, 30.0))  # one result in the first second is no 60 a minute
        return 60.0 * len(self._times) / span_s


def duration(seconds: float) -> str:
    """Return `seconds` as a person says it: ``45s``, ``3m05s``, ``2h10m``, ``3d04h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def in_one_line(progress: Progress) -> str:
    """Return how a search stands, in one line."""
    states, best = progress.states, "none"
    if progress.best is not None:
        best = f"{turned(progress.best['objective'], progress.minimize):.6g} (trial {progress.best['job_id']})"
    evaluations, seconds = progress.left
    left = [] if evaluations is None else [counted(evaluations, "evaluation")]
    left += [] if seconds is None else [duration(seconds)]
    line = (
        f"{duration(progress.elapsed_s)}  done {states[TrialState.DONE]}  running {states[TrialState.RUNNING]}  "
        f"waiting {states[TrialState.READY]}  failed {states[TrialState.FAILED]}  "
        f"best {best}"
    )
    line += f"  left {' or '.join(left)}" if left else ""
    return line + (f"  [{progress.notice}]" if progress.notice else "")


def by_state(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return how many trials of a table are in each state, such as ``30 done, 2 failed``."""
    counts = Counter(line["job_status"] for line in lines)
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(counts.items())) or "no trial"


def why_failed(lines: Iterable[Mapping[str, Any]], most: int = _MOST_REASONS) -> list[str]:
    """Return why trials failed, the most frequent reason first; those that differ in a number are one."""
    failed = Counter(str(line["m:failure"]) for line in lines if line["job_status"] == TrialState.FAILED.value)
    kinds = by_kind(failed.items())
    said = [f"{count} x {reason}" for reason, count in kinds[:most]]
    rest = sum(count for _, count in kinds[most:])
    return [*said, *([f"{rest} for other reasons"] if rest else [])]


class Narrator:
    """Says how a search stands; call it with each `Progress`, and `end` at the end.

    Parameters
    ----------
    stream
        Where to; None: the standard error output as it is then.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._said_at = -1e9
        self._said: tuple[Any, ...] = ()
        self._open_line = False
        self._bar = _Bar() if stream is None and _in_notebook() else None

    def __call__(self, progress: Progress) -> None:
        """Show `progress`, if it is time to."""
        now, stream = self._clock(), self._stream or sys.stderr
        if self._bar is not None:
            if now - self._said_at >= _LINE_EVERY_S:
                self._said_at = now
                self._bar.show(progress)
        elif stream.isatty():
            if now - self._said_at >= _LINE_EVERY_S:
                self._said_at, self._open_line = now, True
                width = shutil.get_terminal_size().columns - 1
                self._write(f"\r{printable(in_one_line(progress))[:width].ljust(width)}")
        else:
            news = (progress.states, progress.notice)
            if news != self._said and now - self._said_at >= _PLAIN_EVERY_S:
                self._said_at, self._said = now, news
                self._write(f"{printable(in_one_line(progress))}\n")

    def end(self, words: Iterable[str] = ()) -> None:
        """Say the last words, each in a line of its own."""
        if self._open_line:
            self._write("\n")
            self._open_line = False
        for line in words:
            self._write(f"{printable(line)}\n")

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stderr
        encoding = getattr(stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError):  # a terminal that is gone, a full disk: the search goes on
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()


def _in_notebook() -> bool:
    get = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return hasattr(get() if get is not None else None, "kernel")


class _Bar:
    """A bar in a notebook, drawn by the browser."""

    def __init__(self) -> None:
        self._shown: Any = None

    def show(self, progress: Progress) -> None:
        drawn: Any = import_module("IPython.display")
        share = 0.0
        if progress.max_evals:
            share = progress.evaluated / progress.max_evals
        if progress.timeout_s:
            share = max(share, progress.elapsed_s / progress.timeout_s)
        bar = f'<progress value="{min(1.0, share):.4f}" max="1" style="width: 20em"></progress> '
        content = drawn.HTML(bar + html.escape(in_one_line(progress)))
        if self._shown is None:
            self._shown = drawn.display(content, display_id=True)
        else:
            self._shown.update(content)
