"""The report of a search: one HTML file that needs no network, made from the figures and the table.

What a person reads stands in the page itself; `report.js` adds what moves: the figures (Vega, embedded), the parallel
coordinates, the table. The trials are embedded once, compressed, and shared by all of these.
"""

from __future__ import annotations

import base64
import gzip
import json
import platform
import pprint
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import metadata, resources
from typing import Any

import yaml

from deephyper_balsam.analysis import figures
from deephyper_balsam.analysis.drawing import to_vega, vega_library
from deephyper_balsam.analysis.importance import Landscape
from deephyper_balsam.analysis.trials import Trials, label, running, time_unit
from deephyper_balsam.errors import InputError
from deephyper_balsam.results import columns, configuration

_MOST_SURFACES = 3
_MOST_REASONS = 40
_PACKAGES = ("deephyper-balsam", "balsam", "ConfigSpace", "scikit-optimize", "scikit-learn", "numpy", "pandas")


@dataclass
class _Page:
    """The sections of a report as they are made, and the figures that its script draws into them."""

    sections: list[tuple[str, str, str]]
    charts: list[dict[str, Any]]

    def add(self, name: str, title: str, *parts: str) -> None:
        self.sections.append((name, title, "\n".join(parts)))

    def chart(self, body: figures.Spec, said: str, caption: str = "") -> str:
        """Keep a figure for the script and return the place where it is drawn."""
        number = len(self.charts)
        fields = "trials" if body["data"].get("name") == "trials" else None
        self.charts.append({"spec": to_vega(figures.spec(body, said)), "data": fields})
        height = body["height"] + 60 if isinstance(body["height"], int) else 24 * len(body["data"]["values"]) + 60
        shown = f"<figcaption>{caption}</figcaption>" if caption else ""
        return (
            f'<figure><div class="chart" data-chart="{number}" role="img" aria-label="{escape(said)}" '
            f'style="min-height:{height}px"></div>{shown}</figure>'
        )


def html(trials: Trials, written_at: float) -> str:
    """Return the report of a search.

    Parameters
    ----------
    trials
        The search.
    written_at
        When, seconds since the epoch.

    Raises
    ------
    InputError
        When no trial has an objective, or the drawing library is not installed.
    """
    page = _Page([], [])
    landscape = _learn(trials)
    _best(page, trials)
    _progress(page, trials)
    _parallel(page)
    _panels(page, trials)
    _importance(page, landscape)
    _dependence(page, landscape)
    _failures(page, trials)
    _table(page)
    _settings(page, trials)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>\n{text}\n</section>'
        for name, title, text in page.sections
    )
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in page.sections)
    return _fill(
        _asset("report.html"),
        {
            "name": escape(trials.name),
            "colours": _colours(),
            "style": _asset("report.css"),
            "subtitle": _subtitle(trials, written_at),
            "summary": _summary(trials),
            "links": links,
            "sections": body,
            "charts": _json(page.charts),
            "trials": _packed(_shared(trials)),
            "library": vega_library(),
            "script": _asset("report.js"),
        },
    )


def _learn(trials: Trials) -> Landscape | str:
    """What a forest makes of the trials, or why it makes nothing."""
    trials.best  # noqa: B018  # says what is missing
    try:
        return figures.learn(trials)
    except InputError as error:
        return str(error)


# --- the sections ----------------------------------------------------------------------------------------------------


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
    steps = running(trials.ended)
    cells = [("best objective", label(float(trials.best["objective"])), f"trial {trials.best['job_id']}")]
    cells.append(("evaluated", f"{len(trials.ended):,}", f"{len(trials.failed):,} failed" if trials.failed else "none failed"))
    still = len([line for line in trials.lines if line["job_status"] in ("RUNNING", "READY")])
    if still:
        cells.append(("still open", f"{still:,}", "running or waiting"))
    if steps:
        span = steps[-1][0]
        unit, length = time_unit(span)
        cells.append(("time", f"{span / length:.3g} {unit}", f"{len(trials.ended) / span * 60:.3g} evaluations a minute"))
        busy = sum(line["m:timestamp_end"] - line["m:timestamp_start"] for line in trials.ended if _timed(line))
        cells.append(("at once, on average", f"{busy / (span - steps[0][0] or 1.0):.3g}", "trials running"))
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class='note'>{escape(note)}</dd></div>"
        for name, value, note in cells
    )


