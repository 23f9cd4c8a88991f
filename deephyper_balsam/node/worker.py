"""What runs on the node: load the run function, call it, turn its value or its error into an outcome, deliver it.

Nothing here imports pandas, ConfigSpace or scikit-optimize. The outcome is a JSON object, written into the job's own
`data["result"]` the moment the run ends, and returned to Balsam as well for nodes that cannot reach the API.
An evaluation that fails by its own fault is an outcome like any other: the process exits 0 and Balsam never re-runs it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deephyper_balsam.common.clock import moment
from deephyper_balsam.common.loopback import go_direct
from deephyper_balsam.common.objective import command_minimises, objective_of, repr_of, turned
from deephyper_balsam.common.wording import storable
from deephyper_balsam.errors import TargetError
from deephyper_balsam.node import failure_policy
from deephyper_balsam.node.recording import Curve, FileRecorder, RecordFile
from deephyper_balsam.node.run_in_balsam import data_now, stopping, tell_progress
from deephyper_balsam.node.rungs import Line, RungRecorder
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.shell_command import ProcessKilled, run_command
from deephyper_balsam.node.stoppers import NEVER, Stopper
from deephyper_balsam.node.supervise import RunEnd, clean_file, readable_end, supervise
from deephyper_balsam.node.targets import code_version, load_object, own_traceback, reason, shorten

MAX_METADATA_CHARS = 50_000
_KEPT_OF_OUTPUT, _KEPT_OF_A_FAILURE = 500, 2000  # characters
_LEFT_OUT = "(too large, left out)"
_RANK_VARIABLES = (
    "OMPI_COMM_WORLD_RANK",
    "PMIX_RANK",
    "PMI_RANK",
    "ALPS_APP_PE",
    "MV2_COMM_WORLD_RANK",
    "SLURM_PROCID",
)

Outcome = dict[str, Any]


RunFunction = Callable[[RunningJob], Any]


class TrialTimeout(BaseException):
    """Raised in the run function when its time is over; no Exception, so that ``except Exception`` lets it through."""


def evaluate(
    run: RunFunction, job: RunningJob, clock: Callable[[], float] = moment, *, minimize: bool = False
) -> Outcome:
    """Call `run` once and say how it ended; whatever it raises becomes a failure with its reason.

    Parameters
    ----------
    run
        The user's run function.
    job
        What it is called with.
    clock
        Tells the time (epoch) of the start and the end.
    minimize
        What `run` returns is a loss: the outcome's objective, which is maximised, is minus that.

    Returns
    -------
    dict
        ``objective`` (float or None), ``failure`` (None or one line), ``traceback``, ``metadata``, ``start`` and
        ``end`` (seconds since the epoch on this node), ``host``; ``fault`` where it is not the configuration's (see
        `node.failure_policy`); ``curve`` (pairs of a budget and an objective) where the run recorded something, and
        ``stopped`` where it was told to stop. Only KeyboardInterrupt goes through.
    """
    started_at = clock()
    outcome: Outcome = {"objective": None, "failure": None, "metadata": {}}
    try:
        returned = run(job)
        outcome.update(interpret(job.objective if returned is None and job.was_stopped else returned))
    except KeyboardInterrupt:
        raise
    except TrialTimeout as error:
        outcome["failure"] = str(error)
    except SystemExit as error:
        outcome["failure"] = f"the run function called sys.exit({storable(repr_of(error.code))})"
    except ProcessKilled as error:
        outcome.update(_machines_fault(error.signal_number))
    except BaseException as error:
        if isinstance(error, MemoryError):  # let go of what fills it, to have room for the words
            traceback.clear_frames(error.__traceback__)
        outcome.update(failure=reason(error), traceback=own_traceback(error))
    if outcome["objective"] is not None:
        outcome["objective"] = turned(outcome["objective"], minimize)  # with `Recorder.record` all that turns the sign
    outcome.update(_recorded(job.recorder.curve, stopped=job.was_stopped))
    return {**outcome, "start": started_at, "end": clock(), "host": _host()}


def _recorded(curve: Curve, *, stopped: bool = False) -> Outcome:
    """Return what an outcome says of the way to it; nothing for a run that recorded nothing."""
    if not curve.points:
        return {}
    return {"curve": [list(point) for point in curve.points], **({"stopped": True} if stopped else {})}


def interpret(returned: Any) -> Outcome:
    """Read what a run function returned: a number, ``{"objective": ..., "metadata": {...}}``, or ``"F_reason"``."""
    metadata: Any = {}
    if isinstance(returned, Mapping):
        if "objective" not in returned:
            return _failure(f'returned a dict without "objective" (its keys: {sorted(map(str, returned))})')
        metadata = {} if returned.get("metadata") is None else returned["metadata"]
        returned = returned["objective"]
    return {**_interpret_objective(returned), "metadata": _plain_metadata(metadata)}


def _interpret_objective(value: Any) -> Outcome:
    if isinstance(value, str) and value.startswith("F"):  # DeepHyper's way to say that a run failed
        return _failure(value.removeprefix("F_").removeprefix("F").strip(" _:") or "the run function returned 'F'")
    try:
        return {"objective": objective_of(value), "failure": None}
    except ValueError as error:
        return _failure(f"returned {error}")


def _failure(reason: str) -> Outcome:
    return {"objective": None, "failure": shorten(reason)}


def _plain_metadata(metadata: Any) -> dict[str, Any]:
    """Return `metadata` as JSON values: what JSON cannot hold becomes text, what is too large is named and left out."""
    try:
        plain = _plain(metadata)
    except Exception as error:  # the objective is good all the same
        return {"metadata": f"(left out: {reason(error)})"}
    if not isinstance(metadata, Mapping):
        plain = {"metadata": plain}
    if len(json.dumps(plain)) <= MAX_METADATA_CHARS:
        return dict(plain)
    share = MAX_METADATA_CHARS // (len(plain) + 1)
    kept = {key: value if len(json.dumps(value)) <= share else _LEFT_OUT for key, value in plain.items()}
    if len(json.dumps(kept)) > MAX_METADATA_CHARS:
        return {"metadata": f"(left out: {len(kept)} keys are too many)"}
    return kept


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value) if abs(value) < 2**63 else str(value)  # Balsam's API cannot answer with larger ones
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {storable(str(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    return storable(str(value))


# --- the time limit --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def time_limit(limit_s: float | None) -> Iterator[None]:
    """Raise `TrialTimeout` in the block after `limit_s` seconds, by a timer signal; None or 0: no limit.

    Code that hangs outside Python, or swallows the exception, does not react: its supervisor ends it ten seconds later.
    """
    if not limit_s:
        yield
        return

    def ring(_signum: int, _frame: Any) -> None:
        raise TrialTimeout(timeout_reason(limit_s))

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def timeout_reason(limit_s: float) -> str:
    """Return the reason kept for a run that took longer than its `eval_timeout`."""
    return f"timed out after {limit_s:g} s"


# --- inside Balsam ---------------------------------------------------------------------------------------------------


def make_run_function(spec: Mapping[str, Any], workdir: Path) -> RunFunction:
    """Return the callable behind an application's spec (see `store.applications`)."""
    if spec["kind"] == "command":
        return lambda job: run_command(spec, job.parameters, workdir, job)
    if spec.get("payload"):
        import dill

        loaded: Any = dill.loads(base64.b64decode(spec["payload"]))
    else:
        loaded = load_object(spec["target"], spec.get("search_path"))
    if not callable(loaded):
        raise TargetError(f"{spec['target']} is {type(loaded).__name__}, not a function that takes a job.")
    run: RunFunction = loaded
    return run


