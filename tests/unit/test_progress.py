"""What a search from Python says while it runs, and how the command line ends what it runs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import VirtualSite

from deephyper_balsam.cli import main
from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.progress import Narrator, Progress, Rate, duration, in_one_line, why_failed
from deephyper_balsam.driver.search import RandomSearch
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.trial import TrialState

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.02)
"""The site of these tests is a fast one."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    tried = 0

    def write(self, text: str) -> int:
        self.tried += 1
        raise OSError(28, "No space left on device")


def progress(done: int = 3, notice: str | None = None, max_evals: int | None = 10) -> Progress:
    states = dict.fromkeys(TrialState, 0) | {TrialState.DONE: done, TrialState.RUNNING: 2}
    return Progress(states, {"objective": 0.5, "job_id": 1}, 65.0, 2.0, max_evals, 130.0, 2, notice)


def test_a_line_says_how_the_search_stands() -> None:
    line = in_one_line(progress(notice="Balsam is away"))
    assert line.startswith("1m05s  done 3  running 2  waiting 0  failed 0  best 0.5 (trial 1)")
    assert "left 7 evaluations or 1m05s  [Balsam is away]" in line


def test_a_terminal_has_one_line_that_is_written_anew() -> None:
    out, times = Terminal(), iter([0.0, 0.1, 1.0])
    told = Narrator(out, lambda: next(times))
    for done in (1, 2, 3):
        told(progress(done))
    told.end(["Over."])
    shown = out.getvalue()
    assert shown.count("\r") == 2
    assert "done 2" not in shown
    assert shown.endswith("\nOver.\n")
    assert shown.count("\n") == 2


def test_elsewhere_there_are_plain_lines_now_and_then_when_something_changed() -> None:
    out, times = io.StringIO(), iter([0.0, 1.0, 20.0, 40.0])
    told = Narrator(out, lambda: next(times))
    for done in (1, 2, 2, 2):
        told(progress(done))
    told.end()
    assert [line.split("  ")[1] for line in out.getvalue().splitlines()] == ["done 1", "done 2"]


@pytest.mark.parametrize("broken", ["full", "latin"])
def test_an_output_that_takes_nothing_or_not_every_sign_does_not_end_the_search(broken: str) -> None:
    if broken == "latin":
        raw = io.BytesIO()
        out: Any = io.TextIOWrapper(raw, encoding="latin-1")
        Narrator(out)(progress(notice="\u5149"))
        assert rb"\u5149" in raw.getvalue()
    else:
        full = Full()
        Narrator(full)(progress())
        Narrator(full).end(["Over."])
        assert full.tried == 2


def test_a_notebook_has_a_bar_that_moves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    module, display = ModuleType("IPython"), ModuleType("IPython.display")
    handle = SimpleNamespace(update=lambda content: shown.append(content))
    module.get_ipython = lambda: SimpleNamespace(kernel=1)  # type: ignore[attr-defined]
    display.HTML = str  # type: ignore[attr-defined]
    display.display = lambda content, display_id: shown.append(content) or handle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    times = iter([0.0, 10.0])
    told = Narrator(clock=lambda: next(times))
    told(progress(3, notice="<b>"))
    told(progress(10))
    told.end(["Over."])
    assert '<progress value="0.5000"' in shown[0]  # half of the time, which is more than three of ten
    assert "[&lt;b&gt;]" in shown[0]
    assert '<progress value="1.0000"' in shown[1]
    assert capsys.readouterr().err == "Over.\n"


def test_reasons_that_differ_in_a_number_are_one_and_the_most_frequent_comes_first() -> None:
    reasons = ["out of memory: 3 GB", "nan", "out of memory: 4 GB", "a", "b", "c"]
    lines = [{"job_status": "FAILED", "m:failure": reason} for reason in reasons]
    lines += [{"job_status": "DONE", "m:failure": None}]
    assert why_failed(lines) == [
        "2 x out of memory: 3 GB (also with other numbers)",
        "1 x nan",
        "1 x a",
        "2 for other reasons",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (3599.6, "1h00m"), (2 * 86400, "2d00h")]
)
def test_a_duration_is_said_as_a_person_does(seconds: float, said: str) -> None:
    assert duration(seconds) == said


