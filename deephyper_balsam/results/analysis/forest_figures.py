"""Figures of what a forest makes of the trials: importances, and its view of the objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deephyper_balsam.problem.columns import Column
from deephyper_balsam.results.analysis.importance import Curve, Share, Surface
from deephyper_balsam.results.analysis.look import PANEL_HEIGHT, Row, Spec, axis_of, colour, is_discrete
from deephyper_balsam.results.analysis.trials import labels_of, widened


def bars(shares: Sequence[Share], most: int = 15) -> Spec:
    """Return shares of the variance as bars, with a line for one standard deviation over the trees to both sides."""
    values: list[Row] = [
        {
            "name": " and ".join(one.names),
            "share": one.share,
            "low": max(one.share - one.spread, 0),
            "high": one.share + one.spread,
        }
        for one in shares[:most]
    ]
    y = {
        "field": "name",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelColor": colour("ink"), "labelLimit": 190},
    }
    top = max([0.05, *(value["high"] for value in values)])
    x = {
        "field": "share",
        "type": "quantitative",
        "title": "share of the variance",
        "axis": {"format": ".0%", "tickCount": 5, "grid": True, "domain": False},
        "scale": {"domain": [0, min(1.0, top)], "clamp": True},
    }
    tip = [{"field": "name", "title": "hyperparameter"}, {"field": "share", "format": ".1%", "title": "share"}]
    return {
        "height": {"step": 24},
        "data": {"values": values},
        "layer": [
            {
                "mark": {"type": "bar", "color": colour("accent"), "height": 10, "cornerRadiusEnd": 2},
                "encoding": {"x": x, "y": y, "tooltip": tip},
            },
            {
                "mark": {"type": "rule", "color": colour("ink"), "strokeOpacity": 0.55},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y},
            },
        ],
    }


def dependence(curve: Curve, domain: tuple[float, float], title: str = "mean objective") -> Spec:
    """Return the mean objective against one hyperparameter, with a band of one standard deviation over the trees."""
    labels = labels_of(curve.column)
    values = [
        {
            "v": labels[value] if labels else value,
            "m": float(mean),
            "low": max(float(mean - spread), domain[0]),
            "high": min(float(mean + spread), domain[1]),
        }
        for value, mean, spread in zip(curve.values, curve.mean, curve.spread, strict=True)
    ]
    x = axis_of(curve.column, "v")
    y = {
        "field": "m",
        "type": "quantitative",
        "title": title,
        "scale": {"domain": list(domain), "nice": False, "zero": False},
    }
    band = {**y, "field": "low"}
    tip = [{"field": "v", "title": curve.column.name}, {"field": "m", "format": ".5g", "title": title}]
    if labels:
        layers = [
            {
                "mark": {"type": "rule", "color": colour("accent"), "strokeOpacity": 0.4, "strokeWidth": 2},
                "encoding": {"x": x, "y": band, "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "color": colour("accent"), "size": 60, "opacity": 1},
                "encoding": {"x": x, "y": y, "tooltip": tip},
            },
        ]
    else:
        layers = [
            {
                "mark": {"type": "area", "color": colour("accent"), "fillOpacity": 0.16, "opacity": 1},
                "encoding": {"x": x, "y": band, "y2": {"field": "high"}},
            },
            {"mark": {"type": "line", "color": colour("accent"), "strokeWidth": 2}, "encoding": {"x": x, "y": y}},
            {"mark": {"type": "point", "opacity": 0, "size": 60}, "encoding": {"x": x, "y": y, "tooltip": tip}},
        ]
    return {"height": PANEL_HEIGHT, "title": curve.column.name, "data": {"values": values}, "layer": layers}


def surface(one: Surface, title: str = "mean objective", *, minimize: bool = False) -> Spec:
    """Return the mean objective against two hyperparameters, the darker the better."""
    x_cells, y_cells = (_cells(column, values) for column, values in zip(one.columns, one.values, strict=True))
    values = [
        {
            **{f"x{key}": cell for key, cell in x.items()},
            **{f"y{key}": cell for key, cell in y.items()},
            "m": float(f"{one.mean[i, k]:.6g}"),
        }
        for i, x in enumerate(x_cells)
        for k, y in enumerate(y_cells)
    ]
    encoding: Spec = {}
    for axis, column in zip("xy", one.columns, strict=True):
        encoding[axis] = {**axis_of(column, f"{axis}v" if is_discrete(column) else f"{axis}low"), "title": column.name}
        if is_discrete(column):
            encoding[axis]["scale"] = {**encoding[axis]["scale"], "padding": 0}
            encoding[axis]["axis"] = {"labelAngle": 0}
        else:
            encoding[f"{axis}2"] = {"field": f"{axis}high"}
        encoding[axis]["axis"] = {**encoding[axis]["axis"], "grid": False}
    shades = [colour("accent"), colour("soft")] if minimize else [colour("soft"), colour("accent")]
    encoding["fill"] = {
        "field": "m",
        "type": "quantitative",
        "title": title,
        "scale": {"range": shades, "zero": False, "nice": False},
        "legend": {"symbolType": "square", "tickCount": 4},
    }
    encoding["stroke"] = {**encoding["fill"], "legend": None}  # hides the seams between cells
    encoding["tooltip"] = [
        {"field": "xv", "title": one.columns[0].name},
        {"field": "yv", "title": one.columns[1].name},
        {"field": "m", "title": title},
    ]
    return {
        "height": PANEL_HEIGHT,
        "data": {"values": values},
        "mark": {"type": "rect", "strokeWidth": 0.7},
        "encoding": encoding,
    }


def _cells(column: Column, values: Sequence[Any]) -> list[Row]:
    """Return for each value the cell that it stands for."""
    if is_discrete(column):
        labels = labels_of(column)
        return [{"v": labels[value]} for value in values]
    points = np.log(values) if column.log else np.asarray(values, dtype=float)
    edges = np.concatenate([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])
    edges = np.exp(edges) if column.log else edges
    edges[0], edges[-1] = column.lower, column.upper
    return [
        {"v": value, "low": float(low), "high": float(high)}
        for value, low, high in zip(values, edges[:-1], edges[1:], strict=True)
    ]


def curves_domain(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the range that all panels of the partial dependence share."""
    low = min(float((curve.mean - curve.spread).min()) for curve in curves)
    high = max(float((curve.mean + curve.spread).max()) for curve in curves)
    return widened(low, high, 0.05)
