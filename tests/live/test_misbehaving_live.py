"""One search over a run function that misbehaves by its configuration, on the real local Balsam.

Each of its ways has the state and the reason that docs/howto.md promises, whatever it does to its process, its output,
its folder or its memory; and the launcher, the agent and the search go on.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.gateway import Gateway

from .conftest import stack_environment

pytestmark = pytest.mark.live

CLI = [sys.executable, "-m", "deephyper_balsam"]
TIMEOUT_S = 6

# way -> (state, what the reason says; how often it ran)
WAYS: dict[str, tuple[str, str, int]] = {
    "good": ("DONE", "", 1),
    "raises": ("FAILED", r"^ValueError: too wide$", 1),
    "nan": ("FAILED", r"^returned nan$", 1),
    "inf": ("FAILED", r"^returned -inf$", 1),
    "none": ("FAILED", r"^returned None instead of a number", 1),
    "text": ("FAILED", r"^returned text instead of a number: 'high'$", 1),
    "huge": ("FAILED", r"^returned list instead of a number: \[0, 0.{,500}…$", 1),
    "huge_metadata": ("DONE", "", 1),
    "megabytes": ("DONE", "", 1),
    "markers": ("DONE", "", 1),
    "no_unicode": ("DONE", "", 1),
    "orphans": ("DONE", "", 1),
    "hangs": ("FAILED", rf"^timed out after {TIMEOUT_S} s$", 1),
    "hangs_outside": ("FAILED", rf"^timed out after {TIMEOUT_S} s$", 1),
    "sys_exit": ("FAILED", r"^the run function called sys.exit\(0\)$", 1),
    "os_exit": ("FAILED", r"^the run ended its own process with status 3 ", 1),
    "kills_itself": ("FAILED", r"^killed by SIGKILL \(out of memory\?\)$", 2),
    "kills_itself_once": ("DONE", "", 2),
    "crashes": ("FAILED", r"^killed by SIGSEGV ", 2),
    "kills_its_supervisor": ("FAILED", r"^killed by SIGKILL ", 2),
    "memory": ("FAILED", r"^MemoryError", 1),
    "writes_job_out": ("DONE", "", 1),
    "closes_stdout": ("DONE", "", 1),
    "changes_folder": ("DONE", "", 1),
    "deletes_folder": ("DONE", "", 1),
}

PROBLEM = f"""
from deephyper_balsam import HpProblem
problem = HpProblem("ways")
problem.add_hyperparameter({list(WAYS)!r}, "way")
"""

RUN = """
import ctypes, os, pathlib, resource, shutil, signal, subprocess, sys, time
HERE = pathlib.Path(__file__).parent

def run(job):
    way = job["way"]
    with open(HERE / "calls.txt", "a") as calls:
        print(way, file=calls)
    first = not (HERE / way).exists()
    (HERE / way).touch()
    if way == "raises":
        raise ValueError("too wide")
    if way == "nan":
        return float("nan")
    if way == "inf":
        return float("-inf")
    if way == "none":
        return None
    if way == "text":
        return "high"
    if way == "huge":
        return [0] * 10**6
    if way == "huge_metadata":
        return {"objective": 1.0, "metadata": {"log": "x" * 10**7, "small": 3}}
    if way == "megabytes":
        for _ in range(80):
            print("x" * 2**20)
        subprocess.run(["bash", "-c", "head -c 8000000 /dev/zero | tr '\\\\0' y"])
    if way == "markers":
        print("BALSAM-EXCEPTION nonsense")
        print("BALSAM-RETURN-VALUE gASVAAAA", flush=True)
        print("BALSAM-RETURN-VALUE " + "A" * 10**6, flush=True)
    if way == "no_unicode":
        os.write(1, bytes(range(256)) * 100)
    if way == "orphans":
        subprocess.Popen(["setsid", "sleep", "3600.25"])
        subprocess.Popen(["bash", "-c", "trap '' TERM HUP; sleep 3600.25"])
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execvp("sleep", ["sleep", "3600.25"])
            os._exit(0)
        time.sleep(0.3)
    if way == "hangs":
        while True:
            try:
                time.sleep(100)
            except Exception:
                pass
    if way == "hangs_outside":
        subprocess.Popen(["setsid", "sleep", "3600.25"])
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
        ctypes.CDLL(None).sleep(3600)
    if way == "sys_exit":
        sys.exit(0)
    if way == "os_exit":
        os._exit(3)
    if way == "kills_itself" or (way == "kills_itself_once" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "crashes":
        ctypes.string_at(0)
    if way == "kills_its_supervisor":
        os.write(1, b"\\xff last words \\xfe\\n")
        time.sleep(0.5)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if way == "memory":
        now = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**27, now + 2**27))
        held = []
        while True:
            held.append(bytearray(2**10))
    if way == "writes_job_out":
        pathlib.Path("job.out").write_bytes(b"\\xff\\nBALSAM-RETURN-VALUE mine\\n")
        pathlib.Path("results.csv").write_text("nonsense")
    if way == "closes_stdout":
        sys.stdout.close()
        os.close(1)
        os.close(2)
    if way == "changes_folder":
        os.chdir("/")
    if way == "deletes_folder":
        shutil.rmtree(os.getcwd())
    return 1.0