# --- a search from Python --------------------------------------------------------------------------------------------


def run(job: Any) -> float:
    return float(job["x"])


@pytest.fixture
def search(site: VirtualSite, client_yml: Path, tmp_path: Path, play: Any) -> RandomSearch:
    def score(config: dict[str, Any]) -> float:
        if config["x"] > 3:
            raise ValueError(f"no room for {config['x']}")
        return float(config["x"])

    problem = HpProblem("p")
    problem.add_hyperparameter((1, 5), "x")
    play(score)
    evaluator = BalsamEvaluator(run, "lab", allocation=AllocationRequest(2), client_path=client_yml, timing=QUICK)
    return RandomSearch(problem, evaluator, "s", log_dir=tmp_path, poll_s=0.02)


def test_it_says_what_came_of_it_how_long_it_took_and_why_trials_failed(
    search: RandomSearch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    search.search(max_evals=5)
    said = capsys.readouterr()
    assert said.out == ""
    assert "done" in said.err.splitlines()[0]
    assert "Search s: 3 done, 2 failed. It took " in said.err
    assert "Best objective 3 (trial " in said.err
    assert "Failed: 2 x " in said.err
    assert f"Results: {tmp_path}/s/results.csv" in said.err
    assert "To go on" not in said.err


def test_it_can_be_told_to_say_nothing(search: RandomSearch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(search.search(max_evals=5, show=False)) == 5
    assert capsys.readouterr() == ("", "")


def test_after_ctrl_c_it_says_how_to_go_on(
    search: RandomSearch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_narrator: Narrator, _progress: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Narrator, "__call__", interrupted)
    search.search(max_evals=5)
    assert "To go on, call search() again with the same name, or: deephyper-balsam search resume s" in (
        capsys.readouterr().err
    )


# --- what the command line says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [[], ["search"], ["server"], ["site"], ["problem"], ["app"]])
def test_no_summary_in_a_help_is_cut(group: list[str]) -> None:
    said = CliRunner().invoke(main, [*group, "--help"], terminal_width=80).output
    assert not [line for line in said.partition("Commands:")[2].splitlines() if line.endswith("...")]


def test_a_simulation_keeps_the_run_functions_output_apart_and_takes_the_options_of_methods(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(
        "import os\nfrom deephyper_balsam import HpProblem\nproblem = HpProblem('p')\n"
        "problem.add_hyperparameter((1, 5), 'x')\n"
        "def run(job):\n    print('mine')\n    os.system('echo its')\n    return job['x']\n",
        encoding="utf-8",
    )
    words = ["simulate", "--problem", f"{tmp_path}/p.py", "--workers", "1", "--minutes", "1", "--duration-mean", "20"]
    for more in (["--method", "ga", "--population", "2", "--mut-prob", "0.5"], ["--liar-strategy", "none"]):
        command = [sys.executable, "-m", "deephyper_balsam", *words, *more, "--json", "--output", f"{tmp_path}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert json.loads(done.stdout)["evaluations"] >= 2
        assert "mine" not in done.stderr
    printed = (tmp_path / "out").read_text(encoding="utf-8").split()
    assert printed.count("mine") == printed.count("its") >= 4


def test_the_rate_counts_only_the_results_of_its_window() -> None:
    rate = Rate(window_s=60.0)
    for second in range(0, 120, 2):
        rate.add(1, float(second))
    assert rate.per_min(118.0, 0.0) == pytest.approx(31.0)
    assert rate.per_min(118.0, 110.0) == pytest.approx(62.0)  # a driver that began just now has had half a minute
