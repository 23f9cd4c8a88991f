"""The report of a search: one HTML file that needs no network, made from the figures and the table.

What a person reads stands in the page itself; `report.js` adds what moves: the figures (Vega, embedded), the parallel
coordinates, the table. The trials are embedded once, compressed, and shared by all of these.
"""

from __future__ import annotations

import contextlib
import json
import platform
import pprint
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib import metadata, resources
from typing import Any

import yaml

from deephyper_balsam.common.objective import title, turned
from deephyper_balsam.common.wording import by_kind, counted, without_numbers
from deephyper_balsam.errors import InputError
from deephyper_balsam.monitor.node_hours import KINDS, NodeHours
from deephyper_balsam.results.analysis import figures, forest_figures, look
from deephyper_balsam.results.analysis.drawing import to_vega, vega_library
from deephyper_balsam.results.analysis.embedded import packed, script_json, shared
from deephyper_balsam.results.analysis.importance import Landscape
from deephyper_balsam.results.analysis.node_hours import DESCRIPTION, node_hours
from deephyper_balsam.results.analysis.trials import Trials, label, running, time_unit
from deephyper_balsam.results.table import configuration

_MOST_SURFACES = 3
_MOST_PANELS = 36
_MOST_REASONS = 40
_TRUSTED = 0.3
_LEAST_SHARE = 0.005
_PACKAGES = ("deephyper-balsam", "balsam", "ConfigSpace", "scikit-optimize", "scikit-learn", "numpy", "pandas")