def _timed(line: Mapping[str, Any]) -> bool:
    return line.get("m:timestamp_start") is not None and line.get("m:timestamp_end") is not None


def _best(page: _Page, trials: Trials) -> None:
    config = configuration(trials.best)
    rows = "".join(f"<tr><th scope='row'>{escape(name)}</th><td>{escape(label(value))}</td></tr>" for name, value in config.items())
    page.add(
        "best",
        "Best configuration",
        f"<table class='plain'>{rows}</table>",
        "<p class='actions'>",
        _copy_button("Copy as JSON", json.dumps(config, indent=2, default=str)),
        _copy_button("Copy as Python", pprint.pformat(config, sort_dicts=False)),
        "<span role='status' class='said'></span></p>",
    )


def _copy_button(name: str, text: str) -> str:
    return f'<button type="button" data-copy="{escape(text)}">{escape(name)}</button>'


def _progress(page: _Page, trials: Trials) -> None:
    note = "Blue: the best so far, and the best tenth of the trials."
    if trials.failed:
        note += " Crosses at the foot: trials that failed."
    if trials.floor is not None:
        below = int((trials.objectives < trials.floor).sum())
        note += f" {below} trials lie below the axis and are drawn at its foot; the worst has {label(float(trials.objectives.min()))}."
    parts = [page.chart(figures.progress(trials, "trials"), "Objective and best so far against evaluations", note)]
    if any(_timed(line) for line in trials.ended):
        parts.append(page.chart(figures.progress(trials, "time"), "Objective and best so far against time"))
        parts.append("<h3>Trials running</h3>")
        parts.append(
            page.chart(
                figures.running_trials(trials),
                "Trials running at once, over time",
                "From the start and the end of each trial's last run; what allocations cut before is not in it.",
            )
        )
    page.add("progress", "Progress", *parts)


def _parallel(page: _Page) -> None:
    page.add(
        "parallel",
        "Parallel coordinates",
        "<p>A line is a trial. Drag along an axis to pick trials, or move the two ends of an axis with the arrow keys; the "
        "table below then shows the picked ones. Escape, or a double click, frees an axis.</p>",
        "<div class='parallel' id='parallel-plot'></div>",
        "<p class='actions'><span id='picked' role='status'></span> <button type='button' id='free'>Free all axes</button></p>",
    )


def _panels(page: _Page, trials: Trials) -> None:
    made = [
        page.chart(figures.panel(trials, j), f"Objective against {column.name}") for j, column in enumerate(trials.columns)
    ]
    conditional = [column.name for column in trials.columns if column.conditional]
    note = ""
    if conditional:
        note = f"<p>Trials in which {escape(', '.join(conditional))} {'is' if len(conditional) == 1 else 'are'} inactive are left out there.</p>"
    page.add("hyperparameters", "Hyperparameters", note, f"<div class='grid'>{''.join(made)}</div>")


def _importance(page: _Page, landscape: Landscape | str) -> None:
    if isinstance(landscape, str):
        page.add("importance", "Importance", f"<p>{escape(landscape)}</p>")
        return
    shares, pairs = landscape.shares(), landscape.pairs()
    said = (
        f"<p>How much of the objective's variance over the whole space each hyperparameter explains alone, and each pair beyond "
        f"that (functional ANOVA). {_trust(landscape)}</p>"
    )
    parts = [page.chart(figures.bars(shares), "Importance of hyperparameters", "The thin line: one standard deviation over the trees.")]
    if pairs:
        parts.append(page.chart(figures.bars(pairs, most=10), "Importance of pairs of hyperparameters", "Pairs, the ten greatest."))
    page.add("importance", "Importance", said, f"<div class='grid two'>{''.join(parts)}</div>")


