"""A loss: what is maximised is minus what the run returned, turned once; tables have both, and people see the loss."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite
from test_analysis import search_of
from test_cli_requests import Call, begun, call, problem, refused
from test_cli_watch import NOW, shown, snapshot
from test_search import Make, Play, make
from test_worker import Client, app_for

from deephyper_balsam.cli import main
from deephyper_balsam.cli.screen import one_line
from deephyper_balsam.common.objective import minimises, turned
from deephyper_balsam.driver.search import Search
from deephyper_balsam.driver.simulation import simulate
from deephyper_balsam.errors import InputError, ProblemError, SearchExistsError
from deephyper_balsam.monitor.search_snapshot import Best
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.worker import evaluate, run_trial
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.problem.warm_start import read_warm_start
from deephyper_balsam.results import table as results
from deephyper_balsam.results.analysis.compare import compare_searches, comparison_figure
from deephyper_balsam.results.analysis.embedded import shared
from deephyper_balsam.results.analysis.figures import figure, rows
from deephyper_balsam.results.analysis.report import html
from deephyper_balsam.store.trial_rows import job_elsewhere, table_row, trial_job
from deephyper_balsam.trial import Resources, Trial

pytest_plugins = ["balsam_fixtures"]
__all__ = ["begun", "call", "make", "problem"]

COMMAND = {"kind": "command", "name": "c", "command": "echo loss: 0.25", "objective": {"regex": r"loss: (\S+)"}}
SPACE = """
from deephyper_balsam import HpProblem
problem = HpProblem("p"{})
problem.add_hyperparameter((0.0, 1.0), "x")
"""


def line_problem(minimize: bool = True) -> HpProblem:
    made = HpProblem("line", minimize=minimize)
    made.add_hyperparameter((-10.0, 10.0), "x")
    return made


def loss(config: Any) -> float:
    return float((config["x"] - 3.0) ** 2)


# --- the problem says so ---------------------------------------------------------------------------------------------


def test_a_problem_carries_its_direction_and_one_of_before_is_maximised() -> None:
    for minimize in (True, False):
        made = HpProblem.from_dict(json.loads(json.dumps(line_problem(minimize).to_dict())))
        assert made.minimize is minimize
        assert ("objective minimised" in made.describe()) is minimize
        assert ("objective maximised" in made.describe()) is not minimize
    assert "minimize" not in line_problem(False).to_dict()  # equal to the record of an earlier version
    assert line_problem(False).minimized() == line_problem(True) != line_problem(False)


@pytest.mark.parametrize("minimize", ["false", 1, None, "minimize"])
def test_a_direction_that_is_no_bool_is_refused(minimize: Any) -> None:
    with pytest.raises(ProblemError, match=r"`minimize` must be True \(for a loss\) or False, but got"):
        HpProblem("p", minimize=minimize)


# --- the worker turns it, once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("returned", "kept"), [(0.25, -0.25), (-3, 3.0), (0, 0.0), ({"objective": 2}, -2.0)])
def test_a_loss_is_kept_turned_and_shown_as_it_was(returned: Any, kept: float) -> None:
    found = evaluate(lambda job: returned, RunningJob(0, {}), minimize=True)["objective"]
    assert found == kept
    assert str(found) != "-0.0"
    assert evaluate(lambda job: returned, RunningJob(0, {}))["objective"] == turned(found, True)


@pytest.mark.parametrize("returned", ["F_oom", None, float("nan"), True])
def test_a_failure_stays_one(returned: Any) -> None:
    assert evaluate(lambda job: returned, RunningJob(0, {}), minimize=True)["objective"] is None


@pytest.mark.parametrize("told", [{}, {"minimize": True}])
@pytest.mark.parametrize("maximize", [True, False])
def test_a_node_turns_it_once_whoever_says_so(
    told: dict[str, Any], maximize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = {**COMMAND, "target": "c.yaml", "maximize": maximize, "environment": {}, "here": str(tmp_path)}
    outcome = run_trial(app_for(Client(), told), spec, {})
    assert outcome["objective"] == (-0.25 if told or not maximize else 0.25), outcome


def test_a_trial_that_goes_to_another_site_stays_a_loss() -> None:
    row = trial_job(Trial(0, {"x": 1}), "s", 1, Resources(), 1.0, None, minimize=True)
    row = {**row, "data": {**row["data"], "moved": {"at": 2.0, "from": "a"}}, "state": "READY"}
    assert job_elsewhere(row, 2, 1, 0)["data"]["minimize"] is True


# --- a search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ambs", "random", "ga"])
def test_a_search_of_any_method_minimises_and_says_the_loss(
    make: Make, play: Play, api: BalsamApi, method: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def on_the_node(config: dict[str, Any]) -> float:
        return float(evaluate(loss, RunningJob(0, config), minimize=True)["objective"])  # type: ignore[arg-type]

    play(on_the_node)
    frame = make(line_problem(), method=method).search(max_evals=12)
    assert all(row["data"]["minimize"] is True for row in api.trials("s").values())
    smallest = min(loss({"x": x}) for x in frame["p:x"])
    assert frame["objective"].max() == -smallest
    assert frame["m:loss"].min() == smallest
    assert frame["m:loss"].tolist() == (0.0 - frame["objective"]).tolist()
    written = (tmp_path / "out" / "s" / "results.csv").read_text().splitlines()[0]
    assert "p:x,objective,m:loss,job_id" in written
    assert f"Best objective (minimised) {smallest:.6g} (trial" in capsys.readouterr().err


def test_a_search_that_maximises_leaves_no_trace_of_it(make: Make, play: Play, api: BalsamApi) -> None:
    play(loss)
    made = make(line_problem(False))
    made.search(max_evals=2)
    assert not made.minimize
    assert all("minimize" not in row["data"] for row in api.trials("s").values())
    assert "minimize" not in json.dumps(made.settings)


@pytest.mark.parametrize("begun_to", [True, False])
def test_a_search_does_not_go_on_the_other_way(make: Make, play: Play, begun_to: bool) -> None:
    play(loss)
    make(line_problem(begun_to)).search(max_evals=2)
    ways = ("minimise", "maximise") if begun_to else ("maximise", "minimise")
    with pytest.raises(SearchExistsError, match=f"was begun to {ways[0]} its objective, and would now {ways[1]}"):
        make(line_problem(not begun_to)).search(max_evals=4)
    assert len(make(line_problem(begun_to)).search(max_evals=3)) == 3


def test_a_search_that_is_resumed_minimises_as_before(make: Make, play: Play, client_yml: Path, tmp_path: Path) -> None:
    play(loss)
    make(line_problem()).search(max_evals=2)
    again = Search.resume("s", log_dir=tmp_path / "again", client_path=client_yml)
    assert again.minimize
    assert again.problem.minimize


def test_a_simulation_minimises() -> None:
    report = simulate(
        line_problem(), loss, method="random", workers=2, minutes=60, duration=lambda *_: 60.0, max_evals=10
    )
    assert report.best_objective is not None
    assert report.best_loss == -report.best_objective == loss(report.best_config) >= 0
    assert report.to_dict()["minimize"] is True


# --- people see what was returned ------------------------------------------------------------------------------------

SAYS_SO: dict[str, Callable[[dict[str, Any]], None]] = {
    "the problem": lambda settings: settings["problem"].update(minimize=True),
    "the command": lambda settings: settings.update(run={**COMMAND, "maximize": False}),
}


@pytest.mark.parametrize("who", SAYS_SO)
def test_every_command_shows_what_the_run_returned(
    call: Call, begun: str, api: BalsamApi, site: VirtualSite, who: str
) -> None:
    record = next(row for row in api.jobs.values() if row["tags"].get("kind") == "search")
    SAYS_SO[who](record["data"]["settings"])
    for row in api.trials(begun).values():
        row["data"]["minimize"] = True
    api.trials(begun)[0]["data"]["result"]["objective"] = -0.5  # trial 0 returned 0.5
    for command in (("best", begun), ("status", begun)):
        assert "Best objective (minimised) 0.5 (trial 0)" in call(*command).out
    assert "Trial 0 of s: DONE, objective (minimised) 0.5" in call("show", begun, "0").out
    assert "objective minimised" in call("show", begun).out
    refused(call("add", begun, "layers=3"), "DONE, objective (minimised) 0.5")
    for found in (
        call("best", begun, "--json").json[0],
        call("status", begun, "--json").json["best"],
        call("results", begun, "--json").json[0],
    ):
        assert (found["objective"], found["m:loss"]) == (-0.5, 0.5)
    shown = call("show", begun, "0", "--json").json
    assert (shown["objective"], shown["loss"], shown["minimize"]) == (-0.5, 0.5, True)
    for columns in ((), ("--deephyper",)):
        assert ",-0.5,0.5," in call("results", begun, *columns).out
    legacy = call("results", begun, "--legacy").out
    assert ",-0.5," in legacy
    assert "loss" not in legacy


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
@pytest.mark.parametrize("kept", ["objective", "m:loss"])
def test_the_table_of_a_search_that_minimises_is_a_warm_start(suffix: str, kept: str, tmp_path: Path) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    line = {"p:x": 1.0, "objective": -4.0, "m:loss": 4.0, "job_id": 0, "job_status": "DONE", "m:balsam_job_id": 7}
    failed = {**line, "p:x": 2.0, "objective": None, "m:loss": None, "job_status": "FAILED"}
    file = tmp_path / f"results.{suffix}"
    frame = results.table([line, failed])
    assert list(frame.columns[:3]) == ["p:x", "objective", "m:loss"]
    results.export(frame if kept == "objective" else frame.drop(columns="objective"), file)
    for made in (line_problem(), line_problem(False)):
        assert [one.objective for one in read_warm_start(file, made).points] == [-4.0, None]
    done, other = ("maximised", "minimize") if kept == "objective" else ("minimised", "maximize")
    with pytest.raises(InputError, match=rf"says itself that it was {done}"):
        read_warm_start(file, line_problem(), other)


@pytest.mark.parametrize("minimize", [True, False])
def test_metadata_cannot_pass_for_the_loss(minimize: bool) -> None:
    row = trial_job(Trial(0, {"x": 1}), "s", 1, Resources(), 1.0, None, minimize=minimize)
    outcome = {"objective": 1.0, "metadata": {"loss": 7.0}, "start": 1.0, "end": 2.0}
    made = {**row, "id": 1, "state": "JOB_FINISHED", "data": {**row["data"], "result": outcome}}
    line = table_row(made, 0.0, "lab")
    assert line["m:metadata:loss" if minimize else "m:loss"] == 7.0
    assert line["m:loss"] == (-1.0 if minimize else 7.0)


def test_the_screen_and_the_lines_of_watch_show_the_loss_and_the_curve_falls() -> None:
    steps = [(NOW - 9000, -8.0), (NOW - 5000, -4.0), (NOW - 1000, -2.0)]
    made = snapshot(best=Best(-2.0, 3, {"x": 1}), steps=steps, minimize=True)
    screen = shown(made, 100, 40)
    text = "\n".join(screen)
    assert "best 2 (trial 3)" in text
    assert "best 2 (trial 3)" in one_line(made)
    assert "best objective (minimised) over time" in text
    labels = [row.split("┤")[0].strip() for row in screen if "┤" in row]
    assert [float(label) for label in labels] == [8.0, 2.0]
    assert "╮" in text
    assert "╭" not in text
    assert "╮" not in "\n".join(shown(replace(made, minimize=False), 100, 40))


def losing(*objectives: float | None) -> Any:
    made = search_of(*objectives)
    return replace(made, settings={**made.settings, "problem": {**made.settings["problem"], "minimize": True}})


def test_figures_draw_what_the_runs_returned() -> None:
    trials = losing(-5.0, -3.0, None, -4.0, -1.0)
    assert [row["o"] for row in rows(trials)] == [5.0, 3.0, None, 4.0, 1.0]
    assert [row["y"] for row in rows(trials)] == [5.0, 3.0, None, 4.0, 1.0]
    assert [row["g"] for row in rows(trials)] == [0, 0, 0, 0, 1]
    assert trials.objective_title == "objective (minimised)"
    steps = figure(trials, "progress")["layer"][-1]["data"]["values"]
    assert [step["b"] for step in steps] == [5.0, 3.0, 1.0, 1.0]
    assert "objective (minimised)" in json.dumps(figure(trials, "parallel"))
    table = shared(trials)
    place = table["columns"].index("objective")
    assert [line[place] for line in table["lines"]] == [5.0, 3.0, None, 4.0, 1.0]
    assert (table["good"], table["minimize"]) == (1.0, True)


def test_what_is_far_worse_lies_above_the_axis() -> None:
    trials = losing(-1e6, *(-1.0 - i / 100 for i in range(20)))
    assert "1 trial lies above the axis and is drawn at its top; the highest has 1e+06" in trials.floor_said
    assert max(trials.drawn) < 10


def test_the_report_shows_the_loss() -> None:
    page = html(losing(*(-5.0 + i / 10 for i in range(30))), 0.0)
    assert "best objective (minimised)" in page
    assert "objective minimised" in page
    assert "<dd>2.1</dd>" in page


def test_a_comparison_is_drawn_and_told_in_losses_and_mixes_no_directions() -> None:
    one, other = replace(losing(-5.0, -3.0), name="a"), replace(losing(-4.0, -2.0), name="b", created_at=1.0)
    found = compare_searches([one, replace(other, settings={**other.settings, "method": "ga"})])
    told = {group["names"][0]: group for group in found.to_dict()["groups"]}
    assert found.to_dict()["minimize"] is True
    assert (told["a"]["best"], told["b"]["best"], told["b"]["rank"]) == (-3.0, -2.0, 1.0)
    assert (told["a"]["loss"]["best"], told["b"]["loss"]["best"]) == (3.0, 2.0)
    for group in told.values():
        assert group["lowest"] <= group["highest"]
        assert group["loss"]["lowest"] <= group["loss"]["highest"]
    drawn = comparison_figure(found)
    assert {row["m"] for row in drawn["data"]["values"]} == {5.0, 4.0, 3.0, 2.0}
    assert "best so far (minimised)" in json.dumps(drawn)
    with pytest.raises(InputError, match=r"Searches that minimise \(a\) cannot be compared"):
        compare_searches([one, search_of(1.0, 2.0)])


# --- the commands before a search ------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "problem.py").write_text(SPACE.format(", minimize=True"))
    (folder / "run.py").write_text("def run(job):\n    return 0.5 + job['x']\n")
    return folder


@pytest.fixture
def command(mine: Path) -> Path:
    (mine / "problem.py").write_text(SPACE.format(""))
    settings = {"command": "echo loss: 1{{ x }}", "objective": {"regex": r"loss: (\S+)"}, "maximize": False}
    (mine / "command.yaml").write_text(yaml.safe_dump(settings))
    return mine / "command.yaml"


def test_problem_check_says_that_it_is_minimised_and_shows_the_loss(mine: Path) -> None:
    said = CliRunner().invoke(main, ["problem", "check", "mine"]).output
    assert "objective minimised" in said
    assert "Objective: 1 (it will be minimised)" in said
    found = json.loads(CliRunner().invoke(main, ["problem", "check", "mine", "--json"]).stdout)
    assert (found["objective"], found["loss"], found["minimize"]) == (-1.0, 1.0, True)


def test_problem_check_shows_what_a_minimised_command_left(command: Path) -> None:
    said = CliRunner().invoke(main, ["problem", "check", "mine", "--run", str(command)]).output
    assert "objective minimised" in said
    assert "Objective: 10.5 (it will be minimised)" in said


@pytest.mark.parametrize("words", [["mine"], ["mine", "--run", "mine/command.yaml"], ["mine/problem.py"]])
def test_problem_show_minds_a_command_that_is_minimised(command: Path, words: list[str]) -> None:
    told = words != ["mine/problem.py"]  # a file names no command beside it
    said = CliRunner().invoke(main, ["problem", "show", *words])
    assert ("objective minimised" in said.output) is told, said.output
    found = json.loads(CliRunner().invoke(main, ["problem", "show", *words, "--json"]).stdout)
    assert found.get("minimize", False) is told


def test_problem_show_runs_nothing_of_the_run_function(mine: Path) -> None:
    (mine / "run.py").write_text("raise RuntimeError('loaded')")
    said = CliRunner().invoke(main, ["problem", "show", "mine"])
    assert (said.exit_code, "objective minimised" in said.output) == (0, True)


def test_simulate_says_the_loss(mine: Path, command: Path) -> None:
    small = ["--workers", "1", "--minutes", "60", "--duration-mean", "60", "--max-evals", "3", "--method", "random"]
    said = CliRunner().invoke(main, ["simulate", "--problem", "mine", "--run", str(command), *small]).output
    [found] = [line for line in said.splitlines() if line.startswith("best")]
    assert found.split()[1] == "loss"
    assert float(found.split()[-1]) >= 10.0
    told = CliRunner().invoke(main, ["simulate", "--problem", "mine", "--run", str(command), *small, "--json"]).stdout
    assert json.loads(told)["best_loss"] == -json.loads(told)["best_objective"] >= 10.0


@pytest.mark.parametrize(("written", "read"), [("true", True), ("false", False)])
def test_a_file_says_it_with_a_yaml_bool(call: Call, site: VirtualSite, mine: Path, written: str, read: bool) -> None:
    (mine / "problem.py").write_text(SPACE.format(""))
    file = mine / "search.yaml"
    file.write_text(f"problem: {mine}\nsite: lab\nmax_evals: 3\nminimize: {written}\n")
    said = call("run", "s", "--file", str(file), "--dry-run")
    assert said.code == 0, said
    assert yaml.safe_load(said.out)["minimize"] is read


@pytest.mark.parametrize("written", ["'true'", "1", "loss"])
def test_a_file_that_says_it_otherwise_is_refused(call: Call, site: VirtualSite, mine: Path, written: str) -> None:
    file = mine / "search.yaml"
    file.write_text(f"problem: {mine}\nsite: lab\nmax_evals: 3\nminimize: {written}\n")
    refused(call("run", "s", "--file", str(file), "--dry-run"), "`minimize`")


def test_the_option_makes_the_search_one_that_minimises(call: Call, site: VirtualSite, mine: Path) -> None:
    (mine / "problem.py").write_text(SPACE.format(""))
    options = ("--problem", str(mine), "--site", "lab", "--max-evals", "3", "--dry-run")
    assert yaml.safe_load(call("run", "s", *options, "--minimize").out)["minimize"] is True
    assert "minimize" not in yaml.safe_load(call("run", "s", *options).out)


def test_a_file_and_a_problem_that_contradict_each_other_are_refused(call: Call, site: VirtualSite, mine: Path) -> None:
    file = mine / "search.yaml"
    file.write_text(f"problem: {mine}\nsite: lab\nmax_evals: 3\nminimize: false\n")
    refused(call("run", "s", "--file", str(file), "--dry-run"), "the problem says that the objective is a loss")


def test_settings_of_any_kind_are_read() -> None:
    assert not minimises({})
    assert not minimises({"problem": None, "run": ["a", 1]})
    assert minimises({"problem": {}, "run": {"maximize": False}})
    assert not minimises({"problem": {"name": "p"}, "run": {"maximize": True}})
