"""The trials of a search, ready to be drawn: what ended when, the best so far, the good ones, where a value stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from deephyper_balsam.common.objective import minimises, title, turned
from deephyper_balsam.errors import InputError
from deephyper_balsam.problem.cells import write_cell
from deephyper_balsam.problem.columns import CONSTANT, Column
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.results.table import Line, best, configuration

GOOD_SHARE = 0.1
"""The best tenth of the trials is what figures bring out."""
_FLOOR_SPANS = 8.0
_SMALLEST_DRAWN, _LARGEST_DRAWN, _LEAST_EXPONENT = 1e-100, 1e100, -307


@dataclass(frozen=True)
class Trials:
    """The trials of one search, as lines of its table, and the settings that it was recorded with.

    Attributes
    ----------
    name, settings, lines
        The search's name, the settings in its record, and the lines of its table by number.
    created_at
        The zero of its times, seconds since the epoch.
    tracebacks
        The traceback of each failed trial that left one, by number.
    driven
        From when until when a driver drove it, by the same clock; empty: not known.
    """

    name: str
    settings: Mapping[str, Any]
    lines: Sequence[Line]
    created_at: float = 0.0
    tracebacks: Mapping[int, str] = field(default_factory=dict)
    driven: Sequence[tuple[float, float]] = ()

    def search_time(self, moment: float) -> float:
        """Return how long the search had been driven at a moment of its clock (s): pauses do not count.

        Where nobody said when it was driven, all of the time counts.
        """
        if not self.driven:
            return moment
        return sum(max(0.0, min(end, moment) - begin) for begin, end in self.driven)

    @cached_property
    def problem(self) -> HpProblem:
        """The search space."""
        problem = HpProblem.from_dict(self.settings["problem"])
        return problem.minimized() if self.minimize else problem

    @cached_property
    def minimize(self) -> bool:
        """Whether objectives, which are maximised in lines, are minus what the runs returned, which figures show."""
        return minimises(self.settings)

    @cached_property
    def columns(self) -> list[Column]:
        """The hyperparameters that vary."""
        return [column for column in self.problem.encoder.columns if column.kind != CONSTANT]

    @cached_property
    def ended(self) -> list[Line]:
        """Lines of what was evaluated, done or failed, in the order of their ends."""
        over = [line for line in self.lines if line["job_status"] in ("DONE", "FAILED")]
        return sorted(over, key=lambda line: (_end(line), line["job_id"]))

    @cached_property
    def done(self) -> list[Line]:
        """Lines with an objective, in the order of their ends."""
        return [line for line in self.ended if line["objective"] is not None]

    @cached_property
    def failed(self) -> list[Line]:
        """Lines of trials that failed, in the order of their ends."""
        return [line for line in self.ended if line["objective"] is None]

    @cached_property
    def timed(self) -> list[Line]:
        """Lines of `ended` that have the times of their run."""
        return [
            line
            for line in self.ended
            if line.get("m:timestamp_start") is not None and line.get("m:timestamp_end") is not None
        ]

    @cached_property
    def best(self) -> Line:
        """The line with the highest objective.

        Raises
        ------
        InputError
            When no trial has an objective.
        """
        found = best(self.done)
        if found is None:
            raise InputError(
                f"Search {self.name} has no trial with an objective yet ({len(self.failed)} failed): there is nothing "
                f"to draw. `deephyper-balsam search status {self.name}` says how it stands."
            )
        return found

    @cached_property
    def objectives(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Objectives of `done`, maximised."""
        return np.array([float(line["objective"]) for line in self.done])

    @cached_property
    def configs(self) -> list[dict[str, Any]]:
        """Configurations of `done`."""
        return [configuration(line) for line in self.done]

    @cached_property
    def good(self) -> float:
        """The objective from which on a trial is among the best tenth."""
        ranked = sorted(self.objectives.tolist())
        return float(ranked[math.ceil((1 - GOOD_SHARE) * (len(ranked) - 1))])

    @cached_property
    def unit(self) -> float:
        """What figures divide objectives by: 1, or a power of ten where they are so large or small that axes overflow.

        A drawing library reckons with differences, squares and reciprocals of what it draws.
        """
        return drawing_unit(self.objectives.tolist())

    @property
    def objective_title(self) -> str:
        """What an axis of the objective is called."""
        name = title(self.minimize)
        return name if self.unit == 1 else f"{name} / {self.unit:g}"

    @cached_property
    def floor(self) -> float | None:
        """Where the axis of the objective ends although trials lie below it, so that a few do not flatten the others.

        As far below the median as `_FLOOR_SPANS` times from there to the best; None when nothing lies below.
        """
        scaled = self.objectives / self.unit
        middle, top = float(np.median(scaled)), float(scaled.max())
        floor = middle - _FLOOR_SPANS * (top - middle)
        return floor * self.unit if middle < top and scaled.min() < floor else None

    @property
    def floor_said(self) -> str:
        """What a figure must say of trials that lie below its axis; empty when none does."""
        if self.floor is None:
            return ""
        below = int((self.objectives < self.floor).sum())
        worst = label(turned(float(self.objectives.min()), self.minimize))
        side, end, last = ("above", "top", "highest") if self.minimize else ("below", "foot", "lowest")
        lie = f"trial lies {side} the axis and is" if below == 1 else f"trials lie {side} the axis and are"
        return f"{below:,} {lie} drawn at its {end}; the {last} has {worst}."

    @cached_property
    def shown(self) -> list[float]:
        """Objectives of `done` as the runs returned them; those that lie below the floor as if they lay on it."""
        raised = self.objectives if self.floor is None else np.maximum(self.objectives, self.floor)
        return [turned(float(one), self.minimize) for one in raised]

    @cached_property
    def drawn(self) -> list[float]:
        """What `shown` has, in `unit`s: the numbers that figures draw."""
        return [one / self.unit for one in self.shown]

    @cached_property
    def drawn_range(self) -> tuple[float, float]:
        """The range of an axis of the objective: what is drawn, and a margin; never empty."""
        return widened(min(self.drawn), max(self.drawn), 0.06)


