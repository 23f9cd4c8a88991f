"""Figures, comparisons and the report of searches that never ran."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ConfigSpace import EqualsCondition

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from made_searches import ODD_NAMES, made_search, network_problem, odd_search

from deephyper_balsam.cli.report import _KINDS
from deephyper_balsam.errors import InputError
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.results.analysis import figures
from deephyper_balsam.results.analysis.compare import compare_searches, comparison_figure
from deephyper_balsam.results.analysis.drawing import draw, to_vega
from deephyper_balsam.results.analysis.figures import KINDS, figure
from deephyper_balsam.results.analysis.report import html
from deephyper_balsam.results.analysis.trials import Trials, best_so_far, labels_of, running


def ended(number: int, objective: float | None, start: float, end: float) -> dict[str, Any]:
    status = "FAILED" if objective is None else "DONE"
    times = {"m:timestamp_start": start, "m:timestamp_end": end}
    return {"job_id": number, "objective": objective, "job_status": status, **times}


def search_of(*objectives: float | None, **values: Any) -> Trials:
    problem = HpProblem("small")
    problem.add_hyperparameter((0.0, 1.0), "x")
    lines = [
        {**ended(n, objective, n * 1.0, n + 2.0), "p:x": (n * 0.37) % 1, **values}
        for n, objective in enumerate(objectives)
    ]
    return Trials("small", {"problem": problem.to_dict(), "method": "random", "options": {}}, lines)


# --- what the figures are made of ------------------------------------------------------------------------------------


def test_the_best_so_far_rises_in_the_order_of_the_ends_and_counts_failures() -> None:
    lines = [ended(2, 0.2, 0, 5), ended(1, None, 0, 6), ended(0, 0.1, 0, 7), ended(3, 0.5, 0, 8)]
    assert best_so_far(lines) == [(1, 5.0, 0.2), (4, 8.0, 0.5)]
    trials = replace(search_of(0.0), lines=[lines[3], lines[2], lines[0], lines[1]])
    assert [line["job_id"] for line in trials.ended] == [2, 1, 0, 3]


def test_how_many_ran_at_once_is_read_from_starts_and_ends() -> None:
    lines = [ended(0, 1.0, 0, 10), ended(1, 1.0, 5, 12), ended(2, 1.0, 10, 15), {"job_id": 3, "job_status": "READY"}]
    assert running(lines) == [(0.0, 1.0), (5.0, 2.0), (10.0, 2.0), (12.0, 1.0), (15.0, 0.0)]
    assert running([]) == []


def test_of_many_changes_the_means_over_equal_intervals_keep_the_whole_time() -> None:
    lines = [ended(n, 1.0, n * 1.0, n + 3.0) for n in range(1000)]
    steps = running(lines, most_steps=50)
    assert len(steps) == 51
    width = steps[1][0] - steps[0][0]
    assert sum(count * width for _, count in steps) == pytest.approx(3000.0)


def test_a_few_terrible_trials_do_not_set_the_axis_of_the_objective() -> None:
    trials = search_of(0.90, 0.91, 0.92, 0.93, 0.94, -1e9)
    assert trials.floor is not None
    assert 0.5 < trials.floor < 0.9
    assert min(trials.shown) == trials.floor
    assert trials.objectives.min() == -1e9
    assert search_of(0.1, 0.5, 0.9).floor is None
    assert search_of(0.5, 0.5, 0.5).floor is None


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_drawn_as_svg(kind: str) -> None:
    drawn = draw(figure(made_search(60), kind), ".svg").decode()
    assert drawn.startswith("<svg")
    assert "NaN" not in drawn
    words = {
        "progress-time": "without pauses",
        "importance": "learning_rate",
        "dependence": "units",
        "panels": "logistic",
        "parallel": "batch_size",
    }
    assert words.get(kind, "began" if "running" in kind else "evaluations ended") in drawn


def test_a_figure_is_a_pdf_or_a_png_too() -> None:
    spec = figure(made_search(12), "progress")
    assert draw(spec, ".pdf").startswith(b"%PDF")
    assert draw(spec, ".png").startswith(b"\x89PNG")


def test_the_command_knows_every_kind() -> None:
    assert set(_KINDS) == set(KINDS)


def test_a_hyperparameter_on_a_log_scale_has_a_log_axis_and_failures_are_marked() -> None:
    trials = made_search(60)
    assert trials.failed
    panels = figure(trials, "panels")["concat"]
    scales = {panel["title"]: panel["layer"][0]["encoding"]["x"]["scale"] for panel in panels}
    assert scales["learning_rate"] == {"domain": [1e-5, 1e-1], "nice": False, "zero": False, "type": "log"}
    assert "type" not in scales["num_layers"]
    assert scales["activation"]["domain"] == ["relu", "tanh", "gelu", "logistic"]
    assert "version" not in scales  # a constant
    drawn = draw(figure(trials, "progress"), ".svg").decode()
    assert len(re.findall(r'aria-roledescription="point"', drawn)) == len(trials.ended)


@pytest.mark.parametrize("kind", ["progress", "progress-time", "running", "parallel", "panels"])
@pytest.mark.parametrize("objectives", [[0.5], [0.5, 0.5], [-3.0, None, -3.0]], ids=["one", "equal", "negative"])
def test_the_smallest_searches_are_drawn(kind: str, objectives: list[float | None]) -> None:
    assert "NaN" not in draw(figure(search_of(*objectives), kind), ".svg").decode()


def test_no_name_or_choice_disturbs_a_figure_or_the_report() -> None:
    names = ["net.width:0", "datum.n", "a-b", "__proto__"]
    choices = ["</script><b>", "it's", 'say "so"', "${x}", "ünï"]
    problem = HpProblem("odd")
    for name in names:
        problem.add_hyperparameter((0.0, 1.0), name)
    problem.add_hyperparameter(choices, "choice")
    lines = [
        {
            **ended(n, float(n % 7), n, n + 1),
            **{f"p:{name}": (n * 0.37 + k / 7) % 1 for k, name in enumerate(names)},
            "p:choice": choices[n % 5],
        }
        for n in range(30)
    ]
    trials = Trials("odd", {"problem": problem.to_dict(), "method": "random"}, lines)
    for kind in KINDS:
        assert "NaN" not in draw(figure(trials, kind), ".svg").decode()
    page = html(trials, 0.0)
    assert page.count("</script>") == 4
    assert "<b>" not in page


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_names_of_javascript_and_control_characters_are_drawn(suffix: str) -> None:
    for kind in KINDS:
        drawn = draw(figure(odd_search(), kind), suffix)
        if suffix == ".svg":
            text = drawn.decode()
            assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ufffe]", text)
            if kind in ("importance", "dependence", "panels", "parallel"):
                assert all(f">{name}" in text for name in ODD_NAMES)


def test_searches_with_names_of_javascript_are_compared() -> None:
    searches = [made_search(12, seed=n, name=name, num_workers=n) for n, name in enumerate(ODD_NAMES[:4])]
    assert "constructor" in draw(comparison_figure(compare_searches(searches, "time")), ".svg").decode()


def test_a_figure_says_which_trials_lie_below_its_axis() -> None:
    trials = search_of(*[0.90 + n / 1000 for n in range(20)], -1e9)
    for kind in ("progress", "progress-time", "parallel", "panels", "importance", "dependence"):
        drawn = draw(figure(trials, kind), ".svg").decode()
        assert "1 trial lies below the axis and is drawn at its foot; the lowest has -1e+09." in drawn
    assert "below the axis" not in draw(figure(search_of(0.1, 0.2), "progress"), ".svg").decode()


def test_the_place_of_what_is_inactive_is_named() -> None:
    assert ">inactive<" in draw(figure(made_search(30), "parallel"), ".svg").decode()
    assert "inactive" not in draw(figure(search_of(0.1, 0.2), "parallel"), ".svg").decode()


def test_failures_that_differ_only_in_numbers_are_one_row_of_the_report() -> None:
    trials = search_of(0.1, None, None, None, 0.2)
    for line, why in zip(trials.failed, ["loss 3.5 at step 17", "loss 1e-7 at step 2", "no space left"], strict=True):
        line["m:failure"] = why
    page = html(trials, 0.0)
    assert '<td class="number">2</td><td>loss 3.5 at step 17 (also with other numbers)</td><td>1, 2</td>' in page
    assert '<td class="number">1</td><td>no space left</td>' in page


def test_without_a_result_there_is_nothing_to_draw_and_it_says_so() -> None:
    for trials in (search_of(), search_of(None, None)):
        for draw_it in (lambda one: figure(one, "progress"), lambda one: html(one, 0.0)):
            with pytest.raises(InputError, match=r"no trial with an objective yet .* search status small"):
                draw_it(trials)


def test_a_trial_without_times_is_drawn_against_evaluations_only() -> None:
    trials = search_of(0.1, 0.2, 0.3)
    trials.lines[1].update({"m:timestamp_start": None, "m:timestamp_end": None})  # type: ignore[attr-defined]

    def points(kind: str) -> int:
        return draw(figure(trials, kind), ".svg").decode().count('aria-roledescription="point"')

    assert points("progress") == 3
    assert points("progress-time") == 2


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> str:
    return html(made_search(80, name="made-1"), 1_700_003_600.0)


def shared(page: str) -> dict[str, Any]:
    packed = re.search(r'id="data">([^<]*)<', page)
    assert packed is not None
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed.group(1))))
    return found


def test_the_report_needs_nothing_from_elsewhere(page: str) -> None:
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#|data:,)[^"]*"', markup)
    assert "@import" not in markup
    assert "url(" not in markup


def test_the_report_says_what_was_found_and_how(page: str) -> None:
    trials = made_search(80)
    assert "<title>made-1" in page
    best = json.loads(html_value(page, "Copy as JSON"))
    assert best == {key[2:]: value for key, value in trials.best.items() if key.startswith("p:")}
    assert eval(html_value(page, "Copy as Python")) == best
    assert "surrogate: RF" in page
    assert "scikit-learn" in page
    for section in ("progress", "parallel", "importance", "dependence", "failures", "trials", "settings"):
        assert f'<section id="{section}"' in page


def html_value(page: str, name: str) -> str:
    from html import unescape

    found = re.search(rf'data-copy="([^"]*)">{name}<', page)
    assert found is not None
    return unescape(found.group(1))


def test_the_report_shows_failures_with_reason_and_traceback_escaped(page: str) -> None:
    failed = len(made_search(80).failed)
    assert f"{failed} of 80 trials failed." in page
    assert "ValueError: &lt;loss&gt; is nan &amp; gone" in page
    assert "<loss>" not in page
    assert "Traceback (most recent call last):" in page


def test_every_trial_stands_in_the_report_with_its_exact_values(page: str) -> None:
    trials = made_search(80)
    data = shared(page)
    assert len(data["lines"]) == 82
    for line, row in zip(trials.lines, data["lines"], strict=True):
        assert {name: value for name, value in zip(data["columns"], row, strict=True) if value is not None} == {
            name: value for name, value in line.items() if value is not None and name != "m:balsam_job_id"
        }


def test_a_search_with_too_few_trials_for_a_forest_has_a_report_that_says_so() -> None:
    page = html(search_of(0.1, 0.2, 0.3), 0.0)
    assert "Importances need 10 trials with an objective, but got 3." in page


def test_a_search_of_ten_thousand_trials_has_a_report_below_5_mb() -> None:
    assert len(html(made_search(10_000, workers=256), 0.0).encode()) < 5e6


def test_of_very_many_hyperparameters_those_that_matter_most_have_panels() -> None:
    problem = HpProblem("wide")
    for j in range(60):
        problem.add_hyperparameter((0.0, 1.0), f"x{j}")
    configs = problem.encoder.decode(problem.encoder.sample(80, np.random.default_rng(0)))
    lines = [
        {**ended(n, config["x50"], n, n + 1), **{f"p:{name}": value for name, value in config.items()}}
        for n, config in enumerate(configs)
    ]
    page = html(Trials("wide", {"problem": problem.to_dict(), "method": "random"}, lines), 0.0)
    assert "The 36 of 60 that matter most." in page
    assert page.count('aria-label="Objective against x') == 36
    assert 'aria-label="Objective against x50"' in page
    assert len(shared(page)["axes"]) == 61


def test_what_json_does_not_know_does_not_break_the_page() -> None:
    page = html(search_of(0.1, 0.2, **{"m:loss": math.inf, "m:rate": math.nan}), 0.0)
    data = shared(page)
    row = dict(zip(data["columns"], data["lines"][0], strict=True))
    assert (row["m:loss"], row["m:rate"]) == ("inf", None)


def test_figures_of_the_report_bring_no_trials_of_their_own() -> None:
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', html(made_search(300), 0.0), re.DOTALL).group(1))  # type: ignore[union-attr]
    using = [chart for chart in charts if chart["needsTrials"]]
    assert len(using) == 2 + 8
    assert all(len(json.dumps(chart)) < 20_000 for chart in using)


def test_a_figure_needs_no_vega_lite_in_the_page() -> None:
    assert to_vega(figure(made_search(12), "running"))["$schema"].endswith("/vega/v6.json")


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_searches_that_differ_only_in_their_seed_are_one_group_with_median_and_range() -> None:
    searches = [made_search(30, seed=seed, name=f"a-{seed}") for seed in range(3)]
    searches.append(made_search(20, seed=9, name="b", method="random", options={}, gain=0.2))
    found = compare_searches(searches)
    assert found.budget == 20
    table = found.to_dict()
    assert [group["searches"] for group in table["groups"]] == ["b", "ambs surrogate=RF"]
    first, second = table["groups"]
    assert (first["rank"], second["rank"]) == (1.0, 3.0)
    assert second["names"] == ["a-0", "a-1", "a-2"]
    assert second["lowest"] <= second["median"] <= second["highest"]
    at_20 = [max(v for count, _, v in best_so_far(one.ended) if count <= 20) for one in searches[:3]]
    assert second["median"] == sorted(at_20)[1]
    drawn = draw(comparison_figure(found), ".svg").decode()
    assert "NaN" not in drawn
    assert ">ambs surrogate=RF</text>" in drawn  # the legend


def test_searches_are_compared_at_equal_time_too() -> None:
    slow, fast = made_search(30, workers=1, name="slow"), made_search(30, workers=8, name="fast", num_workers=8)
    found = compare_searches([slow, fast], "time")
    assert found.budget == max(line["m:timestamp_end"] for line in fast.ended)
    assert "minutes each" in found.budget_said
    assert found.to_dict()["groups"][0]["searches"] == "fast"
    assert "NaN" not in draw(comparison_figure(found), ".svg").decode()


def test_pauses_do_not_count_as_time_of_the_search() -> None:
    there = replace(made_search(20, name="a"), driven=[(0.0, 1e6)])
    ends = [line["m:timestamp_end"] for line in there.ended]
    middle = ends[9]
    paused = [
        {**line, "m:timestamp_start": line["m:timestamp_start"] + 1e5, "m:timestamp_end": line["m:timestamp_end"] + 1e5}
        if line.get("m:timestamp_end", 0) > middle
        else line
        for line in there.lines
    ]
    pause = replace(there, name="b", lines=paused, driven=[(0.0, middle), (middle + 1e5, 1e6)])
    assert pause.search_time(middle + 5e4) == middle
    assert [pause.search_time(line["m:timestamp_end"]) for line in pause.ended] == pytest.approx(ends)
    found = compare_searches([there, pause], "time")
    assert found.budget == pytest.approx(max(ends))
    progress = [figure(one, "progress-time")["layer"][-1]["data"]["values"][-1] for one in (there, pause)]
    assert progress[0]["t"] == pytest.approx(progress[1]["t"])


def test_equal_searches_share_their_rank() -> None:
    found = compare_searches([made_search(10, name="a"), made_search(10, name="b", method="random")])
    assert [group["rank"] for group in found.to_dict()["groups"]] == [1.5, 1.5]


def test_a_comparison_of_different_problems_says_so_and_one_search_is_none() -> None:
    other = replace(made_search(10, name="b"), settings={**made_search(10).settings, "problem": small_problem()})
    assert "different problems" in compare_searches([made_search(10), other]).notes[0]
    with pytest.raises(InputError, match="two searches or more, but got 1"):
        compare_searches([made_search(10)])
    with pytest.raises(InputError, match="no trial with an objective"):
        compare_searches([made_search(10), search_of(None)])


def small_problem() -> dict[str, Any]:
    problem = network_problem()
    problem.add_hyperparameter((0, 1), "more")
    return problem.to_dict()


# --- None, and choices that look alike -------------------------------------------------------------------------------


def search_with_none(count: int = 60) -> Trials:
    """A search whose best trials have None as the value of `penalty`; `strength` is inactive in them."""
    problem = HpProblem("none")
    penalty = problem.add_hyperparameter([None, "l1", "None", 1, "1", ""], "penalty")
    strength = problem.add_hyperparameter((0.0, 1.0), "strength")
    problem.add_condition(EqualsCondition(strength, penalty, "l1"))
    rng = np.random.default_rng(0)
    lines = []
    for n, config in enumerate(problem.encoder.decode(problem.encoder.sample(count, rng))):
        objective = 1.0 if config["penalty"] is None else 0.1
        lines.append({**ended(n, objective, n, n + 1.0), **{f"p:{name}": value for name, value in config.items()}})
    return Trials("none", {"problem": problem.to_dict(), "method": "random", "options": {}}, lines)


def test_none_is_a_value_in_every_figure_and_what_is_inactive_is_none() -> None:
    trials = search_with_none()
    with_none = {line["job_id"] for line in trials.lines if line["p:penalty"] is None}
    rows = figures.rows(trials)
    assert {row["n"] for row in rows if row["p0"] == "None"} == with_none
    assert all(row["p0"] is not None for row in rows)
    assert {row["n"] for row in rows if row["p1"] is not None} == {
        line["job_id"] for line in trials.lines if line["p:penalty"] == "l1"
    }
    lines = figures.parallel(trials)["data"]["values"]
    below = {(point["n"], point["x"]) for point in lines if point["y"] < 0}
    assert below == {(row["n"], 1) for row in rows if row["p1"] is None}


def test_choices_that_look_alike_have_labels_of_their_own() -> None:
    column = search_with_none().problem.encoder.columns[0]
    assert list(labels_of(column).values()) == ["None", "l1", '"None"', "1", '"1"', '""']


def test_the_forest_learns_from_trials_with_none() -> None:
    trials = search_with_none()
    landscape = figures.learn(trials)
    assert landscape.num_trials == len(trials.done)
    assert landscape.shares()[0].names == ("penalty",)
    assert landscape.shares()[0].share > 0.9


def test_a_configuration_that_is_copied_from_the_report_has_its_none() -> None:
    trials = search_with_none()
    page = unescape(html(trials, 0.0))
    assert 'data-copy="{\n  "penalty": null\n}"' in page
    assert "data-copy=\"{'penalty': None}\"" in page
    brought = data_of(html(trials, 0.0))
    at = brought["columns"].index("p:penalty")
    cells = {line[brought["columns"].index("job_id")]: line[at] for line in brought["lines"]}
    assert all((cells[line["job_id"]] == []) == (line["p:penalty"] is None) for line in trials.lines)


def data_of(page: str) -> Any:
    found = re.search(r'id="data"[^>]*>([^<]*)<', page)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


@pytest.mark.parametrize(("key", "value"), [("warm_start", [[{"x": 0.5}, 1.0]]), ("eval_timeout", 60.0)])
def test_searches_that_differ_in_more_than_the_seed_are_not_merged(key: str, value: Any) -> None:
    one, other = replace(search_of(1.0, 2.0), name="a"), replace(search_of(1.0, 3.0), name="b")
    seeded = replace(other, settings={**other.settings, "seed": 2})
    assert [len(group.searches) for group in compare_searches([one, seeded]).groups] == [2]
    unlike = replace(other, settings={**other.settings, key: value})
    assert [group.label for group in compare_searches([one, unlike]).groups] == ["a", "b"]
