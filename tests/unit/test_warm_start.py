"""Tables from elsewhere become points that fit the space; what does not fit is counted and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ConfigSpace as cs
import numpy as np
import pandas as pd
import pytest

from deephyper_balsam import HpProblem
from deephyper_balsam.errors import InputError
from deephyper_balsam.problem.warm_start import MAX_POINTS, read_warm_start
from deephyper_balsam.results import table as results


@pytest.fixture
def problem() -> HpProblem:
    made = HpProblem("p")
    made.add_hyperparameter((1, 8), "layers")
    made.add_hyperparameter((1e-4, 1e-1, "log-uniform"), "rate")
    solver = made.add_hyperparameter(["adam", "sgd"], "solver")
    momentum = made.add_hyperparameter((0.0, 0.9), "momentum")
    made.add_condition(cs.EqualsCondition(momentum, solver, "sgd"))
    return made


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "points.csv"
    file.write_text(text)
    return file


def test_deephypers_results_keep_their_sign_and_failures(tmp_path: Path, problem: HpProblem) -> None:
    file = written(
        tmp_path,
        "p:layers,p:rate,p:solver,p:momentum,objective,job_id,job_status\n"
        "2,0.01,adam,,0.5,0,DONE\n3.0,0.02,sgd,0.5,F_memory,1,FAILED\n4,0.01,adam,,,2,RUNNING\n99,0.01,adam,,0.9,3,DONE\n",
    )
    found = read_warm_start(file, problem)
    assert [(point.number, point.objective, point.config) for point in found.points] == [
        (None, 0.5, {"layers": 2, "rate": 0.01, "solver": "adam"}),
        (None, None, {"layers": 3, "rate": 0.02, "solver": "sgd", "momentum": 0.5}),
    ]
    assert list(found.refused) == [5]
    assert found.unfinished == 1
    assert "1 does not fit the space (line 5; line 5: `layers`" in str(found)


def test_optunas_table_needs_its_direction(tmp_path: Path, problem: HpProblem) -> None:
    frame = pd.DataFrame(
        {
            "number": [0, 1, 2],
            "value": [0.25, None, 0.5],
            "params_layers": [2, 3, 4],
            "params_rate": [0.01, 0.02, 0.03],
            "params_solver": ["adam", "adam", "sgd"],
            "params_momentum": [None, None, 0.5],
            "state": ["COMPLETE", "FAIL", "PRUNED"],
        }
    )
    file = tmp_path / "optuna.csv"
    frame.to_csv(file)
    with pytest.raises(InputError, match="--warm-start-direction"):
        read_warm_start(file, problem)
    assert [point.objective for point in read_warm_start(file, problem, "minimize").points] == [-0.25, None]
    assert [point.objective for point in read_warm_start(file, problem, "maximize").points] == [0.25, None]


@pytest.mark.parametrize(("column", "objective"), [("fun", -0.5), ("y", -0.5), ("objective", 0.5)])
def test_bare_names_are_maximised_or_minimised_by_the_objectives_name(
    tmp_path: Path, problem: HpProblem, column: str, objective: float
) -> None:
    file = written(tmp_path, f"layers,rate,solver,momentum,seconds,{column}\n2,0.01,adam,,7,0.5\n")
    assert [point.objective for point in read_warm_start(file, problem).points] == [objective]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "is no table of points"),
        ("", "is no table of points"),
        ("p:layers,objective\n", "it has no line"),
        ("p:layers,p:rate,p:solver,objective\n77,0.01,adam,1\n", "No point of"),
    ],
)
def test_a_table_of_which_nothing_fits_is_refused(tmp_path: Path, problem: HpProblem, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_warm_start(written(tmp_path, text), problem)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, problem: HpProblem) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_warm_start(tmp_path / "none.csv", problem)


def test_of_too_many_points_the_best_and_an_even_spread_are_kept(tmp_path: Path) -> None:
    problem = HpProblem("p")
    problem.add_hyperparameter((0, 10**6), "x")
    lines = "".join(f"{x},{x}\n" for x in range(3 * MAX_POINTS))
    found = read_warm_start(written(tmp_path, "p:x,objective\n" + lines), problem)
    kept = [point.objective for point in found.points]
    assert len(set(kept)) == MAX_POINTS
    assert found.left_out == 2 * MAX_POINTS
    assert set(range(3 * MAX_POINTS - MAX_POINTS // 2, 3 * MAX_POINTS)) <= set(kept)
    assert min(value for value in kept if value is not None) == 0


def test_a_problem_written_for_deephyper_runs_by_changing_its_import_line() -> None:
    text = """
