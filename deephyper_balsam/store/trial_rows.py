"""How a trial stands in Balsam's job table: functions between trials and rows.

A trial's job carries the tags ``search`` (the search's name) and ``trial`` (its number), the configuration as
parameters, and in `data` what `store.trial_data` says: no other module looks into it.

Times are seconds since the epoch (UTC).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from deephyper_balsam.common.objective import LOSS, turned
from deephyper_balsam.errors import BalsamError
from deephyper_balsam.node import failure_policy
from deephyper_balsam.node.targets import shorten
from deephyper_balsam.store import trial_data
from deephyper_balsam.store.encoding import pack, parse_time, unpack, unpack_error
from deephyper_balsam.store.gateway import WAITING_STATES, Gateway, Row
from deephyper_balsam.store.trial_data import EarlierTry, Outcome
from deephyper_balsam.trial import Config, Origin, Resources, Result, Trial, TrialState

CURVE = "m:curve"
"""The column with what a run recorded: a list of pairs of a budget and an objective."""
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
_CLOCKS_DIFFER_S = 30.0


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
    parameters = pack(trial.config)
    needs = asdict(resources)
    needs["node_packing_count"] = needs.pop("evals_per_node")
    return {
        "app_id": app_id,
        "workdir": f"{search}/{trial.number:06d}",
        "tags": {**trial_tags(search), "trial": str(trial.number)},
        "serialized_parameters": parameters,
        "data": trial_data.new_data(trial.origin, parameters, asked_at, eval_timeout_s, **data),
        **needs,
    }


def trial_number(row: Row) -> int:
    """Return the number of the trial that a job stands for."""
    return int(row["tags"]["trial"])


def is_trial(row: Row) -> bool:
    """Return whether a job stands for a trial; anybody can give a job of theirs the tag of a search."""
    return str(row["tags"].get("trial", "")).isdecimal()


def read_trial(row: Row) -> Trial:
    """Return the trial that a job stands for."""
    asked = trial_data.asked(row)
    origin = Origin(asked.get("kind", "user"), asked.get("told", 0), asked.get("model", 0))
    return Trial(trial_number(row), read_config(row), origin)


def read_config(row: Row) -> Config:
    """Return the configuration of a trial's job: the one that was asked for, whatever the job's parameters say now."""
    return dict(unpack(_asked_parameters(row)))


def _asked_parameters(row: Row) -> str:
    return trial_data.asked(row).get("parameters") or str(row["serialized_parameters"])


def is_edited(row: Row) -> bool:
    """Return whether somebody changed the parameters of a trial's job: what it returns belongs to another trial."""
    asked, now = _asked_parameters(row), row["serialized_parameters"]
    if asked == now:
        return False
    try:
        return bool(unpack(now) != unpack(asked))
    except BalsamError:
        return True


def read_state(row: Row) -> TrialState:
    """Return where a trial stands; a state that this Balsam should not have counts as waiting.

    One that the driver will let run once more is RUNNING until it does.
    """
    if runs_again(row):
        return TrialState.RUNNING
    outcome = trial_data.result(row)
    if outcome is not None:
        return TrialState.FAILED if outcome.get("objective") is None else TrialState.DONE
    state = _STATES.get(row["state"], TrialState.READY)
    if state is TrialState.DONE:
        return TrialState.FAILED if read_outcome(row)["objective"] is None else TrialState.DONE
    if state is TrialState.FAILED and trial_data.is_cancelled(row):
        return TrialState.CANCELLED
    if has_left(row):
        return TrialState.READY
    return state


def read_outcome(row: Row) -> Outcome:
    """Return how the trial of a job in a final state ended: the run's own words, else Balsam's."""
    outcome = trial_data.result(row)
    if outcome is not None:
        return cast(Outcome, dict(outcome))
    failure = f"the run left no result; see job.out in the folder {row['workdir']} of the site's data"
    fault = failure_policy.Fault.MACHINE
    try:
        if row.get("serialized_return_value"):
            returned = unpack(row["serialized_return_value"])
            if isinstance(returned, dict) and "objective" in returned:
                return cast(Outcome, returned)
            raise BalsamError("What the run returned is no outcome of ours: another program wrote it")
        if row.get("serialized_exception"):
            failure = shorten(unpack_error(row["serialized_exception"]))
    except BalsamError as error:
        failure, fault = str(error), failure_policy.Fault.CONFIGURATION
    return trial_data.failed(failure, fault)


def runs_again(row: Row) -> bool:
    """Return whether a trial's run ended by the machine's fault and is to be run once more."""
    if trial_data.is_settled(row) or (not trial_data.has_result(row) and row["state"] not in FINAL_STATES):
        return False
    if has_left(row):
        return False
    return failure_policy.runs_again(read_outcome(row), len(trial_data.earlier_tries(row)))


