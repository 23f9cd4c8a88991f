"""`search watch` and `search run` on real terminals, beside a real search: both show it, and follow what happens."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deephyper_balsam.server.stack import LocalStack

from .conftest import stack_environment
from .proxy import Proxy
from .terminal import Terminal
from .waiting import wait_for

pytestmark = pytest.mark.live

CLI = [sys.executable, "-m", "deephyper_balsam", "search"]
PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("bowl")
problem.add_hyperparameter((-3.0, 3.0), "x")
problem.add_hyperparameter((-3.0, 3.0), "y")
"""
RUN = """
import pathlib, time
def run(job):
    hold = pathlib.Path(__file__).with_suffix(".hold")
    while job.id >= 6 and hold.exists():
        time.sleep(0.1)
    if job.id in (1, 3):
        raise ValueError("too wide")
    return -(job["x"] ** 2) - job["y"] ** 2
"""


class Gate(Proxy):
    """Lets everything pass, or nothing."""

    away = False

    def draw(self) -> str | None:
        return "lost request" if self.away else None


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="live watch "))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def gate(stack: LocalStack) -> Iterator[Gate]:
    made = Gate(stack.url or "", 0)
    yield made
    made.close()


def keep(name: str, text: str) -> None:
    """Leave a screen for a person to look at, where asked for."""
    if os.environ.get("SCREENS"):
        Path(os.environ["SCREENS"], f"{name}.txt").write_text(text + "\n", encoding="utf-8")


def test_a_search_is_watched_on_two_terminals_from_its_middle_to_its_end(
    stack: LocalStack, folder: Path, gate: Gate
) -> None:
    (folder / "problem.py").write_text(PROBLEM)
    (folder / "run.py").write_text(RUN)
    (folder / "run.hold").touch()
    env = stack_environment(stack)
    run = [*CLI, "run", "bowl-1", "--problem", "problem.py", "--run", "run.py", "--site", "local", "--method", "random"]
    options = ["--nodes", "1", "--wall-time-min", "15", "--evals-per-node", "2", "--max-evals", "9", "--seed", "1"]
    through = gate.credentials(stack.client_path, folder / "client.yml")
    terminals: list[Terminal] = []

    def start(command: list[str], env: dict[str, str], columns: int, rows: int) -> Terminal:
        terminals.append(Terminal(command, env, folder, columns, rows))
        return terminals[-1]

    def shows(terminal: Terminal, *words: str) -> Callable[[], bool]:
        def holds() -> bool:
            there = all(word in terminal.text for word in words)
            assert there or terminal.process.poll() is None, terminal.text
            return there

        return holds

    try:
        driver = start([*run, *options], env, 200, 50)
        held = ("4 done  2 failed  2 running", "2x ValueError: too wide", "running: 2 ", "allocations: 1 running")
        wait_for(shows(driver, *held), "the driver's screen", 300)
        watching = [*CLI, "watch", "bowl-1", "--every", "0.5"]
        # As whatever read lines before leaves it to what it starts; the terminal's own size counts
        sizes = {"COLUMNS": "80", "LINES": "24"}
        watch = start(watching, {**env, **sizes, "BALSAM_CLIENT_PATH": str(through)}, 80, 24)
        wait_for(
            shows(watch, *held, "bowl-1  random on bowl at local", "best objective over time"), "the watcher's screen"
        )
        keep("run-200x50", driver.text)
        keep("watch-80x24", watch.text)

        watch.resize(120, 40)
        wait_for(shows(watch, *held), "the screen in its new size")
        wait_for(lambda: max(map(len, watch.rows)) > 100, "the wider screen")
        keep("watch-120x40", watch.text)
        watch.resize(80, 24)
        wait_for(shows(watch, *held), "the screen in its old size")

        gate.away = True
        wait_for(shows(watch, "Balsam does not answer", "Trying again", *held), "what is said of the server")
        keep("watch-away", watch.text)
        gate.away = False
        wait_for(lambda: "does not answer" not in watch.text and shows(watch, *held)(), "the server's return")

        (folder / "run.hold").unlink()
        assert watch.process.wait(180) == 0
        assert driver.process.wait(180) == 0
        wait_for(shows(watch, "The search bowl-1 is complete: deephyper-balsam search best bowl-1"), "the last words")
        assert "7 done" not in watch.text  # the screen is gone, a line of it stays
        assert "done 7  running 0" in watch.text
        wait_for(shows(driver, "Search bowl-1: 7 done, 2 failed", "Best objective"), "the driver's last words")

        again = start([*watching, "--follow"], env, 80, 24)
        wait_for(shows(again, "complete", "allocations:"), "a search that is complete")
        keep("watch-complete", again.text)
        again.process.send_signal(signal.SIGINT)
        assert again.process.wait(60) == 130
    finally:
        for terminal in terminals:
            terminal.close()
