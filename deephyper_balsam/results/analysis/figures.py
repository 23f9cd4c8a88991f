"""The figures of a search as Vega-Lite specifications: the report embeds them, `search plot` turns them into files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from deephyper_balsam.common.objective import title, turned
from deephyper_balsam.errors import InputError
from deephyper_balsam.problem.columns import REAL, Column
from deephyper_balsam.results.analysis.forest_figures import bars, curves_domain, dependence
from deephyper_balsam.results.analysis.importance import Landscape
from deephyper_balsam.results.analysis.look import (
    LIGHT,
    PANEL_HEIGHT,
    TICKS,
    Row,
    Spec,
    axis_of,
    colour,
    drawable,
    footnote,
    is_discrete,
    spec,
)
from deephyper_balsam.results.analysis.trials import (
    Trials,
    best_so_far,
    label,
    labels_of,
    position,
    running,
    time_unit,
)
from deephyper_balsam.results.table import Line

_MOST_LINES = 1000
_INACTIVE_AT = -0.1  # below the axes, in parallel coordinates


def rows(trials: Trials) -> list[Row]:
    """Return a row for each trial that ended, in that order, with short names that no hyperparameter can disturb.

    ``n`` number, ``k`` its place in the order of ends, ``e`` end (s), ``o`` objective (null: failed), ``y`` as it is
    drawn, ``g`` whether it is among the best tenth, ``p0``, ``p1``, ... the hyperparameters that vary, as in
    `Trials.columns`.
    """
    made = []
    labels = [labels_of(column) for column in trials.columns]
    drawn = iter(trials.drawn)
    for count, line in enumerate(trials.ended, start=1):
        objective = line["objective"]
        row: Row = {"n": line["job_id"], "k": count, "e": _end_of(trials, line), "o": _returned(trials, line)}
        row["y"] = None if objective is None else next(drawn)
        row["g"] = int(objective is not None and objective >= trials.good)
        for j, column in enumerate(trials.columns):
            key = f"p:{column.name}"
            row[f"p{j}"] = labels[j][line[key]] if column.choices and key in line else line.get(key)
        made.append(row)
    return made


def _returned(trials: Trials, line: Line) -> float | None:
    """Return the objective as the run returned it."""
    return None if line["objective"] is None else turned(line["objective"], trials.minimize)


def _end_of(trials: Trials, line: Line) -> float | None:
    """Return how long the search had been driven when a trial ended (s)."""
    end = line.get("m:timestamp_end")
    return None if end is None else trials.search_time(float(end))


def objective_scale(trials: Trials) -> Spec:
    """Return the scale that all axes of the objective share."""
    return {"domain": list(trials.drawn_range), "nice": False, "zero": False, "clamp": True}


def _objective(trials: Trials) -> Spec:
    return {"field": "y", "type": "quantitative", "scale": objective_scale(trials), "title": trials.objective_title}


_TIP = [
    {"field": "n", "title": "trial"},
    {"field": "o", "type": "quantitative", "format": ".6g", "title": "objective"},
]


def _dots(trials: Trials, x: Spec, tip: list[Spec], **extra: Spec) -> list[Spec]:
    """Layers of points against the objective: quiet ones, over them the best tenth; the more, the fainter."""
    y: Spec = _objective(trials)
    crowd = min(1.0, (400 / len(trials.done)) ** 0.4)
    made: list[Spec] = []
    for good, name, opacity, size in (
        (0, "quiet", 0.35 * crowd**0.5, 18 * crowd**0.6),
        (1, "accent", 0.8 * crowd**0.5, 24 * crowd**0.6),
    ):
        mark: Spec = {
            "type": "point",
            "filled": True,
            "color": colour(name),
            "fillOpacity": round(opacity, 3),
            "opacity": 1,
            "size": round(size, 1),
        }
        made.append(
            {
                "transform": [{"filter": f"datum.o !== null && datum.g === {good}"}],
                "mark": mark,
                "encoding": dict(x=x, y=y, tooltip=tip, **extra),
            }
        )
    return made


def progress(trials: Trials, by: str) -> Spec:
    """Return objective and best so far against ``"trials"`` or ``"time"``."""
    last = max((end for line in trials.ended if (end := _end_of(trials, line)) is not None), default=0.0)
    unit, length = time_unit(last)
    steps = [
        {
            "k": count,
            "t": None if time is None else trials.search_time(time) / length,
            "b": turned(value, trials.minimize) / trials.unit,
        }
        for count, time, value in best_so_far(trials.ended)
    ]
    steps.append({"k": len(trials.ended), "t": last / length, "b": steps[-1]["b"]})
    name, x_title = ("k", "evaluations ended") if by == "trials" else ("t", f"{unit} of search, without pauses")
    end = (len(trials.ended) if by == "trials" else last / length) or 1.0
    x = {
        "field": name,
        "type": "quantitative",
        "title": x_title,
        "scale": {"domain": [0, end], "nice": False},
        "axis": TICKS,
    }
    layers = _dots(trials, x, _TIP)
    layers.append(
        {
            "transform": [{"filter": "datum.o === null"}],
            "mark": {
                "type": "point",
                "shape": "stroke",
                "angle": 90,
                "stroke": colour("quiet"),
                "size": 60,
                "strokeWidth": 1.2,
                "strokeOpacity": 0.7,
                "opacity": 1,
            },
            "encoding": {
                "x": x,
                "y": {"value": {"expr": "height - 5"}},
                "tooltip": [{"field": "n", "title": "failed trial"}],
            },
        }
    )
    layers.append(
        {
            "data": {"values": [step for step in steps if step[name] is not None]},
            "mark": {"type": "line", "interpolate": "step-after", "color": colour("accent"), "strokeWidth": 2},
            "encoding": {"x": x, "y": {**_objective(trials), "field": "b"}},
        }
    )
    timed: Spec = {"calculate": f"datum.e === null ? null : datum.e / {length}", "as": "t"}
    return {
        "height": 260,
        "data": {"name": "trials"},
        "transform": [timed, {"filter": f"datum.{name} !== null"}],
        "layer": layers,
    }


def running_trials(trials: Trials) -> Spec:
    """Return how many trials ran at once, over time. What the rest of the time went for says `analysis.node_hours`."""
    steps = running(trials.ended)
    most = max((int(count) for _, count in steps), default=0)
    unit, length = time_unit(steps[-1][0] if steps else 0.0)
    x = {
        "field": "t",
        "type": "quantitative",
        "title": f"{unit} since the search began",
        "scale": {"nice": False, "zero": True},
        "axis": TICKS,
    }
    y = {"field": "r", "type": "quantitative", "title": "trials running", "axis": {"tickCount": min(most, 4)}}
    return {
        "height": 150,
        "data": {"values": [{"t": round(time / length, 5), "r": round(count, 3)} for time, count in steps]},
        "mark": {
            "type": "area",
            "interpolate": "step-after",
            "color": colour("accent"),
            "fillOpacity": 0.3,
            "opacity": 1,
        },
        "encoding": {"x": x, "y": y},
    }


def panel(trials: Trials, j: int) -> Spec:
    """Return the objective against one hyperparameter, `Trials.columns[j]`, in the trials in which it is active."""
    column = trials.columns[j]
    x = axis_of(column, f"p{j}")
    tip = [*_TIP, {"field": f"p{j}", "title": column.name}]
    transform: list[Spec] = [{"filter": f"datum.p{j} !== null"}]
    extra: dict[str, Spec] = {}
    if is_discrete(column):
        transform.append({"calculate": "(datum.n * 0.6180339887) % 1", "as": "jitter"})
        extra["xOffset"] = {"field": "jitter", "type": "quantitative", "scale": {"domain": [0, 1]}}
    return {
        "height": PANEL_HEIGHT,
        "title": column.name,
        "data": {"name": "trials"},
        "transform": transform,
        "layer": _dots(trials, x, tip, **extra),
    }


def parallel(trials: Trials) -> Spec:
    """Return the trials as lines over one axis a hyperparameter and the objective; the best tenth stands out.

    Of very many trials the best and a spread of the others are drawn. What is inactive stands below its axis.
    """
    ranked = sorted(trials.done, key=lambda line: -line["objective"])
    good = [line for line in ranked if line["objective"] >= trials.good][: _MOST_LINES // 2]
    others = [line for line in ranked if line["objective"] < trials.good]
    spread = np.unique(np.linspace(0, len(others) - 1, min(_MOST_LINES // 2, len(others))).astype(int))
    kept = [*(others[i] for i in spread), *good]
    x_axis, y_axis = _parallel_axes([*(column.name for column in trials.columns), title(trials.minimize)])
    layers: list[Spec] = [
        {
            "transform": [{"filter": f"datum.g === {group}"}],
            "mark": {"type": "line", "color": colour(name), "strokeOpacity": opacity, "strokeWidth": width},
            "encoding": {"x": x_axis, "y": y_axis, "detail": {"field": "n"}},
        }
        for group, name, opacity, width in ((0, "quiet", 0.16, 0.7), (1, "accent", 0.5, 1.0))
    ]
    text: Spec = {"type": "text", "align": "left", "dx": 4, "dy": -1, "fontSize": 10}
    paper = {"stroke": colour("paper"), "strokeWidth": 3, "strokeOpacity": 0.9}  # so that no line crosses a word
    ends = _parallel_labels(trials, kept)
    layers += [
        {
            "data": {"values": ends},
            "mark": {**text, **extra},
            "encoding": {"x": x_axis, "y": y_axis, "text": {"field": "label"}},
        }
        for extra in ({**paper, "color": colour("paper")}, {"color": colour("ink")})
    ]
    return {"height": 320, "data": {"values": _parallel_points(trials, kept)}, "layer": layers}


def _parallel_points(trials: Trials, kept: Sequence[Line]) -> list[Spec]:
    """Return where each line crosses each axis, from 0 to 1; the objective's axis is the last."""
    low, high = min(trials.drawn), max(trials.drawn)
    made = []
    for line in kept:
        heights = [
            position(column, line[f"p:{column.name}"]) if f"p:{column.name}" in line else _INACTIVE_AT
            for column in trials.columns
        ]
        drawn = turned(line["objective"], trials.minimize) / trials.unit
        heights.append((min(max(drawn, low), high) - low) / ((high - low) or 1.0))
        good = int(line["objective"] >= trials.good)
        made += [{"n": line["job_id"], "x": x, "y": round(y, 4), "g": good} for x, y in enumerate(heights)]
    return made


