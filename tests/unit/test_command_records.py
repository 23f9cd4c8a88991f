"""Shell commands that say how they go, are told to stop, and leave what they recorded last."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.errors import TargetError
from deephyper_balsam.node import command_records
from deephyper_balsam.node.recording import Recorder
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.worker import evaluate, make_run_function
from deephyper_balsam.store.applications import resolve_run

LINES = r"""
import signal, sys, time
for epoch in range(1, 10):
    print(f"epoch {epoch}: accuracy {0.1 * epoch:.2f}", end="\r" if epoch % 2 else "\n", flush=True)
    time.sleep(PAUSE)
print("score: 0.95")
"""
FILE = """
import json, os, time
for epoch in range(1, 10):
    with open("new.json", "w") as file:
        json.dump({"at": {"epoch": epoch}, "accuracy": 0.1 * epoch}, file)
    os.replace("new.json", "progress.json")
    time.sleep(PAUSE)
with open("result.json", "w") as file:
    json.dump({"objective": 0.95}, file)
"""
BY_LINE = """
command: "{python} train.py"
objective: {{regex: 'score: (.+)'}}
record: {{regex: 'epoch (\\d+): accuracy ([-+0-9.eE]+)'{more}}}
"""
BY_FILE = """
command: "{python} train.py"
objective: {{json: result.json}}
record: {{json: progress.json, budget: at.epoch, objective: accuracy{more}}}
"""


class StopsAt(Recorder):
    def __init__(self, budget: float = 1e9) -> None:
        super().__init__()
        self.budget = budget

    def stopped(self) -> bool:
        return self.last is not None and self.last[0] >= self.budget


def outcome_of(folder: Path, yaml: str, code: str, recorder: Recorder, pause: float = 0.0, more: str = "") -> Any:
    (folder / "train.py").write_text(code.replace("PAUSE", str(pause)))
    file = folder / "command.yaml"
    file.write_text(yaml.format(python=sys.executable, more=more))
    return evaluate(make_run_function(resolve_run(str(file)), folder), RunningJob(0, {}, recorder, folder))


def test_each_line_that_matches_is_recorded_and_the_objective_is_the_commands(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, BY_LINE, LINES, StopsAt())
    assert outcome["failure"] is None
    assert outcome["objective"] == 0.95
    assert [budget for budget, _ in outcome["curve"]] == list(range(1, 10))
    assert outcome["curve"][2] == [3.0, 0.3]


def test_a_file_is_watched(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, BY_FILE, FILE, StopsAt(), pause=0.5)
    assert outcome["objective"] == 0.95
    budgets = [budget for budget, _ in outcome["curve"]]
    assert budgets[-1] == 9
    assert len(budgets) >= 5
    assert budgets == sorted(budgets)


@pytest.mark.parametrize(("yaml", "code"), [(BY_LINE, LINES), (BY_FILE, FILE)], ids=["regex", "json"])
def test_a_command_that_shall_stop_gets_a_signal_and_gives_what_it_recorded_last(
    tmp_path: Path, yaml: str, code: str
) -> None:
    began = time.monotonic()
    outcome = outcome_of(tmp_path, yaml, code, StopsAt(3), pause=1.0)
    assert time.monotonic() - began < 8
    assert (outcome["failure"], outcome["stopped"]) == (None, True)
    assert outcome["objective"] == pytest.approx(0.3)
    assert [budget for budget, _ in outcome["curve"]] == [1, 2, 3]


def test_the_signal_is_the_one_named_and_a_command_may_end_in_its_own_time(tmp_path: Path) -> None:
    code = LINES.replace(
        "for epoch",
        "def end(*_):\n    open('told', 'w').close()\n    sys.exit(0)\nsignal.signal(signal.SIGUSR1, end)\nfor epoch",
    )
    outcome = outcome_of(tmp_path, BY_LINE, code, StopsAt(2), pause=0.5, more=", signal: SIGUSR1")
    assert (outcome["failure"], outcome["stopped"]) == (None, True)
    assert (tmp_path / "told").exists()


def test_a_command_that_does_not_heed_the_signal_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_records, "STOP_GRACE_S", 0.5)
    code = LINES.replace("for epoch", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nfor epoch")
    began = time.monotonic()
    outcome = outcome_of(tmp_path, BY_LINE, code, StopsAt(2), pause=2.0)
    assert time.monotonic() - began < 15
    assert (outcome["objective"], outcome["failure"]) == (pytest.approx(0.2), None)


def test_a_pipe_of_commands_is_told_too(tmp_path: Path) -> None:
    yaml = BY_LINE.replace("train.py", "train.py | tee log")
    outcome = outcome_of(tmp_path, yaml, LINES, StopsAt(2), pause=0.5)
    assert (outcome["failure"], outcome["stopped"]) == (None, True)


def test_what_is_no_number_fails_the_run_with_its_reason(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, BY_LINE, "print('epoch 0: accuracy 0.5')", StopsAt())
    assert "the budget must be a number above 0, got 0.0" in outcome["failure"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("true", "must be either"),
        ("{regex: 'a (.)', json: x}", "must be either"),
        ("{regex: 'epoch (.)'}", "must have two groups"),
        ("{regex: '(?P<epoch>.) (?P<objective>.)'}", "must have two groups"),
        ("{regex: '(.'}", "is wrong"),
        ("{json: p.json, key: x}", "unknown keys"),
        ("{regex: '(.) (.)', budget: x}", "unknown keys"),
        ("{regex: '(.) (.)', signal: SIGSTOPP}", "signal must be the name"),
        ("{json: 3}", "must be text"),
    ],
)
def test_a_record_that_cannot_be_is_refused(tmp_path: Path, record: str, said: str) -> None:
    file = tmp_path / "command.yaml"
    file.write_text(f"command: a\nobjective: {{json: r.json}}\nrecord: {record}\n")
    with pytest.raises(TargetError, match=said):
        resolve_run(str(file))
