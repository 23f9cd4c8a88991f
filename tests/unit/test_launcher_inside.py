"""A search inside an allocation: both processes end in order, exit codes are right, the scripts are sound."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.common.bundled_files import folder
from deephyper_balsam.launcher import inside

SCRIPTS = sorted(folder("jobscripts").glob("*.sh"))


def start(text: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", "-c", text])


def never() -> bool:
    return False


def driver(text: str) -> inside.Driver:
    return inside.Driver(lambda: start(text), lambda: True)


def test_a_driver_that_is_done_ends_the_launcher() -> None:
    launcher = start("trap 'exit 0' TERM; while true; do sleep 0.05; done")
    codes = inside.run_both(driver("exit 1"), launcher, never, lambda: 9e9)
    assert codes == (1, None)
    assert launcher.poll() is not None
    assert inside.exit_code(*codes) == 1


@pytest.mark.parametrize("why", ["time", "signal"])
def test_before_the_wall_time_or_at_a_signal_the_driver_ends_first(why: str, tmp_path: Path) -> None:
    order, ready = tmp_path / "order", tmp_path / "ready"
    loop = "touch {ready}.{who}; while true; do sleep 0.05; done"
    both = [
        f"trap 'echo {who} >> {order}; exit {code}' TERM; " + loop.format(ready=ready, who=who)
        for who, code in (("driver", 130), ("launcher", 0))
    ]

    def over() -> bool:
        return all(ready.with_suffix(f".{who}").exists() for who in ("driver", "launcher"))

    stop, left = (never, lambda: 0.0 if over() else 9e9) if why == "time" else (over, lambda: 9e9)
    asked: list[str] = []
    ends = lambda died: asked.append(f"the next allocation, {died}")  # noqa: E731
    codes = inside.run_both(driver(both[0]), start(both[1]), stop, left, before_end=ends)
    assert order.read_text().split() == ["driver", "launcher"]
    assert asked == ["the next allocation, None"]
    assert inside.exit_code(*codes) == 130


def test_a_launcher_that_breaks_down_ends_the_driver_and_is_told() -> None:
    codes = inside.run_both(
        driver("trap 'exit 0' TERM; while true; do sleep 0.05; done"), start("sleep 0.5; exit 5"), never, lambda: 9e9
    )
    assert codes[1] == 5
    assert inside.exit_code(0, 5) == 5
    assert inside.exit_code(0, None) == 0
    assert inside.exit_code(-9, 5) == 137


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        return self.code

    def terminate(self) -> None:
        raise AssertionError("it has ended")

    kill = terminate


def last_code(made: inside.Driver, looks: int = 1000) -> int | None:
    return next((code for _ in range(looks) if (code := made.look()) is not None), None)


def of_codes(*codes: int, free: Callable[[], bool] = lambda: True) -> inside.Driver:
    """A driver whose process ends with one code after the other."""
    left = iter(codes)
    return inside.Driver(lambda: Ended(next(left)), free, clock=Clock())


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_driver_that_ended_by_itself_is_not_started_again(code: int) -> None:
    assert last_code(of_codes(code)) == code


def test_a_driver_that_was_killed_is_started_again_a_few_times() -> None:
    assert last_code(of_codes(-9, -9, 0)) == 0
    assert last_code(of_codes(-9, -9, -9, -11, 0)) == -11


def test_a_driver_without_balsam_is_started_again_until_there_is_one() -> None:
    assert last_code(of_codes(*[3] * 20, 0)) == 0


def test_while_another_drives_no_driver_is_started_and_one_that_came_too_late_waits() -> None:
    others = iter([True, False, False, False, True, True])
    # free: started; refused (another drives): waits twice; then free, and done
    assert last_code(of_codes(2, 0, free=lambda: next(others))) == 0
    assert list(others) == [True]
    assert last_code(of_codes(0, free=never)) is None
    waiting = of_codes(0, free=never)
    waiting.look()
    assert waiting.end() == 130


def test_a_search_that_was_stopped_is_not_driven() -> None:
    stopped = inside.Driver(lambda: Ended(5), lambda: True, lambda: True)
    assert stopped.look() == 0


def test_a_launcher_that_finds_nothing_to_do_and_leaves_is_followed_by_no_allocation() -> None:
    asked: list[str] = []
    ends = lambda died: asked.append(f"the next allocation, {died}")  # noqa: E731
    codes = inside.run_both(of_codes(free=never), start("exit 0"), never, lambda: 9e9, before_end=ends)
    assert (codes, asked) == ((130, 0), [])


def test_results_go_where_they_were_asked_for_or_into_the_site(tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert inside.results_folder(str(tmp_path), site) == tmp_path
    assert inside.results_folder(str(tmp_path / "gone"), site) == site / "data"
    assert inside.results_folder(".", site) == site / "data"


class FakeGateway:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def batch_jobs(self, site_ids: object, states: object = None) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["state"] in (states or [])]  # type: ignore[operator]

    def create_batch_job(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append({**row, "id": len(self.rows) + 1, "state": "pending_submission", "scheduler_id": None})
        return self.rows[-1]

    def adopt_batch_job(self, batch_job_id: int, scheduler_id: int, start_time: str) -> None:
        self.rows[batch_job_id - 1] |= {"state": "running", "scheduler_id": scheduler_id, "start_time": start_time}


def test_an_allocation_is_made_known_to_balsam_once() -> None:
    gateway = FakeGateway()
    made = [inside.adopt(gateway, 1, "digits-1", 8, 60, "mpi", 4711) for _ in range(2)]
    assert made == [1, 1]
    (row,) = gateway.rows
    assert (row["state"], row["scheduler_id"], row["num_nodes"]) == ("running", 4711, 8)
    assert row["filter_tags"] == {"search": "digits-1"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_job_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def run_script(name: str, tmp_path: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a job script with a `python` that shows its arguments, and a `squeue` that tells the time left."""
    shows = tmp_path / "python"
    shows.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/bash\necho "$LEFT"\n')
    for file in (shows, squeue):
        file.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"
    script = next(script for script in SCRIPTS if script.name == name)
    return subprocess.run(["bash", str(script), *words], env={"PATH": path, **env}, capture_output=True, text=True)


