"""Runs that are forked: they find what a new Python would have found, and end like one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import psutil
import pytest
from balsam.platform.app_run.app_run import TimeoutExpired
from test_sites_runs import make

from deephyper_balsam.common import scratch
from deephyper_balsam.launcher import forking
from deephyper_balsam.sites import local, runs

# Stands for Balsam's runner in the process that runs are forked from: its argument is what to do
RUNNER = """
import sys
import tempfile
__file__ = "runner.py"
def main(app_id, chunks, words):
    exec(words[0], {"app_id": app_id})
"""


@pytest.fixture(scope="module", autouse=True)
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A fork server of this module's own, whose runner does what it is told."""
    folder = tmp_path_factory.mktemp("preloaded")
    (folder / "told.py").write_text(
        f"import sys, types\nrunner = types.ModuleType('balsam.site.launcher.python_runner')\nexec({RUNNER!r}, "
        "runner.__dict__)\nsys.modules[runner.__name__] = runner\n"
        "sys.modules['balsam.site.launcher'].python_runner = runner\n"
    )
    os.environ["DEEPHYPER_BALSAM_PRELOAD"] = "told, no_such_module, numpy"
    os.environ["PYTHONPATH"] = str(folder)
    yield
    del os.environ["DEEPHYPER_BALSAM_PRELOAD"], os.environ["PYTHONPATH"]
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def command(code: str) -> str:
    return f"{sys.executable} -m balsam.site.launcher.python_runner 7 1 {shlex.quote(code)}"


def started(tmp_path: Path, code: str, cls: type = local.LocalRun, **values: Any) -> Any:
    run = make(cls, tmp_path, cmdline=command(code), ranks_per_node=1, **values)
    run.start()
    return run


def was_forked(run: Any) -> bool:
    return isinstance(run._process, forking._Forked)


def test_a_forked_run_finds_what_a_new_python_would_find(tmp_path: Path) -> None:
    code = """
import json, multiprocessing, os, sys
multiprocessing.set_start_method("spawn")
print(json.dumps([app_id, os.getcwd(), sys.path[0], os.environ["MINE"], os.environ["OMP_NUM_THREADS"],
                  sys.stdin.read(), multiprocessing.current_process().daemon, sys.argv[1:3]]))
print("to stderr", file=sys.stderr)
"""
    run = started(tmp_path, code, envs={"MINE": "a b"})
    assert was_forked(run)
    assert run.wait(timeout=60) == 0
    first, second = sorted((tmp_path / "job.out").read_text().splitlines())
    assert json.loads(first) == [7, str(tmp_path), str(tmp_path), "a b", "2", "", False, ["7", "1"]]
    assert second == "to stderr"
    assert not any(str(Path(forking.__file__).parent) == path for path in sys.path)
    assert "MINE" not in os.environ


def test_runs_draw_other_numbers_and_keep_to_their_threads_though_numpy_was_loaded_before(tmp_path: Path) -> None:
    code = """
import random, numpy, threadpoolctl
print(random.random(), numpy.random.random(), {pool["num_threads"] for pool in threadpoolctl.threadpool_info()})
"""
    said = set()
    for _ in range(2):
        run = started(tmp_path, code, threads_per_rank=1)
        assert run.wait(timeout=60) == 0
        said.add((tmp_path / "job.out").read_text().strip())
    assert len(said) == 2
    assert len({one.split()[0] for one in said}) == len({one.split()[1] for one in said}) == 2
    assert all(one.endswith(" {1}") for one in said)


def test_a_forked_run_is_pinned_and_the_launcher_keeps_all_cpus(tmp_path: Path) -> None:
    from balsam.site.launcher import NodeSpec

    before = os.sched_getaffinity(0)
    spec = NodeSpec(node_ids=["n"], hostnames=["n"], cpu_ids=[[min(before)]], gpu_ids=[[3]])
    code = "import os; print(os.sched_getaffinity(0), os.environ['CUDA_VISIBLE_DEVICES'])"
    run = started(tmp_path, code, runs.PinnedRun, node_spec=spec)
    assert was_forked(run)
    assert run.wait(timeout=60) == 0
    assert (tmp_path / "job.out").read_text().strip() == f"{{{min(before)}}} 3"
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise ValueError('too wide')", 1),
        ("import sys; sys.exit(5)", 5),
        ("import os; os._exit(6)", 6),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
    ],
)
def test_a_forked_run_ends_with_the_code_of_a_process(tmp_path: Path, code: str, expected: int) -> None:
    run = started(tmp_path, code)
    assert run.wait(timeout=60) == run.poll() == expected
    if expected == 1:
        assert "ValueError: too wide" in run.tail_output()


