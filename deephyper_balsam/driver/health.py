"""What goes wrong with runs and nodes while a search goes on: second tries, cuts by allocations, nodes that fail all.

What it knows comes from the jobs and from Balsam's event log, so that it is the same after the driver began anew.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from deephyper_balsam.node import failure_policy
from deephyper_balsam.store import trial_data, trial_rows
from deephyper_balsam.store.cuts import cut_after_s, read_cuts
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.trial_data import EarlierTry, Outcome

logger = logging.getLogger(__name__)

_LOOK_BACK_S = 600.0  # the times in the event log are the launchers'


class Health:
    """Watches the runs of one search.

    Parameters
    ----------
    explain
        Returns how the runs of jobs ended, by the job's id.
    max_cuts
        After so many cuts of a run that had the whole of an allocation, its trial fails; 0: never.

    Attributes
    ----------
    failed_by_cuts
        How many trials failed so.
    """

    def __init__(
        self,
        gateway: Gateway,
        search: str,
        explain: Callable[[Sequence[Row]], dict[int, Outcome]],
        max_cuts: int = failure_policy.DEFAULT_MAX_CUTS,
    ) -> None:
        self._gateway, self._search, self._explain, self._max_cuts = gateway, search, explain, max_cuts
        self.failed_by_cuts = 0
        self._lasted: dict[int, tuple[int, list[float]]] = {}  # job id -> cuts, and how long each run had lasted then
        self.nodes = failure_policy.Nodes()
        self.retried = 0
        self._cuts: dict[int, set[int]] = {}  # job id -> the events of Balsam's log in which it was cut
        self._numbers: dict[int, int] = {}
        self._looked_at: float | None = None
        self._too_long: dict[int, float] = {}  # trial number -> seconds after which it was cut last
        self._warned: set[str] = set()

    def restore(self, rows: Sequence[Row]) -> None:
        """Take in what is known from before: the rows of the search's jobs."""
        for row in rows:
            self._note_tries(row)
            if trial_data.is_gathered(row):
                self._count(trial_rows.read_outcome(row))
        self._warn_of_nodes()
        open_ids = [row["id"] for row in rows if not trial_rows.read_state(row).is_final]
        self._read_cuts(read_cuts(self._gateway, open_ids))

    # --- second tries --------------------------------------------------------------------------------------------

    def run_again(self, rows: Sequence[Row]) -> None:
        """Let run once more what of `rows` ended by the machine's fault; those that wait now are changed here, too."""
        ended = [row for row in rows if trial_rows.runs_again(row)]
        if not ended:
            return
        for row in trial_rows.run_again(self._gateway, self._explain(ended), ended):
            earlier = self._note_tries(row)[-1]
            where = f" on {earlier['host']}" if earlier.get("host") else ""
            logger.warning("Trial %d: %s%s; it runs once more", trial_rows.trial_number(row), earlier["failure"], where)
        self._warn_of_nodes()

    def _note_tries(self, row: Row) -> list[EarlierTry]:
        tries = trial_data.earlier_tries(row)
        for earlier in tries:
            self.nodes.add(earlier.get("host"), failure_policy.Fault.MACHINE)
        self.retried += len(tries)
        return tries

    def take_in(self, outcome: Mapping[str, Any]) -> None:
        """Take in how a run ended for good."""
        self._count(outcome)
        self._warn_of_nodes()

    def _count(self, outcome: Mapping[str, Any]) -> None:
        fault = failure_policy.of_outcome(outcome)
        self.nodes.add(outcome.get("host"), fault)
        self.failed_by_cuts += fault is failure_policy.Fault.ALLOCATION

    def _warn_of_nodes(self) -> None:
        for host, count in self.nodes.suspects().items():
            if host not in self._warned:
                self._warned.add(host)
                logger.warning("Node %s failed all %d runs that it got, while others work", host, count)

    @property
    def suspects(self) -> list[str]:
        """Return the nodes that fail everything they get."""
        return sorted(self.nodes.suspects())

    # --- cuts by the end of allocations --------------------------------------------------------------------------

    def cuts(self, job_id: int) -> int:
        """Return how often the end of an allocation has cut the run of a job."""
        return len(self._cuts.get(job_id, ()))

    def look_for_cuts(
        self, rows: Iterable[Row], now: float, wall_time_s: Callable[[int], float | None]
    ) -> dict[int, Outcome]:
        """Read in Balsam's log which runs were cut, if `rows` of changed jobs hold a sign of it.

        Parameters
        ----------
        rows
            The jobs that changed.
        now
            The server's clock.
        wall_time_s
            The time of an allocation where the trial of this number is, to tell a run that is longer; None: unknown.

        Returns
        -------
        dict
            The outcomes of trials that no allocation holds, by the job's id: they have failed. The same call, made
            again, returns the same.
        """
        signs = [
            row for row in rows if row["state"] in ("RUN_TIMEOUT", "RESTART_READY") and not trial_data.has_result(row)
        ]
        if not signs:
            return {}
        self._numbers.update({row["id"]: trial_rows.trial_number(row) for row in signs})
        since = (now if self._looked_at is None else min(now, self._looked_at)) - _LOOK_BACK_S
        tags = [f"{key}:{value}" for key, value in trial_rows.trial_tags(self._search).items()]
        self._read_cuts(read_cuts(self._gateway, tags=tags, timestamp_after=_iso(since)))
        self._looked_at = now
        most = self._max_cuts or failure_policy.DEFAULT_MAX_CUTS
        often = [row["id"] for row in signs if self.cuts(row["id"]) >= most and not _gets_on(row, most)]
        self._read_lengths(often)
        failed: dict[int, Outcome] = {}
        for job_id in often:
            number, (cuts, lasted) = self._numbers[job_id], self._lasted[job_id]
            wall_s = wall_time_s(number)
            if not wall_s or not failure_policy.is_too_long(lasted, wall_s, most):
                continue
            if self._max_cuts:
                why = failure_policy.too_long(cuts, lasted[-1], wall_s)
                failed[job_id] = trial_data.failed(why, failure_policy.Fault.ALLOCATION)
            elif number not in self._too_long:
                self._too_long[number] = lasted[-1]
                logger.warning("%s", too_long_said({number: lasted[-1]}))
        return failed

    def _read_cuts(self, events: Iterable[Row]) -> None:
        for event in events:
            self._cuts.setdefault(event["job_id"], set()).add(event["id"])

    def _read_lengths(self, job_ids: Iterable[int]) -> None:
        """Read how long the runs of these jobs had lasted when they were cut, where there are new cuts."""
        due = [job_id for job_id in job_ids if self._lasted.get(job_id, (0,))[0] != self.cuts(job_id)]
        events: dict[int, list[Row]] = {job_id: [] for job_id in due}
        for event in self._gateway.events(job_ids=due) if due else ():
            events[event["job_id"]].append(event)
        for job_id in due:
            self._lasted[job_id] = self.cuts(job_id), cut_after_s(events[job_id])

    @property
    def notice(self) -> str | None:
        """What a person should know, if there is something."""
        said = []
        if self._too_long:
            said.append(too_long_said(self._too_long))
        suspects = self.nodes.suspects()
        if suspects:
            said.append("failed all they got: " + ", ".join(f"{host} ({count}x)" for host, count in suspects.items()))
        return "; ".join(said) or None