def _trust(landscape: Landscape) -> str:
    foretells = (
        f"The forest learnt {landscape.num_trials:,} trials and foretells {max(landscape.explained, 0):.0%} of the variance "
        "of trials that it had not seen"
    )
    if landscape.explained < 0.3:
        return f"<strong>{foretells}: too little to rely on.</strong>"
    return f"{foretells}. An optimizer looks mostly where the objective is high; elsewhere the forest has less to go by."


def _dependence(page: _Page, landscape: Landscape | str) -> None:
    if isinstance(landscape, str):
        return
    curves = [landscape.curve(column.name) for column in landscape.columns]
    domain = figures.curves_domain(curves)
    made = [page.chart(figures.dependence(curve, domain), f"Mean objective against {curve.column.name}") for curve in curves]
    parts = [
        "<p>The same forest's view: the mean objective at each value, over all values of the others (partial dependence); the band is "
        "one standard deviation over the trees.</p>",
        f"<div class='grid'>{''.join(made)}</div>",
    ]
    pairs = [pair for pair in landscape.pairs()[:_MOST_SURFACES] if pair.share >= 0.005]
    if pairs:
        made = [
            page.chart(figures.surface(landscape.surface(*pair.names)), f"Mean objective against {' and '.join(pair.names)}")
            for pair in pairs
        ]
        parts += ["<h3>Pairs that matter most</h3>", f"<div class='grid'>{''.join(made)}</div>"]
    page.add("dependence", "The surrogate’s view", *parts)


def _failures(page: _Page, trials: Trials) -> None:
    if not trials.failed:
        page.add("failures", "Failures", "<p>No trial failed.</p>")
        return
    reasons: dict[str, list[int]] = {}
    for line in trials.failed:
        reasons.setdefault(str(line.get("m:failure") or "no reason given"), []).append(line["job_id"])
    ranked = sorted(reasons.items(), key=lambda entry: -len(entry[1]))
    rows = []
    for why, numbers in ranked[:_MOST_REASONS]:
        which = ", ".join(map(str, numbers[:6])) + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
        trace = next((trials.tracebacks[number] for number in numbers if number in trials.tracebacks), "")
        shown = f"<details><summary>Traceback</summary><pre tabindex='0'>{escape(trace)}</pre></details>" if trace else ""
        rows.append(f"<tr><td class='number'>{len(numbers):,}</td><td>{escape(why)}{shown}</td><td>{which}</td></tr>")
    left = len(ranked) - _MOST_REASONS
    page.add(
        "failures",
        "Failures",
        f"<p>{len(trials.failed):,} of {len(trials.ended):,} trials failed.</p>",
        "<div class='scroll' tabindex='0' role='region' aria-label='Failures by reason'><table class='plain wide'>"
        "<thead><tr><th scope='col' class='number'>trials</th><th scope='col'>reason</th><th scope='col'>which</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>",
        f"<p>{left} more reasons are in the table of trials.</p>" if left > 0 else "",
        _where_they_fail(page, trials),
    )


def _where_they_fail(page: _Page, trials: Trials) -> str:
    """What failing depends on, where a forest can tell."""
    try:
        landscape = Landscape.of_failures(
            trials.problem,
            [configuration(line) for line in trials.ended],
            [line["objective"] is None for line in trials.ended],
        )
    except InputError:
        return ""
    if landscape.explained < 0.3:
        return "<p>Which trials fail does not visibly depend on the configuration.</p>"
    return (
        f"<h3>What failing depends on</h3><p>{_trust(landscape).partition('. An')[0]}.</p>"
        f"<div class='grid two'>{page.chart(figures.bars(landscape.shares(), most=6), 'Importance of hyperparameters for failing')}</div>"
    )


