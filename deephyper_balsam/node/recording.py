"""What a run records on its way: its objective after each budget (an epoch, a step), and what is kept of that.

A run records into a `Recorder`. In Balsam that is one that also writes the records into a file in the trial's folder,
beside the checkpoints of the run: a run that was cut finds both again when it starts anew (`RecordFile`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deephyper_balsam.common.objective import objective_of, repr_of, turned

Point = tuple[float, float]
"""A budget, and the objective after it."""

RECORD_FILE = "records.jsonl"
MAX_POINTS = 128


class Curve:
    """A learning curve: points in the order of their budgets, thinned evenly so that it stays small.

    A point whose budget is not beyond the last one replaces all from its budget on: a run that was cut goes on from an
    older checkpoint. The first and the last point are always kept.

    Parameters
    ----------
    points
        Pairs of a budget and an objective.
    """

    def __init__(self, points: Iterable[Sequence[float]] = ()) -> None:
        self.points: list[Point] = []
        self._least_gap = 0.0  # between two budgets that are kept
        for budget, objective in points:
            self.add(budget, objective)

    def add(self, budget: float, objective: float) -> None:
        """Add a point.

        Parameters
        ----------
        budget
            What was spent until then.
        objective
            What was reached with it.
        """
        points = self.points
        while points and points[-1][0] >= budget:
            points.pop()
        if len(points) > 1 and points[-1][0] - points[-2][0] < self._least_gap:
            points.pop()
        points.append((float(budget), float(objective)))
        if len(points) > MAX_POINTS:
            points[:] = [*points[:-1:2], points[-1]]
            self._least_gap = (points[-1][0] - points[0][0]) / len(points)

    @property
    def last(self) -> Point | None:
        """The point of the largest budget; None: there is none."""
        return self.points[-1] if self.points else None


class Recorder:
    """Takes in what a run records, and says whether it shall stop; this one keeps a curve and stops nobody.

    Parameters
    ----------
    curve
        What an earlier start of the run recorded.
    minimize
        What the run records is a loss: the curve holds minus that.
    """

    def __init__(self, curve: Iterable[Sequence[float]] = (), *, minimize: bool = False) -> None:
        self.curve = Curve(curve)
        self.minimize = minimize

    def record(self, budget: Any, objective: Any) -> None:
        """Take in the objective that a run has reached with a budget.

        Parameters
        ----------
        budget
            What it has spent so far, such as the number of epochs: a number of more than 0.
        objective
            What it would return if it ended now.

        Raises
        ------
        ValueError
            When one of them is no finite number; the message says what was got.
        """
        self.add(_budget(budget), turned(_objective(objective), self.minimize))

    def add(self, budget: float, objective: float) -> None:
        """Keep a point; a child that keeps it elsewhere, too, extends this.

        Parameters
        ----------
        budget, objective
            As of `record`, checked, the objective to be maximised.
        """
        self.curve.add(budget, objective)

    def kept(self) -> Curve:
        """Return what outlives the process that records: here what this one knows."""
        return self.curve

    @property
    def restarts(self) -> int:
        """How often the run was begun before, where it records."""
        return 0

    def stopped(self) -> bool:
        """Return whether the run shall end now: with what it recorded last it has no prospect."""
        return False

    @property
    def last(self) -> Point | None:
        """The last point in the run's own terms: a loss is a loss. None: nothing was recorded."""
        point = self.curve.last
        return None if point is None else (point[0], turned(point[1], self.minimize))


