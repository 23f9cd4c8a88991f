"""The figures of a search as Vega-Lite specifications: the report embeds them, `search plot` turns them into files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from deephyper_balsam.analysis.forest_figures import bars, curves_domain, dependence
from deephyper_balsam.analysis.importance import Landscape
from deephyper_balsam.analysis.look import LIGHT, PANEL_HEIGHT, TICKS, Row, Spec, axis_of, colour, is_discrete, spec
from deephyper_balsam.analysis.trials import Trials, best_so_far, label, position, running, time_unit
from deephyper_balsam.columns import REAL, Column

_MOST_LINES = 1000


def rows(trials: Trials) -> list[Row]:
    """Return a row for each trial that ended, in that order, with short names that no hyperparameter can disturb.

    ``n`` number, ``k`` how-manieth to end, ``e`` end (s), ``o`` objective (null: failed), ``y`` the objective as shown,
    ``g`` whether it is among the best tenth, ``p0``, ``p1``, ... the hyperparameters that vary, as `Trials.columns`.
    """
    made = []
    for count, line in enumerate(trials.ended, start=1):
        objective = line["objective"]
        row: Row = {"n": line["job_id"], "k": count, "e": line.get("m:timestamp_end"), "o": objective}
        row["y"] = (
            None if objective is None else max(objective, trials.floor) if trials.floor is not None else objective
        )
        row["g"] = int(objective is not None and objective >= trials.good)
        for j, column in enumerate(trials.columns):
            value = line.get(f"p:{column.name}")
            row[f"p{j}"] = label(value) if value is not None and column.choices else value
        made.append(row)
    return made


def objective_scale(trials: Trials) -> Spec:
    """Return the scale that all axes of the objective share."""
    low, high = min(trials.shown), max(trials.shown)
    margin = 0.06 * (high - low) or 1.0
    return {"domain": [low - margin, high + margin], "nice": False, "zero": False, "clamp": True}


def _objective(trials: Trials) -> Spec:
    return {"field": "y", "type": "quantitative", "scale": objective_scale(trials), "title": "objective"}


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
    last = max((float(line["m:timestamp_end"]) for line in trials.ended if line.get("m:timestamp_end")), default=0.0)
    unit, length = time_unit(last)
    steps = [
        {"k": count, "t": None if time is None else time / length, "b": value}
        for count, time, value in best_so_far(trials.ended)
    ]
    steps.append({"k": len(trials.ended), "t": last / length, "b": steps[-1]["b"]})
    name, title = ("k", "evaluations ended") if by == "trials" else ("t", f"{unit} since the search began")
    end = len(trials.ended) if by == "trials" else last / length
    x = {
        "field": name,
        "type": "quantitative",
        "title": title,
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
    kept = [
        others[i] for i in np.unique(np.linspace(0, len(others) - 1, min(_MOST_LINES // 2, len(others))).astype(int))
    ]
    low, high = min(trials.shown), max(trials.shown)
    names = [*(column.name for column in trials.columns), "objective"]
    values, ends = [], []
    for line in (*kept, *good):
        for place, column in enumerate(trials.columns):
            value = line.get(f"p:{column.name}")
            y = -0.1 if value is None else position(column, value)
            values.append(
                {"n": line["job_id"], "x": place, "y": round(y, 4), "g": int(line["objective"] >= trials.good)}
            )
        y = (max(line["objective"], low) - low) / ((high - low) or 1.0)
        values.append(
            {"n": line["job_id"], "x": len(names) - 1, "y": round(y, 4), "g": int(line["objective"] >= trials.good)}
        )
    for place, column in enumerate(trials.columns):
        marks = column.choices if 0 < column.size <= 6 and column.choices else _bounds(column)
        ends += [{"x": place, "y": position(column, mark), "label": label(mark)} for mark in marks]
    ends += [{"x": len(names) - 1, "y": y, "label": f"{value:.4g}"} for y, value in ((0, low), (1, high))]
    x_axis: Spec = {
        "field": "x",
        "type": "quantitative",
        "title": None,
        "scale": {"domain": [0, len(names) - 1], "nice": False, "padding": 10},
        "axis": {
            "orient": "top",
            "values": list(range(len(names))),
            "labelExpr": f"{json.dumps(names)}[datum.value]",
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
    layers: list[Spec] = [
        {
            "transform": [{"filter": f"datum.g === {good}"}],
            "mark": {"type": "line", "color": colour(name), "strokeOpacity": opacity, "strokeWidth": width},
            "encoding": {"x": x_axis, "y": y_axis, "detail": {"field": "n"}},
        }
        for good, name, opacity, width in ((0, "quiet", 0.16, 0.7), (1, "accent", 0.5, 1.0))
    ]
    layers.append(
        {
            "data": {"values": ends},
            "mark": {"type": "text", "align": "left", "dx": 4, "dy": -1, "fontSize": 10, "color": colour("ink")},
            "encoding": {"x": x_axis, "y": y_axis, "text": {"field": "label"}},
        }
    )
    return {"height": 320, "data": {"values": values}, "layer": layers}


def _bounds(column: Column) -> tuple[Any, Any]:
    if column.choices:
        return column.choices[0], column.choices[-1]
    return (column.lower, column.upper) if column.kind == REAL else (int(column.lower), int(column.upper))


def learn(trials: Trials) -> Landscape:
    """Return what a forest makes of the trials; what lies below the floor of the figures counts as lying on it."""
    trials.best  # noqa: B018  # says what is missing
    return Landscape(trials.problem, trials.configs, trials.shown)


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
        body = _panels([dependence(curve, curves_domain(curves)) for curve in curves])
    else:
        body = _panels([panel(trials, j) for j in range(len(trials.columns))])
    made = spec({"background": LIGHT["paper"], **body}, f"{trials.name}: {KINDS[kind]}", width)
    if kind == "panels" or "name" in made.get("data", {}):
        made["datasets"] = {"trials": rows(trials)}
    return made
