"""What a driver holds of a search at Balsam while it drives: shared by those that submit, collect and mend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deephyper_balsam.common.objective import minimises
from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.code_versions import Versions
from deephyper_balsam.driver.health import Health
from deephyper_balsam.driver.live_table import LiveTable
from deephyper_balsam.driver.placement import Placement
from deephyper_balsam.driver.reconcile import Reconciler
from deephyper_balsam.driver.session import Advice
from deephyper_balsam.driver.standing import StandingNote
from deephyper_balsam.driver.trial_jobs import TrialJobs
from deephyper_balsam.node.stoppers import parse_stopper
from deephyper_balsam.store import trial_rows
from deephyper_balsam.store.change_poller import ChangePoller
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.lease import LeaseKeeper
from deephyper_balsam.store.record import SearchRecord
from deephyper_balsam.store.snapshots import SnapshotWriter
from deephyper_balsam.trial import Result, Trial, TrialState


@dataclass
class DrivenSearch:
    """One search, as its driver knows it.

    Attributes
    ----------
    gateway, name, lease, clock
        Balsam, the search's name in it, what makes this driver the only one, and the time (epoch).
    begun_at
        When the search began (epoch): the zero of the times in its table.
    minimize
        Whether its run function returns a loss.
    sites, jobs, changes, reconciler, snapshots, health, standing, versions
        The parts that each mind one thing of it.
    table
        A line a trial.
    on_change
        Called with each job that changed, and the name of its site.
    unended
        The trials that wait or run, by number, to make their jobs again.
    gathered
        The numbers of the trials whose results were taken in.
    next_place
        In the order of the results that were taken in, the place of the next one.
    ending
        Whether the waiting trials were withdrawn.
    """

    gateway: Gateway
    name: str
    lease: LeaseKeeper
    clock: Callable[[], float]
    begun_at: float
    minimize: bool
    sites: Placement
    table: LiveTable
    jobs: TrialJobs
    changes: ChangePoller
    reconciler: Reconciler
    snapshots: SnapshotWriter
    health: Health
    standing: StandingNote
    on_change: Callable[[Row, str], None]
    versions: Versions = field(default_factory=Versions)
    unended: dict[int, Trial] = field(default_factory=dict)
    gathered: set[int] = field(default_factory=set)
    next_place: int = 0
    ending: bool = False

    @classmethod
    def of(
        cls,
        gateway: Gateway,
        record: SearchRecord,
        snapshots: SnapshotWriter,
        lease: LeaseKeeper,
        clock: Callable[[], float],
        sites: Placement,
        table: LiveTable,
        health: Health,
        on_change: Callable[[Row, str], None],
        timing: Timing,
    ) -> DrivenSearch:
        """Return the search of a record, as a driver that knows nothing of its trials yet holds it."""
        stopper = parse_stopper(record.settings.get("stopper", "none"))
        return cls(
            gateway=gateway,
            name=record.name,
            lease=lease,
            clock=clock,
            begun_at=record.created_at,
            minimize=minimises(record.settings),
            sites=sites,
            table=table,
            jobs=TrialJobs(gateway, record.name, sites, clock, timing),
            changes=ChangePoller(gateway, record.name, own=True),
            reconciler=Reconciler(gateway, record.name, timing=timing),
            snapshots=snapshots,
            health=health,
            standing=StandingNote(gateway, record.name, snapshots.site_id, stopper, clock),
            on_change=on_change,
        )

    def note(self, row: Row) -> None:
        """Take in a trial's job as it is now."""
        self.table.put(self.line(row))
        self.on_change(row, self.table[trial_rows.trial_number(row)]["m:site"])
        self.jobs.note(row)
        self.standing.take_in(row)
        self.changes.note(row)

    def line(self, row: Row) -> dict[str, Any]:
        """Return the line of `results.csv` of a trial's job."""
        return trial_rows.table_row(row, self.begun_at, self.sites.of_job(row).name)

    @property
    def advice(self) -> Advice:
        """What to tell people of the search."""
        return Advice(
            files_are_copies="nothing is lost, since all of it is in Balsam: "
            f"`deephyper-balsam search results {self.name} -o FILE.csv`.",
            where_runs_print="what each trial left is in job.out of its "
            f"folder {self.name}/<number> in the site's data",
            to_go_on="To go on, call search() again with the same name, or: "
            f"deephyper-balsam search resume {self.name}",
        )

    def all_too_long_said(self, arrived: Sequence[Result], max_failures: int, workers: int) -> str | None:
        """Return that every trial of a whole wave failed because its runs are longer than the allocations.

        Parameters
        ----------
        arrived
            The results that were taken in last.
        max_failures
            So many are enough; 0: none are.
        workers
            So many are enough, too, but two at least.

        Returns
        -------
        str or None
            What to do; None: it is not so.
        """
        failed, enough = self.health.failed_by_cuts, max(2, min(max_failures, workers))
        if not max_failures or self.table.count(TrialState.DONE) or failed < enough:
            return None
        if failed != self.table.count(TrialState.FAILED):
            return None
        return (
            f"None of the first {failed} trials ended within an allocation: the runs are longer than the "
            f"allocations, so the search ended. Trial {arrived[-1].number}: {arrived[-1].failure}. To go on with "
            f"longer ones: `deephyper-balsam search resume {self.name} --wall-time-min M`, or in Python an "
            "`allocation` with a "
            "longer `wall_time_min`. Or begin another search: with an `eval_timeout`, --eval-timeout, that ends a "
            "run before its allocation does; or, where a run goes on from its own checkpoint, with `max_cuts=0`, "
            "--max-cuts 0, to let it be cut as often as it takes."
        )