"""


@dataclass
class Ways:
    """The search, ended."""

    folder: Path
    code: int
    err: str
    rows: dict[str, dict[str, Any]]
    status: dict[str, Any]
    trials: dict[str, dict[str, Any]]
    calls: Counter[str]
    status_text: str


@pytest.fixture(scope="module")
def ways(stack: LocalStack) -> Iterator[Ways]:
    folder = Path(tempfile.mkdtemp(prefix="live ways "))
    (folder / "problem.py").write_text(PROBLEM)
    (folder / "ways.py").write_text(RUN)

    def cli(*arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        command = [*CLI, "search", *arguments]
        return subprocess.run(
            command, env=stack_environment(stack), cwd=folder, capture_output=True, text=True, timeout=timeout_s
        )

    command = "--problem problem.py --run ways.py --site local --nodes 1 --evals-per-node 6 --method random --seed 3"
    done = cli("run", "ways", *command.split(), "--max-evals", "100", "--eval-timeout", str(TIMEOUT_S))
    rows = {row["p:way"]: row for row in json.loads(cli("results", "ways", "--json").stdout)}
    by_number = {int(row["tags"]["trial"]): row for row in Gateway(stack.client_path).jobs({"search": "ways"})}
    yield Ways(
        folder,
        done.returncode,
        done.stderr,
        rows,
        json.loads(cli("status", "ways", "--json").stdout),
        {way: by_number[row["job_id"]] for way, row in rows.items()},
        Counter((folder / "calls.txt").read_text().split()),
        cli("status", "ways").stdout,
    )
    shutil.rmtree(folder, ignore_errors=True)


def test_the_search_goes_on_to_its_end(ways: Ways) -> None:
    assert ways.code == 0, ways.err
    assert "Traceback" not in ways.err
    assert set(ways.rows) == set(WAYS)
    assert "Every configuration of the space has been evaluated" in (ways.folder / "ways" / "search.log").read_text()


@pytest.mark.parametrize("way", WAYS)
def test_each_way_has_its_state_and_its_reason(ways: Ways, way: str) -> None:
    state, reason, times = WAYS[way]
    row = ways.rows[way]
    assert row["job_status"] == state, row
    assert re.search(reason, row["m:failure"] or ""), row
    assert row["objective"] == (1.0 if state == "DONE" else None)
    assert ways.calls[way] == times, ways.trials[way]["data"]


def test_who_ended_by_the_machines_fault_ran_once_more_and_both_reasons_are_kept(ways: Ways) -> None:
    killed = {way: row for way, row in ways.rows.items() if row.get("m:retried_after")}
    assert set(killed) == {way for way, (_, _, times) in WAYS.items() if times == 2}
    assert "killed by SIGKILL" in killed["kills_itself_once"]["m:retried_after"]
    [first] = ways.trials["kills_itself"]["data"]["tries"]
    assert first["host"]
    assert first["end"] >= first["start"]
    assert ways.status["retried"] == 4
    assert "run once more" in ways.status_text
    assert "killed by SIGKILL" in ways.status_text


def test_nothing_that_a_run_started_outlives_it(ways: Ways) -> None:
    left = [process.pid for process in psutil.process_iter(["cmdline"]) if "3600.25" in (process.info["cmdline"] or [])]
    assert left == []


def test_what_is_large_is_cut_and_the_rest_kept(ways: Ways, stack: LocalStack) -> None:
    assert ways.rows["huge_metadata"]["m:log"] == "(too large, left out)"
    assert ways.rows["huge_metadata"]["m:small"] == 3
    [output] = stack.folder.rglob(f"{ways.trials['megabytes']['workdir']}/job.out")
    assert 60 * 2**20 < output.stat().st_size < 70 * 2**20
    with output.open(errors="strict") as file:
        assert any("beyond 64 MiB is left out" in line for line in file)
