"""Shell commands as run functions: real processes, values that would break a shell, outputs that hold no number."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from deephyper_balsam.node import shell_command as command
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.shell_command import (
    bare_names,
    check_template,
    read_objective,
    render_command,
    run_command,
    template_names,
)
from deephyper_balsam.node.worker import evaluate, time_limit


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


@pytest.mark.parametrize(
    ("command", "active", "inactive"),
    [
        ("t {% if momentum is defined %}--momentum {{ momentum }}{% endif %}", "t --momentum 0.9", "t "),
        ("t {% if optimizer == 'sgd' %}-m {{ momentum }}{% else %}--adam{% endif %}", "t -m 0.9", "t --adam"),
        ("t --m {{ momentum | default(0.5) }}", "t --m 0.9", "t --m 0.5"),
        ('t {{ flag("momentum") }} x', "t --momentum=0.9 x", "t  x"),
        ('t {{ flag("momentum", "--m") }}', "t --m=0.9", "t "),
        ('t {{ flag("momentum", "-m") }}', "t -m 0.9", "t "),
        (
            "t{% for name in parameters %} {{ flag(name) }}{% endfor %}",
            "t --optimizer=sgd --momentum=0.9",
            "t --optimizer=adam",
        ),
        ("t --twice {{ 2 * (momentum or 1) }}", "t --twice 1.8", "t --twice 2"),
    ],
)
def test_what_an_inactive_hyperparameter_leaves_out(command: str, active: str, inactive: str) -> None:
    assert render_command(spec(command), {"optimizer": "sgd", "momentum": 0.9}) == active
    assert render_command(spec(command), {"optimizer": "adam"}) == inactive


def test_argparse_takes_the_command_of_an_active_and_an_inactive_hyperparameter(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--momentum', type=float, default=7)\n"
        "parser.add_argument('--nesterov', action='store_true')\nparser.add_argument('--why', default='')\n"
        "given = parser.parse_args()\nprint('score:', given.momentum + 100 * given.nesterov + 1000 * len(given.why))\n"
    )
    flags = '{{ flag("momentum") }} {{ flag("nesterov") }} {{ flag("why") }}'
    what = spec("{{ python }} {{ here }}/train.py " + flags, here=str(tmp_path))
    assert run_command(what, {}, tmp_path) == 7
    assert run_command(what, {"momentum": -0.5, "nesterov": True, "why": "it's; $x"}, tmp_path) == 8099.5
    assert run_command(what, {"momentum": -1e-05, "nesterov": False}, tmp_path) == -1e-05


@pytest.mark.parametrize("value", [-0.5, -1e-05, -1.5e-300, -3, -1e22, 1e-05])
def test_a_negative_number_is_a_number_to_argparse(tmp_path: Path, value: float) -> None:
    code = "from argparse import ArgumentParser as P; p = P(); add = p.add_argument; add('--x', type=float)"
    code += "; add('y', type=float)"
    what = spec(
        f"{{{{ python }}}} -c \"{code}; n = p.parse_args(); print('score:', n.x + n.y)\" --x {{{{ x }}}} {{{{ x }}}}"
    )
    assert run_command(what, {"x": value}, tmp_path) == 2 * value


def test_values_in_conditions_are_values_and_what_is_filled_in_is_quoted() -> None:
    what = spec("{% if n > 9 and use %}many {{ word }}{% endif %} {{ 'a b' ~ word }}")
    assert render_command(what, {"n": 10, "use": True, "word": "it's"}) == "many 'it'\"'\"'s' 'a bit'\"'\"'s'"


@pytest.mark.parametrize(
    "command",
    ["echo ${#PATH}", "f() { echo {}; }; x=a.txt; echo ${x%.txt} ${x%%.*}", 'echo \'{"a": {"b": 1}}\'', "a # {b}\n"],
)
def test_what_bash_means_by_braces_stays(command: str) -> None:
    assert render_command(spec(command), {}) == command


def test_the_names_of_a_command_are_those_of_its_values_conditions_and_flags() -> None:
    command = (
        '{{ python }} {{ here }} {{ a }} {% if b is defined %}{{ c }}{% endif %} {{ flag("d") }} {{ e | default(1) }}'
    )
    assert template_names(command) == {"a", "b", "c", "d", "e"}
    assert bare_names(command) == {"a"}


def test_a_flag_without_quotes_is_refused_before_it_runs() -> None:
    with pytest.raises(ValueError, match=r'line 2: flag\(\) takes the name in quotes: flag\("momentum"\)'):
        check_template("t\n{{ flag(momentum) }}")
    with pytest.raises(TypeError, match=r"flag\(\) takes the name of a hyperparameter in quotes, but got 3"):
        render_command(spec("{{ flag(3) }}"), {})


def test_the_objective_is_the_last_match(tmp_path: Path) -> None:
    assert run_command(spec("echo score: 1; echo score: 2.5e-1; echo done"), {}, tmp_path) == 0.25


def test_a_number_is_returned_as_the_command_left_it_minimised_or_not(tmp_path: Path) -> None:
    for maximize in (True, False):  # the worker turns it (test_minimize.py)
        assert run_command(spec("echo score: 0.25", maximize=maximize), {}, tmp_path) == 0.25


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


# --- its end, its output and what it leaves --------------------------------------------------------------------------


def runs(pid_file: Path) -> bool:
    pid = int(pid_file.read_text(encoding="utf-8"))
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    "command",
    [
        "sleep 300 & echo $! > pid; echo score: 1",
        "(sleep 300 & echo $! > pid); echo score: 1",
        "nohup sleep 300 & echo $! > pid; echo score: 1",
        "setsid sleep 300 & echo $! > pid; echo score: 1",
        "(while true; do echo chatter; sleep 0.1; done) & echo $! > pid; echo score: 1",
    ],
)
def test_a_command_ends_when_it_ends_and_not_when_what_it_left_in_the_background_does(
    tmp_path: Path, command: str
) -> None:
    assert run_command(spec(command), {}, tmp_path) == 1.0
    assert not runs(tmp_path / "pid")


def test_a_child_of_ours_that_is_older_than_the_command_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "300"]) as other:
        assert run_command(spec("sleep 300 & echo score: 1"), {}, tmp_path) == 1.0
        assert other.poll() is None
        other.kill()


def test_what_is_printed_a_moment_after_the_end_is_read(tmp_path: Path) -> None:
    assert run_command(spec("echo score: 2 > >(sleep 0.2; cat)"), {}, tmp_path) == 2.0


def test_a_command_that_closes_its_output_before_its_end_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="status 3"):
        run_command(spec("echo score: 1; exec >&- 2>&-; sleep 0.3; exit 3"), {}, tmp_path)


def test_a_pipe_fails_when_any_part_of_it_does(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"status 3 \(of any part of a pipe; `set \+o pipefail;`"):
        run_command(spec("(echo score: 1; exit 3) | tee log"), {}, tmp_path)
    assert run_command(spec("set +o pipefail; (echo score: 1; exit 3) | tee log"), {}, tmp_path) == 1.0


def test_a_reader_that_has_enough_is_no_failure(tmp_path: Path) -> None:
    assert run_command(spec("yes score: 4 | head -n 2"), {}, tmp_path) == 4.0


def test_where_there_is_no_bash_sh_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert run_command(spec("echo score: 5 | cat"), {}, tmp_path) == 5.0


def test_much_output_costs_little_memory(tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from deephyper_balsam.node.shell_command import run_command
        sys.stdout = open("/dev/null", "w")
        lots = "yes score: 1 | head -c 100000000; head -c 60000000 /dev/zero | tr '\\\\0' x; echo; echo score: 7; echo"
        what = {{"command": lots, "objective": {{"regex": r"score: (\\S+)"}}, "here": "/"}}
        value = run_command(what, {{}}, Path({str(tmp_path)!r}))
        # Not ru_maxrss: what the process that started this one had counts in it
        peak = Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]
        print(value, int(peak) // 1024, file=sys.stderr)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    value, megabytes = ended.stderr.split()
    assert value == "7.0"
    assert int(megabytes) < 250


@pytest.mark.parametrize(
    "pattern", [r"score: (\S+)", r"(?s)begin.{0,50}?score: (\S+)", r"^score: (\S+)$", r"\n\s*score: (\S+)"]
)
def test_a_long_output_is_searched_as_if_it_were_one_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr(command, "_WINDOW_CHARS", 97)
    monkeypatch.setattr(command, "_MATCH_CHARS", 100)
    text = ""
    for number in range(60):
        text += "x" * (number % 13) + ("\n" if number % 3 else " begin\n  ") + f"score: {number}\n"
        (tmp_path / "out").write_text(text)
        expected = re.findall(pattern, text, flags=re.MULTILINE)
        if expected:
            assert read_objective({"regex": pattern}, tmp_path / "out", tmp_path) == float(expected[-1])


def test_a_progress_bar_in_one_line_is_many_lines(tmp_path: Path) -> None:
    what = spec(r"printf 'score: 1\rscore: 2\r\nend\r\n'", objective={"regex": r"^score: (\d)$"})
    assert run_command(what, {}, tmp_path) == 2.0


def test_the_jobs_output_may_lack_signs_that_the_command_prints(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from deephyper_balsam.node.shell_command import run_command;"
        "what = {'command': 'echo {{ x }} score: 1', 'objective': {'regex': 'score: (.)'}, 'here': '/'};"
        f"run_command(what, {{'x': '\u5149'}}, Path({str(tmp_path)!r}))"
    )
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=latin)
    assert rb"\u5149 score: 1" in ended.stdout
    assert (tmp_path / "command.out").read_text(encoding="utf-8") == "\u5149 score: 1\n"