@pytest.mark.parametrize(("left", "minutes"), [("2-03:04:05", 3064), ("1:30:00", 90), ("09:08", 9), ("0:20", 1)])
def test_the_script_for_slurm_tells_the_minutes_that_are_left(left: str, minutes: int, tmp_path: Path) -> None:
    done = run_script(
        "slurm.sh", tmp_path, "digits-1", "--problem", "a b", BALSAM_SITE_PATH="/s", SLURM_JOB_ID="1", LEFT=left
    )
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == [
        *("-m", "deephyper_balsam.launcher.inside", "-t", str(minutes), "-j", "mpi", "digits-1", "--problem", "a b")
    ]


def test_the_scripts_say_what_they_lack(tmp_path: Path) -> None:
    assert "BALSAM_SITE_PATH" in run_script("slurm.sh", tmp_path, "n").stderr
    assert "NAME" in run_script("slurm.sh", tmp_path, BALSAM_SITE_PATH="/s").stderr
    endless = run_script("slurm.sh", tmp_path, "n", BALSAM_SITE_PATH="/s", SLURM_JOB_ID="1", LEFT="UNLIMITED")
    assert (endless.returncode, "give --time" in endless.stderr) == (2, True)
    assert "MINUTES" in run_script("cobalt.sh", tmp_path, "n", BALSAM_SITE_PATH="/s").stderr
    assert "SEARCH" in run_script("pbs.sh", tmp_path, BALSAM_SITE_PATH="/s").stderr


def test_the_scripts_for_pbs_and_cobalt_hand_every_word_on(tmp_path: Path) -> None:
    words = ["-m", "deephyper_balsam.launcher.inside", "-t", "60", "-j", "serial", "n", "--problem", "a b"]
    given = {"BALSAM_SITE_PATH": "/s", "MINUTES": "60", "BALSAM_JOB_MODE": "serial"}
    pbs = run_script("pbs.sh", tmp_path, SEARCH='n --problem "a b"', PBS_O_WORKDIR=str(tmp_path), **given)
    assert eval(pbs.stdout) == words
    assert eval(run_script("cobalt.sh", tmp_path, "n", "--problem", "a b", **given).stdout) == words


def test_its_help_has_an_example() -> None:
    command = [sys.executable, "-m", "deephyper_balsam.launcher.inside", "--help"]
    assert "Example:" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