class _Charts:
    """The figures of a report, in the order in which its script draws them."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def place(self, body: look.Spec, said: str, caption: str = "") -> str:
        """Keep a figure for the script and return the element into which it is drawn; `said` is its accessible name."""
        number, height, data = len(self.kept), body["height"], body["data"]
        self.kept.append({"spec": to_vega(look.spec(body, said)), "needsTrials": data.get("name") == "trials"})
        pixels = (height if isinstance(height, int) else height["step"] * len(data["values"])) + 60
        return (
            f'<figure><div class="chart" data-chart="{number}" role="img" aria-label="{escape(said)}" '
            f'style="min-height:{pixels}px"></div>{_element("figcaption", caption) if caption else ""}</figure>'
        )


def html(trials: Trials, written_at: float, hours: NodeHours | None = None) -> str:
    """Return the report of a search.

    Parameters
    ----------
    trials
        The search.
    written_at
        When, seconds since the epoch.
    hours
        Where its node-hours went; without one only how many trials ran is shown.

    Raises
    ------
    InputError
        When no trial has an objective, or the drawing library is not installed.
    """
    charts = _Charts()
    landscape = _learn(trials)
    parts = {
        "name": escape(trials.name),
        "colours": _colours(),
        "style": _asset("report.css"),
        "subtitle": _subtitle(trials, written_at),
        "summary": _summary(trials),
        "best": _best(trials),
        "progress": _progress(charts, trials) + _nodes(charts, trials, hours),
        "hyperparameters": _hyperparameters(charts, trials, landscape),
        "importance": _importance(charts, trials, landscape),
        "dependence": _dependence(charts, trials, landscape),
        "failures": _failures(charts, trials),
        "settings": _settings(trials),
        "problem": escape(trials.problem.describe()),
        "versions": _versions(),
        "charts": script_json(charts.kept),
        "trials": packed(shared(trials)),
        "library": vega_library(),
        "script": _asset("report.js"),
    }
    return _fill(_asset("report.html"), parts)


def _learn(trials: Trials) -> Landscape | str:
    """Return what a forest makes of the trials, or why it makes nothing."""
    trials.best  # noqa: B018  # says what is missing
    try:
        return figures.learn(trials)
    except InputError as error:
        return str(error)


# --- the parts of the page, in its order -----------------------------------------------------------------------------


def _element(tag: str, text: str) -> str:
    return f"<{tag}>{escape(text)}</{tag}>"


def _grid(made: Sequence[str], kind: str = "grid") -> str:
    return f'<div class="{kind}">{"".join(made)}</div>'


def _subtitle(trials: Trials, written_at: float) -> str:
    settings = trials.settings
    parts = [str(trials.problem.name), f"method {settings.get('method')}"]
    if settings.get("site"):
        parts.append(f"at {settings['site']}")
    if trials.created_at:
        parts.append(f"begun {_date(trials.created_at)}")
    parts.append(f"report of {_date(written_at)}")
    return escape(" · ".join(parts))


def _summary(trials: Trials) -> str:
    failed = f"{len(trials.failed):,} failed" if trials.failed else "none failed"
    cells = [
        (
            f"best {title(trials.minimize)}",
            label(turned(float(trials.best["objective"]), trials.minimize)),
            f"trial {trials.best['job_id']}",
        ),
        ("evaluated", f"{len(trials.ended):,}", failed),
    ]
    still_open = [line for line in trials.lines if line["job_status"] in ("RUNNING", "READY")]
    if still_open:
        cells.append(("still open", f"{len(still_open):,}", "running or waiting"))
    steps = running(trials.ended)
    if steps:
        first, last = steps[0][0], steps[-1][0]
        driven = trials.search_time(last)
        unit, length = time_unit(driven)
        busy = sum(line["m:timestamp_end"] - line["m:timestamp_start"] for line in trials.timed)
        pace = f"{60 * len(trials.ended) / driven:.3g} evaluations a minute" if driven > 0 else ""
        cells.append(("time", f"{driven / length:.3g} {unit}", pace))
        cells.append(("at once, on average", f"{busy / ((last - first) or 1.0):.3g}", "trials running"))
    return "".join(
        f'<div>{_element("dt", name)}{_element("dd", value)}<dd class="note">{escape(note)}</dd></div>'
        for name, value, note in cells
    )


def _best(trials: Trials) -> str:
    found = configuration(trials.best)
    config = {name: found[name] for name in trials.problem.hyperparameter_names if name in found}
    values = "".join(
        f"<div>{_element('dt', name)}{_element('dd', label(value))}</div>" for name, value in config.items()
    )
    return (
        f'<dl class="values">{values}</dl><p class="actions">'
        f"{_copy_button('Copy as JSON', json.dumps(config, indent=2, default=str))} "
        f"{_copy_button('Copy as Python', pprint.pformat(config, sort_dicts=False))}</p>"
    )


def _copy_button(name: str, text: str) -> str:
    return f'<button type="button" data-copy="{escape(text)}">{escape(name)}</button>'


def _progress(charts: _Charts, trials: Trials) -> str:
    caption = "Blue: the best so far, and the best tenth of the trials."
    if trials.failed:
        caption += " Strokes at the foot: trials that failed."
    if trials.floor_said:
        caption += f" {trials.floor_said}"
    made = [charts.place(figures.progress(trials, "trials"), "Objective and best so far against evaluations", caption)]
    if trials.timed:
        made.append(charts.place(figures.progress(trials, "time"), "Objective and best so far against time"))
    return "".join(made)


def _nodes(charts: _Charts, trials: Trials, hours: NodeHours | None) -> str:
    """Return how the nodes were used: by cause where that is known, else how many trials ran."""
    if hours is not None and hours.total:
        share = f"Nodes were {hours.busy:.0%} busy with runs in {hours.total:.3g} node-hours. "
        share += f"{hours.utilization:.0%} of node-hours were useful."
        lost = max((kind for kind in KINDS if kind != "useful"), key=lambda kind: hours.by_kind[kind])
        if hours.by_kind[lost]:
            share += f" Most of the rest: {lost}, {hours.by_kind[lost] / hours.total:.0%}."
        return "<h3>Where the nodes were</h3>" + charts.place(node_hours(hours), DESCRIPTION, share)
    if trials.timed:
        caption = "From the start and the end of each trial's last run; what was cut before is not in it."
        running_now = charts.place(figures.running_trials(trials), "Trials running at once, over time", caption)
        return "<h3>Trials running</h3>" + running_now
    return ""


def _hyperparameters(charts: _Charts, trials: Trials, landscape: Landscape | str) -> str:
    names = _with_panel([column.name for column in trials.columns], landscape)
    made = [
        charts.place(figures.panel(trials, j), f"Objective against {column.name}")
        for j, column in enumerate(trials.columns)
        if column.name in names
    ]
    notes = []
    if len(names) < len(trials.columns):
        notes.append(f"The {len(names)} of {len(trials.columns)} that matter most.")
    conditional = ", ".join(column.name for column in trials.columns if column.conditional and column.name in names)
    if conditional:
        notes.append(f"A trial is left out where its value is inactive: {conditional}.")
    return (_element("p", " ".join(notes)) if notes else "") + _grid(made)


def _with_panel(names: Sequence[str], landscape: Landscape | str) -> set[str]:
    """Return which hyperparameters get a panel: all, or those that matter most where there are very many."""
    ranked = names if isinstance(landscape, str) else [share.names[0] for share in landscape.shares()]
    return set(ranked[:_MOST_PANELS])


def _importance(charts: _Charts, trials: Trials, landscape: Landscape | str) -> str:
    if isinstance(landscape, str):
        return _element("p", landscape)
    said = (
        "How much of the objective's variance over the whole space each hyperparameter explains alone, and each pair "
        f"beyond that (functional ANOVA). {_trust(landscape)}"
    )
    if landscape.explained >= _TRUSTED:
        good = "low" if trials.minimize else "high"
        said += f" An optimizer looks mostly where the objective is {good}; elsewhere the forest has less to go by."
    thin = "The thin line: one standard deviation over the trees."
    made = [charts.place(forest_figures.bars(landscape.shares()), "Importance of hyperparameters", thin)]
    pairs = landscape.pairs()
    if pairs:
        bars = forest_figures.bars(pairs, most=10)
        made.append(charts.place(bars, "Importance of pairs of hyperparameters", "Pairs, the greatest first."))
    return _element("p", said) + _grid(made, "grid two")


def _trust(landscape: Landscape) -> str:
    foretold = f"{max(landscape.explained, 0):.0%} of the variance of trials that it had not seen"
    verdict = "." if landscape.explained >= _TRUSTED else ": too little to rely on."
    return f"The forest learnt {landscape.num_trials:,} trials and foretells {foretold}{verdict}"


def _dependence(charts: _Charts, trials: Trials, landscape: Landscape | str) -> str:
    if isinstance(landscape, str):
        return _element("p", landscape)
    mean = f"mean {trials.objective_title}"
    names = _with_panel([column.name for column in landscape.columns], landscape)
    curves = [landscape.curve(column.name) for column in landscape.columns if column.name in names]
    domain = forest_figures.curves_domain(curves)
    said = (
        "The same forest's view: the mean objective at each value, over all values of the others (partial "
        "dependence). The band is one standard deviation over the trees."
    )
    parts = [_element("p", said)]
    parts.append(
        _grid(
            [
                charts.place(
                    forest_figures.dependence(curve, domain, mean), f"Mean objective against {curve.column.name}"
                )
                for curve in curves
            ]
        )
    )
    pairs = [(one.names[0], one.names[1]) for one in landscape.pairs()[:_MOST_SURFACES] if one.share >= _LEAST_SHARE]
    if pairs:
        made = [
            charts.place(
                forest_figures.surface(landscape.surface(one, other), mean, minimize=trials.minimize),
                f"Mean objective against {one} and {other}",
            )
            for one, other in pairs
        ]
        parts += ["<h3>Pairs that matter most</h3>", _grid(made)]
    return "".join(parts)


def _failures(charts: _Charts, trials: Trials) -> str:
    if not trials.failed:
        return _element("p", "No trial failed.")
    kinds: dict[str, list[tuple[str, int]]] = {}
    for line in trials.failed:
        why = str(line.get("m:failure") or "no reason given")
        kinds.setdefault(without_numbers(why), []).append((why, line["job_id"]))
    ranked = [
        (by_kind((why, 1) for why, _ in members)[0][0], [number for _, number in members])
        for members in sorted(kinds.values(), key=lambda members: -len(members))
    ]
    rows = "".join(_failure_row(why, numbers, trials.tracebacks) for why, numbers in ranked[:_MOST_REASONS])
    heads = '<th scope="col" class="number">trials</th><th scope="col">reason</th><th scope="col">which</th>'
    left = len(ranked) - _MOST_REASONS
    return (
        _element("p", f"{len(trials.failed):,} of {counted(len(trials.ended), 'trial')} failed.")
        + '<div class="scroll" tabindex="0" role="region" aria-label="Failures by reason"><table class="plain wide">'
        + f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        + (_element("p", f"{left:,} more reasons are in the table of all trials.") if left > 0 else "")
        + _where_they_fail(charts, trials)
    )


def _failure_row(why: str, numbers: Sequence[int], tracebacks: Mapping[int, str]) -> str:
    which = ", ".join(map(str, numbers[:6])) + (f" and {len(numbers) - 6:,} more" if len(numbers) > 6 else "")
    trace = next((tracebacks[number] for number in numbers if number in tracebacks), "")
    shown = f'<details><summary>Traceback</summary><pre tabindex="0">{escape(trace)}</pre></details>' if trace else ""
    return f'<tr><td class="number">{len(numbers):,}</td><td>{escape(why)}{shown}</td><td>{which}</td></tr>'


def _where_they_fail(charts: _Charts, trials: Trials) -> str:
    """Return what failing depends on, where a forest can tell."""
    failed = [line["objective"] is None for line in trials.ended]
    try:
        landscape = Landscape.of_failures(trials.problem, [configuration(line) for line in trials.ended], failed)
    except InputError:
        return ""
    if landscape.explained < _TRUSTED:
        return _element("p", "Which trials fail does not visibly depend on their configurations.")
    bars = forest_figures.bars(landscape.shares(), most=6)
    chart = charts.place(bars, "Importance of hyperparameters for failing")
    return "<h3>What failing depends on</h3>" + _element("p", _trust(landscape)) + _grid([chart], "grid two")


def _settings(trials: Trials) -> str:
    kept = {key: value for key, value in trials.settings.items() if key != "problem"}
    if "warm_start" in kept:
        kept["warm_start"] = counted(len(kept["warm_start"]), "point")
    return escape(yaml.safe_dump(json.loads(json.dumps(kept, default=str)), sort_keys=False, allow_unicode=True))


def _versions() -> str:
    found = [("Python", platform.python_version())]
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append((name, metadata.version(name)))
    return "".join(f"<div>{_element('dt', name)}{_element('dd', version)}</div>" for name, version in found)


# --- the page --------------------------------------------------------------------------------------------------------


def _asset(name: str) -> str:
    return resources.files("deephyper_balsam.results.analysis").joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, parts: Mapping[str, str]) -> str:
    """Put the parts into their places; what a part holds is never looked through."""
    pieces = template.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        key, _, rest = piece.partition("}}")
        filled += [parts[key], rest]
    return "".join(filled)


def _colours() -> str:
    light, dark = (
        ";".join(f"--{name}:{value}" for name, value in scheme.items()) for scheme in (look.LIGHT, look.DARK)
    )
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _date(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
