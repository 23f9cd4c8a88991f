"""Several searches side by side: the best so far of each, its spread over seeds, ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from deephyper_balsam.common.objective import turned
from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import InputError
from deephyper_balsam.results.analysis.look import Spec, footnote, spec
from deephyper_balsam.results.analysis.trials import Trials, best_so_far, drawing_unit, time_unit, widened

FloatArray = npt.NDArray[np.float64]

_SAME = ("problem", "method", "options", "run", "warm_start", "eval_timeout")
_POINTS = 200
_COLOURS = ("#2456d6", "#d9730d", "#2a9d74", "#8a5cd1", "#b4235a", "#64748b", "#0e8ba0", "#a3801a")


@dataclass(frozen=True)
class Group:
    """Searches that differ only in their seed: the same problem, run, method, options, warm start and time limit.

    By time, also the same number of workers.

    Attributes
    ----------
    label
        How it is called in a table and a figure.
    searches
        Its members.
    """

    label: str
    searches: tuple[Trials, ...]


@dataclass(frozen=True)
class Comparison:
    """Searches, held against each other at equal cost.

    Attributes
    ----------
    groups
        The searches.
    by
        ``"evaluations"`` or ``"time"`` (s): what is held equal.
    budget
        What all of them spent: the least of any.
    notes
        What a reader should know.
    """

    groups: tuple[Group, ...]
    by: str
    budget: float
    notes: tuple[str, ...] = ()

    @property
    def budget_said(self) -> str:
        """The budget in words."""
        if self.by == "evaluations":
            return f"{counted(round(self.budget), 'evaluation')} each"
        unit, length = time_unit(self.budget)
        return f"{self.budget / length:.3g} {unit} each"

    @cached_property
    def curves(self) -> list[FloatArray]:
        """The best so far of each search of each group at `points`, shape (searches, points); NaN before the first."""
        return [
            np.array([_best_at(search, self.by, self.points) for search in group.searches]) for group in self.groups
        ]

    @cached_property
    def points(self) -> FloatArray:
        """Where the curves are looked at, up to the budget."""
        if self.by == "evaluations" and self.budget <= _POINTS:
            return np.arange(1.0, self.budget + 1)
        return np.linspace(self.budget / _POINTS, self.budget or 1.0, _POINTS)

    @cached_property
    def curves_drawn(self) -> list[FloatArray]:
        """The values of each search's curve as they are drawn, those before its first result left out."""
        sign = -1.0 if self.minimize else 1.0
        return [sign * one[~np.isnan(one)] / self.unit for curve in self.curves for one in curve]

    @property
    def minimize(self) -> bool:
        """Whether the searches minimise, all of them: people are then shown what the runs returned."""
        return self.groups[0].searches[0].minimize

    @cached_property
    def unit(self) -> float:
        """What a figure divides objectives by (see `Trials.unit`)."""
        return drawing_unit(
            [value for group in self.groups for search in group.searches for value in search.objectives]
        )

    @cached_property
    def ranks(self) -> list[FloatArray]:
        """The mean rank of each group at `points` among all searches (1 is best; equals share), shape (points,)."""
        values = np.vstack(self.curves)
        ranks = rankdata(-np.where(np.isnan(values), -np.inf, values), axis=0)
        ends = np.cumsum([len(group.searches) for group in self.groups])
        return [part.mean(axis=0) for part in np.split(ranks, ends[:-1])]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values, the groups by rank.

        Objectives are maximised; where the searches minimise, each group has a mapping ``loss`` with the same numbers
        as the runs returned them.
        """
        groups = []
        for group, curve, ranks in zip(self.groups, self.curves, self.ranks, strict=True):
            best = max(float(search.best["objective"]) for search in group.searches)
            last = curve[:, -1][~np.isnan(curve[:, -1])]
            groups.append(
                {
                    "searches": group.label,
                    "names": [search.name for search in group.searches],
                    "runs": len(group.searches),
                    "evaluated": sum(len(search.ended) for search in group.searches),
                    "failed": sum(len(search.failed) for search in group.searches),
                    **self._spread(best, last),
                    **({"loss": self._spread(turned(best, True), 0.0 - last)} if self.minimize else {}),
                    "rank": float(ranks[-1]),
                }
            )
        return {
            "by": self.by,
            "budget": self.budget,
            "minimize": self.minimize,
            "groups": sorted(groups, key=lambda one: float(one["rank"])),
        }

    def _spread(self, best: float, last: FloatArray) -> dict[str, float | None]:
        """Return the best of a group, and where its searches, shape (searches,), stand at the budget."""
        found = None
        if len(last):
            found = (float(np.median(last / self.unit) * self.unit), float(last.min()), float(last.max()))
        median, lowest, highest = found or (None, None, None)
        return {"best": best, "median": median, "lowest": lowest, "highest": highest}


def compare_searches(searches: Sequence[Trials], by: str = "evaluations") -> Comparison:
    """Compare searches at equal evaluations or equal time.

    Raises
    ------
    InputError
        With fewer than two searches, one without a trial that has an objective, or different directions.
    """
    if len(searches) < 2:
        raise InputError(f"A comparison needs two searches or more, but got {len(searches)}.")
    for search in searches:
        search.best  # noqa: B018  # says what is missing
    if len({search.minimize for search in searches}) > 1:
        minimising = ", ".join(search.name for search in searches if search.minimize)
        raise InputError(f"Searches that minimise ({minimising}) cannot be compared with others that maximise.")
    notes = []
    if len({repr(search.settings["problem"]) for search in searches}) > 1:
        notes.append("these searches have different problems; their objectives are taken for the same measure.")
    same = _SAME if by == "evaluations" else (*_SAME, "num_workers")
    return Comparison(_grouped(searches, same), by, min(_spent(search, by) for search in searches), tuple(notes))


def _grouped(searches: Sequence[Trials], same: Sequence[str]) -> tuple[Group, ...]:
    kinds: dict[str, list[Trials]] = {}
    for search in searches:
        kinds.setdefault(repr([search.settings.get(key) for key in same]), []).append(search)
    labels = [_label(members) for members in kinds.values()]
    return tuple(
        Group(label if labels.count(label) == 1 else " + ".join(one.name for one in members), tuple(members))
        for label, members in zip(labels, kinds.values(), strict=True)
    )


def _label(members: Sequence[Trials]) -> str:
    if len(members) == 1:
        return members[0].name
    settings = members[0].settings
    return " ".join(
        [str(settings.get("method")), *(f"{key}={value}" for key, value in settings.get("options", {}).items())]
    )


def _spent(search: Trials, by: str) -> float:
    if by == "evaluations":
        return float(len(search.ended))
    ends = [
        search.search_time(float(line["m:timestamp_end"]))
        for line in search.ended
        if line.get("m:timestamp_end") is not None
    ]
    if not ends:
        raise InputError(f"Search {search.name} has no times to compare by.")
    return max(ends)


def _best_at(search: Trials, by: str, points: FloatArray) -> FloatArray:
    steps = best_so_far(search.ended)
    at = np.array(
        [
            float(count) if by == "evaluations" else np.inf if time is None else search.search_time(time)
            for count, time, _ in steps
        ]
    )
    values = np.array([np.nan, *(value for _, _, value in steps)])
    return np.asarray(values[np.searchsorted(at, points, side="right")])


def comparison_figure(found: Comparison) -> Spec:
    """Return the best so far of each group (median, and the range over its searches), and the mean ranks, with data."""
    unit, length = ("evaluations ended", 1.0) if found.by == "evaluations" else time_unit(found.budget)
    values = _points_drawn(found, length)
    x = {"field": "t", "type": "quantitative", "title": unit, "scale": {"nice": False}}
    colour = _colour_of_groups([group.label for group in found.groups])
    low, high = _settled_range(values, found.budget / length)
    best_y = {
        "type": "quantitative",
        "title": ("best so far (minimised)" if found.minimize else "best so far")
        + ("" if found.unit == 1 else f" / {found.unit:g}"),
        "scale": {"domain": [low, high], "nice": False, "clamp": True},
    }
    rank_y = {
        "field": "r",
        "type": "quantitative",
        "title": "mean rank",
        "scale": {"zero": False, "reverse": True},
        "axis": {"tickMinStep": 1},
    }
    band = {"type": "area", "interpolate": "step-after", "fillOpacity": 0.14, "opacity": 1}
    line = {"type": "line", "interpolate": "step-after", "strokeWidth": 2}
    whole = {"x": x, "y": {**best_y, "field": "low"}, "y2": {"field": "high"}, "color": colour}
    median = {"x": x, "y": {**best_y, "field": "m"}, "color": colour}
    rank = {"x": x, "y": rank_y, "color": colour}
    best = [{"mark": band, "encoding": whole}, {"mark": line, "encoding": median}]
    body = {
        "background": "white",
        "data": {"values": values},
        "vconcat": [
            {"width": 560, "height": 280, "layer": best},
            {"width": 560, "height": 110, "mark": line, "encoding": rank},
        ],
        "spacing": 24,
    }
    drawn = [one for one in found.curves_drawn if len(one)]
    clipped = sum(one.max() > high if found.minimize else one.min() < low for one in drawn)
    if clipped:
        were = "curve begins" if clipped == 1 else "curves begin"
        body["title"] = footnote(
            f"{clipped} {were} {'above' if found.minimize else 'below'} the axis and "
            f"{'is' if clipped == 1 else 'are'} drawn at its {'top' if found.minimize else 'foot'}."
        )
    return spec(body, "Best so far and mean ranks of several searches")


def _points_drawn(found: Comparison, length: float) -> list[dict[str, Any]]:
    """Return each group's median, lowest and highest best so far, and its mean rank, at each point of the budget."""
    values = []
    for group, curve, ranks in zip(found.groups, found.curves, found.ranks, strict=True):
        for place, point in enumerate(found.points):
            column = curve[:, place][~np.isnan(curve[:, place])] / found.unit
            if found.minimize:
                column = -column
            if len(column):
                row = {"g": group.label, "t": float(point / length), "r": float(ranks[place])}
                values.append(
                    {**row, "m": float(np.median(column)), "low": float(column.min()), "high": float(column.max())}
                )
    return values


def _colour_of_groups(labels: Sequence[str]) -> Spec:
    legend = {
        "orient": "top",
        "title": None,
        "symbolType": "stroke",
        "symbolStrokeWidth": 3,
        "symbolOpacity": 1,
        "labelLimit": 300,
    }
    palette = [_COLOURS[i % len(_COLOURS)] for i in range(len(labels))]
    return {
        "field": "g",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": list(labels), "range": palette},
        "legend": legend,
    }


def _settled_range(values: Sequence[dict[str, Any]], end: float) -> list[float]:
    """Return the range of the best so far after the first tenth: where all begin would flatten where they differ."""
    settled = [row for row in values if row["t"] >= 0.1 * end] or values
    if not settled:  # no search had a result by then
        return [0.0, 1.0]
    return list(widened(min(row["low"] for row in settled), max(row["high"] for row in settled), 0.06))