import ConfigSpace as cs
from deephyper.hpo import HpProblem

problem = HpProblem()
problem.add_hyperparameter((8, 128, "log-uniform"), "units", default_value=32)
problem.add_hyperparameter((0.0, 0.6), "dropout_rate")
problem.add_hyperparameter(["relu", "tanh"], "activation")
use = problem.add_hyperparameter([True, False], "use_decay")
decay = problem.add_hyperparameter((1e-6, 1e-2, "log-uniform"), "decay")
problem.add_condition(cs.EqualsCondition(decay, use, True))

def counted(run):
    from functools import wraps
    @wraps(run)
    def inner(job):
        found = run(job)
        return {"objective": found["objective"], "metadata": {**found["metadata"], "counted": True}}
    return inner

@counted
def run(job):
    config = job.parameters.copy()
    if config["dropout_rate"] > 0.5:
        return {"objective": "F_dropout", "metadata": {"job": job.id}}
    return {"objective": config["units"] - job["dropout_rate"], "metadata": {"job": job.id}}
"""
    from deephyper_balsam.node.running_job import RunningJob
    from deephyper_balsam.node.worker import evaluate
    from deephyper_balsam.optimizers import make_optimizer

    names: dict[str, object] = {}
    exec(compile(text.replace("from deephyper.hpo import", "from deephyper_balsam import"), "theirs", "exec"), names)
    problem, run = names["problem"], names["run"]
    assert isinstance(problem, HpProblem)
    optimizer = make_optimizer("random", problem, seed=1)
    for trial in optimizer.ask(30):
        outcome = evaluate(run, RunningJob(trial.number, trial.config))  # type: ignore[arg-type]
        assert outcome["metadata"] == {"job": trial.number, "counted": True}
        assert (outcome["failure"] == "dropout") == (trial.config["dropout_rate"] > 0.5)


# --- what a cell stands for ------------------------------------------------------------------------------------------


def chosen(tmp_path: Path, choices: list[Any], cells: list[str]) -> list[Any]:
    problem = HpProblem("p")
    problem.add_hyperparameter(choices, "x")
    text = "p:x,objective,job_status\n" + "".join(f"{cell},0.5,DONE\n" for cell in cells)
    return [(point.config or {})["x"] for point in read_warm_start(written(tmp_path, text), problem).points]


@pytest.mark.parametrize(
    ("choices", "cells", "values"),
    [
        ([None, "l1", "l2"], ["None", "", "nan", "l1"], [None, None, None, "l1"]),
        ([True, False], ["True", "true", "1", "1.0", "FALSE", "0.0"], [True, True, True, True, False, False]),
        (["2", "3"], ["2", "2.0", '"""3"""'], ["2", "2", "3"]),
        ([1, "1"], ["1", "1.0", '"""1"""'], [1, 1, "1"]),
        ([16, 32], ["16", "16.0", "3.2e1"], [16, 16, 32]),
        (["", "a"], ["", '""""""', "a"], ["", "", "a"]),
        (["NA", "EU"], ["NA", "", "EU"], ["NA", "NA", "EU"]),
        (["True", "other"], ["True", "TRUE"], ["True", "True"]),
        ([None, "None"], ["None", '"""None"""', ""], [None, "None", None]),
    ],
)
def test_a_cell_is_the_choice_that_it_stands_for_in_this_and_in_other_programs(
    tmp_path: Path, choices: list[Any], cells: list[str], values: list[Any]
) -> None:
    assert list(map(repr, chosen(tmp_path, choices, cells))) == list(map(repr, values))


def test_a_cell_that_could_be_several_choices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="could be each of"):
        chosen(tmp_path, ["1.0", "1.00"], ["1"])


def test_an_empty_cell_is_none_only_where_the_hyperparameter_is_active(tmp_path: Path) -> None:
    problem = HpProblem("p")
    solver = problem.add_hyperparameter(["sgd", "adam"], "solver")
    decay = problem.add_hyperparameter([None, "cosine"], "decay")
    steps = problem.add_hyperparameter((1, 9), "steps")
    problem.add_conditions([cs.EqualsCondition(decay, solver, "sgd"), cs.EqualsCondition(steps, decay, "cosine")])
    file = written(tmp_path, "p:solver,p:decay,p:steps,objective\nsgd,,,1\nadam,,,2\nsgd,cosine,4,3\n")
    assert [point.config for point in read_warm_start(file, problem).points] == [
        {"solver": "sgd", "decay": None},
        {"solver": "adam"},
        {"solver": "sgd", "decay": "cosine", "steps": 4},
    ]


def test_a_line_that_is_cut_is_refused_and_the_others_are_taken(tmp_path: Path, problem: HpProblem) -> None:
    file = written(tmp_path, 'p:layers,p:rate,p:solver,objective\n2,0.01,adam,0.5\n3,0.02,"ad')
    found = read_warm_start(file, problem)
    assert [point.objective for point in found.points] == [0.5]
    assert "cut" in found.refused[3]


def test_a_file_with_nul_bytes_or_a_column_twice_is_refused(tmp_path: Path, problem: HpProblem) -> None:
    with pytest.raises(InputError, match="NUL bytes"):
        read_warm_start(written(tmp_path, "p:layers,objective\n2,0.5\n\0\0\0\0"), problem)
    with pytest.raises(InputError, match="several columns 'p:layers'"):
        read_warm_start(written(tmp_path, "p:layers,p:layers,objective\n2,3,0.5\n"), problem)


def test_a_trial_that_is_done_without_an_objective_is_refused_and_not_a_failure(
    tmp_path: Path, problem: HpProblem
) -> None:
    lines = "2,0.01,adam,,DONE\n3,0.01,adam,nan,COMPLETE\n4,0.01,adam,,FAILED\n5,0.01,adam,F_x,DONE\n6,0.01,adam,,\n"
    found = read_warm_start(written(tmp_path, "p:layers,p:rate,p:solver,objective,job_status\n" + lines), problem)
    assert [(point.config or {})["layers"] for point in found.points] == [4, 5, 6]
    assert list(found.refused) == [2, 3]
    assert found.refused[2] == "it is DONE, but has no objective."


def test_the_legacy_table_is_read_also_where_a_hyperparameter_is_called_objective(tmp_path: Path) -> None:
    problem = HpProblem("p")
    problem.add_hyperparameter(["a", "b"], "objective")
    problem.add_hyperparameter([None, 1], "x")
    lines = [
        {"p:objective": "b", "p:x": None, "objective": 0.5, "job_id": 0, "job_status": "DONE", "m:timestamp_end": 1.0}
    ]
    results.export(results.legacy_table(lines, problem.hyperparameter_names), tmp_path / "legacy.csv")
    points = read_warm_start(tmp_path / "legacy.csv", problem).points
    assert [(point.config, point.objective) for point in points] == [({"objective": "b", "x": None}, 0.5)]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_every_export_of_a_search_is_a_warm_start(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    problem = HpProblem("mixed")
    kind = problem.add_hyperparameter([None, "l1", "2", 2, True], "penalty")
    problem.add_condition(cs.EqualsCondition(problem.add_hyperparameter((1, 9), "steps"), kind, "l1"))
    problem.add_hyperparameter((1e-5, 1.0, "log-uniform"), "rate")
    problem.add_hyperparameter([True, False], "flag")
    configs = problem.encoder.decode(problem.encoder.sample(40, np.random.default_rng(0)))
    lines = [
        {**{f"p:{name}": value for name, value in config.items()}, "objective": None if n % 7 == 3 else n / 8}
        | {"job_id": n, "job_status": "FAILED" if n % 7 == 3 else "DONE", "m:failure": "no" if n % 7 == 3 else None}
        for n, config in enumerate(configs)
    ]
    file = tmp_path / f"results{suffix}"
    results.export(results.table(lines, problem.hyperparameter_names), file)
    found = read_warm_start(file, problem)
    assert found.refused == {}
    assert [(point.objective, point.config) for point in found.points] == [
        (line["objective"], config) for line, config in zip(lines, configs, strict=True)
    ]
    assert [list(map(type, point.config.values())) for point in found.points] == [
        list(map(type, config.values())) for config in configs
    ]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'[{"objective": 1', "no JSON"),
        (b'{"objective": 1}', "JSON list of rows"),
        (b"[1, 2]", "JSON list of rows"),
        (b"[]", "no table of points"),
        (b"PAR1 and nothing more", "no Parquet file"),
    ],
)
def test_a_damaged_table_is_refused_with_the_reason(
    tmp_path: Path, problem: HpProblem, content: bytes, why: str
) -> None:
    file = tmp_path / "table"
    file.write_bytes(content)
    with pytest.raises(InputError, match=why):
        read_warm_start(file, problem)
