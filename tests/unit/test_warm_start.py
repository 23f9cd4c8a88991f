"""Tables from elsewhere become points that fit the space; what does not fit is counted and named."""

from __future__ import annotations

from pathlib import Path

import ConfigSpace as cs
import pandas as pd
import pytest

from deephyper_balsam import HpProblem
from deephyper_balsam.errors import InputError
from deephyper_balsam.warm_start import MAX_POINTS, read_warm_start


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
    assert "1 do not fit the space (lines 5; line 5: `layers`" in str(found)


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
    from deephyper_balsam.optimizers import make_optimizer
    from deephyper_balsam.worker import RunningJob, evaluate

    names: dict[str, object] = {}
    exec(compile(text.replace("from deephyper.hpo import", "from deephyper_balsam import"), "theirs", "exec"), names)
    problem, run = names["problem"], names["run"]
    assert isinstance(problem, HpProblem)
    optimizer = make_optimizer("random", problem, seed=1)
    for trial in optimizer.ask(30):
        outcome = evaluate(run, RunningJob(trial.number, trial.config))  # type: ignore[arg-type]
        assert outcome["metadata"] == {"job": trial.number, "counted": True}
        assert (outcome["failure"] == "dropout") == (trial.config["dropout_rate"] > 0.5)