def _gets_on(row: Row, max_cuts: int) -> bool:
    """Return whether a run that is cut again and again goes on from its own checkpoints."""
    stalled = trial_data.stalled(row)
    return stalled is not None and stalled < max_cuts


def read_health(gateway: Gateway, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what went wrong with the runs and nodes of a search, as Balsam knows it, from the jobs of its trials.

    Returns
    -------
    dict
        ``retried`` (how many runs began once more after the machine's fault), ``retried_after`` (reason -> how many),
        ``failing_nodes`` (node -> runs that it failed, all it got), ``cut`` (trial that has not ended -> how often an
        allocation cut it), ``too_long`` (trial -> seconds after which it was cut last).
    """
    nodes, after = failure_policy.Nodes(), Counter[str]()
    for row in rows:
        for earlier in trial_data.earlier_tries(row):
            nodes.add(earlier.get("host"), failure_policy.Fault.MACHINE)
            after[str(earlier.get("failure"))] += 1
        outcome = trial_data.result(row)
        if outcome is not None and not trial_rows.runs_again(row):
            nodes.add(outcome.get("host"), failure_policy.of_outcome(outcome))
    open_rows = (row for row in rows if not trial_data.is_gathered(row))
    numbers = {row["id"]: trial_rows.trial_number(row) for row in open_rows if not trial_rows.read_state(row).is_final}
    cuts = Counter(event["job_id"] for event in read_cuts(gateway, list(numbers)))
    often = [job_id for job_id, count in cuts.items() if count >= failure_policy.DEFAULT_MAX_CUTS]
    return {
        "retried": sum(after.values()),
        "retried_after": dict(after),
        "failing_nodes": nodes.suspects(),
        "cut": {numbers[job_id]: count for job_id, count in sorted(cuts.items())},
        "too_long": _too_long(gateway, {job_id: numbers[job_id] for job_id in often}),
    }


def _too_long(gateway: Gateway, numbers: Mapping[int, int]) -> dict[int, float]:
    if not numbers:
        return {}
    wall_time_min = {row["id"]: row["wall_time_min"] for row in gateway.batch_jobs([s["id"] for s in gateway.sites()])}
    found = {}
    for row in gateway.jobs({}, ids=list(numbers)):
        lasted = cut_after_s(gateway.events(job_id=row["id"]))
        if row["batch_job_id"] in wall_time_min and failure_policy.is_too_long(
            lasted, 60 * wall_time_min[row["batch_job_id"]]
        ):
            found[numbers[row["id"]]] = lasted[-1]
    return found


def too_long_said(cut: Mapping[int, float]) -> str:
    """Return the words for trials that are longer than the allocations: number -> seconds until it was cut last."""
    names = ", ".join(f"trial {number} ({after_s / 60:.0f} min the last time)" for number, after_s in cut.items())
    return (
        f"cut by {failure_policy.DEFAULT_MAX_CUTS} whole allocations or more: {names}; its runs are longer than the "
        "allocations (ask for a longer `wall_time_min`, --wall-time-min, or give an `eval_timeout`, --eval-timeout)"
    )


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, tz=timezone.utc).replace(tzinfo=None).isoformat()