def _load(spec: Mapping[str, Any], workdir: Path) -> RunFunction:
    """Return the run function; one that cannot be loaded becomes one that raises why, when it is evaluated."""
    try:
        return make_run_function(spec, workdir)
    except (Exception, SystemExit) as error:
        cause: BaseException = error

        def raise_cause(_job: RunningJob) -> Any:
            raise cause

        return raise_cause


def evaluate_apart(
    spec: Mapping[str, Any],
    job: RunningJob,
    limit_s: float | None,
    *,
    minimize: bool = False,
    beside: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
) -> tuple[Outcome, bool]:
    """Evaluate a trial in a child process, in the current folder; whatever it does, this process goes on.

    Parameters
    ----------
    spec
        What to run, as made by `store.applications`.
    job
        What the run function gets.
    limit_s
        Seconds after which it is ended, without those in which it is loaded; None: no limit.
    minimize
        Whether it returns a loss.
    beside
        What this process does while it waits for the child; entered when there is one.

    Returns
    -------
    tuple[dict, bool]
        The outcome as of `evaluate`, and whether the child said it itself; else it was killed, exited or hung.
    """
    workdir, started_at = Path.cwd(), moment()

    def work(began: Callable[[], None]) -> Outcome:
        run = _load(spec, workdir)  # its imports are the application's, not this configuration's: no limit on them
        began()
        outcome: Outcome | None = None
        try:
            with time_limit(limit_s):
                outcome = evaluate(run, job, minimize=minimize)
        except TrialTimeout as error:  # the bell rang after the run function had ended
            outcome = outcome or {**_failure(str(error)), "metadata": {}, **ends(started_at)}
        return outcome

    ending = supervise(work, limit_s, beside=beside)
    if ending.said is not None:
        return ending.said, True
    recorded = _recorded(job.recorder.kept())  # what the child knew is gone with it
    return {**_last_words(ending, limit_s), **recorded, **ends(started_at)}, False


