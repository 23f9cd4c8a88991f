"""Runs that are forked from a process which has Python, Balsam and the worker loaded already.

Balsam starts a Python for each run, which imports Balsam before anything else: half a second of a core or more, each
time. Here the launcher keeps one process that has done so (`multiprocessing`'s fork server); a run is a copy of it with
the folder, environment, output and CPUs that it would have had. What is no Python application of Balsam's, or asks for
another Python, starts as always; with ``DEEPHYPER_BALSAM_FORK=0`` in the job template every run does.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence, Set
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from balsam.platform.app_run.app_run import SubprocessAppRun

from deephyper_balsam.launcher import fork_server, script
from deephyper_balsam.launcher.fork_server import FORK_VARIABLE

logger = logging.getLogger(__name__)

_RUNNER = f"{sys.executable} -m balsam.site.launcher.python_runner "
_READ_AT_START = ("PYTHON", "LD_", "GLIBC_", "MALLOC_", "LANG", "LC_", "TZ")
"""Variables with these beginnings count when a process starts, and never again."""


class _Forked:
    """A forked run with the face of `subprocess.Popen` that Balsam's runs know."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises
        ------
        subprocess.TimeoutExpired
            When it still runs after `timeout` seconds.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("the run", timeout or 0.0)
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()


class ForksPython(SubprocessAppRun):  # type: ignore[misc]
    """A run on the launcher's own node, forked where that can be and started as always elsewhere."""

    _cmdline: str
    _envs: dict[str, str]
    _process: Any

    def start(self) -> None:
        """Start the run."""
        words = runner_words(self._cmdline)
        if words is None or self._preamble or not forkable(self._envs):
            super().start()
            return
        self._set_envs()
        self._outfile = self._open_outfile()
        self._pre_popen()
        try:
            self._process = _Forked(_fork(words, Path(self._cwd), self._envs, Path(self._outfile_path), _cpus()))
            return
        except (OSError, EOFError) as error:
            logger.warning("A run could not be forked (%s): it is started as a new Python", error)
            self._outfile.close()
        finally:
            self._post_popen()
        super().start()


def runner_words(command: str) -> list[str] | None:
    """Return the arguments of Balsam's Python runner when that is what a command starts, with this Python; else None.

    Parameters
    ----------
    command
        As `ApplicationDefinition.get_arg_str` makes it: ``PYTHON -m balsam.site.launcher.python_runner ...``.
    """
    return shlex.split(command.removeprefix(_RUNNER)) if command.startswith(_RUNNER) else None


def forkable(environment: Mapping[str, str]) -> bool:
    """Whether a copy of this process may have such an environment: what counts at a start only must be the same."""
    wanted = os.environ.get(FORK_VARIABLE, "1") != "0"
    return wanted and _at_start({**os.environ, **environment}) == _at_start(os.environ)


def _at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)}


def _cpus() -> Set[int] | None:
    """Return the CPUs that this process may use; None: the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _fork(
    words: Sequence[str], cwd: Path, environment: dict[str, str], output: Path, cpus: Set[int] | None
) -> BaseProcess:
    given = (list(words), str(cwd), environment, str(output), cpus)
    process = fork_server.context().Process(
        target=_run, args=given, daemon=True
    )  # a launcher that ends asks its runs to end
    process.start()
    return process


def _as_if_loaded_now(environment: Mapping[str, str]) -> None:
    """Let libraries that were loaded before the fork draw other numbers in each run, and take its number of threads."""
    numpy, torch = (sys.modules.get(name) for name in ("numpy", "torch"))
    threads = environment.get("OMP_NUM_THREADS", "")
    if numpy is not None:
        numpy.random.seed()
        if threads.isdigit():
            import threadpoolctl

            threadpoolctl.threadpool_limits(int(threads))
    if torch is not None and threads.isdigit():
        torch.set_num_threads(int(threads))


def _run(words: list[str], cwd: str, environment: dict[str, str], output: str, cpus: Set[int] | None) -> None:
    """Be the run: what a new Python would have found is put in place, then Balsam's runner is called."""
    from balsam.site.launcher import python_runner

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output_fd = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output_fd, number)
    os.close(output_fd)
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the run function may choose one,
    multiprocessing.current_process().daemon = False  # and have processes of its own
    script.forget_own_folder()  # the launcher's
    sys.path.insert(0, cwd)
    sys.argv[:] = [str(python_runner.__file__), *words]
    _as_if_loaded_now(environment)
    python_runner.main(int(words[0]), int(words[1]), words[2:])
