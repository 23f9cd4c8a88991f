"""Break things for real, and look whether a search loses or repeats anything: ``python -m tests.live.campaign``.

A search of quick runs is driven by ``deephyper-balsam search run`` in a process of its own. At seeded moments a process
is killed with SIGKILL: the driver, the launcher, the site's agent, the API server or PostgreSQL. Drivers are started
again by ``search resume`` (every other time in an empty folder) or by the same ``search run``; the parts of the server
come back by what a person would do, ``server up``. All the while `results.csv` is read in a loop. At the end everything
is checked against Balsam's own tables, and against what the runs themselves noted in a file.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from deephyper_balsam.common import processes
from deephyper_balsam.errors import BalsamError
from deephyper_balsam.results import table as results
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store import notes, trial_rows
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.lease import read_leases
from deephyper_balsam.store.record import find_record
from deephyper_balsam.trial import TrialState

CLI = [sys.executable, "-m", "deephyper_balsam"]
VICTIMS = ("driver", "launcher", "agent", "api", "postgres")
PATIENCE_S = 420.0

PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("plane")
problem.add_hyperparameter((-3.0, 3.0), "x")
problem.add_hyperparameter((-3.0, 3.0), "y")
"""
# Each run notes that it began and that it ended, in one write each, so that what really ran is known without Balsam
RUN = """
import os, pathlib, random, time
def note(job, what):
    line = f"{job.id} {what} {job['x']!r} {job['y']!r} {os.getpid()}\\n"
    log = os.open(pathlib.Path(__file__).with_suffix(".calls"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, line.encode())
    os.close(log)
def run(job):
    note(job, "began")
    time.sleep(random.Random(job.id).uniform(0.2, 2.0))
    note(job, "ended")
    return -job["x"] ** 2 - job["y"] ** 2
"""


@dataclass
class Verdict:
    """What became of one search.

    Attributes
    ----------
    wrong
        Each invariant that does not hold, in words; empty when all is well.
    """

    name: str
    killed: list[str]
    evaluated: int = 0
    drivers: int = 0
    run_again: int = 0
    set_aside: int = 0
    tables_read: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        said = (
            f"{self.name}: killed {', '.join(self.killed) or 'nothing'}; {self.evaluated} evaluated in {self.drivers} "
            f"drivers, {self.run_again} runs cut and run again, {self.set_aside} jobs set aside, table read "
            f"{self.tables_read} times, {self.seconds:.0f} s"
        )
        return said + ("" if not self.wrong else "\n  WRONG: " + "\n  WRONG: ".join(self.wrong))


class TableReader(threading.Thread):
    """Reads every `results.csv` of a search in a loop; each must always be whole."""

    def __init__(self, folders: list[Path], name: str) -> None:
        super().__init__(daemon=True)
        self._folders, self._name = folders, name
        self._ended = threading.Event()
        self.count, self.wrong = 0, list[str]()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            for folder in list(self._folders):
                path = folder / self._name / "results.csv"
                if path.exists():
                    self.count += 1
                    problem = torn(path.read_text())
                    if problem:
                        self.wrong.append(f"{path}: {problem}")

    def close(self) -> None:
        self._ended.set()
        self.join()


def torn(text: str) -> str | None:
    """What is wrong with the text of a results.csv, or None."""
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or "job_id" not in rows[0] or not text.endswith("\n"):
        return f"no whole table: {text[:60]!r} ... {text[-60:]!r}"
    uneven = [row for row in rows if len(row) != len(rows[0])]
    return f"a line of another length: {uneven[0]}" if uneven else None