def _parallel_labels(trials: Trials, kept: Sequence[Line]) -> list[Spec]:
    """Return the words at the axes: choices or bounds, the objective's range, and where the inactive stand."""
    made = []
    for place, column in enumerate(trials.columns):
        marks = column.choices if 0 < column.size <= 6 and column.choices else _bounds(column)
        labels = labels_of(column)
        made += [{"x": place, "y": position(column, mark), "label": labels.get(mark, label(mark))} for mark in marks]
    limits = ((0, min(trials.shown)), (1, max(trials.shown)))
    made += [{"x": len(trials.columns), "y": y, "label": label(value)} for y, value in limits]
    made += [
        {"x": place, "y": _INACTIVE_AT, "label": "inactive"}
        for place, column in enumerate(trials.columns)
        if any(f"p:{column.name}" not in line for line in kept)
    ]
    return made


def _parallel_axes(names: Sequence[str]) -> tuple[Spec, Spec]:
    x_axis: Spec = {
        "field": "x",
        "type": "quantitative",
        "title": None,
        "scale": {"domain": [0, len(names) - 1], "nice": False, "padding": 10},
        "axis": {
            "orient": "top",
            "values": list(range(len(names))),
            "labelExpr": f"{json.dumps(drawable(names), ensure_ascii=False)}[datum.value]",
            "labelColor": colour("ink"),
            "labelOverlap": False,
            "labelLimit": 100,
            "grid": True,
            "gridOpacity": 0.5,
            "domain": False,
        },
    }
    y_axis: Spec = {
        "field": "y",
        "type": "quantitative",
        "axis": None,
        "scale": {"domain": [-0.12, 1.02], "nice": False},
    }
    return x_axis, y_axis


