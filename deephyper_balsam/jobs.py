"""How a trial stands in Balsam's job table: functions between trials and rows.

A trial's job carries the tags ``search`` (the search's name) and ``trial`` (its number), the configuration as
parameters, and in `data`:

- ``asked``: what the trial was asked from (`Origin`) and when;
- ``eval_timeout_s``: its time limit, if any;
- ``result``: the outcome, written by the run itself (see `deephyper_balsam.worker`);
- ``tries``: earlier runs that ended by the machine's fault (reason, host, start, end), written by the driver as it lets
  the trial run once more (see `deephyper_balsam.faults`);
- ``gathered``: when the driver took the result in, as the how-manieth, and how often an allocation had cut the run;
- ``cancelled``: when the driver withdrew it;
- ``moved``: when and from where the driver took it to another site; the job is FAILED then, and the trial waits, until
  the job made for it elsewhere stands for it (this one is set aside);
- ``moved_from``: the sites that a trial was taken from before it came to this one;
- ``cuts_before``: how often allocations cut its run there.

The run writes ``result`` only, into a job that a launcher holds; the driver the rest, into others, or once the result
is in: whoever writes replaces `data` whole.

Times are seconds since the epoch (UTC).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deephyper_balsam import faults
from deephyper_balsam.errors import BalsamError, InputError
from deephyper_balsam.gateway import WAITING_STATES, Gateway, Row, pack, parse_time, unpack
from deephyper_balsam.targets import reason
from deephyper_balsam.trial import Config, Origin, Result, Trial, TrialState

NEVER_STARTED = "withdrawn before it ran"
RESULT_IS_IN = "its result is in"

# Balsam 0.7, balsam/schemas/job.py, JobState. A run that ended is RUNNING to us until its result is known.
_STATES = {
    "CREATED": TrialState.READY,
    "AWAITING_PARENTS": TrialState.READY,
    "READY": TrialState.READY,
    "STAGED_IN": TrialState.READY,
    "PREPROCESSED": TrialState.READY,
    "RUNNING": TrialState.RUNNING,
    "RUN_DONE": TrialState.RUNNING,
    "RUN_ERROR": TrialState.RUNNING,
    "RUN_TIMEOUT": TrialState.READY,
    "RESTART_READY": TrialState.READY,
    "POSTPROCESSED": TrialState.RUNNING,
    "STAGED_OUT": TrialState.RUNNING,
    "JOB_FINISHED": TrialState.DONE,
    "FAILED": TrialState.FAILED,
}


BEGUN_STATES = tuple(name for name in _STATES if name not in WAITING_STATES or name == "RESTART_READY")
"""States in which a job was given to a node at some time, or has ended."""

FINAL_STATES = tuple(name for name, state in _STATES.items() if state.is_final)
_RUNNABLE = ("PREPROCESSED", "RESTART_READY")
_LEAVABLE = (*WAITING_STATES, "RUN_TIMEOUT")
_COPIED = ("num_nodes", "ranks_per_node", "threads_per_rank", "threads_per_core", "gpus_per_rank", "launch_params")
NOT_FINAL_STATES = tuple(name for name, state in _STATES.items() if not state.is_final)
_LOOK_S = 0.5


@dataclass(frozen=True)
class Resources:
    """What one evaluation gets on a machine.

    Attributes
    ----------
    num_nodes, ranks_per_node, threads_per_rank, threads_per_core
        Nodes of one evaluation, MPI processes on each, threads of each, and threads that share a core.
    gpus_per_rank
        GPUs of each process.
    evals_per_node
        How many evaluations share a node (Balsam's `node_packing_count`); only 1 with several nodes.
    wall_time_min
        A launcher with fewer minutes left does not start an evaluation; 0: it always does.
    launch_params
        Passed on to the machine's MPI launcher.
    """

    num_nodes: int = 1
    ranks_per_node: int = 1
    threads_per_rank: int = 1
    threads_per_core: int = 1
    gpus_per_rank: float = 0
    evals_per_node: int = 1
    wall_time_min: int = 0
    launch_params: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_nodes", "ranks_per_node", "threads_per_rank", "threads_per_core", "evals_per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name} >= 1` must hold, but got ({name}={getattr(self, name)}).")
        if self.gpus_per_rank < 0 or self.wall_time_min < 0:
            raise InputError(
                "`gpus_per_rank >= 0` and `wall_time_min >= 0` must hold, but got "
                f"(gpus_per_rank={self.gpus_per_rank}, wall_time_min={self.wall_time_min})."
            )
        if self.num_nodes > 1 and self.evals_per_node > 1:
            raise InputError(
                "An evaluation either spans nodes or shares one, but got "
                f"(num_nodes={self.num_nodes}, evals_per_node={self.evals_per_node})."
            )

    def slots(self, nodes: int) -> int:
        """Return how many evaluations `nodes` nodes run at once."""
        return nodes // self.num_nodes * self.evals_per_node


def trial_tags(search: str) -> dict[str, str]:
    """Return the tags that all trials of a search share."""
    return {"search": search}


def trial_job(
    trial: Trial,
    search: str,
    app_id: int,
    resources: Resources,
    asked_at: float,
    eval_timeout_s: float | None,
    **data: Any,
) -> Row:
    """Return the job of a trial, ready to be created; `data` is what it holds besides."""
    data = {"asked": {**asdict(trial.origin), "at": asked_at}, **data}
    if eval_timeout_s:
        data["eval_timeout_s"] = eval_timeout_s
    needs = asdict(resources)
    needs["node_packing_count"] = needs.pop("evals_per_node")
    return {
        "app_id": app_id,
        "workdir": f"{search}/{trial.number:06d}",
        "tags": {**trial_tags(search), "trial": str(trial.number)},
        "serialized_parameters": pack(trial.config),
        "data": data,
        **needs,
    }


def trial_number(row: Row) -> int:
    """Return the number of the trial that a job stands for."""
    return int(row["tags"]["trial"])


def read_trial(row: Row) -> Trial:
    """Return the trial that a job stands for."""
    asked = row["data"].get("asked", {})
    origin = Origin(asked.get("kind", "user"), asked.get("told", 0), asked.get("model", 0))
    return Trial(trial_number(row), read_config(row), origin)


def read_config(row: Row) -> Config:
    """Return the configuration of a trial's job."""
    return dict(unpack(row["serialized_parameters"]))


def read_state(row: Row) -> TrialState:
    """Return where a trial stands; a state that this Balsam should not have counts as waiting.

    One that the driver will let run once more is RUNNING until it does.
    """
    if runs_again(row):
        return TrialState.RUNNING
    if "result" in row["data"]:
        return TrialState.FAILED if row["data"]["result"].get("objective") is None else TrialState.DONE
    state = _STATES.get(row["state"], TrialState.READY)
    if state is TrialState.DONE:
        return TrialState.FAILED if read_outcome(row)["objective"] is None else TrialState.DONE
    if state is TrialState.FAILED and "cancelled" in row["data"]:
        return TrialState.CANCELLED
    if has_left(row):
        return TrialState.READY
    return state


def read_outcome(row: Row) -> dict[str, Any]:
    """Return how the trial of a job in a final state ended: the run's own words, else Balsam's."""
    if "result" in row["data"]:
        return dict(row["data"]["result"])
    failure = f"the run left no result; see job.out in the folder {row['workdir']} of the site's data"
    fault = faults.Fault.MACHINE
    try:
        if row.get("serialized_return_value"):
            return dict(unpack(row["serialized_return_value"]))
        if row.get("serialized_exception"):
            failure = reason(unpack(row["serialized_exception"])[0])
    except BalsamError as error:
        failure, fault = str(error), faults.Fault.CONFIGURATION
    return {"objective": None, "failure": failure, "fault": fault.value, "metadata": {}}


def earlier_tries(row: Row) -> list[dict[str, Any]]:
    """Return the runs of a trial that ended by the machine's fault and were run once more."""
    return list(row["data"].get("tries", ()))


def runs_again(row: Row) -> bool:
    """Return whether a trial's run ended by the machine's fault and is to be run once more."""
    data = row["data"]
    if "gathered" in data or "cancelled" in data or ("result" not in data and row["state"] not in FINAL_STATES):
        return False
    if has_left(row):
        return False
    return faults.runs_again(read_outcome(row), len(earlier_tries(row)))


def run_again(gateway: Gateway, outcomes: Mapping[int, dict[str, Any]], rows: Iterable[Row]) -> list[Row]:
    """Give trials whose run ended by the machine's fault back to the queue, once Balsam is done with the run.

    Parameters
    ----------
    outcomes
        How each of `rows` ended, by the job's id.

    Returns
    -------
    list[Row]
        The rows that wait now, changed here as in Balsam.
    """
    again = [row for row in rows if row["state"] in FINAL_STATES]  # before that the launcher still has something to say
    changed = {}
    for row in again:
        outcome = outcomes[row["id"]]
        this = {key: outcome.get(key) for key in ("failure", "host", "start", "end")}
        kept = {key: value for key, value in row["data"].items() if key != "result"}
        changed[row["id"]] = {**kept, "tries": [*earlier_tries(row), this]}
    gateway.restart_jobs(changed, "ended by the machine's fault: once more")
    for row in again:
        row.update(data=changed[row["id"]], state="RESTART_READY", serialized_return_value="", serialized_exception="")
    return again


def read_result(number: int, outcome: Mapping[str, Any]) -> Result:
    """Return the result that an outcome stands for."""
    return Result(
        number,
        outcome["objective"],
        failure=outcome.get("failure") if outcome["objective"] is None else None,
        traceback=outcome.get("traceback"),
        started_at=outcome.get("start"),
        ended_at=outcome.get("end"),
        host=outcome.get("host"),
        metadata=outcome.get("metadata") or {},
    )


def table_row(row: Row, zero: float, site: str) -> dict[str, Any]:
    """Return the line of `results.csv` for a trial's job; times are seconds since `zero`."""
    data, state = row["data"], read_state(row)
    asked, gathered = data.get("asked", {}), data.get("gathered", {})
    ended = state in (TrialState.DONE, TrialState.FAILED)
    outcome = read_outcome(row) if ended else {}

    def since(moment: float | None) -> float | None:
        return None if moment is None else round(moment - zero, 3)

    line: dict[str, Any] = {f"p:{name}": value for name, value in read_config(row).items()}
    line["objective"] = outcome.get("objective")
    line["job_id"] = trial_number(row)
    line["job_status"] = state.value
    line["m:timestamp_submit"] = since(asked.get("at"))
    line["m:timestamp_start"] = since(outcome.get("start"))
    line["m:timestamp_end"] = since(outcome.get("end"))
    line["m:timestamp_gather"] = since(gathered.get("at"))
    line["m:balsam_job_id"] = row["id"]
    line["m:site"] = site
    line["m:failure"] = outcome.get("failure") or (NEVER_STARTED if state is TrialState.CANCELLED else None)
    if earlier_tries(row):
        line["m:retried_after"] = "; ".join(_said_of(earlier) for earlier in earlier_tries(row))
    if data.get("moved_from"):
        line["m:moved_from"] = "; ".join(data["moved_from"])
    if gathered.get("cuts"):
        line["m:cut_by_allocations"] = gathered["cuts"]
    for name, value in (outcome.get("metadata") or {}).items():
        column = f"m:{name}" if f"m:{name}" not in line else f"m:metadata:{name}"  # ours stay what they are
        line[column] = json.dumps(value) if isinstance(value, (dict, list)) else value
    return line


def choose_one(rows: Sequence[Row]) -> Row:
    """Return which of several jobs of one trial stands for it.

    One taken in, with a result, that was not taken to another site, that runs, the oldest.
    """

    def rank(row: Row) -> tuple[bool, bool, bool, bool, int]:
        has_result = "result" in row["data"] or read_state(row) is TrialState.DONE
        waits = row["state"] in WAITING_STATES
        return "gathered" not in row["data"], not has_result, has_left(row), waits, int(row["id"])

    return min(rows, key=rank)


def set_aside(gateway: Gateway, search: str, rows: Iterable[Row], kept: Mapping[int, int], now: float) -> None:
    """Take jobs out of their search, because other ones stand for their trials.

    That a trial has two happens when it was taken to another site, and when the answer to their creation was lost and
    the driver died, or looked too early. The job loses the tag ``search`` and says why in ``data["set_aside"]``; if it
    waits, it never runs. A run of it that is under way ends by itself, and nobody counts it.

    Parameters
    ----------
    kept
        The id of the job that stands for the trial, by the trial's number.
    """
    changes, waiting = {}, []
    for row in rows:
        kept_id = kept[trial_number(row)]
        tags = {"set_aside": search, "trial": row["tags"]["trial"]}
        why = {"at": now, "why": f"job {kept_id} stands for the same trial", "kept": kept_id}
        changes[row["id"]] = (tags, {**row["data"], "set_aside": why})
        if row["state"] != "FAILED":
            waiting.append(row["id"])
    gateway.retag_jobs(changes)
    if waiting:
        why_all = "another job stands for the same trial"
        gateway.move_jobs({"set_aside": search}, WAITING_STATES, "FAILED", why_all, waiting)


# --- from one site to another ----------------------------------------------------------------------------------------
#
# A job cannot change its application, and that belongs to a site. So the job is first ended, then another is made for
# the same trial, then the first is set aside. After each step the jobs alone say what is left to be done.


def has_left(row: Row) -> bool:
    """Return whether a job was ended to take its trial to another site: the trial waits, and needs another job."""
    data = row["data"]
    return row["state"] == "FAILED" and "moved" in data and "result" not in data and "cancelled" not in data


def waiting_at(gateway: Gateway, search: str, app_ids: Iterable[int], *, abandoned: bool) -> list[Row]:
    """Return the jobs of a search that wait at a site and that nothing holds; the oldest first.

    Parameters
    ----------
    app_ids
        The applications of the site.
    abandoned
        No agent works there: what its processes held, and what a launcher was cut in, is free too.
    """
    apps = set(app_ids)
    rows = gateway.jobs(trial_tags(search), states=_LEAVABLE if abandoned else WAITING_STATES)

    def is_held(row: Row) -> bool:
        return bool(row.get("session_id")) and (row["state"] in _RUNNABLE or not abandoned)

    return [row for row in rows if row["app_id"] in apps and "result" not in row["data"] and not is_held(row)]


def leave_site(gateway: Gateway, search: str, rows: Sequence[Row], site: str, now: float) -> None:
    """End jobs that wait at a site, so that their trials can go to another one; what began meanwhile goes on."""
    moved = {"at": now, "from": site}
    gateway.write_data({row["id"]: {**row["data"], "moved": moved} for row in rows})
    why = f"nothing runs at {site}: it goes to another site"
    gateway.move_jobs(trial_tags(search), _LEAVABLE, "FAILED", why, [row["id"] for row in rows])


def job_elsewhere(row: Row, app_id: int, wall_time_min: int, cuts: int) -> Row:
    """Return the job of the same trial at another site, ready to be created; `cuts` by allocations came before."""
    kept = {key: row["data"][key] for key in ("asked", "eval_timeout_s", "tries", "own_minutes") if key in row["data"]}
    cuts += row["data"].get("cuts_before", 0)
    if cuts:
        kept["cuts_before"] = cuts
    moved_from = [*row["data"].get("moved_from", ()), row["data"]["moved"]["from"]]
    return {
        "app_id": app_id,
        "workdir": row["workdir"],
        "tags": row["tags"],
        "serialized_parameters": row["serialized_parameters"],
        "data": {**kept, "moved_from": moved_from},
        "node_packing_count": row["node_packing_count"],
        "wall_time_min": row["wall_time_min"] if "own_minutes" in kept else wall_time_min,
        **{name: row[name] for name in _COPIED},
    }


def _said_of(earlier: Mapping[str, Any]) -> str:
    host = earlier.get("host")
    return f"{earlier.get('failure')}" + (f" on {host}" if host else "")


def is_orphan(row: Row) -> bool:
    """Return whether a job is RUNNING without a result and no launcher holds it: it would stay so for ever."""
    held = row.get("session_id", "unknown") is not None
    return row["state"] == "RUNNING" and "result" not in row["data"] and not held


def give_back(gateway: Gateway, search: str, orphans: Iterable[Row]) -> None:
    """Let other launchers run jobs that are RUNNING and that no launcher holds."""
    ids = [row["id"] for row in orphans]
    if ids:
        gateway.move_jobs(trial_tags(search), ("RUNNING",), "RESTART_READY", "no launcher holds it", ids)


def mend(gateway: Gateway, search: str, rows: Iterable[Row]) -> None:
    """Mend what a driver or launcher that was killed left behind among a search's jobs.

    A job that is RUNNING but that no launcher holds would stay so for ever: it goes back to the queue. A job that waits
    although its result is in would take a node for nothing: it is finished.
    """
    tags = trial_tags(search)
    rows = list(rows)
    give_back(gateway, search, filter(is_orphan, rows))
    ended = [row["id"] for row in rows if row["state"] in WAITING_STATES and "result" in row["data"]]
    if ended:
        gateway.move_jobs(tags, WAITING_STATES, "JOB_FINISHED", RESULT_IS_IN, ended)


def settle(gateway: Gateway, search: str, patience_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Let Balsam note the ends of runs whose results are in, before their launcher ends; else note them for it."""
    tags = trial_tags(search)
    pauses = max(1, round(patience_s / _LOOK_S))
    for _ in range(pauses):
        open_ids = [row["id"] for row in gateway.jobs(tags, states=NOT_FINAL_STATES) if "result" in row["data"]]
        if not open_ids:
            return
        sleep(_LOOK_S)
    gateway.move_jobs(tags, NOT_FINAL_STATES, "JOB_FINISHED", RESULT_IS_IN, open_ids)


def finish_answered(gateway: Gateway, search: str, rows: Iterable[Row]) -> None:
    """Finish jobs whose result is in before any node was asked (a configuration that no allocation can run)."""
    ids = [row["id"] for row in rows if row["state"] in WAITING_STATES and not row.get("session_id")]
    if ids:
        gateway.move_jobs(trial_tags(search), WAITING_STATES, "JOB_FINISHED", RESULT_IS_IN, ids)


def withdraw_waiting(gateway: Gateway, search: str, now: float, between: Sequence[Row] = ()) -> set[int]:
    """Withdraw the trials of a search that no node has begun; the ids of their jobs.

    Parameters
    ----------
    between
        Jobs of trials on their way to another site (`has_left`).


    What a launcher already holds is left to it: its next word about the job would come after ours. A run that began in
    between goes on, and its result counts.
    """
    tags = trial_tags(search)
    rows = {
        row["id"]: row
        for row in gateway.jobs(tags, states=WAITING_STATES)
        if "result" not in row["data"] and not (row["state"] in _RUNNABLE and row.get("session_id"))
    }
    waiting = list(rows)
    rows.update({row["id"]: row for row in between})
    gateway.write_data({job_id: {**row["data"], "cancelled": now} for job_id, row in rows.items()})
    if waiting:
        gateway.move_jobs(tags, WAITING_STATES, "FAILED", NEVER_STARTED, waiting)
    return set(rows)


def updated_at(row: Row) -> float:
    """Return when Balsam last changed the job."""
    return parse_time(row["last_update"])
