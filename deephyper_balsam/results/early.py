"""What early discarding has saved: from the budgets that the runs of a search used, and the time that they took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from deephyper_balsam.common.wording import counted


@dataclass(frozen=True)
class Saved:
    """What the runs that recorded have used, and what they would have used without a stopper.

    Attributes
    ----------
    recorded, stopped
        How many trials recorded, and how many of them were stopped early.
    spent_h
        Hours that all of them ran.
    whole_h
        Hours that they would have run to the largest budget of all, each at its own pace.
    """

    recorded: int
    stopped: int
    spent_h: float
    whole_h: float

    @property
    def share(self) -> float:
        """The share of those hours that was saved, from 0 to 1."""
        return 1 - self.spent_h / self.whole_h if self.whole_h else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        """Say it in one sentence."""
        return (
            f"{self.stopped} of {counted(self.recorded, 'run')} stopped early: {self.share:.0%} of the time saved "
            f"({self.spent_h:.3g} h of runs in place of about {self.whole_h:.3g} h)"
        )


def saved(lines: Iterable[Mapping[str, Any]]) -> Saved | None:
    """Return what was saved, by the lines of a search's table.

    Parameters
    ----------
    lines
        A line a trial, with the columns of `results.csv`.

    Returns
    -------
    Saved or None
        None when no run was stopped.
    """
    used = [
        (float(line["m:budget"]), float(line["m:duration"]), bool(line["m:stopped"]))
        for line in lines
        if line.get("m:budget") and line.get("m:duration") is not None and line.get("objective") is not None
    ]
    stopped = sum(early for *_, early in used)
    if not stopped:
        return None
    whole = max(budget for budget, *_ in used)
    spent_s = sum(seconds for _, seconds, _ in used)
    whole_s = sum(seconds * (whole / budget if early else 1) for budget, seconds, early in used)
    return Saved(len(used), stopped, spent_s / 3600, whole_s / 3600)