def _bounds(column: Column) -> tuple[Any, Any]:
    if column.choices:
        return column.choices[0], column.choices[-1]
    return (column.lower, column.upper) if column.kind == REAL else (int(column.lower), int(column.upper))


def learn(trials: Trials) -> Landscape:
    """Return what a forest makes of the trials; what lies below the floor of the figures counts as lying on it."""
    trials.best  # noqa: B018  # says what is missing
    return Landscape(trials.problem, trials.configs, trials.drawn)


def _panels(made: Sequence[Spec], columns: int = 3, width: int = 210) -> Spec:
    return {"concat": [{"width": width, **one} for one in made], "columns": columns, "spacing": 28}


KINDS = {
    "progress": "objective and best so far against evaluations",
    "progress-time": "objective and best so far against time",
    "running": "trials running over time",
    "parallel": "parallel coordinates of the trials",
    "importance": "importance of hyperparameters and of pairs",
    "dependence": "partial dependence on each hyperparameter",
    "panels": "objective against each hyperparameter",
}
"""What `figure` draws: kind -> what it shows."""


def figure(trials: Trials, kind: str) -> Spec:
    """Return a figure of its own, with its data, one of `KINDS`.

    Raises
    ------
    InputError
        When there are too few trials for it.
    """
    trials.best  # noqa: B018  # says what is missing
    width: int = 640
    if kind in ("progress-time", "running") and not trials.timed:
        raise InputError(f"Search {trials.name} has no trial with the times of its run: there is nothing to draw.")
    if kind in ("progress", "progress-time"):
        body = progress(trials, "time" if kind.endswith("time") else "trials")
    elif kind == "running":
        body = running_trials(trials)
    elif kind == "parallel":
        body, width = parallel(trials), max(640, 110 * (len(trials.columns) + 1))
    elif kind == "importance":
        landscape = learn(trials)
        parts = [bars(landscape.shares()), bars(landscape.pairs(), most=8)]
        body = {"vconcat": [{"width": 420, **part} for part in parts if part["data"]["values"]], "spacing": 30}
    elif kind == "dependence":
        landscape = learn(trials)
        curves = [landscape.curve(column.name) for column in landscape.columns]
        mean = f"mean {trials.objective_title}"
        body = _panels([dependence(curve, curves_domain(curves), mean) for curve in curves])
    else:
        body = _panels([panel(trials, j) for j in range(len(trials.columns))])
    if trials.floor_said and kind != "running":
        body["title"] = footnote(trials.floor_said)
    made = spec({"background": LIGHT["paper"], **body}, f"{trials.name}: {KINDS[kind]}", width)
    if kind == "panels" or "name" in made.get("data", {}):
        made["datasets"] = {"trials": drawable(rows(trials))}
    return made