class RecordFile:
    """The records of a run in a file in the trial's folder, a line each, which outlives the run's process.

    Lines of a trial follow one that names it. An earlier search of the same name may have had the folder, and left a
    file there: its lines stay, and count for nothing.

    Parameters
    ----------
    folder
        The trial's folder.
    trial
        What tells this trial from any other that had the folder.
    """

    def __init__(self, folder: Path, trial: str = "") -> None:
        self.path = folder / RECORD_FILE
        self._mark = {"trial": trial}

    def begin(self, rank: int = 0) -> int:
        """Note that a process of the run begins; return how often one of its rank did so before.

        Parameters
        ----------
        rank
            Of the process.
        """
        before = sum(1 for line in self._lines() if line == {"began": rank})
        self._append(self._mark, {"began": rank})
        return before

    def read(self) -> Curve:
        """Return what was recorded so far."""
        curve = Curve()
        for line in self._lines():
            if isinstance(line, list):
                with contextlib.suppress(ValueError, TypeError):
                    budget, objective = line
                    curve.add(_budget(budget), _objective(objective))
        return curve

    def append_decision(self, start: int, rung: float, *, stop: bool) -> None:
        """Add what the first rank decided at a rung, for the others.

        Parameters
        ----------
        start
            Which start of the run it is, from 0.
        rung
            Where.
        stop
            Whether the run ends there.
        """
        self._append({"start": start, "rung": rung, "stop": stop})

    def decision(self, start: int, rung: float) -> bool | None:
        """Return what the first rank decided at a rung; None: nothing yet.

        Parameters
        ----------
        start, rung
            As of `append_decision`.
        """
        for line in self._lines():
            if isinstance(line, dict) and (line.get("start"), line.get("rung")) == (start, rung):
                return bool(line["stop"])
        return None

    def append(self, budget: float, objective: float) -> None:
        """Add a point; a full disk costs the point, never the run.

        Parameters
        ----------
        budget, objective
            As of `Curve.add`.
        """
        self._append([budget, objective])

    def _lines(self) -> Iterator[Any]:
        """Return what stands in it of this trial; a line that was cut while it was written is left out."""
        ours = False
        with contextlib.suppress(OSError), open(self.path, encoding="utf-8", errors="replace") as file:
            for text in file:
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict) and "trial" in line:
                        ours = line == self._mark
                    elif ours:
                        yield line

    def _append(self, *lines: Any) -> None:
        # A line that was cut before these, when the disk was full, ends here
        text = b"".join(b"\n" + json.dumps(line).encode() for line in lines) + b"\n"
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, text)
            finally:
                os.close(descriptor)


class FileRecorder(Recorder):
    """A recorder that also keeps each point in the trial's folder.

    The file is made when it is first needed: a run that records nothing leaves none.

    Parameters
    ----------
    file
        Where; what it holds already is the curve so far.
    rank
        Of this process; of a run's ranks the first alone writes points.
    minimize
        As of `Recorder`.
    """

    def __init__(self, file: RecordFile, *, rank: int = 0, minimize: bool = False) -> None:
        super().__init__(file.read().points, minimize=minimize)
        self._file, self._rank = file, rank
        self._restarts: int | None = None

    @property
    def restarts(self) -> int:
        """How often the run was begun before; this start is noted when it is first asked for."""
        return self._begin()

    def kept(self) -> Curve:
        """Return what stands in the file."""
        return self._file.read()

    def add(self, budget: float, objective: float) -> None:
        """Keep a point here and in the file."""
        self._begin()
        super().add(budget, objective)
        if self._rank == 0:
            self._file.append(budget, objective)

    def _begin(self) -> int:
        if self._restarts is None:
            self._restarts = self._file.begin(self._rank)
        return self._restarts


def _budget(value: Any) -> float:
    try:
        budget = float(value)
    except (TypeError, ValueError):
        budget = math.nan
    if isinstance(value, (bool, str)) or not math.isfinite(budget) or budget <= 0:
        raise ValueError(f"job.record(budget, objective): the budget must be a number above 0, got {repr_of(value)}")
    return budget


def _objective(value: Any) -> float:
    try:
        return objective_of(value)
    except ValueError as error:
        raise ValueError(f"job.record(budget, objective): the objective must be a finite number, got {error}") from None
