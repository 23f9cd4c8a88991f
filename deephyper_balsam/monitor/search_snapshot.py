"""A search at one moment, for a person who watches it; kept up to date from the jobs that changed, and nothing else.

`Tally` takes in each changed job once, wherever it comes from: the driver's own looks, or a reader's
(`monitor.follower`). What it keeps for the snapshot does not grow with the search but for a few words a trial.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deephyper_balsam.common.wording import by_kind
from deephyper_balsam.errors import BalsamError
from deephyper_balsam.store import trial_rows
from deephyper_balsam.store.gateway import Row
from deephyper_balsam.store.node_time import Use, busy_share, places, span
from deephyper_balsam.trial import Config, TrialState

RECENT_S = 300.0
"""The last minutes, over which the rate is told."""

_LEAST_SPAN_S = 30.0  # one result in the first second after a resume is no 60 a minute
_SHOWN = 100  # of the trials that run, and of those that ended; no screen has more rows


@dataclass(frozen=True)
class Best:
    """The best trial so far."""

    objective: float
    number: int
    config: Config


@dataclass(frozen=True)
class Running:
    """A trial that runs, as far as Balsam says so.

    Attributes
    ----------
    since
        When Balsam was told that it runs (epoch); some launchers say so late.
    nodes
        How many it has; a part of one where several share it.
    batch_job_id
        The allocation that has it; None: not known.
    host
        Its node, known only where that allocation has a single one and another run there has told its name.
    """

    number: int
    since: float
    nodes: float
    site: str
    batch_job_id: int | None
    host: str | None = None


@dataclass(frozen=True)
class Ended:
    """A trial that ended: `objective`, or `failure`; `took_s` is None where the run left no times."""

    number: int
    at: float
    took_s: float | None
    objective: float | None
    failure: str | None
    host: str | None


@dataclass(frozen=True)
class AllocationView:
    """A BatchJob that is alive and may run trials of the search.

    Attributes
    ----------
    left_s
        Of its wall time; None: it runs, and nobody has said since when.
    """

    id: int
    site: str
    nodes: int
    state: str
    wall_time_min: int
    left_s: float | None


@dataclass(frozen=True)
class SearchSnapshot:
    """A search at the moment `at` (epoch, the server's clock).

    Attributes
    ----------
    about
        What is searched, how and where, in a few words.
    begun_at
        When the search was begun (epoch).
    steps
        Where the best objective rose: time (epoch), objective; by time.
    running, last
        Of the trials that run the oldest, the oldest first; the last that ended, the newest first. `states` counts all.
    failures
        Reason, how often; the most frequent first.
    busy
        Share of the nodes' time, since the search's allocations began, in which a run was on them (`node_time`); None:
        no run has begun yet.
    elapsed_s
        Seconds that drivers have driven the search.
    max_evals, timeout_s
        The budgets of the whole search; None: no limit.
    driver
        Who drives it, in words; None: nobody.
    complete
        Whether its budget is used, and nobody drives it.
    notice
        What a person should know, or None.
    minimize
        Whether the objectives, which are maximised here, are minus what the runs returned.
    """

    name: str
    about: str
    at: float
    begun_at: float
    states: Mapping[TrialState, int]
    best: Best | None
    steps: Sequence[tuple[float, float]]
    running: Sequence[Running]
    last: Sequence[Ended]
    failures: Sequence[tuple[str, int]]
    allocations: Sequence[AllocationView]
    busy: float | None
    evaluations_per_min: float
    elapsed_s: float
    max_evals: int | None
    timeout_s: float | None
    driver: str | None = None
    complete: bool = False
    notice: str | None = None
    minimize: bool = False

    @property
    def evaluated(self) -> int:
        """Trials that count against `max_evals`: done and failed."""
        return self.states[TrialState.DONE] + self.states[TrialState.FAILED]


def about(method: str, problem: str | None, sites: Iterable[str]) -> str:
    """Return what is searched, how and where, in a few words."""
    return f"{method} on {problem} at {','.join(sites)}"


@dataclass(frozen=True)
class _Seen:
    job_id: int
    state: TrialState
    failure: str | None


class Tally:
    """What is known of a search's trials, told job by job."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._counts: Counter[TrialState] = Counter()
        self._failures: Counter[str] = Counter()
        self._running: dict[int, Running] = {}
        self._last: list[tuple[float, int, Ended]] = []  # the newest last
        self._recent: list[tuple[float, int]] = []  # end, trial
        self._uses: dict[int, Use] = {}  # by BatchJob
        self._counted: dict[int, float] = {}  # trial -> when the run began that was counted last
        self._steps: list[tuple[float, float]] = []
        self._hosts: dict[int, str] = {}  # BatchJob -> a node of it
        self.best: Best | None = None

    def take(self, row: Row, site: str) -> None:
        """Take in a trial's job as it is now, and the name of its site."""
        number, state = trial_rows.trial_number(row), trial_rows.read_state(row)
        outcome = trial_rows.read_outcome(row) if state in (TrialState.DONE, TrialState.FAILED) else {}
        seen = _Seen(row["id"], state, str(outcome.get("failure")) if state is TrialState.FAILED else None)
        before = self._seen.get(number)
        if before is not None:
            if before.job_id != seen.job_id and (trial_rows.has_left(row) or before.state.is_final):
                return  # two jobs of one trial, for a moment: one is about to be set aside
            if before == seen and state.is_final:
                return
            self._forget(number, before)
            self._take_cut(row, number, state)
        self._seen[number] = seen
        self._counts[state] += 1
        if row.get("batch_job_id"):
            self._use(row)
        if state is TrialState.RUNNING:
            self._take_running(row, number, site)
        elif outcome:
            self._take_end(row, number, outcome, seen.failure)

    def _forget(self, number: int, before: _Seen) -> None:
        self._counts[before.state] -= 1
        if before.failure is not None:
            self._failures[before.failure] -= 1
            self._last = [entry for entry in self._last if entry[1] != number]

    def _use(self, row: Row) -> Use:
        use = self._uses.setdefault(row.get("batch_job_id") or -1, Use())
        use.shapes.add((row["num_nodes"], row["node_packing_count"]))
        return use

    def _take_running(self, row: Row, number: int, site: str) -> None:
        before, batch_job_id, since = self._running.get(number), row.get("batch_job_id"), trial_rows.updated_at(row)
        if before is not None and before.batch_job_id == batch_job_id:
            since = min(since, before.since)  # it runs on; something else of the job was changed
        self._use(row).began(since)
        nodes = row["num_nodes"] / row["node_packing_count"]
        self._running[number] = Running(number, since, nodes, site, batch_job_id)

    def _take_cut(self, row: Row, number: int, state: TrialState) -> None:
        """Take the trial off those that run; a run without an end of its own was cut, and was on its node till then."""
        run = self._running.get(number)
        if run is None or (state is TrialState.RUNNING and run.batch_job_id == row.get("batch_job_id")):
            return
        del self._running[number]
        if not state.is_final and run.batch_job_id in self._uses:
            self._uses[run.batch_job_id].run_s += max(0.0, trial_rows.updated_at(row) - run.since)

    def _take_end(self, row: Row, number: int, outcome: Mapping[str, Any], failure: str | None) -> None:
        start, host, batch_job_id = outcome.get("start"), outcome.get("host"), row.get("batch_job_id")
        at = trial_rows.updated_at(row) if outcome.get("end") is None else float(outcome["end"])
        objective = outcome["objective"]
        took_s = None if start is None else max(0.0, at - start)
        bisect.insort(self._last, (at, number, Ended(number, at, took_s, objective, failure, host)))
        del self._last[:-_SHOWN]
        if not self._recent or at > self._recent[-1][0] - RECENT_S:
            bisect.insort(self._recent, (at, number))
            self._drop_before(self._recent[-1][0] - RECENT_S)
        if start is not None and self._counted.get(number) != start:
            self._counted[number] = start
            use = self._use(row)
            use.began(float(start))
            use.run_s += at - start
        if host and batch_job_id:
            self._hosts[batch_job_id] = host
        if failure is not None:
            self._failures[failure] += 1
        elif objective is not None:
            self._take_objective(row, number, at, float(objective))

    def _take_objective(self, row: Row, number: int, at: float, objective: float) -> None:
        place = bisect.bisect_left(self._steps, (at, objective))
        if not place or objective > self._steps[place - 1][1]:
            end = place
            while end < len(self._steps) and self._steps[end][1] <= objective:
                end += 1
            self._steps[place:end] = [(at, objective)]
        if self.best is None or (objective, -number) > (self.best.objective, -self.best.number):
            try:
                config = trial_rows.read_config(row)
            except BalsamError:  # it holds a class that is not installed where this person looks
                config = {}
            self.best = Best(objective, number, config)

    def _drop_before(self, moment: float) -> None:
        del self._recent[: bisect.bisect_left(self._recent, (moment,))]

    # --- what the snapshot shows ---------------------------------------------------------------------------------

    @property
    def states(self) -> dict[TrialState, int]:
        """How many trials are in each state."""
        return {state: self._counts[state] for state in TrialState}

    @property
    def evaluated(self) -> int:
        """Trials that are done or failed."""
        return self._counts[TrialState.DONE] + self._counts[TrialState.FAILED]

    @property
    def steps(self) -> list[tuple[float, float]]:
        """Where the best objective rose."""
        return list(self._steps)

    @property
    def last(self) -> list[Ended]:
        """The trials that ended last, the newest first."""
        return [ended for _, _, ended in reversed(self._last)]

    @property
    def failures(self) -> list[tuple[str, int]]:
        """Reason, how often; those that differ only in numbers are one."""
        return by_kind((reason, count) for reason, count in self._failures.items() if count)

    def running(self, allocations: Sequence[AllocationView]) -> list[Running]:
        """Return those that have run longest, the oldest first: more than a screen has rows."""
        single = {one.id for one in allocations if one.nodes == 1}

        def with_host(run: Running) -> Running:
            host = self._hosts.get(run.batch_job_id or -1) if run.batch_job_id in single else None
            return Running(run.number, run.since, run.nodes, run.site, run.batch_job_id, host)

        oldest = heapq.nsmallest(_SHOWN, self._running.values(), key=lambda run: (run.since, run.number))
        return [with_host(run) for run in oldest]

    def per_min(self, now: float, since: float) -> float:
        """Return the evaluations a minute over the last minutes, or since the search was taken up."""
        span_s = min(RECENT_S, max(now - since, _LEAST_SPAN_S))
        first = bisect.bisect_left(self._recent, (now - span_s,))
        return 60.0 * (len(self._recent) - first) / span_s

    def has_run_in(self, batch_job_id: int) -> bool:
        """Whether a run is known that was in this BatchJob."""
        return batch_job_id in self._uses

    def busy(self, now: float, batch_jobs: Iterable[Row], tags: Mapping[str, str]) -> float | None:
        """Return which share of the nodes' time was in runs (`node_time`).

        Parameters
        ----------
        now
            Seconds since the epoch, by the server's clock.
        batch_jobs
            Those that may have run the search, the ones that ended as well.
        tags
            Those that all trials of the search share.
        """
        open_since: dict[int, list[float]] = {}
        for run in self._running.values():
            open_since.setdefault(run.batch_job_id or -1, []).append(run.since)
        used_s = there_s = 0.0
        for row in batch_jobs:
            use = self._uses.get(row["id"])
            when = span(row, tags, use, now)
            if when is None:
                continue
            start, end = when
            there_s += row["num_nodes"] * (end - start)
            if use is not None:
                runs_s = use.run_s + sum(max(0.0, end - max(since, start)) for since in open_since.get(row["id"], ()))
                share = runs_s / places(row["num_nodes"], use.shapes)  # clocks that are apart make no time
                used_s += row["num_nodes"] * min(end - start, share)
        return busy_share(used_s, there_s)