def run_again(gateway: Gateway, outcomes: Mapping[int, Outcome], rows: Iterable[Row]) -> list[Row]:
    """Give trials whose run ended by the machine's fault back to the queue, once Balsam is done with the run.

    Parameters
    ----------
    gateway
        Balsam's API.
    outcomes
        How each of `rows` ended, by the job's id.
    rows
        Jobs whose run ended by the machine's fault.

    Returns
    -------
    list[Row]
        The rows that wait now, changed here as in Balsam.
    """
    again = [row for row in rows if row["state"] in FINAL_STATES]  # before that the launcher still has something to say
    changed = {row["id"]: trial_data.with_another_try(row, outcomes[row["id"]]) for row in again}
    gateway.restart_jobs(changed, "ended by the machine's fault: once more")
    for row in again:
        row.update(data=changed[row["id"]], state="RESTART_READY", serialized_return_value="", serialized_exception="")
    return again


def in_our_time(outcome: Outcome, asked_at: float | None, now: float) -> Outcome:
    """Return an outcome with times that can be true: not before its trial was asked for, and not after now.

    A node whose clock was set, or is wrong by more than half a minute, tells others; how long the run took is right all
    the same. Such times are moved so that the run ended now, which is when its result arrived.
    """
    start, end = outcome.get("start"), outcome.get("end")
    if start is None or end is None:
        return outcome
    too_early = asked_at is not None and start < asked_at - _CLOCKS_DIFFER_S
    if not too_early and end <= now + _CLOCKS_DIFFER_S:
        return outcome
    return {**outcome, "start": start + now - end, "end": now}


def read_result(number: int, outcome: Outcome) -> Result:
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
        curve=trial_data.points(outcome.get("curve")),
        stopped=outcome.get("stopped", False),
    )


def table_row(row: Row, zero: float, site: str) -> dict[str, Any]:
    """Return the line of `results.csv` for a trial's job; times are seconds since `zero`."""
    state = read_state(row)
    gathered = trial_data.gathered(row) or {}
    outcome = read_outcome(row) if state in (TrialState.DONE, TrialState.FAILED) else Outcome()

    def since(moment: float | None) -> float | None:
        return None if moment is None else round(moment - zero, 3)

    line: dict[str, Any] = {f"p:{name}": value for name, value in read_config(row).items()}
    line["objective"] = outcome.get("objective")
    if trial_data.is_minimized(row):
        line[LOSS] = None if line["objective"] is None else turned(line["objective"], True)
    line["job_id"] = trial_number(row)
    line["job_status"] = state.value
    line["m:timestamp_submit"] = since(trial_data.asked_at(row))
    line["m:timestamp_start"] = since(outcome.get("start"))
    line["m:timestamp_end"] = since(outcome.get("end"))
    line["m:timestamp_gather"] = since(gathered.get("at"))
    line["m:duration"] = _duration(outcome)
    line["m:balsam_job_id"] = row["id"]
    line["m:site"] = site
    line["m:node"] = outcome.get("host")
    line["m:failure"] = outcome.get("failure") or (NEVER_STARTED if state is TrialState.CANCELLED else None)
    if tries := trial_data.earlier_tries(row):
        line["m:retried_after"] = "; ".join(map(_said_of, tries))
    if sites := trial_data.moved_from(row):
        line["m:moved_from"] = "; ".join(sites)
    if outcome.get("code"):
        line["m:code"] = outcome["code"]
    if gathered.get("cuts"):
        line["m:cut_by_allocations"] = gathered["cuts"]
    add_curve(line, trial_data.points(outcome.get("curve")), stopped=outcome.get("stopped", False))
    add_metadata(line, outcome.get("metadata") or {})
    return line


def add_curve(line: dict[str, Any], curve: Sequence[Sequence[float]] | None, *, stopped: bool) -> None:
    """Put what a run recorded into a line of the table: the budget that it used, whether it was stopped, its curve."""
    if curve:
        line.update({"m:budget": curve[-1][0], "m:stopped": stopped, CURVE: [list(point) for point in curve]})


def add_metadata(line: dict[str, Any], metadata: Mapping[str, Any]) -> None:
    """Put what a run returned beside its objective into a line of `results.csv`; its other columns are there."""
    for name, value in metadata.items():
        column = f"m:metadata:{name}" if f"m:{name}" in line else f"m:{name}"  # ours stay what they are
        line[column] = json.dumps(value) if isinstance(value, (dict, list)) else value


def _duration(outcome: Outcome) -> float | None:
    """Return the seconds that the run function took, by its node's clock; None: it left no times."""
    start, end = outcome.get("start"), outcome.get("end")
    return None if start is None or end is None else round(max(0.0, end - start), 3)


def choose_one(rows: Sequence[Row]) -> Row:
    """Return which of several jobs of one trial stands for it.

    One taken in, with a result, that was not taken to another site, that runs, the oldest.
    """

    def rank(row: Row) -> tuple[bool, bool, bool, bool, int]:
        has_result = trial_data.has_result(row) or read_state(row) is TrialState.DONE
        waits = row["state"] in WAITING_STATES
        return not trial_data.is_gathered(row), not has_result, has_left(row), waits, int(row["id"])

    return min(rows, key=rank)


