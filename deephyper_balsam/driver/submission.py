"""Trials become jobs: in bulk, each at the site that has most room for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deephyper_balsam.common.wording import counted
from deephyper_balsam.driver import start_limits
from deephyper_balsam.driver.driven_search import DrivenSearch
from deephyper_balsam.driver.trial_resources import TrialResources
from deephyper_balsam.errors import InputError
from deephyper_balsam.store import trial_data, trial_rows
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.gateway import Row
from deephyper_balsam.trial import Resources, Trial, TrialState


class Submission:
    """Makes the jobs of a search's trials.

    Parameters
    ----------
    search
        The search.
    needs
        What each evaluation gets.
    requests
        The allocation that is asked for at each site, by its name; None: none.
    eval_timeout_s
        Seconds after which an evaluation is ended; None: no limit.
    """

    def __init__(
        self,
        search: DrivenSearch,
        needs: TrialResources,
        requests: Mapping[str, AllocationRequest | None],
        eval_timeout_s: float | None,
    ) -> None:
        self._search, self._needs, self._requests, self._eval_timeout_s = search, needs, requests, eval_timeout_s

    def submit(self, trials: Sequence[Trial]) -> None:
        """Create the jobs of the trials that have none; see `driver.session.SearchSession.submit`."""
        search = self._search
        search.lease.fence()
        there = search.jobs.there()
        if there:  # only a look at all jobs shows what becomes of those
            search.changes.look_far()
        for trial in trials:
            if trial.number in there:  # it counts at once: the budget may be asked before the next look
                search.table.put(search.line(there[trial.number]))
        self.create([trial for trial in trials if trial.number not in there])
        search.unended.update((trial.number, trial) for trial in trials)

    def create(self, trials: Sequence[Trial]) -> None:
        """Create the jobs of trials, and put these into the table."""
        sites = self._search.sites
        placed: Counter[str] = Counter()
        new = {trial.number: self._new_job(trial, placed) for trial in trials}
        self._search.jobs.create(new)
        free = {site.name: site.capacity - sites.under_way(site) for site in sites}
        by_site: dict[str, list[int]] = {name: [] for name in free}
        for number, row in new.items():
            by_site[sites.of_job(row).name].append(number)
        for where, numbers in by_site.items():
            sites.named(where).delay.submitted(numbers, free[where])
            for number in numbers:
                self._search.table.put({"job_id": number, "job_status": TrialState.READY.value, "m:site": where})

    def _new_job(self, trial: Trial, placed: Counter[str]) -> Row:
        """Return the job of a trial; of one that no allocation can run, a job that has failed already."""
        search = self._search
        site, needs, data = next(iter(search.sites)), Resources(), dict[str, Any]()
        try:
            needs = self._needs.of(trial.config)
            best = search.sites.best_for(needs, placed)
            if best is None:
                raise InputError(
                    f"it asks for {counted(needs.num_nodes, 'node')}, and no allocation gives an evaluation more than "
                    f"{search.sites.largest_nodes}"
                )
            site = best
            request = self._requests[site.name]
            if self._needs.fixed is None and needs.wall_time_min and request is not None:
                start_limits.check_fits(needs.wall_time_min, self._eval_timeout_s, request.wall_time_min)
        except InputError as error:
            needs, data = Resources(), {"result": trial_data.failed(str(error), None)}
        else:
            self._needs.note(needs.num_nodes, needs.evals_per_node)
        placed[site.name] += 1
        if search.minimize:
            data["minimize"] = True
        stopping = search.standing.of_a_job
        if stopping is not None:
            data["stopper"] = stopping
        if self._needs.fixed is None and needs.wall_time_min:
            data["own_minutes"] = True
        else:
            needs = replace(needs, wall_time_min=site.limit.minutes)
        return trial_rows.trial_job(
            trial, search.name, site.app_id, needs, search.clock(), self._eval_timeout_s, **data
        )
