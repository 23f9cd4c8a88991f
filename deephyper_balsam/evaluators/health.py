"""What goes wrong with runs and nodes while a search goes on: second tries, cuts by allocations, nodes that fail all.

What it knows comes from the jobs and from Balsam's event log, so that it is the same after the driver began anew.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from deephyper_balsam import faults, jobs
from deephyper_balsam.gateway import Gateway, Row, parse_time

logger = logging.getLogger(__name__)

_LOOK_BACK_S = 600.0  # the times in the event log are the launchers'
# Balsam's own launcher gives its session back before it says which runs it cut: the log then has each twice, the second
# time from another state
_CUT: dict[str, Any] = {"from_state": "RUNNING", "to_state": "RUN_TIMEOUT"}


class Health:
    """Watches the runs of one search.

    Parameters
    ----------
    explain
        Returns how the run of a job ended.
    """

    def __init__(self, gateway: Gateway, search: str, explain: Callable[[Row], dict[str, Any]]) -> None:
        self._gateway, self._search, self._explain = gateway, search, explain
        self.nodes = faults.Nodes()
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
            if "gathered" in row["data"]:
                self.take_in(row["data"]["result"])
        open_ids = [row["id"] for row in rows if not jobs.read_state(row).is_final]
        self._numbers.update({row["id"]: jobs.trial_number(row) for row in rows})
        self._read_cuts(read_cuts(self._gateway, open_ids))

    # --- second tries --------------------------------------------------------------------------------------------

    def run_again(self, rows: Sequence[Row]) -> None:
        """Let run once more what of `rows` ended by the machine's fault; those that wait now are changed here, too."""
        ended = [row for row in rows if jobs.runs_again(row)]
        if not ended:
            return
        outcomes = {row["id"]: self._explain(row) for row in ended}
        for row in jobs.run_again(self._gateway, outcomes, ended):
            earlier = self._note_tries(row)[-1]
            where = f" on {earlier['host']}" if earlier.get("host") else ""
            logger.warning("Trial %d: %s%s; it runs once more", jobs.trial_number(row), earlier["failure"], where)
        self._warn_of_nodes()

    def _note_tries(self, row: Row) -> list[dict[str, Any]]:
        tries = jobs.earlier_tries(row)
        for earlier in tries:
            self.nodes.add(earlier.get("host"), faults.Fault.MACHINE)
        self.retried += len(tries)
        return tries

    def take_in(self, outcome: Mapping[str, Any]) -> None:
        """Take in how a run ended for good."""
        self.nodes.add(outcome.get("host"), faults.of_outcome(outcome))
        self._warn_of_nodes()

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

    def look_for_cuts(self, rows: Iterable[Row], now: float, wall_time_s: Callable[[int], float | None]) -> None:
        """Read in Balsam's log which runs were cut, if `rows` of changed jobs hold a sign of it.

        Parameters
        ----------
        wall_time_s
            The time of an allocation where the trial of this number is, to tell a run that is longer; None: unknown.
        """
        rows = list(rows)
        signs = [row for row in rows if row["state"] in ("RUN_TIMEOUT", "RESTART_READY")]
        if not signs:
            return
        self._numbers.update({row["id"]: jobs.trial_number(row) for row in signs})
        since = (now if self._looked_at is None else self._looked_at) - _LOOK_BACK_S
        tags = [f"{key}:{value}" for key, value in jobs.trial_tags(self._search).items()]
        events = self._gateway.events(tags=tags, timestamp_after=_iso(since), **_CUT)
        new = self._read_cuts(events)
        self._looked_at = now
        for job_id in new:
            number = self._numbers.get(job_id)
            if number is not None and number not in self._too_long:
                self._judge_length(job_id, number, wall_time_s(number))

    def _read_cuts(self, events: Iterable[Row]) -> set[int]:
        new = set()
        for event in events:
            known = self._cuts.setdefault(event["job_id"], set())
            if event["id"] not in known:
                known.add(event["id"])
                new.add(event["job_id"])
        return new

    def _judge_length(self, job_id: int, number: int, wall_time_s: float | None) -> None:
        if self.cuts(job_id) < faults.MAX_CUTS_IN_A_ROW or not wall_time_s:
            return
        lasted = cut_after_s(self._gateway.events(job_id=job_id))
        if faults.is_too_long(lasted, wall_time_s):
            self._too_long[number] = lasted[-1]
            logger.warning("%s", too_long_said({number: lasted[-1]}))

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


def read_health(gateway: Gateway, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what went wrong with the runs and nodes of a search, as Balsam knows it, from the jobs of its trials.

    Returns
    -------
    dict
        ``retried`` (how many runs began once more after the machine's fault), ``retried_after`` (reason -> how many),
        ``failing_nodes`` (node -> runs that it failed, all it got), ``cut`` (trial that has not ended -> how often an
        allocation cut it), ``too_long`` (trial -> seconds after which it was cut last).
    """
    nodes, after = faults.Nodes(), Counter[str]()
    for row in rows:
        data = row["data"]
        for earlier in data.get("tries", ()):
            nodes.add(earlier.get("host"), faults.Fault.MACHINE)
            after[str(earlier.get("failure"))] += 1
        if "result" in data and ("gathered" in data or not jobs.runs_again(row)):
            nodes.add(data["result"].get("host"), faults.of_outcome(data["result"]))
    open_rows = (row for row in rows if "gathered" not in row["data"])
    numbers = {row["id"]: jobs.trial_number(row) for row in open_rows if not jobs.read_state(row).is_final}
    cuts = Counter(event["job_id"] for event in read_cuts(gateway, list(numbers)))
    often = [job_id for job_id, count in cuts.items() if count >= faults.MAX_CUTS_IN_A_ROW]
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
        if row["batch_job_id"] in wall_time_min and faults.is_too_long(lasted, 60 * wall_time_min[row["batch_job_id"]]):
            found[numbers[row["id"]]] = lasted[-1]
    return found


def read_cuts(gateway: Gateway, job_ids: Sequence[int]) -> list[Row]:
    """Return the events of Balsam's log in which runs of these jobs were cut."""
    return list(gateway.events(job_ids=job_ids, **_CUT))


def cut_after_s(events: Iterable[Row]) -> list[float]:
    """Return how long each run of one job had lasted when it was cut, by the job's events, oldest first."""
    began: float | None = None
    lasted = []
    for event in events:
        if event["to_state"] == "RUNNING":
            began = parse_time(event["timestamp"])
        elif event["to_state"] == "RUN_TIMEOUT" and began is not None:
            lasted.append(parse_time(event["timestamp"]) - began)
            began = None
    return lasted


def too_long_said(cut: Mapping[int, float]) -> str:
    """Return the words for trials that are longer than the allocations: number -> seconds until it was cut last."""
    names = ", ".join(f"trial {number} ({after_s / 60:.0f} min the last time)" for number, after_s in cut.items())
    return (
        f"cut by {faults.MAX_CUTS_IN_A_ROW} allocations in a row: {names}; its runs are longer than the allocations "
        "(ask for a longer --wall-time-min, or give an --eval-timeout)"
    )


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, tz=timezone.utc).replace(tzinfo=None).isoformat()