def test_a_forked_run_ends_with_all_that_it_started_when_it_is_told(tmp_path: Path) -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '1000']).pid, flush=True); time.sleep(1000)"
    run = started(tmp_path, code)
    child = int(_first_line(tmp_path / "job.out"))
    with pytest.raises(TimeoutExpired):
        run.wait(timeout=0.1)
    assert run.poll() is None
    run.terminate()
    assert run.wait(timeout=60) == -signal.SIGTERM
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_signal_to_all_processes_of_an_allocation_leaves_who_says_how_the_runs_ended(tmp_path: Path) -> None:
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(4)))
print("ready", flush=True)
time.sleep(1000)
"""
    run = started(tmp_path, code)
    assert _first_line(tmp_path / "job.out") == "ready"
    server = psutil.Process(run._process.pid).parent()
    assert server is not None
    assert server.pid != os.getpid()
    server.terminate()
    os.kill(run._process.pid, signal.SIGTERM)
    assert run.wait(timeout=60) == 4


def test_a_run_whose_fork_server_is_killed_is_told_as_failed_and_the_next_one_starts(tmp_path: Path) -> None:
    run = started(tmp_path, "import time; print('ready', flush=True); time.sleep(1000)")
    _first_line(tmp_path / "job.out")
    process = psutil.Process(run._process.pid)
    server = process.parent()
    assert server is not None
    server.kill()
    assert run.wait(timeout=60) == 255
    until = time.monotonic() + 60
    while server.status() != psutil.STATUS_ZOMBIE:  # its pipes close a moment before the kernel calls it ended
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    after = started(tmp_path, "print('again')")
    assert was_forked(after)
    assert after.wait(timeout=60) == 0
    assert _first_line(tmp_path / "job.out") == "again"


@pytest.mark.parametrize(
    "values",
    [
        {"cmdline": "echo 1"},
        {"cmdline": "/other/python -m balsam.site.launcher.python_runner 7 1 x || true"},
        {"cmdline": command("pass"), "preamble": ["true"]},
        {"cmdline": command("pass"), "envs": {"PYTHONOPTIMIZE": "1"}},
        {"cmdline": command("pass"), "envs": {"LD_PRELOAD": ""}},
        {"cmdline": command("pass"), "switch": "0"},
    ],
)
def test_what_cannot_be_forked_starts_as_always(
    tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if switch := values.pop("switch", None):
        monkeypatch.setenv(forking.FORK_VARIABLE, switch)
    run = make(local.LocalRun, tmp_path, **values)
    run.start()
    assert not was_forked(run)
    run.wait(timeout=60)


def test_what_the_fork_server_cannot_do_is_done_by_a_new_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(forking, "_fork", refused)
    run = started(tmp_path, "pass")
    assert not was_forked(run)
    run.wait(timeout=60)


def _first_line(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text(encoding="utf-8").endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return path.read_text(encoding="utf-8").splitlines()[0]


PRIVATE = """
import multiprocessing.util, os, sys, tempfile
from multiprocessing import forkserver
tempfile.tempdir = sys.argv[1]
from pathlib import Path
from deephyper_balsam.common import scratch
from deephyper_balsam.launcher import fork_server, forking
scratch._LONGEST = 200
multiprocessing.util.abstract_sockets_supported = True  # as in the versions that took an abstract socket
fork_server.PRELOADED[:] = []
process = forking._fork(["0", "0"], Path("/"), dict(os.environ), Path(os.devnull), None)
process.join(30)
address = forkserver._forkserver._forkserver_address
print(address, multiprocessing.util.abstract_sockets_supported, tempfile.tempdir, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", ["in order", "killed"])
def test_the_fork_servers_socket_lies_in_a_private_folder_that_is_removed_however_its_owner_ends(
    end: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(tempfile.mkdtemp(prefix="forks-"))  # short: it is a socket's path
    try:
        done = subprocess.run(
            [sys.executable, "-c", PRIVATE, str(place), end], capture_output=True, text=True, timeout=60
        )
        address, abstract, usual = done.stdout.split()
        assert address.startswith(f"{place}/dhb-"), done.stderr
        assert (abstract, usual) == ("False", str(place))
        if end == "killed":
            assert [path for path in place.glob("dhb-*/pymp-*") if path.is_dir()]
            monkeypatch.setattr(tempfile, "tempdir", str(place))
            scratch.sweep()
        assert list(place.iterdir()) == []
    finally:
        shutil.rmtree(place)


STARTED = """
import os, sys
from multiprocessing import forkserver
from deephyper_balsam.launcher import fork_server
fork_server.PRELOADED[:] = []
fork_server.start()
print(forkserver._forkserver._forkserver_pid is not None, any(name.split(".")[0] == "balsam" for name in sys.modules))
"""


@pytest.mark.parametrize(("switch", "started"), [("1", "True"), ("0", "False")])
def test_the_fork_server_is_started_before_balsam_is_loaded_unless_runs_are_not_forked(
    switch: str, started: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(forking.FORK_VARIABLE, switch)
    done = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [started, "False"], done.stderr
