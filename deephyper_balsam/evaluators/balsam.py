"""Trials as jobs of a Balsam application: bulk submit, incremental collect."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deephyper_balsam import allocations, faults, jobs
from deephyper_balsam.allocations import Allocations, Requests, Work
from deephyper_balsam.apps import register, resolve_run
from deephyper_balsam.archive import Archivist, read_snapshot
from deephyper_balsam.drivers import Life, Wheel, read_lives
from deephyper_balsam.errors import BalsamError, InputError, SearchExistsError, SettingsError
from deephyper_balsam.evaluators import limits
from deephyper_balsam.evaluators.changes import Changes
from deephyper_balsam.evaluators.health import Health
from deephyper_balsam.evaluators.needs import Needs, ResourcesOf
from deephyper_balsam.evaluators.sites import SearchSite, SearchSites
from deephyper_balsam.evaluators.table import Table
from deephyper_balsam.evaluators.trial_jobs import TrialJobs
from deephyper_balsam.gateway import Gateway, Row, check_name
from deephyper_balsam.jobs import Resources as Resources  # public here: evaluators.balsam.Resources
from deephyper_balsam.orders import STOP, Order, answer_order, effective_budget, read_orders
from deephyper_balsam.record import SearchRecord, check_same, create_record, find_record, find_records, site_names
from deephyper_balsam.trial import Result, Trial, TrialState

logger = logging.getLogger(__name__)

_SETTLE_S = 6.0  # Balsam notes a run's end two to four seconds after the run itself has told us


@dataclass(frozen=True)
class History:
    """What Balsam holds of a search that was begun before.

    Attributes
    ----------
    record
        Its settings, as written when it was begun.
    trials
        Every trial, by number.
    results
        The results that a driver took in, in the order in which it did.
    withdrawn
        The numbers of trials that were withdrawn before they ran.
    orders
        What people asked of it, answered or not; the oldest first.
    max_evals, timeout_s
        Its budget now: as planned, given, and extended; None: no limit.
    drove_s
        How long earlier drivers drove it, seconds.
    """

    record: SearchRecord
    trials: list[Trial]
    results: list[Result]
    withdrawn: list[int]
    orders: list[Order]
    max_evals: int | None
    timeout_s: float | None
    drove_s: float


class BalsamEvaluator:
    """Evaluates trials as jobs at one or several Balsam sites.

    The contract is that of `deephyper_balsam.evaluators.base.Evaluator`.

    Parameters
    ----------
    run
        The run function; or ``"file.py:run"``, ``"package.module:run"``, the YAML of a shell command, the name of a
        bundled application; or the spec that a search recorded (`deephyper_balsam.apps`), which is not loaded here.
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

    Attributes
    ----------
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
        clock: Callable[[], float] = time.time,
    ) -> None:
        if eval_timeout is not None and eval_timeout <= 0:
            raise InputError(f"`eval_timeout > 0` (seconds) must hold, but got {eval_timeout}.")
        names = site_names(site)
        self.needs = Needs(resources)
        self._requests = allocations.by_site(allocation, names)
        for request in self._requests.values():
            if request is not None:
                limits.check_fits(self._asked_min, eval_timeout, request.wall_time_min)
                self.needs.check_fits(request.most_nodes)
        self.spec = dict(run) if isinstance(run, Mapping) else resolve_run(run)
        self.eval_timeout_s = eval_timeout
        self.gateway = Gateway(client_path)
        self._laid_out_for = 1
        self._site_rows = [self.gateway.site(name) for name in names]
        self._requests = {
            row["name"]: request for row, request in zip(self._site_rows, self._requests.values(), strict=True)
        }
        self._clock = clock
        self._table = Table()
        self.on_change: Callable[[Row, str], None] | None = None
        self._gathered: set[int] = set()
        self._order = 0
        self._wheel: Wheel | None = None
        self._orders_seen: set[int] = set()
        # Made by `open`
        self._search: str | None = None
        self._zero = 0.0
        self.sites: SearchSites | None = None
        self.health: Health | None = None
        self._jobs: TrialJobs
        self._archivist: Archivist
        self._changes: Changes

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
        limits.check_fits(self._asked_min, self.eval_timeout_s, wall_time_min)
        self._laid_out_for = self.needs.laid_out(nodes)
        if not self._laid_out_for:
            most = self.needs.fixed.num_nodes if self.needs.fixed else "more"
            raise InputError(f"An evaluation has {most} nodes, but the allocation has {nodes}.")
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
        clock: Callable[[], float] = time.time,
    ) -> tuple[BalsamEvaluator, SearchRecord]:
        """Return the evaluator of a search that was begun before, rebuilt from its record alone, and the record.

        Parameters
        ----------
        allocation
            In place of the one that the search was begun with.

        Raises
        ------
        UnknownSearchError
            There is no such search; the message names those there are.
        """
        record = find_record(Gateway(client_path), name)
        settings = record.settings
        if allocation is None:
            allocation = allocations.from_record(settings.get("allocation"), record.sites)
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

    def knows(self, name: str) -> bool:
        """Whether a search of this name was begun before."""
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
    ) -> History:
        """Begin the search `name`, or pick it up where it stands, as its only driver.

        Parameters
        ----------
        settings
            What the search is; a search of that name must have been begun with the same. A ``seed`` of None accepts
            the seed it was begun with.
        max_evals, timeout_s
            The budget that this driver is given; None for both: that of the search as it stands. A new search is
            planned for it, and keeps it in its record.
        asked_for
            In what words the search was asked for; kept in the record of a new one.
        takeover
            The driver that there is, is gone.

        Raises
        ------
        SearchExistsError
            The name belongs to a search with other settings.
        SearchRunningError
            Another driver is at work.
        """
        check_name(name)
        settings = {**settings, **self.settings}
        if self._find(name, settings) is None and max_evals is None and timeout_s is None:
            raise SettingsError("A search needs an end: give `max_evals` (evaluations), `timeout` (seconds) or both.")
        self._wheel = Wheel.claim(
            self.gateway,
            name,
            self._site_rows[0]["id"],
            takeover=takeover,
            max_evals=max_evals,
            timeout_s=timeout_s,
            clock=self._clock,
        )
        self._search = name
        try:
            return self._open(name, settings, max_evals, timeout_s, asked_for)
        except BaseException as error:
            self.abandon(f"could not begin: {str(error) or type(error).__name__}")
            raise

    def _find(self, name: str, settings: Mapping[str, Any]) -> SearchRecord | None:
        """Return the record of a search that may go on with these settings; None if there is none of that name."""
        for record in find_records(self.gateway, name):
            check_same(record, {key: value for key, value in settings.items() if (key, value) != ("seed", None)})
            return record
        if any(True for _ in self.gateway.jobs(jobs.trial_tags(name))):
            raise SearchExistsError(
                f"Jobs tagged search={name} are in this Balsam already, but were made by something else. "
                "Choose another name."
            )
        return None

    def _open(
        self,
        name: str,
        settings: dict[str, Any],
        max_evals: int | None,
        timeout_s: float | None,
        asked_for: Mapping[str, Any] | None,
    ) -> History:
        sites = [self._open_site(row, name) for row in self._site_rows]
        self.sites = SearchSites(self.gateway, sites, self._table, self.needs, lambda: self._clock() - self._zero)
        self.sites.refresh()  # a new search is laid out for the allocations that there are
        record = self._find(name, settings)  # again: whoever drove until now may have made it
        if record is None:
            if settings.get("seed") is None:
                settings["seed"] = secrets.randbits(31)
            settings = {
                **settings,
                "resources": self.needs.recorded,
                "eval_timeout": self.eval_timeout_s,
                "num_workers": self.workers,
                "max_evals": max_evals,
                "timeout": timeout_s,
                "allocation": allocations.to_record(self._requests),
                "asked_for": dict(asked_for or {}),
            }
            record = create_record(self.gateway, name, settings, self._site_rows[0]["id"], self._clock())
        self._zero = record.created_at
        self._table.clear()
        self._jobs = TrialJobs(self.gateway, name, self.sites, self._clock)
        self._changes = Changes(self.gateway, name, own=True)
        return self._read_history(record)

    def _open_site(self, row: Row, search: str) -> SearchSite:
        app_id, app_name = register(self.gateway, self.spec, row["name"])
        logger.info("Application %s at site %s", app_name, row["name"])
        return SearchSite(
            row,
            app_id,
            {app["id"] for app in self.gateway.apps(row["id"])} | {app_id},
            Allocations(self.gateway, row, jobs.trial_tags(search), self.needs.slots, self._requests[row["name"]]),
            limits.StartLimit(self._asked_min, self.eval_timeout_s),
        )

    def _read_history(self, record: SearchRecord) -> History:
        snapshot = read_snapshot(self.gateway, record.name)
        self._archivist = Archivist(self.gateway, record.name, self._site_rows[0]["id"], snapshot)
        rows = self._jobs.without_twins(snapshot.rows)
        jobs.mend(self.gateway, record.name, rows)
        self.health = Health(self.gateway, record.name, self._explain)
        self.health.restore(rows)
        for row in rows:
            self._note(row)
            if not jobs.read_state(row).is_final:
                self.needs.note(row["num_nodes"], row["node_packing_count"])
        gathered = sorted(
            (row for row in rows if "gathered" in row["data"]), key=lambda row: row["data"]["gathered"]["order"]
        )
        self._gathered = {jobs.trial_number(row) for row in gathered}
        self._order = len(gathered)
        trials = sorted((jobs.read_trial(row) for row in rows), key=lambda trial: trial.number)
        results = [jobs.read_result(jobs.trial_number(row), row["data"]["result"]) for row in gathered]
        # What ended while no driver looked is collected like any other result
        self._changes.offer_again(row for row in rows if "gathered" not in row["data"])
        cancelled = [row for row in rows if jobs.read_state(row) is TrialState.CANCELLED]
        lives, orders = self._lives_and_orders(record.name)
        max_evals, timeout_s = effective_budget(record.settings, lives, orders)
        return History(
            record=record,
            trials=trials,
            results=results,
            withdrawn=[jobs.trial_number(row) for row in cancelled],
            orders=orders,
            max_evals=max_evals,
            timeout_s=timeout_s,
            drove_s=sum(life.drove_s for life in lives if life.id != self._wheel_id),
        )

    def _lives_and_orders(self, name: str) -> tuple[list[Life], list[Order]]:
        lives = [life for life in read_lives(self.gateway, name)[name] if life.driving_since is not None]
        orders = read_orders(self.gateway, name)
        self._orders_seen = {order.id for order in orders}
        for order in orders:
            if order.what == STOP and order.handled is None and order.id < self._wheel_id:
                self.answer(order, "the driver that it was meant for had ended before it")
        return lives, orders

    @property
    def _wheel_id(self) -> int:
        assert self._wheel is not None, "open() comes first"
        return self._wheel.life.id

    def heartbeat(self) -> list[Order]:
        """Leave a sign of life now and then; what people asked of the search since the last call.

        Raises
        ------
        TakenOverError
            Another driver has taken over. Call `abandon`, and nothing else.
        """
        assert self._wheel is not None, "open() comes first"
        self._wheel.beat()
        news = [Order.read(row) for row in self._wheel.news if row["tags"]["kind"] == "order"]
        self._wheel.news.clear()
        new = [order for order in news if order.handled is None and order.id not in self._orders_seen]
        self._orders_seen.update(order.id for order in new)
        return new

    def answer(self, order: Order, did: str, **details: Any) -> None:
        """Write down what became of an order."""
        answer_order(self.gateway, order, self._clock(), did, **details)

    def note_outage(self, began_at: float, why: str) -> None:
        """Keep, for `search status`, that Balsam did not answer from `began_at` until now."""
        if self._wheel is not None:
            self._wheel.note_outage(began_at, why)

    def _fence(self) -> None:
        assert self._wheel is not None, "open() comes first"
        self._wheel.fence()

    # --- submit and collect --------------------------------------------------------------------------------------

    def submit(self, trials: Sequence[Trial]) -> None:
        """Create the jobs of the trials, in bulk, each at the site that has most room for it.

        A trial that asks for more than any allocation has gets a job that has failed already.
        """
        if not trials:
            return
        self._fence()
        there = self._jobs.there()
        if there:  # those count as under way, and only a look at all jobs shows them
            self._changes.look_far()
        placed: Counter[str] = Counter()
        new = {trial.number: self._new_job(trial, placed) for trial in trials if trial.number not in there}
        self._jobs.create(new)
        assert self.sites is not None
        free = {site.name: site.capacity - self.sites.under_way(site) for site in self.sites}
        by_site: dict[str, list[int]] = {name: [] for name in free}
        for number, row in new.items():
            by_site[self.sites.of_job(row).name].append(number)
        for where, numbers in by_site.items():
            self.sites.named(where).delay.submitted(numbers, free[where])
            for number in numbers:
                self._table.put({"job_id": number, "job_status": TrialState.READY.value, "m:site": where})

    def _new_job(self, trial: Trial, placed: Counter[str]) -> Row:
        assert self._search is not None, "open() comes first"
        assert self.sites is not None
        site, needs, data = next(iter(self.sites)), Resources(), dict[str, Any]()
        try:
            needs = self.needs.of(trial.config)
            best = self.sites.best_for(needs, placed)
            if best is None:
                raise InputError(
                    f"it asks for {needs.num_nodes} nodes, and no allocation gives an evaluation more than "
                    f"{self.sites.largest_nodes}"
                )
            site = best
            request = self._requests[site.name]
            if self.needs.fixed is None and needs.wall_time_min and request is not None:
                limits.check_fits(needs.wall_time_min, self.eval_timeout_s, request.wall_time_min)
        except InputError as error:
            needs, data = Resources(), {"result": {"objective": None, "failure": str(error), "metadata": {}}}
        else:
            self.needs.note(needs.num_nodes, needs.evals_per_node)
        placed[site.name] += 1
        if self.needs.fixed is None and needs.wall_time_min:
            data["own_minutes"] = True
        else:
            needs = replace(needs, wall_time_min=site.limit.minutes)
        return jobs.trial_job(trial, self._search, site.app_id, needs, self._clock(), self.eval_timeout_s, **data)

    def collect(self) -> list[Result]:
        """Look at the jobs that changed since the last look, and take in the results that are new."""
        assert self._search is not None, "open() comes first"
        assert self.sites is not None
        assert self.health is not None
        self._fence()
        self.sites.refresh()
        self._limit_starts()
        self._jobs.give_back_orphans()
        if self._jobs.move_on(self.health.cuts):
            self._changes.look_far()
        rows = self._changes.read(everything=self._jobs.must_look_at_all())
        changed = self._jobs.without_twins([row for row in rows if self._changes.is_new(row)])
        self.health.run_again(changed)
        self.health.look_for_cuts(changed, self._clock(), self._wall_time_s)
        arrived = [row for row in changed if self._is_news(row)]
        taken: dict[int, Row] = {}
        for row in arrived:
            outcome = self._explain(row)
            gathered: dict[str, Any] = {"order": self._order + len(taken), "at": self._clock()}
            cuts = self.health.cuts(row["id"]) + row["data"].get("cuts_before", 0)
            if cuts:
                gathered["cuts"] = cuts
            row["data"] = {**row["data"], "result": outcome, "gathered": gathered}
            taken[row["id"]] = row
        self.gateway.write_data({job_id: row["data"] for job_id, row in taken.items()})
        jobs.finish_answered(self.gateway, self._search, taken.values())
        # Nothing above changed us, so that after an error the same call can be made again
        self._order += len(taken)
        for row in changed:
            self._note(row)
        self._changes.forget_old()
        for site in self.sites:
            if self._table.count(TrialState.RUNNING, site=site.name):
                site.allocations.note_work()
        return [self._take_in(row) for row in taken.values()]

    def archive(self) -> None:
        """Copy trials that will not change any more to where they are read quickly, now and then."""
        self._archivist.look(self._order)

    @property
    def archiving(self) -> bool:
        """Whether there is something to copy now."""
        return self._archivist.busy

    def _take_in(self, row: Row) -> Result:
        """Learn from a result that is written down."""
        assert self.sites is not None
        assert self.health is not None
        result = jobs.read_result(jobs.trial_number(row), row["data"]["result"])
        site = self.sites.of_job(row)
        self.health.take_in(row["data"]["result"])
        assert result.number is not None
        self._gathered.add(result.number)
        if result.started_at and result.ended_at:
            site.durations_s.append(result.ended_at - result.started_at)
            asked, gathered = row["data"]["asked"]["at"], row["data"]["gathered"]["at"]
            site.delay.ended(result.number, asked, result.started_at, result.ended_at, gathered)
            site.allocations.note_work()
        if result.state is TrialState.DONE:
            site.allocations.worked()
        return result

    def _limit_starts(self) -> None:
        assert self.sites is not None
        assert self._search is not None
        for site in self.sites:
            if site.limit.update(site.durations_s, site.allocations.wall_time_s):
                limits.apply(self.gateway, self._search, site.app_ids, site.limit.minutes)
                site.limit.applied()

    def _wall_time_s(self, number: int) -> float | None:
        """Return the time of an allocation where a trial is; None: unknown."""
        assert self.sites is not None
        line = self._table.get(number)
        return self.sites.named(line["m:site"]).allocations.wall_time_s if line else None

    def _is_news(self, row: Row) -> bool:
        ended = jobs.read_state(row) in (TrialState.DONE, TrialState.FAILED)
        return ended and jobs.trial_number(row) not in self._gathered

    def _explain(self, row: Row) -> dict[str, Any]:
        """Return the outcome; where the run left none, with what Balsam's log knows of its end."""
        outcome = jobs.read_outcome(row)
        if row["state"] == "FAILED" and "start" not in outcome:
            for event in self.gateway.events(job_id=row["id"], to_state="RUN_ERROR"):
                outcome["failure"] = faults.exit_status_said(event["data"].get("returncode"))
                outcome["traceback"] = str(event["data"].get("error", ""))
        return outcome

    def _note(self, row: Row) -> None:
        self._table.put(self._line(row))
        if self.on_change is not None:
            self.on_change(row, self._table[jobs.trial_number(row)]["m:site"])
        self._jobs.note(row)
        self._changes.note(row)

    def _line(self, row: Row) -> dict[str, Any]:
        assert self.sites is not None
        return jobs.table_row(row, self._zero, self.sites.of_job(row).name)

    # --- how much to have under way ------------------------------------------------------------------------------

    @property
    def begun_at(self) -> float:
        """When the search began (epoch): the zero of the times in its table."""
        return self._zero

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
        if self.sites is None:
            return 0
        return max(0, sum(self.sites.room(site) for site in self.sites) - self._jobs.on_their_way)

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
        said = [part.notice for part in (self.sites, self.health) if part is not None]
        return "; ".join(notice for notice in said if notice) or None

    def ensure_allocation(self, evaluations: int | None = None, seconds: float | None = None) -> None:
        """Ask for allocations where one is wanted and the evaluator may ask.

        Parameters
        ----------
        evaluations, seconds
            What is left of the search's budgets; None: no limit.
        """
        if self.sites is not None:
            self.sites.ensure(Work(evaluations, seconds), [] if self.health is None else self.health.suspects)

    # --- the end -------------------------------------------------------------------------------------------------

    def cancel(self) -> list[int]:
        """Withdraw the trials that no node has begun; their numbers."""
        assert self._search is not None
        self._fence()
        withdrawn = []
        waiting = jobs.withdraw_waiting(self.gateway, self._search, self._clock(), self._jobs.leaving)
        self._jobs.forget_leaving()
        for row in self._changes.read():  # all of them: this may be the last look before the results are written
            self._table.put(self._line(row))  # and no more: the next collect must still see what is new
            if row["id"] in waiting and jobs.read_state(row) is TrialState.CANCELLED:
                withdrawn.append(jobs.trial_number(row))
        return withdrawn

    def close(self, why: str = "it was closed", *, leave_running: bool = False) -> None:
        """End the allocations that were asked for here, and leave the wheel.

        Parameters
        ----------
        why
            Kept for `search status`.
        leave_running
            Allocations in which trials still run go on, so that a later life of the search finds their results.
        """
        try:
            if self.sites is not None and self.sites.owned:
                assert self._search is not None
                if leave_running and self._table.count(TrialState.RUNNING):
                    self.sites.leave()
                else:
                    jobs.settle(self.gateway, self._search, _SETTLE_S)
                    self.sites.release()
        finally:
            if self._wheel is not None:
                self._wheel.leave(why)

    def abandon(self, why: str) -> None:
        """Leave the wheel and touch nothing else: another driver has the search, or it could not be begun."""
        try:
            if self._wheel is not None:
                self._wheel.leave(why)
        except BalsamError as error:
            logger.warning("Balsam could not be told that this driver has left: %s", error)