def run_trial(app: Any, spec: Mapping[str, Any], parameters: Mapping[str, Any]) -> Outcome:
    """Evaluate the trial of a Balsam application instance and deliver the outcome; called by its `run`.

    Parameters
    ----------
    app
        The ApplicationDefinition instance: `app.job` is the job, `app._client` a client of Balsam's API.
    spec
        What to run, as made by `store.applications`.
    parameters
        The configuration.
    """
    data = dict(app.job.data or {})
    if "result" in data:  # it ended before, and only the news of it was lost: never run it again
        return dict(data["result"])
    if "set_aside" in data:  # another job stands for this trial: only the news of it was lost
        return {**_failure(f"not evaluated: {data['set_aside'].get('why')}"), "metadata": {}}
    print_anything()
    workdir = Path.cwd()
    version = code_version(spec)
    minimize = bool(data.get("minimize")) or command_minimises(spec)
    ranks = app.job.num_nodes * app.job.ranks_per_node
    alone = ranks == 1
    stopper, keeper = stopping(app, data)
    if not alone and rank():
        keeper = None
    line = None if keeper is None else keeper.line
    number, asked = int(app.job.tags.get("trial", -1)), data.get("asked") or {}
    job = job_here(
        number,
        parameters,
        workdir,
        trial=f"{number} of {asked.get('at')}",
        stopper=stopper,
        line=line,
        ranks=ranks,
        told_to_stop=any(decision.get("stop") for decision in data.get("rungs", ())),
        minimize=minimize,
    )
    if alone or rank() == 0:
        data = tell_progress(app, data, job)
    limit_s, beside = data.get("eval_timeout_s") or None, None if keeper is None else keeper.answering
    outcome, said = evaluate_apart(spec, job, limit_s, minimize=minimize, beside=beside)
    clean_file(workdir / "job.out")
    printed = readable_end(workdir / "job.out", _KEPT_OF_A_FAILURE if outcome["objective"] is None else _KEPT_OF_OUTPUT)
    if printed:  # for who cannot read the folder
        outcome = {**outcome, "output": printed}
    if version is not None:
        outcome = {**outcome, "code": version}
    if alone or rank() == 0:
        deliver(app, data, outcome)
    if not alone and not said:  # MPI ends the other ranks when one fails
        raise RuntimeError(outcome["failure"])
    if not alone and rank() != 0:  # Balsam prints what is returned, and its agent takes what comes first
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return outcome


