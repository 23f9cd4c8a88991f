"""Trials in processes of this machine: a search without Balsam, on a laptop or inside a job of one's own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deephyper_balsam.common.clock import moment, steady
from deephyper_balsam.common.private import write_private
from deephyper_balsam.driver.in_memory import InMemorySession, result_of
from deephyper_balsam.driver.session import Advice, SearchHistory
from deephyper_balsam.driver.standing import RungValues
from deephyper_balsam.errors import InputError, SearchExistsError
from deephyper_balsam.node import failure_policy
from deephyper_balsam.node.pool_worker import RUNGS_FILE, STANDING_FILE, read_rungs
from deephyper_balsam.node.stoppers import NEVER, parse_stopper
from deephyper_balsam.node.worker import Outcome, ends
from deephyper_balsam.store.applications import resolve_run
from deephyper_balsam.store.trial_rows import NEVER_STARTED
from deephyper_balsam.trial import Result, Trial

_LOOK_S = 0.2  # how soon a wait notices that somebody wants the end
_END_GRACE_S = 10.0  # a worker gives its run six seconds to end


class InProcessEvaluator(InMemorySession):
    """Evaluates trials in processes of this machine, without Balsam.

    Each evaluation is a process of its own, as on a node: one that crashes, exits or hangs is a trial that failed. It
    works in the folder ``NAME/<number>`` in the search's `log_dir`, where ``job.out`` has what it printed. What runs
    when the search ends is ended with it. Nothing but the files outlives this Python: a search goes on only while its
    evaluator lives (the contract is that of `deephyper_balsam.driver.session.SearchSession`).

    Parameters
    ----------
    run
        The run function; or ``"file.py:run"``, ``"package.module:run"``, the YAML of a shell command, the name of a
        bundled application.
    num_workers
        How many evaluations run at once.
    eval_timeout
        Seconds after which an evaluation is ended and counts as failed; None: no limit.

    Raises
    ------
    TargetError
        The run function cannot be loaded.
    SettingsError
        Without a worker.
    InputError
        A time limit that is not positive.
    """

    def __init__(
        self, run: str | Callable[..., Any], num_workers: int = 1, *, eval_timeout: float | None = None
    ) -> None:
        if eval_timeout is not None and eval_timeout <= 0:
            raise InputError(f"`eval_timeout > 0` (seconds) must hold, but got {eval_timeout}.")
        super().__init__("here", num_workers, resolve_run(run))
        self._eval_timeout_s = eval_timeout
        self._folder = Path(tempfile.gettempdir())
        self._waiting: deque[int] = deque()
        self._idle: list[_Worker] = []
        self._busy: dict[int, _Worker] = {}  # by the number of the trial
        self._tries: dict[int, list[str]] = {}  # trial number -> why its earlier runs ended by the machine's fault
        self._rungs = RungValues(NEVER)

    def now(self) -> float:
        """Return seconds of a clock that only goes forward."""
        return steady()

    def moment(self) -> float:
        """Return the time (epoch)."""
        return moment()

    # --- the beginning and the end -------------------------------------------------------------------------------

    def begun(self, name: str, folder: Path) -> bool:
        """Return whether a search of this name was begun: here, or its folder has results."""
        return super().begun(name, folder) or _results(folder).exists()

    def open(self, name: str, settings: dict[str, Any], **options: Any) -> SearchHistory:
        """Begin the search `name`, or go on with the one that this evaluator has had last.

        Raises
        ------
        SearchExistsError
            The folder has the results of a search that this evaluator knows nothing of.
        """
        folder = options.get("folder")
        if folder is not None and name != self._name and _results(folder).exists():
            raise SearchExistsError(
                f"{_results(folder)} has the results of a search already, and without Balsam nothing else is kept of "
                "it: it cannot go on. Choose another name, or another `log_dir`. To begin a new search with what that "
                "one found: `from deephyper_balsam.problem.warm_start import read_warm_start`, and "
                f'`warm_start=read_warm_start(Path("{_results(folder)}"), problem).points`.'
            )
        history = super().open(name, settings, **options)
        if folder is not None:
            self._folder = Path(folder).resolve()
        stopper = parse_stopper(history.settings.get("stopper", "none"))
        if (
            not history.trials
        ):  # a new search: nothing of another that this evaluator had, or that had its folder, counts
            self._tries.clear()
            self._rungs = RungValues(stopper)
            (self._folder / STANDING_FILE).unlink(missing_ok=True)
        return history

    def close(self, why: str = "it was closed", *, leave_running: bool = False) -> None:
        """End the workers and what runs in them; those trials are withdrawn."""
        running = list(self._busy)
        workers = [*self._idle, *self._busy.values()]
        self._idle, self._busy = [], {}
        _end(workers)
        self._put_withdrawn([*self._waiting, *running], "ended with its search")
        self._waiting.clear()
        super().close(why, leave_running=leave_running)

    # --- trials --------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many trials to submit now: one for each free worker."""
        return max(0, self._workers - len(self._busy) - len(self._waiting))

    def submit(self, trials: Sequence[Trial]) -> None:
        """Start the trials on free workers; the others wait."""
        self._waiting.extend(trial.number for trial in trials if self._put_new(trial))
        self._start()

    def collect(self) -> list[Result]:
        """Take in what workers have answered, and let those that are free begin what waits."""
        results = []
        for number in self._ready(0.0):
            worker = self._busy.pop(number)
            outcome = worker.answer()
            if worker.is_alive:
                self._idle.append(worker)
            tries = self._tries.setdefault(number, [])
            if failure_policy.runs_again(outcome, len(tries)):
                tries.append(str(outcome["failure"]))
                self._waiting.appendleft(number)
                continue
            results.append(result_of(number, outcome))
            self._put_result(results[-1], "; ".join(tries))
            self._take_in_rungs(results[-1])
        self._publish()
        self._start()
        return results

    def _take_in_rungs(self, result: Result) -> None:
        if self._rungs.stopper.compares and result.number is not None and result.curve:
            own_end = result.objective is not None and not result.stopped
            self._rungs.take_in(result.number, result.curve, (), result.curve[-1][0] if own_end else None)

    def _publish(self) -> None:
        """Tell the runs how they stand at their rungs, once there is something new."""
        if not self._rungs.stopper.compares:
            return
        for number in self._busy:
            self._rungs.take_in(number, (), read_rungs(self._folder / str(number)))
        if self._rungs.is_new:
            write_private(self._folder / STANDING_FILE, json.dumps(self._rungs.standing))
            self._rungs.is_new = False

    def cancel(self) -> list[int]:
        """Withdraw what waits; what runs goes on."""
        withdrawn = list(self._waiting)
        self._waiting.clear()
        self._put_withdrawn(withdrawn, NEVER_STARTED)
        return withdrawn

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Wait until then, until `stop` is set, or until a worker answers."""
        until = time.monotonic() + seconds
        while not stop.is_set() and (left_s := until - time.monotonic()) > 0:
            if not self._busy:
                stop.wait(left_s)
            elif self._ready(min(left_s, _LOOK_S)):
                return

    def _start(self) -> None:
        while self._waiting and len(self._busy) < self._workers:
            worker = self._idle.pop() if self._idle else _Worker()
            number = self._waiting.popleft()
            folder = self._folder / str(number)
            if number not in self._tries:  # what a search of the same name left there, whose table was deleted
                (folder / RUNGS_FILE).unlink(missing_ok=True)
            worker.evaluate(
                {
                    "spec": self._spec,
                    "number": number,
                    "config": self._trials[number].config,
                    "folder": str(folder),
                    "limit_s": self._eval_timeout_s,
                    "minimize": self._minimize,
                    "trial": f"{number} of {self._zero}",
                    "stopper": self._rungs.stopper.to_dict(),
                    "standing": str(self._folder / STANDING_FILE),
                }
            )
            self._busy[number] = worker
            self._put_running(number, self.moment())

    def _ready(self, seconds: float) -> list[int]:
        """Return the trials whose workers have answered, or are gone, after so many seconds at most."""
        poll = select.poll()
        of_file = {worker.file: number for number, worker in self._busy.items()}
        for file in of_file:
            poll.register(file, select.POLLIN)
        return [of_file[file] for file, _ in poll.poll(1000 * seconds)] if of_file else []

    @property
    def advice(self) -> Advice:
        """What to tell people of the search that is open."""
        return Advice(
            files_are_copies="its results are in the memory of this Python only, until they can be written.",
            where_runs_print=f"what each trial left is in job.out of its folder {self._folder}/<number>",
            to_go_on="To go on, call search() again in this Python: without Balsam nothing but the files outlives it.",
        )


class _Worker:
    """A process that evaluates one trial at a time (`node.pool_worker`), in a session of its own: Ctrl-C is ours."""

    def __init__(self) -> None:
        self._began_at = moment()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deephyper_balsam.node.pool_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.file = self._process.stdout.fileno()

    @property
    def is_alive(self) -> bool:
        """Whether it can take another trial."""
        return self._process.poll() is None

    def evaluate(self, task: Mapping[str, Any]) -> None:
        """Begin with a trial; one that is gone says so by its answer."""
        self._began_at = moment()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self) -> Outcome:
        """Return the outcome of the trial; where the process is gone, that it was lost by the machine's fault."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith(b"\n"):
            outcome: Outcome = json.loads(line)
            return outcome
        status = self._process.wait()
        failure = f"the process that ran it ended with status {status}"
        fault = failure_policy.Fault.MACHINE.value
        return {"objective": None, "failure": failure, "metadata": {}, "fault": fault, **ends(self._began_at)}

    def tell_to_end(self) -> None:
        """Ask it, and with it its run, to end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Wait for its end; after so many seconds, kill all of it."""
        with self._process as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.tell_to_end()
    until = time.monotonic() + _END_GRACE_S
    for worker in workers:
        worker.wait(max(0.0, until - time.monotonic()))


def _results(folder: Path) -> Path:
    return folder / "results.csv"