def drawing_unit(objectives: Sequence[float]) -> float:
    """Return 1, or the power of ten by which objectives must be divided before they can be drawn."""
    largest = max(map(abs, objectives), default=0.0)
    if largest == 0 or _SMALLEST_DRAWN <= largest <= _LARGEST_DRAWN:
        return 1.0
    return float(10.0 ** max(math.floor(math.log10(largest)), _LEAST_EXPONENT))


def widened(low: float, high: float, margin: float) -> tuple[float, float]:
    """Return a range with a margin on both sides, that share of it; of a single value a range around it."""
    room = margin * (high - low) or margin * abs(high) or 1.0
    return low - room, high + room


def _end(line: Line) -> float:
    for key in ("m:timestamp_end", "m:timestamp_gather"):
        if line.get(key) is not None:
            return float(line[key])
    return float("inf")


def best_so_far(lines: Sequence[Line]) -> list[tuple[int, float | None, float]]:
    """Return where the best objective rose: evaluations ended by then, the time (s) if known, the objective."""
    steps: list[tuple[int, float | None, float]] = []
    for count, line in enumerate(lines, start=1):
        if line["objective"] is not None and (not steps or line["objective"] > steps[-1][2]):
            time = _end(line)
            steps.append((count, None if time == float("inf") else time, float(line["objective"])))
    return steps


def running(lines: Sequence[Line], most_steps: int = 600) -> list[tuple[float, float]]:
    """Return how many trials ran at once, as steps (time in s, how many from then on), from starts and ends alone.

    With more than `most_steps` changes, means over as many intervals of equal length. Only the last run of a trial has
    its times in the table; what was cut or tried before is not seen here.
    """
    spans = [
        (float(line["m:timestamp_start"]), float(line["m:timestamp_end"]))
        for line in lines
        if line.get("m:timestamp_start") is not None and line.get("m:timestamp_end") is not None
    ]
    if not spans:
        return []
    times = np.array([time for begin, end in spans for time in (begin, max(begin, end))])
    changes = np.tile([1.0, -1.0], len(spans))
    order = np.lexsort((-changes, times))
    times, counts = times[order], np.cumsum(changes[order])
    if len(times) <= most_steps:
        last = np.append(times[1:] != times[:-1], True)
        return list(zip(times[last].tolist(), counts[last].tolist(), strict=True))
    area = np.concatenate([[0.0], np.cumsum(counts[:-1] * np.diff(times))])
    edges = np.linspace(times[0], times[-1], most_steps + 1)
    means = np.diff(np.interp(edges, times, area)) / np.diff(edges)
    return [*zip(edges[:-1].tolist(), means.tolist(), strict=True), (float(edges[-1]), 0.0)]


def label(value: Any) -> str:
    """Return a value as a person reads it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else str(value)


def labels_of(column: Column) -> dict[Any, str]:
    """Return the label of each choice of a hyperparameter, none twice: ``1`` and ``"1"``, and ``""`` for empty text."""
    labels = [label(choice) for choice in column.choices]
    if "" in labels or len(set(labels)) < len(labels):
        labels = [write_cell(choice) for choice in column.choices]
    return dict(zip(column.choices, labels, strict=True))


def position(column: Column, value: Any) -> float:
    """Return where a value stands on the axis of its hyperparameter, 0 to 1."""
    if column.choices:
        return column.choices.index(value) / max(column.size - 1, 1)
    return float(column.to_unit(np.array([float(value)]))[0])


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which so long a time is read, and its seconds."""
    for name, length, least in (
        ("days", 86400.0, 3 * 86400.0),
        ("hours", 3600.0, 2 * 3600.0),
        ("minutes", 60.0, 120.0),
    ):
        if seconds >= least:
            return name, length
    return "seconds", 1.0