def set_aside(gateway: Gateway, search: str, rows: Iterable[Row], kept: Mapping[int, int], now: float) -> None:
    """Take jobs out of their search, because other ones stand for their trials.

    That a trial has two happens when it was taken to another site, and when the answer to their creation was lost and
    the driver died, or looked too early. The job loses the tag ``search`` and says why in ``data["set_aside"]``; if it
    waits, it never runs. A run of it that is under way ends by itself, and nobody counts it.

    Parameters
    ----------
    gateway
        Balsam's API.
    search
        The search's name.
    rows
        The jobs that count no more.
    kept
        The id of the job that stands for the trial, by the trial's number.
    now
        Seconds since the epoch.
    """
    changes, waiting = {}, []
    for row in rows:
        kept_id = kept[trial_number(row)]
        tags = {"set_aside": search, "trial": row["tags"]["trial"]}
        changes[row["id"]] = (tags, trial_data.with_set_aside(row, kept_id, now))
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
    return row["state"] == "FAILED" and trial_data.is_moved(row)


def waiting_at(gateway: Gateway, search: str, app_ids: Iterable[int], *, abandoned: bool) -> list[Row]:
    """Return the jobs of a search that wait at a site and that nothing holds; the oldest first.

    Parameters
    ----------
    gateway
        Balsam's API.
    search
        The search's name.
    app_ids
        The applications of the site.
    abandoned
        No agent works there: what its processes held, and what a launcher was cut in, is free too.
    """
    apps = set(app_ids)
    rows = gateway.jobs(trial_tags(search), states=_LEAVABLE if abandoned else WAITING_STATES)

    def is_held(row: Row) -> bool:
        return bool(row.get("session_id")) and (row["state"] in _RUNNABLE or not abandoned)

    return [row for row in rows if row["app_id"] in apps and not trial_data.has_result(row) and not is_held(row)]


def leave_site(gateway: Gateway, search: str, rows: Sequence[Row], site: str, now: float) -> None:
    """End jobs that wait at a site, so that their trials can go to another one; what began meanwhile goes on."""
    gateway.write_data({row["id"]: trial_data.with_moved(row, site, now) for row in rows})
    why = f"nothing runs at {site}: it goes to another site"
    gateway.move_jobs(trial_tags(search), _LEAVABLE, "FAILED", why, [row["id"] for row in rows])


def job_elsewhere(row: Row, app_id: int, wall_time_min: int, cuts: int) -> Row:
    """Return the job of the same trial at another site, ready to be created; `cuts` by allocations came before."""
    return {
        "app_id": app_id,
        "workdir": row["workdir"],
        "tags": row["tags"],
        "serialized_parameters": row["serialized_parameters"],
        "data": trial_data.at_another_site(row, cuts),
        "node_packing_count": row["node_packing_count"],
        "wall_time_min": row["wall_time_min"] if trial_data.has_own_minutes(row) else wall_time_min,
        **{name: row[name] for name in _COPIED},
    }


def _said_of(earlier: EarlierTry) -> str:
    host = earlier.get("host")
    return f"{earlier.get('failure')}" + (f" on {host}" if host else "")


def is_orphan(row: Row) -> bool:
    """Return whether a job is RUNNING without a result and no launcher holds it: it would stay so for ever."""
    held = row.get("session_id", "unknown") is not None
    return row["state"] == "RUNNING" and not trial_data.has_result(row) and not held


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
    ended = [row["id"] for row in rows if row["state"] in WAITING_STATES and trial_data.has_result(row)]
    if ended:
        gateway.move_jobs(tags, WAITING_STATES, "JOB_FINISHED", RESULT_IS_IN, ended)


def settle(gateway: Gateway, search: str, patience_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Let Balsam note the ends of runs whose results are in, before their launcher ends; else note them for it."""
    tags = trial_tags(search)
    pauses = max(1, round(patience_s / _LOOK_S))
    for _ in range(pauses):
        open_ids = [row["id"] for row in gateway.jobs(tags, states=NOT_FINAL_STATES) if trial_data.has_result(row)]
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
    gateway
        Balsam's API.
    search
        The search's name.
    now
        Seconds since the epoch.
    between
        Jobs of trials on their way to another site (`has_left`).


    What a launcher already holds is left to it: its next word about the job would come after ours. A run that began in
    between goes on, and its result counts.
    """
    tags = trial_tags(search)
    rows = {
        row["id"]: row
        for row in gateway.jobs(tags, states=WAITING_STATES)
        if not trial_data.has_result(row) and not (row["state"] in _RUNNABLE and row.get("session_id"))
    }
    waiting = list(rows)
    rows.update({row["id"]: row for row in between})
    gateway.write_data({job_id: trial_data.with_cancelled(row, now) for job_id, row in rows.items()})
    if waiting:
        gateway.move_jobs(tags, WAITING_STATES, "FAILED", NEVER_STARTED, waiting)
    return set(rows)


def updated_at(row: Row) -> float:
    """Return when Balsam last changed the job."""
    return parse_time(row["last_update"])
