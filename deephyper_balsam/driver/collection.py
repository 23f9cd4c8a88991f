"""Jobs that changed become results: each is written down in Balsam before the driver learns from it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from deephyper_balsam.driver import start_limits
from deephyper_balsam.driver.driven_search import DrivenSearch
from deephyper_balsam.driver.submission import Submission
from deephyper_balsam.node import failure_policy
from deephyper_balsam.store import trial_data, trial_rows
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.trial_data import Outcome
from deephyper_balsam.trial import Result, TrialState

logger = logging.getLogger(__name__)

_JOB_DELETED = "its job was deleted in Balsam"


def explain(gateway: Gateway, rows: Sequence[Row]) -> dict[int, Outcome]:
    """Return the outcomes, by the job's id; where a run left none, with what Balsam's log knows of its end."""
    outcomes = {row["id"]: trial_rows.read_outcome(row) for row in rows}
    mute = [row["id"] for row in rows if row["state"] == "FAILED" and "start" not in outcomes[row["id"]]]
    for event in gateway.events(job_ids=mute, to_state="RUN_ERROR"):
        outcome = outcomes[event["job_id"]]
        outcome["failure"] = failure_policy.exit_status_said(event["data"].get("returncode"))
        outcome["traceback"] = str(event["data"].get("error", ""))
    return outcomes


class Collection:
    """Looks at the jobs of a search."""

    def __init__(self, search: DrivenSearch) -> None:
        self._search = search

    def collect(self) -> list[Result]:
        """Look at the jobs that changed since the last look, and take in the results that are new."""
        search = self._search
        search.lease.fence()
        search.sites.refresh()
        self._limit_starts()
        changed = self._changed()
        taken = self._taken([row for row in changed if self._is_news(row)])
        search.gateway.write_data({job_id: row["data"] for job_id, row in taken.items()})
        trial_rows.finish_answered(search.gateway, search.name, taken.values())
        # Nothing above changed us, so that after an error the same call can be made again
        search.next_place += len(taken)
        for row in changed:
            search.note(row)
        search.standing.publish()
        search.changes.forget_old()
        for site in search.sites:
            if search.table.count(TrialState.RUNNING, site=site.name):
                site.allocations.note_work()
        results = [self._take_in(row) for row in taken.values()]
        for result in results:
            search.unended.pop(int(result.number or 0), None)
        return results

    def _changed(self) -> list[Row]:
        """Return the jobs that changed, with the outcomes that are decided here; runs that may go on, do."""
        search = self._search
        search.jobs.give_back_orphans()
        if search.jobs.move_on(search.health.cuts):
            search.changes.look_far()
        rows = search.changes.read(everything=search.jobs.must_look_at_all())
        changed = search.jobs.without_twins([row for row in rows if search.changes.is_new(row)])
        _decide(changed, search.reconciler.ended_by_hand(changed))
        _decide(changed, search.reconciler.edited(changed))
        search.reconciler.finish_given_back(changed)
        search.health.run_again(changed)
        _decide(changed, search.health.look_for_cuts(changed, search.gateway.now(), self._wall_time_s))
        return changed

    def _taken(self, arrived: Sequence[Row]) -> dict[int, Row]:
        """Give jobs that have ended their outcomes and their places in the order of results; by the job's id."""
        search = self._search
        taken: dict[int, Row] = {}
        outcomes = explain(search.gateway, arrived)
        for row in arrived:
            now, position = search.clock(), search.next_place + len(taken)
            cuts = search.health.cuts(row["id"]) + trial_data.cuts_before(row)
            outcome = trial_rows.in_our_time(outcomes[row["id"]], trial_data.asked_at(row), now)
            row["data"] = trial_data.with_gathered(row, outcome, position, now, cuts)
            taken[row["id"]] = row
        return taken

    def _is_news(self, row: Row) -> bool:
        ended = trial_rows.read_state(row) in (TrialState.DONE, TrialState.FAILED)
        return ended and trial_rows.trial_number(row) not in self._search.gathered

    def _take_in(self, row: Row) -> Result:
        """Learn from a result that is written down."""
        search = self._search
        outcome = trial_rows.read_outcome(row)
        result = trial_rows.read_result(trial_rows.trial_number(row), outcome)
        site = search.sites.of_job(row)
        search.health.take_in(outcome)
        assert result.number is not None
        search.gathered.add(result.number)
        search.versions.note(result.number, outcome.get("code"))
        if result.started_at and result.ended_at:
            site.durations_s.append(result.ended_at - result.started_at)
            asked, gathered = trial_data.asked_at(row), trial_data.gathered_at(row)
            if asked is not None and gathered is not None:  # somebody may have replaced what the job held
                site.delay.ended(result.number, asked, result.started_at, result.ended_at, gathered)
            site.allocations.note_work()
        if result.state is TrialState.DONE:
            site.allocations.worked()
        return result

    def _limit_starts(self) -> None:
        search = self._search
        for site in search.sites:
            if site.limit.update(site.durations_s, site.allocations.wall_time_s):
                start_limits.apply(search.gateway, search.name, site.app_ids, site.limit.minutes)
                site.limit.applied()

    def _wall_time_s(self, number: int) -> float | None:
        """Return the time of an allocation where a trial is; None: unknown."""
        line = self._search.table.get(number)
        return self._search.sites.named(line["m:site"]).allocations.wall_time_s if line else None

    def withdraw(self) -> list[int]:
        """Withdraw the trials that no node has begun; their numbers."""
        search = self._search
        search.lease.fence()
        search.ending = True
        withdrawn = []
        waiting = trial_rows.withdraw_waiting(search.gateway, search.name, search.clock(), search.jobs.leaving)
        search.jobs.forget_leaving()
        for row in search.changes.read():  # all of them: this may be the last look before the results are written
            search.table.put(search.line(row))  # and no more: the next collect must still see what is new
            if row["id"] in waiting and trial_rows.read_state(row) is TrialState.CANCELLED:
                withdrawn.append(trial_rows.trial_number(row))
                search.unended.pop(withdrawn[-1], None)
        return withdrawn

    def reconcile(self, submission: Submission) -> list[int]:
        """Compare, now and then, the jobs that there should be with those that are there; what was deleted is mended.

        A trial whose job is gone gets another one; while the search ends it is withdrawn.

        Returns
        -------
        list[int]
            The numbers of the trials that were withdrawn.
        """
        search = self._search
        search.lease.fence()
        missing = search.reconciler.missing(search.jobs.ids, list(search.unended))
        if not missing:
            return []
        said = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        if search.ending:
            for number in missing:
                line = {**search.table[number], "job_status": TrialState.CANCELLED.value, "m:failure": _JOB_DELETED}
                search.table.put(line)
                search.unended.pop(number, None)
                search.jobs.forget(number)
            logger.warning("The jobs of trials %s were deleted in Balsam: the trials are withdrawn", said)
            return missing
        logger.warning("The jobs of trials %s were deleted in Balsam: they are made again", said)
        there = search.jobs.there()
        submission.create([search.unended[number] for number in missing if number not in there])
        search.changes.look_far()
        return []


def _decide(rows: Iterable[Row], outcomes: Mapping[int, Outcome]) -> None:
    """Give rows the outcomes that are known for them here, by the job's id."""
    for row in rows:
        if row["id"] in outcomes:
            row["data"] = trial_data.with_result(row, outcomes[row["id"]])
