"""A configuration is the same after its way through a job, `results.csv` and a warm start, whatever its choices are."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ConfigSpace as cs
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deephyper_balsam import HpProblem
from deephyper_balsam.problem.cells import read_cell, read_choice, write_cell
from deephyper_balsam.problem.warm_start import read_warm_start
from deephyper_balsam.results import table as results
from deephyper_balsam.store import trial_rows
from deephyper_balsam.trial import Resources, Trial

relaxed = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
alike = st.sampled_from(
    [
        *("", " ", "1", "1.0", "1e0", "01", "0x1", "1_0", "inf", "-0.0", "\N{ARABIC-INDIC DIGIT ONE}"),
        *("True", "true", "None", "None ", "null", "nan", "NA", "#N/A"),
        *('"1"', '"', "'", "a,b", "a\nb", "\r", "é", "日本", "\u2028", "\x1b[0m"),
    ]
)
reals = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.integers(-(2**63), 2**63 - 1) | reals | st.sampled_from([0, 1, 1.5])
choices = st.none() | st.booleans() | numbers | alike | texts


def same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)


@st.composite
def drawn_problems(draw: st.DrawFn) -> HpProblem:
    problem = HpProblem("drawn")
    for name in ("x", "y", "z"):
        problem.add_hyperparameter(draw(st.lists(choices, min_size=1, max_size=5, unique_by=lambda one: one)), name)
    problem.add_hyperparameter((0, 9), "whole")
    problem.add_hyperparameter((0.0, 1.0), "real")
    values = problem.encoder.columns[0].choices
    if len(values) > 1:
        for child in ("y", "real"):
            problem.add_condition(cs.EqualsCondition(problem[child], problem["x"], draw(st.sampled_from(values))))
    return problem


@relaxed
@given(drawn_problems(), st.integers(0, 99))
def test_a_configuration_comes_back_from_a_job_a_table_and_a_warm_start(problem: HpProblem, seed: int) -> None:
    again = HpProblem.from_dict(json.loads(json.dumps(problem.to_dict())))
    rng = np.random.default_rng(seed)
    configs = problem.encoder.decode(problem.encoder.sample(8, rng))
    lines = []
    for number, config in enumerate(configs):
        job = trial_rows.trial_job(Trial(number, config), "s", 1, Resources(), 0.0, None)
        row = {**job, "id": number, "state": "JOB_FINISHED", "data": {**job["data"], "result": {"objective": 0.5}}}
        assert same(trial_rows.read_config(row), config)
        lines.append(trial_rows.table_row(row, 0.0, "lab"))
        assert same(results.configuration(lines[-1]), config)
    names = problem.hyperparameter_names
    frame = results.table(lines, names)
    assert results.frame_csv(frame) == results.csv_text(lines, names)
    rows = json.loads(json.dumps(results.rows_of(frame)))
    assert all(same(results.configuration(one), config) for one, config in zip(rows, configs, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        for file in ("grown.csv", "whole.csv", "legacy.csv"):
            path = Path(folder) / file
            if file == "grown.csv":
                results.ResultsFile(path, names).write(lines, lambda: lines)
            elif file == "whole.csv":
                results.export(frame, path)
            else:
                results.export(results.legacy_table(lines, names), path)
            found = read_warm_start(path, again)
            assert not found.refused
            assert [repr(point.config) for point in found.points] == list(map(repr, configs))


@settings(max_examples=300, deadline=None)
@given(choices)
def test_a_cell_is_read_back_as_what_was_written(value: Any) -> None:
    text = write_cell(value)
    assert text != ""
    assert same(read_cell(text), value)


@settings(max_examples=200, deadline=None)
@given(st.lists(choices, min_size=1, max_size=6, unique_by=lambda one: one))
def test_a_cell_of_ours_is_one_choice_whatever_the_others_are(values: list[Any]) -> None:
    assert len({write_cell(value) for value in values}) == len(values)
    for value in values:
        assert same(read_choice(values, write_cell(value)), value)