class Campaign:
    """Searches on one stack, in one folder."""

    def __init__(self, stack: LocalStack, folder: Path) -> None:
        self.stack, self.folder = stack, folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BALSAM_")}
        self.env = {**kept, **stack.env}
        (folder / "plane.py").write_text(PROBLEM)

    @property
    def gateway(self) -> Gateway:
        """A fresh connection: the server may have come back at another address."""
        return Gateway(self.stack.client_path)

    def patiently(self, call: Callable[[Gateway], Any]) -> Any:
        """Ask Balsam until it answers: it may be down on purpose."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call(self.gateway)
            except BalsamError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    # --- the processes -------------------------------------------------------------------------------------------

    def start(self, arguments: Sequence[str], cwd: Path) -> subprocess.Popen[bytes]:
        cwd.mkdir(exist_ok=True)
        with (cwd / "driver.out").open("ab") as out:
            return subprocess.Popen([*CLI, *arguments], env=self.env, cwd=cwd, stdout=out, stderr=subprocess.STDOUT)

    def kill(self, victim: str, driver: subprocess.Popen[bytes]) -> bool:
        """Kill a process of the stack or the driver, an agent with all its services; whether there was one."""
        if victim == "driver":
            driver.kill()
            driver.wait()
            return True
        if victim == "launcher":
            found = processes.matching(processes.carries("BALSAM_SITE_PATH", str(self.stack.site_path), "_mode.py"))
            pids = [process.pid for process in found if _is_first(process, found)]
        else:
            pids = [one.pid for one in self.stack.status().processes if one.name == victim and one.pid is not None]
        for pid in pids[:1]:
            services = psutil.Process(pid).children() if victim == "agent" else []
            for one in [pid, *(service.pid for service in services)]:
                os.kill(one, signal.SIGKILL)
        return bool(pids)

    # --- one search ----------------------------------------------------------------------------------------------

    def search(self, name: str, evals: int, victims: Sequence[str], seed: int, method: str = "random") -> Verdict:
        """Run a search, kill each of `victims` at a seeded moment of it, and judge it."""
        rng = random.Random(seed)
        began_at = time.monotonic()
        home = self.folder / f"{name}-home"
        run_file = self.folder / f"{name}_run.py"
        run_file.write_text(RUN)
        command = ["search", "run", name, "--problem", str(self.folder / "plane.py"), "--run", str(run_file)]
        command += ["--site", "local", "--method", method, "--seed", str(seed), "--max-evals", str(evals)]
        command += ["--nodes", "1", "--evals-per-node", "3", "--wall-time-min", "30"]
        moments = sorted(rng.sample(range(1, max(evals - 2, len(victims) + 1)), len(victims)))
        folders = [home]
        verdict = Verdict(name, [])
        driver = self.start(command, home)
        reader = TableReader(folders, name)
        reader.start()
        try:
            for moment, victim in zip(moments, victims, strict=True):
                if not self._wait_for_results(name, moment, driver):
                    break
                time.sleep(rng.uniform(0.0, 1.5))
                if driver.poll() is not None:
                    break
                if self.kill(victim, driver):
                    verdict.killed.append(f"{victim} at {moment}")
                if victim == "driver":
                    driver = self._go_on(name, command, folders, rng)
                elif victim != "launcher":
                    time.sleep(rng.uniform(0.0, 5.0))
                    self.stack.up()
            code = self._wait_for_end(driver, name)
        finally:
            driver.kill()
            driver.wait()
            reader.close()
        if code != 0:
            verdict.wrong.append(f"the last driver ended with {code}: {_tail(folders[-1] / 'driver.out')}")
        verdict.wrong += reader.wrong[:3]
        verdict.tables_read = reader.count
        self.judge(verdict, evals, folders[-1], run_file.with_suffix(".calls"))
        verdict.seconds = time.monotonic() - began_at
        return verdict

    def _go_on(self, name: str, command: list[str], folders: list[Path], rng: random.Random) -> subprocess.Popen[bytes]:
        """Start a driver again: in an empty folder by `resume`, or where it was by either command."""
        if len(folders) % 2:
            folders.append(self.folder / f"{name}-empty-{len(folders)}")
            return self.start(["search", "resume", name], folders[-1])
        folders.append(folders[-1])
        return self.start(rng.choice([command, ["search", "resume", name]]), folders[-1])

    def _wait_for_results(self, name: str, count: int, driver: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and driver.poll() is None:
            rows = self.patiently(lambda gateway: list(gateway.jobs(trial_rows.trial_tags(name))))
            if sum("result" in row["data"] for row in rows) >= count:
                return True
            time.sleep(0.3)
        return False

    def _wait_for_end(self, driver: subprocess.Popen[bytes], name: str) -> int:
        try:
            return driver.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            rows = self.patiently(lambda gateway: list(gateway.jobs(trial_rows.trial_tags(name))))
            where = Counter((row["state"], row.get("session_id") is not None) for row in rows)
            raise AssertionError(f"{name} did not end within {PATIENCE_S:.0f} s: {where}") from None

    # --- the invariants ------------------------------------------------------------------------------------------

    def judge(self, verdict: Verdict, evals: int, folder: Path, calls: Path) -> None:
        """Hold the search against Balsam's tables and against what the runs noted."""
        gateway, name, wrong = self.gateway, verdict.name, verdict.wrong
        rows = self._settled(gateway, name)
        record = find_record(gateway, name)
        numbers = Counter(trial_rows.trial_number(row) for row in rows)
        by_number = {trial_rows.trial_number(row): row for row in rows}
        states = {number: trial_rows.read_state(row) for number, row in by_number.items()}
        counted = [number for number, state in states.items() if state is TrialState.DONE]
        orders = sorted(row["data"]["gathered"]["order"] for row in rows if "gathered" in row["data"])
        verdict.evaluated = len(counted)
        aside = list(gateway.jobs({"set_aside": name}))
        verdict.set_aside = len(aside)
        leases = [lease for lease in read_leases(gateway, name)[name] if lease.driving_since is not None]
        verdict.drivers = len(leases)

        if len(rows) != len(numbers):
            wrong.append(f"trials with two jobs: {[number for number, count in numbers.items() if count > 1]}")
        if sorted(numbers) != list(range(len(numbers))):
            wrong.append(f"numbers with gaps: {sorted(numbers)}")
        if len(counted) != evals:
            wrong.append(
                f"{len(counted)} evaluations are done, not {evals}: {Counter(s.value for s in states.values())}"
            )
        if orders != list(range(len(counted))):
            wrong.append(f"results were not taken in once each: {orders}")
        not_final = {row["id"]: row["state"] for row in rows if row["state"] not in ("JOB_FINISHED", "FAILED")}
        if not_final:
            wrong.append(f"jobs that still look like work: {not_final}")
        points = Counter(json.dumps(trial_rows.read_config(by_number[number]), sort_keys=True) for number in counted)
        if max(points.values(), default=0) > 1:
            wrong.append("a configuration was counted twice")
        drove = sum("driver" in killed for killed in verdict.killed)
        # A driver that was killed before it had claimed the search never drove
        if not 1 <= len(leases) <= drove + 1 or [lease.why for lease in leases if lease.left_at is not None] != [
            "complete"
        ]:
            wrong.append(f"the leases are {[(str(lease.why)[:200], lease.drove_s) for lease in leases]}")
        self._judge_runs(verdict, gateway, by_number, aside, calls)
        self._judge_table(verdict, gateway, record, folder)

    def _settled(self, gateway: Gateway, name: str) -> list[Row]:
        """The jobs, once Balsam has noted the ends of all runs."""
        deadline = time.monotonic() + 30
        while True:
            rows = list(gateway.jobs(trial_rows.trial_tags(name)))
            final = all(row["state"] in ("JOB_FINISHED", "FAILED") for row in rows)
            if final or time.monotonic() > deadline:
                return rows
            time.sleep(0.5)

    def _judge_runs(
        self, verdict: Verdict, gateway: Gateway, by_number: dict[int, Row], aside: list[Row], calls: Path
    ) -> None:
        """No run without a job, and no second run without a reason in Balsam's log."""
        began, ended = Counter[int](), Counter[int]()
        for line in calls.read_text(encoding="utf-8").splitlines():
            number, what, *_ = line.split()
            (began if what == "began" else ended)[int(number)] += 1
        twins = {int(row["tags"]["trial"]) for row in aside}
        for number, row in by_number.items():
            if began[number] > 1 and number not in twins:
                verdict.run_again += began[number] - 1
                reasons = [
                    event["data"].get("message", event["to_state"])
                    for event in gateway.events(job_id=row["id"])
                    if event["to_state"] in ("RUN_TIMEOUT", "RESTART_READY", "RUN_ERROR")
                ]
                if not reasons:
                    verdict.wrong.append(f"trial {number} ran {began[number]} times and nothing says why")
                if not any(victim in killed for killed in verdict.killed for victim in VICTIMS[1:]):
                    verdict.wrong.append(
                        f"trial {number} ran again though no launcher or server was touched: {reasons}"
                    )
            if trial_rows.read_state(row) is TrialState.DONE and not ended[number]:
                verdict.wrong.append(f"trial {number} has a result and its run never ended")
        unknown = set(began) - set(by_number)
        if unknown:
            verdict.wrong.append(f"runs of trials that Balsam does not know: {sorted(unknown)}")

    def _judge_table(self, verdict: Verdict, gateway: Gateway, record: Any, folder: Path) -> None:
        """The last table says what the jobs say."""
        lines = results.read_lines(gateway, record)
        names = list(record.settings["problem"]["hyperparameters"])
        results.ResultsFile(folder / "expected.csv", names).write(lines, lambda: lines)
        expected = (folder / "expected.csv").read_text()
        table = folder / verdict.name / "results.csv"
        if not table.exists():
            verdict.wrong.append("the last driver wrote no table")
            return
        written = table.read_text()
        if written != expected:
            verdict.wrong.append(f"the table is not what the jobs say:\n{written}\nbut\n{expected}")

    # --- two drivers at once -------------------------------------------------------------------------------------

    def race(self, name: str, seed: int) -> list[str]:
        """Start two drivers of a new search at the same moment; what is wrong with how that went."""
        run_file = self.folder / f"{name}_run.py"
        run_file.write_text(RUN)
        command = ["search", "run", name, "--problem", str(self.folder / "plane.py"), "--run", str(run_file)]
        command += ["--site", "local", "--method", "random", "--seed", str(seed), "--max-evals", "1"]
        pair = [self.start(command, self.folder / f"{name}-{letter}") for letter in "ab"]
        deadline = time.monotonic() + 60
        while all(one.poll() is None for one in pair) and time.monotonic() < deadline:
            time.sleep(0.1)
        refused = [one for one in pair if one.poll() is not None]
        driving = [one for one in pair if one.poll() is None]
        searches: list[Row] = []
        while time.monotonic() < deadline and not searches:  # the refused one may end before the other has begun
            time.sleep(0.1)
            searches = list(notes.read_notes(self.gateway, name, "search"))
        leases = read_leases(self.gateway, name)[name]
        drove = [lease.pid for lease in leases if lease.driving_since is not None]
        for one in driving:
            one.send_signal(signal.SIGTERM)
            one.wait(60)
        wrong = []
        if [one.returncode for one in refused] != [2] or drove != [one.pid for one in driving]:
            said = [_tail(self.folder / f"{name}-{letter}" / "driver.out") for letter in "ab"]
            wrong.append(f"{name}: {len(drove)} drove, exit codes {[one.returncode for one in pair]}: {said}")
        if len(searches) != 1:
            wrong.append(f"{name}: {len(searches)} records")
        return wrong