def job_here(
    number: int,
    parameters: Mapping[str, Any],
    folder: Path,
    *,
    trial: str = "",
    stopper: Stopper = NEVER,
    line: Line | None = None,
    ranks: int = 1,
    told_to_stop: bool = False,
    minimize: bool = False,
) -> RunningJob:
    """Return what a run function gets whose trial has a folder, in which an earlier start may have left records.

    Parameters
    ----------
    number, parameters
        Of the trial.
    folder
        The trial's folder.
    trial
        What tells this trial from that of another search of the same name, which may have had the folder before.
    stopper
        Says at which budgets it is decided whether the run goes on.
    line
        Where that is asked.
    ranks
        How many processes the run has.
    told_to_stop
        Whether an earlier start was told to stop, and was cut before it did.
    minimize
        Whether the run function returns, and records, a loss.
    """
    file, of_rank = RecordFile(folder, trial), rank() if ranks > 1 else 0
    if stopper == NEVER:
        return RunningJob(number, parameters, FileRecorder(file, rank=of_rank, minimize=minimize), folder)
    recorder = RungRecorder(
        file, stopper, line, rank=of_rank, ranks=ranks, told_to_stop=told_to_stop, minimize=minimize
    )
    return RunningJob(number, parameters, recorder, folder)


def print_anything() -> None:
    """Write this process's output as UTF-8 whatever the locale: a run must not fail for a character that it prints."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def ends(started_at: float) -> Outcome:
    """Return when and where a run that began at `started_at` ended: here and now."""
    return {"start": started_at, "end": moment(), "host": _host()}


def _host() -> str:
    return storable(socket.gethostname())


def _last_words(ending: RunEnd, limit_s: float | None) -> Outcome:
    """Return the outcome of a run that ended without a word."""
    if ending.timed_out:
        return {**_failure(timeout_reason(limit_s or 0.0)), "metadata": {}}
    if ending.signal is not None:
        return {"objective": None, "metadata": {}, **_machines_fault(ending.signal)}
    how = f"the run ended its own process with status {ending.status} and left no result"
    return {**_failure(f"{how} (os._exit, or a library that exits?)"), "metadata": {}}


def _machines_fault(signal_number: int) -> Outcome:
    return {"failure": failure_policy.killed(signal_number), "fault": failure_policy.Fault.MACHINE.value}


def rank() -> int:
    """Return this process's MPI rank, from what the launcher left in the environment; 0 without MPI."""
    for name in _RANK_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return 0


def deliver(app: Any, data: Mapping[str, Any], outcome: Outcome) -> None:
    """Write the outcome into the job's own `data`; where the API is out of reach, Balsam's return value must do.

    The write replaces `data` whole, so what others wrote while the run went on is read first. The result of another
    run of the same job, after this one was given up for lost, stays.
    """
    client = app._client
    client.retry_count, client.connect_timeout, client.read_timeout = 3, 5.0, 30.0
    try:
        go_direct(client)
        data = data_now(client, app.job.id, data)
        if "result" in data:
            return
        client.bulk_patch("jobs/", [{"id": app.job.id, "data": {**data, "result": outcome}}])
    except Exception as error:
        print(f"The result could not be written to Balsam from here ({error}); it goes by the return value.")  # noqa: T201


def even_update(job: Any, state: str) -> None:
    """Move a job on in the site's agent, with the same columns in every update.

    The agent sends the updates of many jobs in one request, and Balsam's server applies the columns of the first to all
    (`balsam/server/models/crud/jobs.py`, do_update_jobs): a job that just ended beside one that was just created makes
    the server answer 500, and the agent then retries for half an hour while every job of the site stands still.
    """
    job.state = state
    update = job._update_model
    for column in ("serialized_return_value", "serialized_exception"):
        if column not in update.__fields_set__:
            setattr(update, column, "")
