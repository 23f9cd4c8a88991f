"""Trials as jobs of a Balsam application: bulk submit, incremental collect."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deephyper_balsam.common.clock import Moments, steady
from deephyper_balsam.common.timing import USUAL, Timing
from deephyper_balsam.common.wording import counted
from deephyper_balsam.driver import start_limits
from deephyper_balsam.driver.collection import Collection, explain
from deephyper_balsam.driver.driven_search import DrivenSearch
from deephyper_balsam.driver.health import Health
from deephyper_balsam.driver.history import find_begun, make_history, take_up
from deephyper_balsam.driver.live_table import LiveTable
from deephyper_balsam.driver.opening import begin_record, open_site, reach_sites
from deephyper_balsam.driver.placement import Placement, SearchSite
from deephyper_balsam.driver.request_inbox import RequestInbox
from deephyper_balsam.driver.session import DEFAULT_LIMITS, Advice, FailureLimits, SearchHistory
from deephyper_balsam.driver.submission import Submission
from deephyper_balsam.driver.trial_resources import ResourcesOf, TrialResources
from deephyper_balsam.errors import BalsamError, InputError, SettingsError
from deephyper_balsam.store import allocation_request, trial_rows
from deephyper_balsam.store.allocation_request import Requests
from deephyper_balsam.store.allocations import Work
from deephyper_balsam.store.applications import resolve_run
from deephyper_balsam.store.driver_requests import (
    DriverRequest,
    answer_request,
)
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.lease import LeaseKeeper, read_leases
from deephyper_balsam.store.record import (
    SearchRecord,
    check_name,
    find_record,
    find_records,
    site_names,
)
from deephyper_balsam.store.snapshots import SnapshotWriter, read_snapshot
from deephyper_balsam.trial import Resources, Result, Trial, TrialState

logger = logging.getLogger(__name__)

_SETTLE_S = 6.0  # Balsam notes a run's end two to four seconds after the run itself has told us


class BalsamEvaluator:
    """Evaluates trials as jobs at one or several Balsam sites.

    The contract is that of `deephyper_balsam.driver.session.SearchSession`.

    Parameters
    ----------
    run
        The run function; or ``"file.py:run"``, ``"package.module:run"``, the YAML of a shell command, the name of a
        bundled application; or the spec that a search recorded (`store.applications`), which is not loaded here.
    site
        The name of the Balsam site; several as a list, or with commas between them.
    resources
        What one evaluation gets; or a function from the configuration to that, itself or as ``"file.py:resources"``.
    eval_timeout
        Seconds after which an evaluation is ended and counts as failed; None: no limit.
    allocation
        The allocation to ask for when none is alive, at every site or for each by its name; None: someone else provides
        them.
    client_path
        Balsam's credentials file; by default ``BALSAM_CLIENT_PATH``, else ``~/.balsam/client.yml``.
    timing
        How often this driver looks and speaks.

    Attributes
    ----------
    timing
        As given; it may be set until `open`.
    on_change
        Called with each job that changed, as it is now, and the name of its site; for whoever shows the search.

    Raises
    ------
    TargetError, UnknownSiteError, NotLoggedInError, UnreachableError
        At once, not when the search begins.
    """

    def __init__(
        self,
        run: str | Callable[..., Any] | Mapping[str, Any],
        site: str | Sequence[str],
        *,
        resources: Resources | ResourcesOf | str | Mapping[str, Any] | None = None,
        eval_timeout: float | None = None,
        allocation: Requests = None,
        client_path: str | Path | None = None,
        clock: Callable[[], float] | None = None,
        timing: Timing = USUAL,
    ) -> None:
        if eval_timeout is not None and eval_timeout <= 0:
            raise InputError(f"`eval_timeout > 0` (seconds) must hold, but got {eval_timeout}.")
        names = site_names(site)
        self.needs = TrialResources(resources)
        self._requests = allocation_request.by_site(allocation, names)
        for request in self._requests.values():
            if request is not None:
                start_limits.check_fits(self._asked_min, eval_timeout, request.wall_time_min)
                self.needs.check_fits(request.most_nodes, request.most_ranks)
        self.spec = dict(run) if isinstance(run, Mapping) else resolve_run(run)
        self.eval_timeout_s = eval_timeout
        self.gateway = Gateway(client_path)
        self._laid_out_for = 1
        self._site_rows, self._requests = reach_sites(self.gateway, self._requests)
        self._clock = clock or Moments(self.gateway.now)
        self.timing = timing
        self._max_failures = 0
        self._hopeless: str | None = None
        self._table = LiveTable()
        self.on_change: Callable[[Row, str], None] | None = None
        self._lease: LeaseKeeper | None = None
        self._driven: DrivenSearch | None = None  # made by `open`
        self._submission: Submission
        self._collection: Collection
        self._inbox: RequestInbox

    @property
    def sites(self) -> Placement | None:
        """The sites of the search; None before `open`."""
        return None if self._driven is None else self._driven.sites

    @property
    def health(self) -> Health | None:
        """What is known of its nodes and of its runs; None before `open`."""
        return None if self._driven is None else self._driven.health

    @property
    def _open_search(self) -> DrivenSearch:
        assert self._driven is not None, "open() comes first"
        return self._driven

    def _tell_change(self, row: Row, site: str) -> None:
        if self.on_change is not None:
            self.on_change(row, site)

    @property
    def _asked_min(self) -> int:
        return 0 if self.needs.fixed is None else self.needs.fixed.wall_time_min

    @property
    def workers(self) -> int:
        """How many trials the search is laid out for: those of the allocations it asks for, or as it is told."""
        asked = sum(self.needs.laid_out(request.nodes) for request in self._requests.values() if request is not None)
        return max(asked, self.capacity, self._laid_out_for)

    def lay_out(self, nodes: int, wall_time_min: int) -> int:
        """Plan for allocations that someone else provides, before `open`; how many trials one runs at once.

        Raises
        ------
        InputError
            When no evaluation fits into one.
        """
        start_limits.check_fits(self._asked_min, self.eval_timeout_s, wall_time_min)
        self._laid_out_for = self.needs.laid_out(nodes)
        if not self._laid_out_for:
            most = counted(self.needs.fixed.num_nodes, "node") if self.needs.fixed else "more nodes"
            raise InputError(f"An evaluation has {most}, but the allocation has {nodes}.")
        return self._laid_out_for

    @property
    def settings(self) -> dict[str, Any]:
        """What a search with this evaluator writes into its record."""
        return {"run": self.spec, "site": ",".join(self._requests)}

    @classmethod
    def recorded(
        cls,
        name: str,
        *,
        allocation: Requests = None,
        client_path: str | Path | None = None,
        clock: Callable[[], float] | None = None,
    ) -> tuple[BalsamEvaluator, SearchRecord]:
        """Return the evaluator of a search that was begun before, rebuilt from its record alone, and the record.

        Parameters
        ----------
        name
            The search's name.
        allocation
            In place of the one that the search was begun with.
        client_path, clock
            As above.

        Raises
        ------
        UnknownSearchError
            There is no such search; the message names those there are.
        """
        record = find_record(Gateway(client_path), name)
        settings = record.settings
        if allocation is None:
            allocation = allocation_request.from_record(settings.get("allocation"), record.sites)
        made = cls(
            settings["run"],
            record.sites,
            resources=settings["resources"],
            eval_timeout=settings.get("eval_timeout"),
            allocation=allocation,
            client_path=client_path,
            clock=clock,
        )
        return made, record

    # --- the beginning -------------------------------------------------------------------------------------------

    def begun(self, name: str, folder: Path | None = None) -> bool:
        """Return whether a search of this name was begun before, in any folder."""
        return bool(find_records(self.gateway, name))

    def open(
        self,
        name: str,
        settings: dict[str, Any],
        *,
        max_evals: int | None = None,
        timeout_s: float | None = None,
        asked_for: Mapping[str, Any] | None = None,
        takeover: bool = False,
        folder: Path | None = None,
        limits: FailureLimits = DEFAULT_LIMITS,
    ) -> SearchHistory:
        """Begin the search `name`, or pick it up where it stands; see `driver.session.SearchSession.open`.

        `folder` is not used: all of a search is in Balsam.
        """
        check_name(name)
        settings = {**settings, **self.settings}
        if find_begun(self.gateway, name, settings) is None and max_evals is None and timeout_s is None:
            raise SettingsError("A search needs an end: give `max_evals` (evaluations), `timeout` (seconds) or both.")
        if isinstance(self._clock, Moments):  # the clock may have been put back since the last driver
            leases = read_leases(self.gateway, name).get(name, ())
            self._clock.not_before(max((lease.at for lease in leases), default=0.0))
        self._lease = LeaseKeeper.claim(
            self.gateway,
            name,
            self._site_rows[0]["id"],
            takeover=takeover,
            max_evals=max_evals,
            timeout_s=timeout_s,
            clock=self._clock,
            timing=self.timing,
        )
        try:
            return self._open(name, settings, max_evals, timeout_s, asked_for, limits)
        except BaseException as error:
            self.abandon(f"could not begin: {str(error) or type(error).__name__}")
            raise

    def _open(
        self,
        name: str,
        settings: dict[str, Any],
        max_evals: int | None,
        timeout_s: float | None,
        asked_for: Mapping[str, Any] | None,
        limits: FailureLimits,
    ) -> SearchHistory:
        self._driven = None
        self._table.clear()
        began_at = [0.0]  # known when the record is
        sites = Placement(
            self.gateway,
            [self._open_site(row, name) for row in self._site_rows],
            self._table,
            self.needs,
            lambda: self._clock() - began_at[0],
            timing=self.timing,
        )
        sites.refresh()  # a new search is laid out for the allocations that there are
        record = find_begun(self.gateway, name, settings)  # again: whoever drove until now may have made it
        if record is None:
            settings = {
                **settings,
                "resources": self.needs.recorded,
                "eval_timeout": self.eval_timeout_s,
                "num_workers": max(self.workers, sites.capacity),
                "max_evals": max_evals,
                "timeout": timeout_s,
                "asked_for": dict(asked_for or {}),
            }
            site_id = self._site_rows[0]["id"]
            record = begin_record(self.gateway, site_id, name, settings, self._requests, self._clock())
        began_at[0] = record.created_at
        snapshot = read_snapshot(self.gateway, name)
        self._driven = DrivenSearch.of(
            self.gateway,
            record,
            SnapshotWriter(self.gateway, name, self._site_rows[0]["id"], snapshot),
            self._own_lease,
            self._clock,
            sites,
            self._table,
            Health(self.gateway, name, partial(explain, self.gateway), limits.max_cuts),
            self._tell_change,
            self.timing,
        )
        self._submission = Submission(self._driven, self.needs, self._requests, self.eval_timeout_s)
        self._collection = Collection(self._driven)
        self._inbox = RequestInbox(self.gateway, name, self._own_lease, self._clock)
        self._hopeless = None
        self._max_failures = limits.max_failures
        rows = take_up(self._driven, snapshot.rows, self.needs, self.spec)
        leases = read_leases(self.gateway, name)[name]
        return make_history(record, rows, leases, self._inbox.read_all(), self._own_lease.lease.id)

    def _open_site(self, row: Row, search: str) -> SearchSite:
        limit = start_limits.StartLimit(self._asked_min, self.eval_timeout_s)
        request = self._requests[row["name"]]
        return open_site(self.gateway, row, search, self.spec, self.needs, request, limit, self.timing)

    @property
    def _own_lease(self) -> LeaseKeeper:
        assert self._lease is not None, "open() comes first"
        return self._lease

    def requests(self) -> list[DriverRequest]:
        """Leave a sign of life now and then; what people asked of the search since the last call."""
        return self._inbox.read_new()

    def answer(self, request: DriverRequest, did: str, **details: Any) -> None:
        """Write down what became of a request."""
        answer_request(self.gateway, request, self._clock(), did, **details)

    def note_outage(self, lasted_s: float, why: str) -> None:
        """Keep, for `search status`, that Balsam did not answer for so many seconds until now."""
        if self._lease is not None:
            self._lease.note_outage(self._clock() - lasted_s, why)

    # --- submit and collect --------------------------------------------------------------------------------------

    def submit(self, trials: Sequence[Trial]) -> None:
        """Create the jobs of the trials, in bulk, each at the site that has most room for it.

        A trial that asks for more than any allocation has gets a job that has failed already.
        """
        if trials:
            self._submission.submit(trials)

    def collect(self) -> list[Result]:
        """Look at the jobs that changed since the last look, and take in the results that are new."""
        before = self._open_search.health.failed_by_cuts
        arrived = self._collection.collect()
        if self._open_search.health.failed_by_cuts > before:
            self._hopeless = self._open_search.all_too_long_said(arrived, self._max_failures, self.workers)
        return arrived

    def upkeep(self) -> list[int]:
        """Copy what has ended to where it is read quickly, and mend what was deleted in Balsam, now and then.

        Returns
        -------
        list[int]
            The numbers of the trials that were withdrawn because their jobs are gone.
        """
        search = self._open_search
        search.snapshots.look(search.next_place)
        # The last: what it returns must not be lost with a failure of something else
        return self._collection.reconcile(self._submission)

    @property
    def copying(self) -> bool:
        """Whether there is something to copy now."""
        return self._open_search.snapshots.busy

    # --- how much to have under way ------------------------------------------------------------------------------

    @property
    def begun_at(self) -> float:
        """When the search began (epoch): the zero of the times in its table."""
        return 0.0 if self._driven is None else self._driven.begun_at

    @property
    def capacity(self) -> int:
        """How many trials the running allocations can run at once."""
        return 0 if self.sites is None else self.sites.capacity

    @property
    def backlog(self) -> int:
        """How many more wait in Balsam's queue, so that a free node finds its next run there."""
        return 0 if self.sites is None else self.sites.backlog

    @property
    def room(self) -> int:
        """How many trials the sites are short of; what waits or hangs at one is no reason to starve another."""
        if self._driven is None:
            return 0
        sites = self._driven.sites
        return max(0, sum(sites.room(site) for site in sites) - self._driven.jobs.on_their_way)

    @property
    def hopeless(self) -> str | None:
        """That all trials of a whole wave failed because their runs are longer than the allocations; None: not so."""
        return self._hopeless

    @property
    def counts(self) -> dict[TrialState, int]:
        """How many trials are in each state."""
        return {state: self._table.count(state) for state in TrialState}

    def line(self, number: int | None) -> dict[str, Any]:
        """Return the line of `results.csv` of one trial."""
        assert number is not None
        return self._table[number]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of `results.csv`, by trial number."""
        return self._table.lines

    def take_changed_lines(self) -> list[dict[str, Any]]:
        """Return the lines of `results.csv` that changed since the last call."""
        return self._table.take_changed()

    @property
    def notice(self) -> str | None:
        """What a person should know about the sites, their nodes and the allocations, if there is something."""
        if self._driven is None:
            return None
        said = [part.notice for part in (self._driven.sites, self._driven.health, self._driven.versions)]
        return "; ".join(notice for notice in said if notice) or None

    @property
    def advice(self) -> Advice:
        """What to tell people of the search that is open."""
        return self._open_search.advice

    def now(self) -> float:
        """Return seconds of a clock that only goes forward."""
        return steady()

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Wait until then, or until `stop` is set."""
        stop.wait(seconds)

    def hurry(self, hurried: bool = True) -> None:
        """Wait only a few seconds for Balsam from now on; False: as long as before."""
        self.gateway.hurry(hurried)

    def reconnect(self) -> None:
        """Read the credentials again: after a login, or after a local server came back at another address."""
        self.gateway.reconnect()

    def ensure_allocation(self, evaluations: int | None = None, seconds: float | None = None) -> None:
        """Ask for allocations where one is wanted and the evaluator may ask.

        Parameters
        ----------
        evaluations, seconds
            What is left of the search's budgets; None: no limit.
        """
        if self._driven is not None:
            self._driven.sites.ensure(Work(evaluations, seconds), self._driven.health.suspects)

    # --- the end -------------------------------------------------------------------------------------------------

    def cancel(self) -> list[int]:
        """Withdraw the trials that no node has begun; their numbers."""
        return self._collection.withdraw()

    def close(self, why: str = "it was closed", *, leave_running: bool = False) -> None:
        """End the allocations that were asked for here, and give up the lease.

        Parameters
        ----------
        why
            Kept for `search status`.
        leave_running
            Allocations in which trials still run go on, so that a later driver of the search finds their results.
        """
        try:
            if self._driven is not None and self._driven.sites.owned:
                if leave_running and self._table.count(TrialState.RUNNING):
                    self._driven.sites.leave()
                else:
                    trial_rows.settle(self.gateway, self._driven.name, _SETTLE_S)
                    self._driven.sites.release()
        finally:
            if self._lease is not None:
                self._lease.leave(why)

    def abandon(self, why: str) -> None:
        """Give up the lease and touch nothing else: another driver has the search, or it could not be begun."""
        try:
            if self._lease is not None:
                self._lease.leave(why)
        except BalsamError as error:
            logger.warning("Balsam could not be told that this driver has left: %s", error)
