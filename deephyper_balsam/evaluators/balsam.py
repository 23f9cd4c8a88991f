"""Trials as jobs of a Balsam application: bulk submit, incremental collect."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from deephyper_balsam import faults, jobs
from deephyper_balsam.allocations import AllocationRequest, Allocations, Work
from deephyper_balsam.apps import register, resolve_run
from deephyper_balsam.drivers import Life, Wheel, read_lives
from deephyper_balsam.errors import BalsamError, InputError, SearchExistsError, SettingsError
from deephyper_balsam.evaluators import limits
from deephyper_balsam.evaluators.health import Health
from deephyper_balsam.gateway import Gateway, Row, check_name
from deephyper_balsam.jobs import Resources as Resources  # public here: evaluators.balsam.Resources
from deephyper_balsam.orders import STOP, Order, answer_order, effective_budget, read_orders
from deephyper_balsam.record import SearchRecord, check_same, create_record, find_record, find_records
from deephyper_balsam.trial import Result, Trial, TrialState
from deephyper_balsam.watch import SiteWatch

logger = logging.getLogger(__name__)

PIPELINE_DELAY_S = 6.0
"""From a run's end to the start of the next through Balsam's pipeline, on a stock site (measured: 5 to 6 s)."""

_OVERLAP_S = 10.0  # a poll looks back this far: clocks differ, and a commit may land late
_RECENT_RUNS = 200
_DOUBT_S = 90.0  # so long after a lost answer, what was asked for may still be done
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
    """Evaluates trials as jobs at a Balsam site (see `deephyper_balsam.evaluators.base.Evaluator` for the contract).

    Parameters
    ----------
    run
        The run function; or ``"file.py:run"``, ``"package.module:run"``, the YAML of a shell command, the name of a
        bundled application; or the spec that a search recorded (`deephyper_balsam.apps`), which is not loaded here.
    site
        The name of the Balsam site.
    resources
        What one evaluation gets.
    eval_timeout
        Seconds after which an evaluation is ended and counts as failed; None: no limit.
    allocation
        The allocation to ask for when none is alive; None: someone else provides them.
    client_path
        Balsam's credentials file; by default ``BALSAM_CLIENT_PATH``, else ``~/.balsam/client.yml``.

    Raises
    ------
    TargetError, UnknownSiteError, NotLoggedInError, UnreachableError
        At once, not when the search begins.
    """

    def __init__(
        self,
        run: str | Callable[..., Any] | Mapping[str, Any],
        site: str,
        *,
        resources: Resources | None = None,
        eval_timeout: float | None = None,
        allocation: AllocationRequest | None = None,
        client_path: str | Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if eval_timeout is not None and eval_timeout <= 0:
            raise InputError(f"`eval_timeout > 0` (seconds) must hold, but got {eval_timeout}.")
        if allocation is not None:
            asked_min = 0 if resources is None else resources.wall_time_min
            limits.check_fits(asked_min, eval_timeout, allocation.wall_time_min)
        self.spec = dict(run) if isinstance(run, Mapping) else resolve_run(run)
        self.resources = resources or Resources()
        self.eval_timeout_s = eval_timeout
        self.gateway = Gateway(client_path)
        self.site = self.gateway.site(site)
        self._request = allocation
        self._laid_out_for = 1
        self._clock = clock
        self._search: str | None = None
        self._zero = 0.0
        self._app_id = -1
        self._since: str | None = None
        self._seen: dict[int, str] = {}  # job id -> last_update, of what the next look may show again
        self._lines: dict[int, dict[str, Any]] = {}  # trial number -> its line of results.csv
        self._states: Counter[TrialState] = Counter()
        self._gathered: set[int] = set()
        self._order = 0
        self._doubtful = False
        self._look_again_at: float | None = None
        self._job_ids: dict[int, int] = {}  # trial number -> id of its job
        self._durations_s: deque[float] = deque(maxlen=_RECENT_RUNS)
        self._wheel: Wheel | None = None
        self._watch: SiteWatch | None = None
        self._orders_seen: set[int] = set()
        self.allocations: Allocations | None = None
        self.health: Health | None = None
        self._limit = limits.StartLimit(self.resources.wall_time_min, eval_timeout)

    @property
    def workers(self) -> int:
        """How many trials the search is laid out for: those of the allocation it asks for, or as it is told."""
        return max(self.resources.slots(self._request.nodes) if self._request else 1, self.capacity, self._laid_out_for)

    def lay_out(self, nodes: int, wall_time_min: int) -> int:
        """Plan for allocations that someone else provides, before `open`; how many trials one runs at once.

        Raises
        ------
        InputError
            When no evaluation fits into one.
        """
        limits.check_fits(self.resources.wall_time_min, self.eval_timeout_s, wall_time_min)
        self._laid_out_for = self.resources.slots(nodes)
        if not self._laid_out_for:
            raise InputError(f"An evaluation has {self.resources.num_nodes} nodes, but the allocation has {nodes}.")
        return self._laid_out_for

    @property
    def settings(self) -> dict[str, Any]:
        """What a search with this evaluator writes into its record."""
        return {"run": self.spec, "site": self.site["name"]}

    @classmethod
    def recorded(
        cls,
        name: str,
        *,
        allocation: AllocationRequest | None = None,
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
        if allocation is None and settings.get("allocation"):
            allocation = AllocationRequest(**settings["allocation"])
        made = cls(
            settings["run"],
            settings["site"],
            resources=Resources(**settings["resources"]),
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
            self.site["id"],
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
        record = self._find(name, settings)  # again: whoever drove until now may have made it
        if record is None:
            if settings.get("seed") is None:
                settings["seed"] = secrets.randbits(31)
            settings = {
                **settings,
                "resources": asdict(self.resources),
                "eval_timeout": self.eval_timeout_s,
                "num_workers": self.workers,
                "max_evals": max_evals,
                "timeout": timeout_s,
                "allocation": None if self._request is None else asdict(self._request),
                "asked_for": dict(asked_for or {}),
            }
            record = create_record(self.gateway, name, settings, self.site["id"], self._clock())
        self._zero = record.created_at
        self._forget_all()
        self._app_id, app_name = register(self.gateway, self.spec, self.site["name"])
        logger.info("Application %s at site %s", app_name, self.site["name"])
        sites = {self.site["id"]: self.site}
        self.allocations = Allocations(self.gateway, sites, jobs.trial_tags(name), self.resources, self._request)
        self._watch = SiteWatch(self.gateway, sites)
        return self._read_history(record)

    def _read_history(self, record: SearchRecord) -> History:
        rows = self._without_twins(list(self.gateway.jobs(jobs.trial_tags(record.name))))
        jobs.mend(self.gateway, record.name, rows)
        self.health = Health(self.gateway, record.name, self._explain)
        self.health.restore(rows)
        for row in rows:
            self._note(row)
        gathered = sorted(
            (row for row in rows if "gathered" in row["data"]), key=lambda row: row["data"]["gathered"]["order"]
        )
        self._gathered = {jobs.trial_number(row) for row in gathered}
        self._order = len(gathered)
        trials = sorted((jobs.read_trial(row) for row in rows), key=lambda trial: trial.number)
        results = [jobs.read_result(jobs.trial_number(row), row["data"]["result"]) for row in gathered]
        # What ended while no driver looked is collected like any other result: look at everything once more
        self._since, self._seen = None, {}
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
        """Create the jobs of the trials, in bulk."""
        if not trials:
            return
        assert self._search is not None, "open() comes first"
        self._fence()
        if self._doubtful:  # an answer was lost: what was created all the same must not be created twice
            there = {jobs.trial_number(row) for row in self.gateway.jobs(jobs.trial_tags(self._search))}
            trials = [trial for trial in trials if trial.number not in there]
        now = self._clock()
        needs = replace(self.resources, wall_time_min=self._limit.minutes)
        new = [jobs.trial_job(trial, self._search, self._app_id, needs, now, self.eval_timeout_s) for trial in trials]
        try:
            ids = self.gateway.create_jobs(new)
        except BalsamError:  # of several batches some may be there, whatever befell the next
            self._doubtful = True
            self._look_again_at = self._clock() + _DOUBT_S
            raise
        self._doubtful = False
        self._job_ids.update((trial.number, job_id) for trial, job_id in zip(trials, ids, strict=True))
        for trial in trials:
            self._set_line(trial.number, {"job_id": trial.number, "job_status": TrialState.READY.value})

    def collect(self) -> list[Result]:
        """Look at the jobs that changed since the last look, and take in the results that are new."""
        assert self._search is not None, "open() comes first"
        assert self.allocations is not None
        self._fence()
        self.allocations.refresh()
        self._limit_starts()
        if self._watch is not None:
            self._watch.look(self.gateway.now())
        rows = self._without_twins(self._changed_rows())
        changed = [row for row in rows if self._seen.get(row["id"]) != row["last_update"]]
        assert self.health is not None
        self.health.run_again(changed)
        self.health.look_for_cuts(changed, self._clock(), self.allocations.wall_time_s)
        arrived = [row for row in changed if self._is_news(row)]
        taken: dict[int, Row] = {}
        for row in arrived:
            outcome = self._explain(row)
            gathered: dict[str, Any] = {"order": self._order + len(taken), "at": self._clock()}
            if self.health.cuts(row["id"]):
                gathered["cuts"] = self.health.cuts(row["id"])
            row["data"] = {**row["data"], "result": outcome, "gathered": gathered}
            taken[row["id"]] = row
        self.gateway.write_data({job_id: row["data"] for job_id, row in taken.items()})
        if any(jobs.read_state(row) is TrialState.DONE for row in taken.values()):
            self.allocations.worked()
        # Nothing above changed us, so that after an error the same call can be made again
        self._order += len(taken)
        for row in changed:
            self._note(row)
        self._forget_old()
        if taken or self._states[TrialState.RUNNING]:
            self.allocations.note_work()
        for row in taken.values():
            self.health.take_in(row["data"]["result"])
        results = [jobs.read_result(jobs.trial_number(row), row["data"]["result"]) for row in taken.values()]
        for result in results:
            assert result.number is not None
            self._gathered.add(result.number)
            if result.started_at and result.ended_at:
                self._durations_s.append(result.ended_at - result.started_at)
        return results

    def _limit_starts(self) -> None:
        assert self.allocations is not None
        assert self._search is not None
        if self._limit.update(self._durations_s, self.allocations.wall_time_s):
            limits.apply(self.gateway, self._search, self._limit.minutes)
            self._limit.applied()

    def _changed_rows(self) -> list[Row]:
        assert self._search is not None
        since = self._since
        if self._look_again_at is not None and self._clock() > self._look_again_at:
            since, self._look_again_at = None, None  # what was created late, after an answer was lost
        return list(self.gateway.jobs(jobs.trial_tags(self._search), changed_since=since))

    def _without_twins(self, rows: list[Row]) -> list[Row]:
        """Return the rows without second jobs of a trial; those are set aside (see `jobs.set_aside`)."""
        assert self._search is not None
        by_number: dict[int, dict[int, Row]] = {}
        for row in rows:
            by_number.setdefault(jobs.trial_number(row), {})[row["id"]] = row
        kept: list[Row] = []
        for number, twins in by_number.items():
            known = self._job_ids.get(number)
            if known is not None and known not in twins:
                twins.update({row["id"]: row for row in self.gateway.jobs(jobs.trial_tags(self._search), ids=[known])})
            one = jobs.choose_one(list(twins.values()))
            for row in twins.values():
                if row is not one:
                    logger.warning("Trial %d has two jobs; %d is set aside for %d", number, row["id"], one["id"])
                    jobs.set_aside(self.gateway, self._search, row, one["id"], self._clock())
            self._job_ids[number] = one["id"]
            kept.append(one)
        return kept

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
        self._set_row_line(row)
        self._seen[row["id"]] = row["last_update"]
        if self._since is None or jobs.updated_at(row) - _OVERLAP_S > datetime.fromisoformat(self._since).timestamp():
            moment = datetime.fromisoformat(row["last_update"]) - timedelta(seconds=_OVERLAP_S)
            self._since = moment.isoformat()

    def _forget_all(self) -> None:
        """Begin without what an earlier search of this evaluator left."""
        self._lines.clear()
        self._states.clear()
        self._durations_s.clear()
        self._doubtful = False
        self._look_again_at = None
        self._job_ids.clear()
        self._since, self._seen = None, {}

    def _forget_old(self) -> None:
        if self._since is not None:
            horizon = datetime.fromisoformat(self._since)
            self._seen = {key: at for key, at in self._seen.items() if datetime.fromisoformat(at) >= horizon}

    def _set_row_line(self, row: Row) -> None:
        self._set_line(jobs.trial_number(row), jobs.table_row(row, self._zero, self.site["name"]))

    def _set_line(self, number: int, line: dict[str, Any]) -> None:
        before = self._lines.get(number)
        if before is not None:
            self._states[TrialState(before["job_status"])] -= 1
        self._lines[number] = line
        self._states[TrialState(line["job_status"])] += 1

    # --- how much to have under way ------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """How many trials the running allocations can run at once."""
        return 0 if self.allocations is None else self.allocations.capacity

    @property
    def backlog(self) -> int:
        """What completes during one pipeline delay (Little's law); before anything ended, one wave.

        While no allocation runs, what those in the scheduler's queue will start with.
        """
        if self.allocations is None:
            return 0
        if not self.capacity:
            return self.allocations.planned or self.resources.slots(self.resources.num_nodes)
        closing = self.allocations.closing(self._limit.needed_s)  # a new run would be cut there, and none follows
        lasting = self.capacity - closing
        if not self._durations_s:
            return lasting - closing
        share = PIPELINE_DELAY_S / max(fmean(self._durations_s), 0.1)
        return min(lasting, math.ceil(lasting * share)) - closing

    @property
    def counts(self) -> dict[TrialState, int]:
        """How many trials are in each state."""
        return {state: self._states[state] for state in TrialState}

    def line(self, number: int | None) -> dict[str, Any]:
        """Return the line of `results.csv` of one trial."""
        assert number is not None
        return self._lines[number]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of `results.csv`, by trial number."""
        return [self._lines[number] for number in sorted(self._lines)]

    @property
    def notice(self) -> str | None:
        """What a person should know about the site, its nodes and the allocations, if there is something."""
        said = [part.notice for part in (self._watch, self.allocations, self.health) if part is not None]
        return "; ".join(notice for notice in said if notice) or None

    def ensure_allocation(self, evaluations: int | None = None, seconds: float | None = None) -> None:
        """Ask for an allocation if one is wanted and the evaluator may ask.

        Parameters
        ----------
        evaluations, seconds
            What is left of the search's budgets; None: no limit.
        """
        if self.allocations is not None:
            self.allocations.avoid = [] if self.health is None else self.health.suspects
            self.allocations.ensure(Work(evaluations, seconds))

    # --- the end -------------------------------------------------------------------------------------------------

    def cancel(self) -> list[int]:
        """Withdraw the trials that no node has begun; their numbers."""
        assert self._search is not None
        self._fence()
        withdrawn = []
        waiting = jobs.withdraw_waiting(self.gateway, self._search, self._clock())
        for row in self._changed_rows():  # all of them: this may be the last look before the results are written
            self._set_row_line(row)  # and no more: the next collect must still see what is new
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
            if self.allocations is not None and self.allocations.owned:
                assert self._search is not None
                if leave_running and self._states[TrialState.RUNNING]:
                    self.allocations.leave()
                else:
                    jobs.settle(self.gateway, self._search, _SETTLE_S)
                    self.allocations.release()
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
