"""What stands in the `data` of a trial's job: the one module that reads and writes its fields.

The run writes ``result`` only, into a job that a launcher holds; the driver writes the rest, into other jobs, or once
the result is in. Balsam replaces `data` whole, so whoever writes takes what is there and changes his own fields: those
that he does not know stay as they are.

Times are seconds since the epoch (UTC).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TypedDict, cast

from deephyper_balsam.node.failure_policy import Fault
from deephyper_balsam.store.gateway import Row
from deephyper_balsam.store.schema import STAMP, check_schema
from deephyper_balsam.trial import Origin

_OF_A_DECISION = ("rung", "value", "at")


class Asked(TypedDict, total=False):
    """What a trial was asked from (`Origin`) and when, and its parameters as they were given to the job."""

    kind: str
    told: int
    model: int
    at: float
    parameters: str


class Outcome(TypedDict, total=False):
    """How a run ended, as the run itself says it (`node.worker`), or the driver for it.

    `objective` is to be maximised; None: the trial failed, for the reason `failure`. `fault` says whose fault it is
    (`Fault`), `code` with which version of the run function it was evaluated, `output` the end of what it printed.
    `curve` is what the run recorded, as pairs of a budget and an objective to be maximised; `stopped`: it was told to
    stop before its end.
    """

    objective: float | None
    failure: str | None
    fault: str
    traceback: str | None
    start: float | None
    end: float | None
    host: str | None
    code: str
    output: str
    metadata: dict[str, Any]
    curve: list[list[float]]
    stopped: bool


class Stopping(TypedDict, total=False):
    """The stopper of a trial's search (`Stopper.to_dict`), and the id of the note with the standing at its rungs."""

    settings: dict[str, Any]
    note: int


class Gathered(TypedDict, total=False):
    """When a driver collected the result, its position in collection order, and how often allocations had cut it."""

    order: int
    at: float
    cuts: int


class EarlierTry(TypedDict, total=False):
    """A run that ended by the machine's fault, and after which the trial was run once more."""

    failure: str | None
    host: str | None
    start: float | None
    end: float | None


Moved = TypedDict("Moved", {"at": float, "from": str})
"""When and from which site the driver took a trial to another one."""


class SetAside(TypedDict):
    """Why a job counts no more: the job `kept` stands for the same trial."""

    at: float
    why: str
    kept: int


class TrialData(TypedDict, total=False):
    """The `data` of a trial's job.

    `minimize`: what the run returns is a loss, and the objective is minus that. `own_minutes`: the trial has a
    `wall_time_min` of its own. `stopper`: by what it is decided at each rung whether the run goes on; `rungs`: what
    was decided (`Decision.to_dict`, and the time `at`), and `curve` what was recorded until then, both written by the
    run. `progress`: the budget that was reached by each time that the run was begun again. `cancelled`: when the
    driver withdrew it. `moved`: the job is FAILED then, and the trial waits until the job made for it elsewhere
    stands for it. `moved_from` and `cuts_before`: the sites that the trial was at before this one, and how often
    allocations cut its runs there.
    """

    schema: int
    program: str
    asked: Asked
    eval_timeout_s: float
    minimize: bool
    own_minutes: bool
    stopper: Stopping
    rungs: list[dict[str, Any]]
    curve: list[list[float]]
    progress: list[float]
    result: Outcome
    tries: list[EarlierTry]
    gathered: Gathered
    cancelled: float
    moved: Moved
    moved_from: list[str]
    cuts_before: int
    set_aside: SetAside


# --- reading ---------------------------------------------------------------------------------------------------------


def read_data(row: Row) -> TrialData:
    """Return the `data` of a trial's job, which is not copied.

    Parameters
    ----------
    row
        The job.

    Raises
    ------
    NewerVersionError
        A later program wrote it.
    """
    check_schema(row)
    return cast(TrialData, row["data"])


def asked(row: Row) -> Asked:
    """Return what the trial of a job was asked from; empty where somebody replaced what the job held."""
    return read_data(row).get("asked", {})


def asked_at(row: Row) -> float | None:
    """Return when the trial of a job was asked for (epoch); None: not known."""
    return asked(row).get("at")


