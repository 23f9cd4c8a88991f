"""Reports, figures and comparisons of any table that a search can leave: they hold, or say what is missing."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_problems import problems

from deephyper_balsam.errors import InputError
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.results.analysis.compare import compare_searches, comparison_figure
from deephyper_balsam.results.analysis.drawing import draw
from deephyper_balsam.results.analysis.figures import KINDS, figure
from deephyper_balsam.results.analysis.importance import Landscape
from deephyper_balsam.results.analysis.report import html
from deephyper_balsam.results.analysis.trials import Trials

relaxed = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

ANY = st.floats(allow_nan=False, allow_infinity=False)
OBJECTIVES: dict[str, st.SearchStrategy[float | None]] = {
    "usual": st.floats(-1, 1),
    "failed": st.none(),
    "equal": st.just(0.25),
    "huge and equal": st.just(1e160),
    "huge": st.sampled_from([1e160, 2e160, -3e160]),
    "the largest": st.sampled_from([1.7e308, -1.7e308, 1.6e308]),
    "tiny": st.sampled_from([1e-300, 2e-300, -1e-300, 0.0]),
    "the smallest": st.sampled_from([5e-324, 0.0, -5e-324]),
    "alike": st.sampled_from([1e3, math.nextafter(1e3, 2e3), 1e3 + 1e-9]),
    "one far off": st.one_of(st.floats(0, 1), st.just(-1e300)),
    "any": ANY,
    "mixed": st.one_of(st.none(), st.floats(-10, 10), ANY),
}
METADATA = st.sampled_from(
    [math.nan, math.inf, -math.inf, None, "", "\x1b[31mred", "</script>", 2**70, True, 1e300, "[1, NaN]"]
)


def line_of(number: int, config: dict[str, Any], objective: float | None, times: str, note: Any) -> dict[str, Any]:
    start, end = {
        "usual": (1.0 * number, number + 2.5),
        "none": (None, None),
        "zero": (0.0, 0.0),
        "backwards": (5.0, -100.0 * number),
        "years": (1e8 * number, 1e8 * number + 1e6),
    }[times]
    return {
        **{f"p:{name}": value for name, value in config.items()},
        "objective": objective,
        "job_id": number,
        "job_status": "FAILED" if objective is None else "DONE",
        "m:timestamp_submit": 0.0,
        "m:timestamp_start": start,
        "m:timestamp_end": end,
        "m:timestamp_gather": end,
        "m:balsam_job_id": number + 7,
        "m:site": "lab",
        "m:failure": f"ValueError: {number}" if objective is None else None,
        "m:note": note,
    }


@st.composite
def tables(draw: st.DrawFn, most: int = 24) -> Trials:
    problem = draw(problems(max_size=4))
    configs = problem.encoder.decode(
        problem.encoder.sample(
            draw(st.sampled_from([1, 2, 10, 11, most])), np.random.default_rng(draw(st.integers(0, 99)))
        )
    )
    one = OBJECTIVES[draw(st.sampled_from(list(OBJECTIVES)))]
    times = draw(st.sampled_from(["usual", "usual", "none", "zero", "backwards", "years"]))
    lines = [line_of(number, config, draw(one), times, draw(METADATA)) for number, config in enumerate(configs)]
    if draw(st.booleans()):
        unfinished = line_of(len(lines), configs[0], None, "none", None)
        lines.append({**unfinished, "job_status": draw(st.sampled_from(["READY", "RUNNING", "CANCELLED"]))})
    made_of = {"problem": problem.to_dict(), "method": "random", "options": {}, "num_workers": draw(st.integers(1, 2))}
    return Trials("drawn", made_of, lines)


def drawn_numbers(svg: str) -> None:
    """Hold that a picture is well formed and has no place that is no number."""
    ET.fromstring(svg)
    assert "NaN" not in svg
    assert "Infinity" not in svg


def missing(error: InputError, *reasons: str) -> None:
    """Hold that an error says one of these things."""
    assert any(reason in str(error) for reason in reasons), error


@relaxed
@given(tables(), st.permutations(list(KINDS)))
def test_every_figure_is_drawn_or_says_what_is_missing(trials: Trials, kinds: list[str]) -> None:
    for kind in kinds[:3]:
        try:
            spec = figure(trials, kind)
        except InputError as error:
            missing(error, "no trial with an objective", "Importances need", "no trial with the times")
        else:
            drawn_numbers(draw(spec, ".svg").decode())


@relaxed
@given(tables())
def test_every_table_has_a_report_or_says_that_there_is_no_result(trials: Trials) -> None:
    if not trials.done:
        with pytest.raises(InputError, match="no trial with an objective"):
            html(trials, 0.0)
        return
    page = html(trials, 0.0)
    assert page.count("</script>") == 4
    for odd in ("NaN", "Infinity", ">nan", ">inf"):
        assert odd not in page.split('<script type="application/json"')[0].replace("[1, NaN]", "")
    charts = page.split('id="charts">')[1].split("</script>")[0]
    assert "NaN" not in charts
    assert "Infinity" not in charts


@relaxed
@given(tables(), tables(), st.sampled_from(["evaluations", "time"]))
def test_any_two_searches_are_compared_or_it_says_what_is_missing(one: Trials, other: Trials, by: str) -> None:
    try:
        found = compare_searches([one, other, one], by)
    except InputError as error:
        missing(error, "no trial with an objective", "has no times")
        return
    for group in found.to_dict()["groups"]:
        values = [group[key] for key in ("best", "median", "lowest", "highest", "rank")]
        assert all(value is None or math.isfinite(value) for value in values)
    drawn_numbers(draw(comparison_figure(found), ".svg").decode())


@quick
@given(tables(most=40))
def test_importances_are_shares_or_it_says_why_there_are_none(trials: Trials) -> None:
    try:
        landscape = Landscape(trials.problem, trials.configs, trials.objectives.tolist())
    except InputError as error:
        missing(error, "Importances need")
        return
    assert math.isfinite(landscape.explained)
    assert landscape.explained <= 1
    for share in (*landscape.shares(), *landscape.pairs()):
        assert -1e-9 <= share.share <= 1 + 1e-9
    for column in landscape.columns:
        curve = landscape.curve(column.name)
        assert np.isfinite(curve.mean).all()
        assert (curve.spread >= 0).all()


def one_real() -> HpProblem:
    problem = HpProblem("small")
    problem.add_hyperparameter((0.0, 1.0), "x")
    return problem


@pytest.mark.parametrize("kind", list(OBJECTIVES))
def test_a_single_trial_of_each_kind_has_a_report_and_figures(kind: str) -> None:
    value = {"failed": None, "huge": 1e160, "tiny": 1e-300, "the largest": -1.7e308, "the smallest": 5e-324}.get(
        kind, 0.5
    )
    lines = [line_of(0, {"x": 0.5}, value, "usual", math.nan)]
    trials = Trials("one", {"problem": one_real().to_dict(), "method": "random"}, lines)
    if value is None:
        with pytest.raises(InputError, match="no trial with an objective"):
            html(trials, 0.0)
        return
    assert "one" in html(trials, 0.0)
    for one in ("progress", "progress-time", "running", "parallel", "panels"):
        drawn_numbers(draw(figure(trials, one), ".svg").decode())