def _is_first(process: psutil.Process, among: list[psutil.Process]) -> bool:
    return process.ppid() not in {other.pid for other in among}


def _tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-400:] if path.exists() else "(nothing)"


@contextmanager
def own_stack() -> Iterator[LocalStack]:
    """A stack in a temporary folder that is stopped and removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="campaign stack "))
    stack = LocalStack(folder / "balsam")
    try:
        stack.up()
        yield stack
    finally:
        stack.down()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run the campaign; 1 when an invariant does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.live.campaign", description=__doc__)
    parser.add_argument("--searches", type=int, default=20, help="with the driver killed; default 20")
    parser.add_argument("--evals", type=int, default=40, help="evaluations of each; default 40")
    parser.add_argument("--kills", type=int, default=3, help="how often the driver is killed in each; default 3")
    parser.add_argument("--others", type=int, default=4, help="searches in which all others are killed too; default 4")
    parser.add_argument("--races", type=int, default=20, help="how often two drivers start at once; default 20")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the searches' folder")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="campaign "))
    failed = 0
    with own_stack() as stack:
        campaign = Campaign(stack, folder)
        for index in range(arguments.searches):
            methods = ("random", "ambs", "random", "ga")
            seed = arguments.seed * 1000 + index
            victims = ["driver"] * arguments.kills
            verdict = campaign.search(f"kill-{index}", arguments.evals, victims, seed, methods[index % 4])
            print(verdict, flush=True)
            failed += bool(verdict.wrong)
        for index in range(arguments.others):
            seed = arguments.seed * 1000 + 500 + index
            victims = random.Random(seed).sample(VICTIMS, len(VICTIMS))
            verdict = campaign.search(f"all-{index}", arguments.evals, victims, seed)
            print(verdict, flush=True)
            failed += bool(verdict.wrong)
        wrong = [line for index in range(arguments.races) for line in campaign.race(f"race-{index}", index)]
        print(f"{arguments.races} times two drivers at once: {arguments.races - len(wrong)} times exactly one drove")
        for line in wrong:
            print(f"  WRONG: {line}")
        failed += len(wrong)
    if not arguments.keep and not failed:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"The searches' folders are in {folder}")
    print("All invariants hold." if not failed else f"{failed} searches with something wrong.")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