def result(row: Row) -> Outcome | None:
    """Return the outcome in a job's data; None: it has none yet."""
    return read_data(row).get("result")


def has_result(row: Row) -> bool:
    """Return whether the outcome of a trial is in its job's data."""
    return "result" in read_data(row)


def run_span(row: Row) -> tuple[float, float] | None:
    """Return when the run with the result began and ended (epoch, the node's clock); None: it left no times."""
    outcome = read_data(row).get("result", {})
    start, end = outcome.get("start"), outcome.get("end")
    return None if start is None or end is None else (start, end)


def rungs(row: Row) -> list[dict[str, Any]]:
    """Return what was decided of a trial's run at the rungs of its search's stopper (`Decision.to_dict`, and ``at``).

    What is no decision, where somebody replaced what the job held, is left out.
    """
    found = read_data(row).get("rungs", [])
    return [one for one in found if isinstance(one, dict) and all(map(_is_number, map(one.get, _OF_A_DECISION)))]


def curve(row: Row) -> list[tuple[float, float]]:
    """Return what a trial's run has recorded, as far as it is known: pairs of a budget and an objective."""
    data = read_data(row)
    return points(data.get("result", {}).get("curve") or data.get("curve"))


def points(found: Any) -> list[tuple[float, float]]:
    """Return the points of a curve as a job holds it; what is none is left out.

    Parameters
    ----------
    found
        A list of pairs of a budget and an objective; None: there is none.
    """
    pairs = found if isinstance(found, list) else []
    return [(one[0], one[1]) for one in pairs if isinstance(one, list) and len(one) == 2 and all(map(_is_number, one))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def stalled(row: Row) -> int | None:
    """Return how many starts of a trial's run, the last ones, brought it no further; None: it records nothing.

    The start that was cut last is not known yet, and counts as one that did.
    """
    reached = [budget for budget in read_data(row).get("progress", []) if _is_number(budget)]
    if not reached:
        return None
    count = 0
    for before, after in zip([0.0, *reached][::-1][1:], reached[::-1], strict=True):
        if after > before:
            break
        count += 1
    return count


def whole_budget(row: Row) -> float | None:
    """Return the budget of a run that recorded and came to its own end; None: it did not."""
    outcome = read_data(row).get("result", {})
    recorded = points(outcome.get("curve"))
    if not recorded or outcome.get("stopped") or outcome.get("objective") is None:
        return None
    return recorded[-1][0]


def gathered(row: Row) -> Gathered | None:
    """Return when and as which one a driver collected the result of a job; None: no driver has."""
    return read_data(row).get("gathered")


def is_gathered(row: Row) -> bool:
    """Return whether a driver has collected the result of a job."""
    return "gathered" in read_data(row)


def gathered_at(row: Row) -> float | None:
    """Return when a driver collected the result of a job (epoch); None: no driver has."""
    return read_data(row).get("gathered", {}).get("at")


def position(row: Row) -> int:
    """Return the position of a result that a driver collected, in collection order from 0."""
    return read_data(row)["gathered"]["order"]


def collected(rows: Iterable[Row]) -> list[Row]:
    """Return the jobs whose results a driver collected, in collection order."""
    return sorted(filter(is_gathered, rows), key=position)


def cancelled_at(row: Row) -> float | None:
    """Return when the trial of a job was withdrawn (epoch); None: it was not."""
    return read_data(row).get("cancelled")


def is_cancelled(row: Row) -> bool:
    """Return whether the trial of a job was withdrawn."""
    return "cancelled" in read_data(row)


def is_settled(row: Row) -> bool:
    """Return whether nothing more happens to the trial of a job: its result was collected, or it was withdrawn."""
    data = read_data(row)
    return "gathered" in data or "cancelled" in data


def is_untold(row: Row) -> bool:
    """Return whether neither a run nor a driver has said in a job's data how its trial ended or left."""
    return not {"result", "cancelled", "moved", "gathered"} & read_data(row).keys()


def is_moved(row: Row) -> bool:
    """Return whether the driver ended a job to take its trial to another site, and nothing else came of it."""
    data = read_data(row)
    return "moved" in data and "result" not in data and "cancelled" not in data


def moved_from(row: Row) -> list[str]:
    """Return the sites that the trial of a job was at before."""
    return list(read_data(row).get("moved_from", ()))


def cuts_before(row: Row) -> int:
    """Return how often allocations at other sites cut the runs of a job's trial."""
    return read_data(row).get("cuts_before", 0)


def earlier_tries(row: Row) -> list[EarlierTry]:
    """Return the runs of a trial that ended by the machine's fault and were run once more."""
    return list(read_data(row).get("tries", ()))


def eval_timeout_s(row: Row) -> float | None:
    """Return the time limit of a trial's run in seconds; None: it has none."""
    return read_data(row).get("eval_timeout_s")


def is_minimized(row: Row) -> bool:
    """Return whether a trial's run returns a loss; its objective is then minus that."""
    return read_data(row).get("minimize", False)


def has_own_minutes(row: Row) -> bool:
    """Return whether a job was made with a `wall_time_min` of its own."""
    return "own_minutes" in read_data(row)


# --- writing: each returns the whole `data`, for `Gateway.write_data` -----------------------------------------------


def new_data(origin: Origin, parameters: str, at: float, eval_timeout_s: float | None, **more: Any) -> TrialData:
    """Return the data of a new trial's job.

    Parameters
    ----------
    origin
        What the trial was asked from.
    parameters
        The configuration as it is given to the job.
    at
        When it was asked for (epoch).
    eval_timeout_s
        The time limit of its run in seconds; None: none.
    **more
        Further fields of `TrialData`.
    """
    data = {**STAMP, "asked": {**asdict(origin), "at": at, "parameters": parameters}, **more}
    if eval_timeout_s:
        data["eval_timeout_s"] = eval_timeout_s
    return cast(TrialData, data)


def failed(why: str, fault: Fault | None = Fault.CONFIGURATION) -> Outcome:
    """Return the outcome of a trial that failed without a word of its run.

    Parameters
    ----------
    why
        The reason, in one line.
    fault
        Whose fault it is.
    """
    outcome: Outcome = {"objective": None, "failure": why, "metadata": {}}
    if fault is not None:
        outcome["fault"] = fault.value
    return outcome


def with_result(row: Row, outcome: Outcome) -> TrialData:
    """Return a job's data with the outcome of its trial."""
    return {**read_data(row), "result": outcome}


def with_gathered(row: Row, outcome: Outcome, order: int, at: float, cuts: int) -> TrialData:
    """Return a job's data with its outcome, collected as number `order` at the time `at` (epoch), after `cuts` cuts."""
    how: Gathered = {"order": order, "at": at}
    if cuts:
        how["cuts"] = cuts
    return {**with_result(row, outcome), "gathered": how}


def with_another_try(row: Row, outcome: Outcome) -> TrialData:
    """Return a job's data for one more run, after one that ended by the machine's fault."""
    data = {key: value for key, value in read_data(row).items() if key != "result"}
    this = {key: outcome.get(key) for key in ("failure", "host", "start", "end")}
    return cast(TrialData, {**data, "tries": [*earlier_tries(row), this]})


def with_cancelled(row: Row, at: float) -> TrialData:
    """Return a job's data, withdrawn at a time (epoch)."""
    return {**read_data(row), "cancelled": at}


def with_moved(row: Row, site: str, at: float) -> TrialData:
    """Return the data of a job that leaves a site at a time (epoch)."""
    return {**read_data(row), "moved": {"at": at, "from": site}}


def with_set_aside(row: Row, kept: int, at: float) -> TrialData:
    """Return the data of a job that counts no more since a time (epoch): the job `kept` stands for its trial."""
    why = f"job {kept} stands for the same trial"
    return {**read_data(row), "set_aside": {"at": at, "why": why, "kept": kept}}


def at_another_site(row: Row, cuts: int) -> TrialData:
    """Return the data of the job that takes over the trial of a job that was moved; `cuts` came before."""
    data = read_data(row)
    kept = cast(TrialData, {**STAMP, **{key: value for key, value in data.items() if key != "moved"}})
    if cuts + cuts_before(row):
        kept["cuts_before"] = cuts + cuts_before(row)
    return {**kept, "moved_from": [*moved_from(row), data["moved"]["from"]]}
