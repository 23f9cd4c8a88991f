"""Shell commands as run functions: real processes, values that would break a shell, outputs that hold no number."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from deephyper_balsam.command import read_objective, render_command, run_command
from deephyper_balsam.worker import RunningJob, evaluate, time_limit


def spec(command: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": "command",
        "command": command,
        "objective": {"regex": r"score: (\S+)"},
        "here": "/apps/mine",
        **more,
    }


@pytest.mark.parametrize(
    "value",
    ["plain", "with space", "it's", 'say "hi"', "$(rm -rf /)", "`id`", "a;b|c&d", "line\nbreak", "", "ünï", "*"],
)
def test_a_value_arrives_at_the_command_as_it_is(tmp_path: Path, value: str) -> None:
    show = '{{ python }} -c \'import sys; open("seen", "w").write(sys.argv[1]); print("score: 1")\' {{ value }}'
    assert run_command(spec(show), {"value": value}, tmp_path) == 1.0
    assert (tmp_path / "seen").read_text() == value


def test_names_are_filled_with_or_without_spaces() -> None:
    rendered = render_command(spec("{{python}} {{ here }}/t.py --n={{n}} --x={{  x  }}"), {"n": 3, "x": 1e-5})
    assert rendered == f"{shlex.quote(sys.executable)} /apps/mine/t.py --n=3 --x=1e-05"


def test_a_folder_with_a_space_is_quoted() -> None:
    assert render_command(spec("{{ here }}/t.py", here="/my apps"), {}) == "'/my apps'/t.py"


def test_an_inactive_hyperparameter_is_the_empty_string() -> None:
    assert render_command(spec("t --momentum {{ momentum }}"), {}) == "t --momentum ''"


def test_the_objective_is_the_last_match(tmp_path: Path) -> None:
    assert run_command(spec("echo score: 1; echo score: 2.5e-1; echo done"), {}, tmp_path) == 0.25


def test_a_minimised_number_changes_its_sign_once(tmp_path: Path) -> None:
    assert run_command(spec("echo score: 0.25", maximize=False), {}, tmp_path) == -0.25


@pytest.mark.parametrize(("text", "failure"), [("true", "bool"), ('"low"', "text"), ("null", "None"), ("[1]", "list")])
def test_what_is_no_number_is_a_failure_minimised_or_not(tmp_path: Path, text: str, failure: str) -> None:
    for maximize in (True, False):
        what = spec(
            f"echo '{{\"loss\": {text}}}' > r.json", objective={"json": "r.json", "key": "loss"}, maximize=maximize
        )
        outcome = evaluate(lambda job, what=what: run_command(what, {}, tmp_path), RunningJob(0, {}))
        assert f"returned {failure} instead of a number" in outcome["failure"]


def test_output_goes_to_the_log_and_to_the_job_and_errors_with_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_command(spec("echo score: 1; echo oops >&2; printf 'caf\\351\\n'"), {}, tmp_path)
    log = (tmp_path / "command.out").read_text()
    assert sorted(log.splitlines()) == ["caf\N{REPLACEMENT CHARACTER}", "oops", "score: 1"]
    assert "oops" in capfd.readouterr().out


def test_the_command_runs_in_the_trials_folder_with_its_environment_and_no_input(tmp_path: Path) -> None:
    command = 'cat; pwd > where; echo "score: $RATE"'
    assert run_command(spec(command, environment={"RATE": 3}), {}, tmp_path) == 3.0
    assert (tmp_path / "where").read_text().strip() == str(tmp_path.resolve())


def test_a_status_other_than_0_is_a_failure_with_the_last_lines(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with status 3; its last lines: score: 1\nboom"):
        run_command(spec("echo score: 1; echo boom; exit 3"), {}, tmp_path)
    with pytest.raises(RuntimeError, match=r"status 127; its last lines: bash: .*no_such_command"):
        run_command(spec("no_such_command"), {}, tmp_path)
    with pytest.raises(RuntimeError, match=r"status 1; its last lines: \(none\)"):
        run_command(spec("false"), {}, tmp_path)


def test_output_without_the_number_is_a_failure_that_names_the_rule(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no line of the output matches the objective's regex 'score: "):
        run_command(spec("echo nothing"), {}, tmp_path)
    with pytest.raises(ValueError, match="could not convert string to float: 'high'"):
        run_command(spec("echo score: high"), {}, tmp_path)


def test_nan_in_the_output_is_a_failure(tmp_path: Path) -> None:
    outcome = evaluate(lambda job: run_command(spec("echo score: nan"), {}, tmp_path), RunningJob(0, {}))
    assert outcome["failure"] == "returned nan"


def test_a_json_result_is_read_by_a_dotted_key(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"objective": 1, "best": {"loss": 0.5}}')
    assert read_objective({"json": "r.json"}, "", tmp_path) == 1
    assert read_objective({"json": "r.json", "key": "best.loss"}, "", tmp_path) == 0.5
    for key in ("accuracy", "best.acc", "objective.x"):
        with pytest.raises(RuntimeError, match=rf"r\.json has no key '{key}'"):
            read_objective({"json": "r.json", "key": key}, "", tmp_path)


def test_a_missing_or_broken_json_result_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"left no r\.json in its folder"):
        read_objective({"json": "r.json"}, "", tmp_path)
    (tmp_path / "r.json").write_text('{"objective": ')
    with pytest.raises(ValueError, match="Expecting value"):
        read_objective({"json": "r.json"}, "", tmp_path)


def test_the_time_limit_ends_the_command_and_what_it_started_at_once(tmp_path: Path) -> None:
    began_at = time.monotonic()

    with time_limit(0.5):
        command = spec("sleep 300 & echo $! > pid; echo score: 1; wait")
        outcome = evaluate(lambda job: run_command(command, {}, tmp_path), RunningJob(0, {}))
    assert outcome["failure"] == "timed out after 0.5 s"
    assert time.monotonic() - began_at < 5
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 3
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