def _table(page: _Page) -> None:
    page.add(
        "trials",
        "All trials",
        "<p class='actions'><label>Filter <input type='search' id='filter' autocomplete='off' spellcheck='false' "
        "aria-describedby='filter-help' placeholder='objective&gt;0.9 relu'></label> "
        "<label><input type='checkbox' id='only-picked'> only picked</label> <span id='count' role='status'></span></p>",
        "<p class='note' id='filter-help'>Words that a trial must hold, and conditions such as <code>learning_rate&lt;0.01</code> or "
        "<code>status=FAILED</code>, with a space between. A click on a heading sorts; a trial's number shows all of it.</p>",
        "<div class='scroll' tabindex='0' role='region' aria-label='Trials'><table id='table'><thead></thead><tbody></tbody></table></div>",
        "<p class='actions' id='pages'><button type='button' id='back'>Back</button> "
        "<button type='button' id='next'>Next</button></p>",
    )


def _settings(page: _Page, trials: Trials) -> None:
    kept = {key: value for key, value in trials.settings.items() if key != "problem"}
    text = yaml.safe_dump(json.loads(json.dumps(kept, default=str)), sort_keys=False, allow_unicode=True)
    versions = "".join(f"<tr><th scope='row'>{escape(name)}</th><td>{escape(version)}</td></tr>" for name, version in _versions())
    page.add(
        "settings",
        "Settings",
        f"<pre tabindex='0'>{escape(text)}</pre>",
        f"<h3>Problem</h3><pre tabindex='0'>{escape(trials.problem.describe())}</pre>",
        f"<h3>Versions</h3><p>Of the environment that wrote this report.</p><table class='plain'>{versions}</table>",
    )


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


# --- what the script reads -------------------------------------------------------------------------------------------


def _shared(trials: Trials) -> dict[str, Any]:
    """Return the rows of the figures, the lines of the table, and the axes of the parallel coordinates."""
    names = [name for name in columns(trials.lines, [column.name for column in trials.problem.encoder.columns]) if name != "m:balsam_job_id"]
    axes = [
        {
            "name": column.name,
            "key": f"p:{column.name}",
            "choices": list(column.choices),
            "log": column.log,
            "whole": column.kind == "integer",
            "lower": column.lower,
            "upper": column.upper,
            "missing": "inactive" if column.conditional else None,
        }
        for column in trials.columns
    ]
    axes.append(
        {
            "name": "objective",
            "key": "objective",
            "choices": [],
            "log": False,
            "whole": False,
            "lower": min(trials.shown),
            "upper": max(trials.shown),
            "missing": "failed" if trials.failed else None,
        }
    )
    return {
        "rows": _columnar(figures.rows(trials)),
        "columns": names,
        "lines": [[_plain(line.get(name)) for name in names] for line in trials.lines],
        "axes": axes,
        "good": trials.good,
        "tracebacks": {str(number): text for number, text in list(trials.tracebacks.items())[:200]},
    }


def _columnar(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value


def _packed(value: Any) -> str:
    return base64.b64encode(gzip.compress(json.dumps(value, separators=(",", ":"), default=str).encode(), 9, mtime=0)).decode()


def _json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), default=str).replace("<", "\\u003c")


# --- the page --------------------------------------------------------------------------------------------------------


def _asset(name: str) -> str:
    return resources.files("deephyper_balsam.analysis").joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, parts: Mapping[str, str]) -> str:
    """Put the parts into their places; what a part holds is never looked through."""
    pieces = template.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        key, _, rest = piece.partition("}}")
        filled += [parts[key], rest]
    return "".join(filled)


def _colours() -> str:
    light, dark = (";".join(f"--{name}:{value}" for name, value in scheme.items()) for scheme in (figures.LIGHT, figures.DARK))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _date(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
