"""Which job stands for each trial: one is made, never two are counted, and another where a trial changes its site."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from deephyper_balsam.common.timing import USUAL, Timing
from deephyper_balsam.driver.placement import Placement, SearchSite
from deephyper_balsam.errors import BalsamError
from deephyper_balsam.store import trial_rows
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.trial import Resources

logger = logging.getLogger(__name__)


class TrialJobs:
    """The jobs of one search's trials, by the trial's number."""

    def __init__(
        self, gateway: Gateway, search: str, sites: Placement, clock: Callable[[], float], timing: Timing = USUAL
    ) -> None:
        self._gateway, self._search, self._sites, self._clock = gateway, search, sites, clock
        self._timing = timing
        self._ids: dict[int, int] = {}  # trial number -> id of its job
        self._doubtful = False
        self._look_again_at: float | None = None
        self._orphans: dict[int, float] = {}  # id of a job that is RUNNING and that no launcher holds -> since when
        self._leaving: dict[int, Row] = {}  # trial number -> the job that it had at the site it left
        self._may_leave = True
        self._to_leave = 0  # how many more wait where nothing runs, and could go elsewhere

    # --- making them ---------------------------------------------------------------------------------------------

    def there(self) -> dict[int, Row]:
        """After a lost answer, return the jobs of trials that have one all the same; those must not get another."""
        if not self._doubtful:
            return {}
        rows = self._gateway.jobs(trial_rows.trial_tags(self._search))
        return {
            trial_rows.trial_number(row): row
            for row in rows
            if trial_rows.is_trial(row) and not trial_rows.has_left(row)
        }

    @property
    def ids(self) -> Mapping[int, int]:
        """The id of each trial's job, by the trial's number."""
        return self._ids

    def forget(self, number: int) -> None:
        """Say that a trial has no job any more."""
        self._ids.pop(number, None)

    def create(self, new: Mapping[int, Row]) -> None:
        """Create jobs, by the number of the trial; look at `there` before."""
        try:
            ids = self._gateway.create_jobs(list(new.values()))
        except BalsamError:  # of several batches some may be there, whatever befell the next
            self._doubtful = True
            self._look_again_at = self._clock() + self._timing.lost_answer_s
            raise
        self._doubtful = False
        self._ids.update(zip(new, ids, strict=True))

    def must_look_at_all(self) -> bool:
        """Return, once, whether a job may have been created late, after its answer was lost."""
        late = self._look_again_at is not None and self._clock() > self._look_again_at
        if late:
            self._look_again_at = None
        return late

    def without_twins(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows without second jobs of a trial; those are set aside (see `jobs.set_aside`)."""
        by_number: dict[int, dict[int, Row]] = {}
        for row in rows:
            by_number.setdefault(trial_rows.trial_number(row), {})[row["id"]] = row
        kept: list[Row] = []
        for number, twins in by_number.items():
            known = self._ids.get(number)
            if known is not None and known not in twins:
                twins.update(
                    {row["id"]: row for row in self._gateway.jobs(trial_rows.trial_tags(self._search), ids=[known])}
                )
            one = trial_rows.choose_one(list(twins.values()))
            others = [row for row in twins.values() if row is not one]
            if others:
                logger.warning("Trial %d has two jobs; %d is set aside for %d", number, others[0]["id"], one["id"])
                trial_rows.set_aside(self._gateway, self._search, others, {number: one["id"]}, self._clock())
            self._ids[number] = one["id"]
            kept.append(one)
        self._may_leave = True
        return kept

    def give_back_orphans(self) -> None:
        """Let jobs run again that have been RUNNING for a while and that no launcher holds.

        A launcher that is killed at the end of its allocation may say that a job runs after its session has gone. What
        has its result is left alone: it is collected like any other.
        """
        latest = self._gateway.now() - self._timing.orphan_s  # its launcher is gone by then, and what it ran
        due = [job_id for job_id, since in self._orphans.items() if since < latest]
        if not due:
            return
        now = self._gateway.jobs(trial_rows.trial_tags(self._search), ids=due)
        rows = [row for row in now if trial_rows.is_orphan(row) and trial_rows.updated_at(row) < latest]
        trial_rows.give_back(self._gateway, self._search, rows)
        for row in rows:
            logger.warning(
                "No launcher holds trial %d any more: it goes back to the queue", trial_rows.trial_number(row)
            )
        for job_id in due:
            self._orphans.pop(job_id)  # its next change shows it again

    # --- from one site to another (the steps are in `store.trial_rows`) -----------------------------------------

    def note(self, row: Row) -> None:
        """Take in how a job is now."""
        if trial_rows.is_orphan(row):
            self._orphans[row["id"]] = trial_rows.updated_at(row)
        else:
            self._orphans.pop(row["id"], None)
        if trial_rows.has_left(row):
            self._leaving[trial_rows.trial_number(row)] = row
        else:
            self._leaving.pop(trial_rows.trial_number(row), None)

    @property
    def on_their_way(self) -> int:
        """How many trials come to a site from another one, now or as soon as there is room: before new ones."""
        return len(self._leaving) + self._to_leave

    @property
    def leaving(self) -> list[Row]:
        """The jobs of trials that have left a site, and have no other job yet."""
        return list(self._leaving.values())

    def forget_leaving(self) -> None:
        """Say that those trials were withdrawn."""
        self._leaving.clear()

    def move_on(self, cuts: Callable[[int], int]) -> bool:
        """Take trials that wait where nothing runs to sites that have room, one step of it at each look.

        Parameters
        ----------
        cuts
            How often the end of an allocation has cut the run of a job.

        Returns
        -------
        bool
            Whether jobs that wait were changed or made.
        """
        if self._leaving:
            self._settle(cuts)
            return True
        if not self._may_leave:
            return False
        self._to_leave, room = 0, self._sites.room_where_runs
        for site in self._sites.idle():
            waiting = trial_rows.waiting_at(self._gateway, self._search, site.app_ids, abandoned=site.gone)
            movable = [row for row in waiting if self._fits_elsewhere(row, site)]
            leaving = movable[:room]
            self._to_leave += len(movable) - len(leaving)
            room -= len(leaving)
            if leaving:
                self._may_leave = False  # until a look has shown which of them have left
                trial_rows.leave_site(self._gateway, self._search, leaving, site.name, self._clock())
                logger.info("Nothing runs at %s: %d waiting trials go to another site", site.name, len(leaving))
        return not self._may_leave

    def _fits_elsewhere(self, row: Row, here: SearchSite) -> bool:
        needs = Resources(num_nodes=row["num_nodes"])
        return any(site is not here and site.capacity and site.fits(needs) for site in self._sites)

    def _settle(self, cuts: Callable[[int], int]) -> None:
        """Make the jobs of trials that have left their site, and set aside those that they had there."""
        there = self.there()
        new: dict[int, Row] = {}
        placed: Counter[str] = Counter()
        for number, row in self._leaving.items():
            if not self._has_another(number, row) and number not in there:
                site = self._sites.best_for(Resources(num_nodes=row["num_nodes"]), placed) or self._sites.of_job(row)
                placed[site.name] += 1
                new[number] = trial_rows.job_elsewhere(row, site.app_id, site.limit.minutes, cuts(row["id"]))
        self.create(new)
        left = [row for number, row in self._leaving.items() if self._has_another(number, row)]
        trial_rows.set_aside(self._gateway, self._search, left, self._ids, self._clock())
        self._leaving.clear()

    def _has_another(self, number: int, row: Row) -> bool:
        return bool(self._ids.get(number, row["id"]) != row["id"])
