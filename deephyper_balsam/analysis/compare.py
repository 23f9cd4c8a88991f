"""Several searches side by side: the best so far of each, its spread over seeds, ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from deephyper_balsam.analysis.look import Spec, spec
from deephyper_balsam.analysis.trials import Trials, best_so_far, time_unit
from deephyper_balsam.errors import InputError

FloatArray = npt.NDArray[np.float64]

_SAME = ("problem", "method", "options", "run")
_POINTS = 200
_COLOURS = ("#2456d6", "#d9730d", "#2a9d74", "#8a5cd1", "#b4235a", "#64748b", "#0e8ba0", "#a3801a")


@dataclass(frozen=True)
class Group:
    """Searches that differ only in their seed: the same problem, run, method, options (and workers, by time).

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
            return f"{self.budget:.0f} evaluations each"
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
        return np.linspace(self.budget / _POINTS, self.budget, _POINTS)

    @cached_property
    def ranks(self) -> list[FloatArray]:
        """The mean rank of each group at `points` among all searches (1 is best; equals share), shape (points,)."""
        values = np.vstack(self.curves)
        ranks = rankdata(-np.where(np.isnan(values), -np.inf, values), axis=0)
        ends = np.cumsum([len(group.searches) for group in self.groups])
        return [part.mean(axis=0) for part in np.split(ranks, ends[:-1])]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values, the groups by rank."""
        groups = []
        for group, curve, ranks in zip(self.groups, self.curves, self.ranks, strict=True):
            last = curve[:, -1][~np.isnan(curve[:, -1])]
            groups.append(
                {
                    "searches": group.label,
                    "names": [search.name for search in group.searches],
                    "runs": len(group.searches),
                    "evaluated": sum(len(search.ended) for search in group.searches),
                    "failed": sum(len(search.failed) for search in group.searches),
                    "best": max(float(search.best["objective"]) for search in group.searches),
                    "median": float(np.median(last)) if len(last) else None,
                    "lowest": float(last.min()) if len(last) else None,
                    "highest": float(last.max()) if len(last) else None,
                    "rank": float(ranks[-1]),
                }
            )
        return {"by": self.by, "budget": self.budget, "groups": sorted(groups, key=lambda one: float(one["rank"]))}


def compare_searches(searches: Sequence[Trials], by: str = "evaluations") -> Comparison:
    """Compare searches at equal evaluations or equal time.

    Raises
    ------
    InputError
        With fewer than two searches, or one without a trial that has an objective.
    """
    if len(searches) < 2:
        raise InputError(f"A comparison needs two searches or more, but got {len(searches)}.")
    for search in searches:
        search.best  # noqa: B018  # says what is missing
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
    ends = [float(line["m:timestamp_end"]) for line in search.ended if line.get("m:timestamp_end") is not None]
    if not ends:
        raise InputError(f"Search {search.name} has no times to compare by.")
    return max(ends)


def _best_at(search: Trials, by: str, points: FloatArray) -> FloatArray:
    steps = best_so_far(search.ended)
    at = np.array(
        [float(count) if by == "evaluations" else np.inf if time is None else time for count, time, _ in steps]
    )
    values = np.array([np.nan, *(value for _, _, value in steps)])
    return np.asarray(values[np.searchsorted(at, points, side="right")])


def comparison_figure(found: Comparison) -> Spec:
    """Return the best so far of each group (median, and the range over its searches), and the mean ranks, with data."""
    unit, length = ("evaluations ended", 1.0) if found.by == "evaluations" else time_unit(found.budget)
    values = []
    for group, curve, ranks in zip(found.groups, found.curves, found.ranks, strict=True):
        for place, point in enumerate(found.points):
            column = curve[:, place][~np.isnan(curve[:, place])]
            if len(column):
                row = {"g": group.label, "t": float(point / length), "r": float(ranks[place])}
                values.append(
                    {**row, "m": float(np.median(column)), "low": float(column.min()), "high": float(column.max())}
                )
    x = {"field": "t", "type": "quantitative", "title": unit, "scale": {"nice": False}}
    labels = [group.label for group in found.groups]
    palette = [_COLOURS[i % len(_COLOURS)] for i in range(len(labels))]
    legend = {
        "orient": "top",
        "title": None,
        "symbolType": "stroke",
        "symbolStrokeWidth": 3,
        "symbolOpacity": 1,
        "labelLimit": 300,
    }
    colour = {
        "field": "g",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": labels, "range": palette},
        "legend": legend,
    }
    scale = {"domain": _settled_range(values, found.budget / length), "nice": False, "clamp": True}
    best_y = {"type": "quantitative", "title": "best so far", "scale": scale}
    rank_y = {
        "field": "r",
        "type": "quantitative",
        "title": "mean rank",
        "scale": {"zero": False, "reverse": True},
        "axis": {"tickMinStep": 1},
    }
    band = {"type": "area", "interpolate": "step-after", "fillOpacity": 0.14, "opacity": 1}
    line = {"type": "line", "interpolate": "step-after", "strokeWidth": 2}
    body = {
        "background": "white",
        "data": {"values": values},
        "vconcat": [
            {
                "width": 560,
                "height": 280,
                "layer": [
                    {
                        "mark": band,
                        "encoding": {
                            "x": x,
                            "y": {**best_y, "field": "low"},
                            "y2": {"field": "high"},
                            "color": colour,
                        },
                    },
                    {"mark": line, "encoding": {"x": x, "y": {**best_y, "field": "m"}, "color": colour}},
                ],
            },
            {"width": 560, "height": 110, "mark": line, "encoding": {"x": x, "y": rank_y, "color": colour}},
        ],
        "spacing": 24,
    }
    return spec(body, "Best so far and mean ranks of several searches")


def _settled_range(values: Sequence[dict[str, Any]], end: float) -> list[float]:
    """Return the range of the best so far after the first tenth: where all begin would flatten where they differ."""
    settled = [row for row in values if row["t"] >= 0.1 * end]
    low, high = min(row["low"] for row in settled), max(row["high"] for row in settled)
    margin = 0.06 * (high - low) or 1.0
    return [low - margin, high + margin]
