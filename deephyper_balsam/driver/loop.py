"""The loop of a search: collect, record, tell; then fill what is free: ask, submit.

It knows an optimizer by ask and tell, and whatever evaluates by `driver.session.SearchSession`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from deephyper_balsam.common.objective import command_minimises, turned
from deephyper_balsam.common.wording import counted
from deephyper_balsam.driver.exports import Exports
from deephyper_balsam.driver.patience import Patience
from deephyper_balsam.driver.progress import Progress, Rate
from deephyper_balsam.driver.request_handler import RequestHandler
from deephyper_balsam.driver.session import DEFAULT_LIMITS, FailureLimits, Line, SearchHistory, SearchSession
from deephyper_balsam.errors import (
    BalsamError,
    BrokenApplicationError,
    NotLoggedInError,
    TakenOverError,
    UnreachableError,
)
from deephyper_balsam.node.failure_policy import BrokenApplication
from deephyper_balsam.node.stoppers import NEVER, Stopper
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.optimizers.base import Optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.results import table as results
from deephyper_balsam.store.search_state import Budget, EndReason
from deephyper_balsam.trial import Config, Result, TrialState

logger = logging.getLogger(__name__)

_IDLE_POLLS = 4  # while nothing runs
_ASKED_A_LOOP = 300  # thousands at once: the first nodes begin while the rest is asked
_LEAST_PAUSE = 0.2  # of a poll: what a loop that takes long leaves to the server


@dataclass(frozen=True)
class SearchPlan:
    """What a search is, and how it is driven.

    Attributes
    ----------
    problem, name, method, seed, options, warm_start
        As of `driver.search.Search`; a warm start is pairs of a configuration and its objective.
    poll_s
        Seconds between two looks.
    limits
        When failures are taken for more than the fault of their configurations.
    stopper
        Says which runs end early.
    asked_for
        In what words it was asked for.
    """

    problem: HpProblem
    name: str
    method: str
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    warm_start: Sequence[Any] = ()
    poll_s: float = 0.5
    limits: FailureLimits = DEFAULT_LIMITS
    stopper: Stopper = NEVER
    asked_for: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What the search is, as written into its record."""
        return {
            "problem": self.problem.to_dict(),
            "method": self.method,
            "options": dict(self.options),
            "seed": self.seed,
            **({"warm_start": list(self.warm_start)} if self.warm_start else {}),
            **({"stopper": self.stopper.to_text()} if self.stopper != NEVER else {}),
        }

    def minimises(self, session: SearchSession) -> bool:
        """Return whether the run function returns a loss: by its problem, or its shell command."""
        return self.problem.minimize or command_minimises(session.settings["run"])


def make_planned(plan: SearchPlan, settings: Mapping[str, Any]) -> Optimizer:
    """Return the optimizer of a search.

    Parameters
    ----------
    plan
        The search.
    settings
        Those in its record, with the seed and the number of workers that it was begun with.
    """
    options = dict(plan.options)
    if plan.method == "ambs":
        options = {"max_evals": settings.get("max_evals"), **options, "background": True}
    return make_optimizer(
        plan.method, plan.problem, seed=settings["seed"], num_workers=settings["num_workers"], **options
    )


@dataclass(frozen=True)
class StopSignals:
    """How a driver is told to end, from a signal handler or another thread.

    Attributes
    ----------
    stop
        No new trials, waiting ones withdrawn, results written.
    leave
        Everything stays as it is.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    leave: threading.Event = field(default_factory=threading.Event)

    def clear(self) -> None:
        """Forget what was asked."""
        self.stop.clear()
        self.leave.clear()


class Driver:
    """Drives a search from the beginning to the end of one call.

    Parameters
    ----------
    plan
        What is searched.
    session
        Where its trials run.
    signals
        By which it is told to end.
    exports
        The files that are written; None: none.
    make
        Makes the optimizer, from the plan and the settings in the search's record.

    Attributes
    ----------
    why
        Why it ended.
    requests
        What people asked of it; None before `drive` has begun.
    patiently
        Makes the calls of the session.
    """

    def __init__(
        self,
        plan: SearchPlan,
        session: SearchSession,
        signals: StopSignals,
        exports: Exports | None = None,
        make: Callable[[SearchPlan, Mapping[str, Any]], Optimizer] = make_planned,
    ) -> None:
        self.plan, self.session = plan, session
        self.why = "interrupted" if signals.stop.is_set() else "it was closed"
        self.requests: RequestHandler | None = None
        self.patiently = Patience(session, signals.stop)
        self._signals, self._exports, self._make = signals, exports, make
        self._minimize = plan.minimises(session)
        self._application = BrokenApplication(plan.limits.max_failures)
        self._driven_before_s = 0.0
        self._began_at: float | None = None
        self._rate = Rate()
        self._withdrawn: dict[int, Config] = {}
        self._first_of_ours = 0
        self._best: Line | None = None

    def stop(self) -> None:
        """Ask `drive` to end; safe in a signal handler."""
        self.why = "interrupted"
        self.session.hurry()
        self._signals.stop.set()

    @property
    def elapsed_s(self) -> float:
        """Seconds that drivers have driven the search, over all its drivers; 0 before it was begun."""
        return 0.0 if self._began_at is None else self._driven_before_s + self.session.now() - self._began_at

    def drive(self, budget: Budget, on_progress: Callable[[Progress], None] | None, takeover: bool = False) -> None:
        """Run until the budget is used, every configuration is evaluated, or it is stopped.

        Parameters
        ----------
        budget
            Of the whole search, as given to this driver.
        on_progress
            Called after every look.
        takeover
            The driver that there is, is gone.
        """
        optimizer, requests = self._open(budget, takeover)
        self._began_at = self.session.now()
        try:
            while not self._signals.stop.is_set():
                looked_at = time.monotonic()
                if requests.obey(self.patiently(self.session.requests)):
                    break
                progress = self._look(optimizer, requests)
                if on_progress is not None:
                    on_progress(progress)
                if self._ended(progress, optimizer, requests):
                    break
                if requests.drain_until is None:
                    self._ensure_allocation(progress, optimizer, requests)
                    self._fill(optimizer, requests)
                self.session.wait(self._pause_s(progress, time.monotonic() - looked_at), self._signals.stop)
            if requests.stopped_by is not None and not self._signals.stop.is_set():
                self.why = f"stopped by {requests.stopped_by}"
        except KeyboardInterrupt:
            self.stop()
        except TakenOverError as error:
            logger.error("%s", error)
            self.why = "taken over"
            raise
        except (UnreachableError, NotLoggedInError) as error:
            if not self._signals.stop.is_set():  # asked to stop while Balsam is away: what is in it can be resumed
                self.why = f"error: {error}"
                raise
        except Exception as error:
            self.why = f"error: {type(error).__name__}: {error}"
            raise
        finally:
            self._close(optimizer)

    # --- the beginning and the end -------------------------------------------------------------------------------

    def _open(self, budget: Budget, takeover: bool) -> tuple[Optimizer, RequestHandler]:
        history = self.session.open(
            self.plan.name,
            self.plan.settings,
            max_evals=budget.max_evals,
            timeout_s=budget.timeout_s,
            asked_for=self.plan.asked_for,
            takeover=takeover,
            folder=None if self._exports is None else self._exports.folder,
            limits=self.plan.limits,
        )
        try:
            return self._begin(history)
        except BaseException as error:
            self.session.abandon(f"could not begin: {str(error) or type(error).__name__}")
            raise

    def _begin(self, history: SearchHistory) -> tuple[Optimizer, RequestHandler]:
        self._driven_before_s = history.drove_s
        optimizer = self._make(self.plan, history.settings)
        warm = [_from_elsewhere(config, objective) for config, objective in history.settings.get("warm_start", [])]
        if warm and not history.trials:
            optimizer.tell(warm)
            logger.info("Begins with %d points from elsewhere", len(warm))
        if history.trials:
            optimizer.restore(history.trials, [*warm, *history.results], history.withdrawn)
            configs = {trial.number: trial.config for trial in history.trials}
            self._withdrawn = {number: configs[number] for number in history.withdrawn}
            logger.info(
                "Going on with %s, %s", counted(len(history.trials), "trial"), counted(len(history.results), "result")
            )
        budget = Budget(history.max_evals, history.timeout_s)
        requests = RequestHandler(self.plan.problem, self.session, self.patiently, optimizer, budget)
        self.requests = requests
        requests.take_up(history.requests)
        self._best = results.best(self.session.lines)
        if self._best is not None:
            self._application.settle()
        self._first_of_ours = 1 + max((trial.number for trial in history.trials), default=-1)
        if self._exports is not None:
            self._exports.asked_for["seed"] = history.settings["seed"]  # the one that was drawn, if none was given
            self._exports.write(now=True)  # of a long search it takes a second, which no node waits for yet
        return optimizer, requests

    def _ended(self, progress: Progress, optimizer: Optimizer, requests: RequestHandler) -> bool:
        running = progress.states[TrialState.RUNNING]
        if requests.drain_until is not None:
            return not running or self.session.now() >= requests.drain_until
        used = requests.budget.used(progress.evaluated, progress.elapsed_s)
        if used is not EndReason.TIME:
            if running or progress.states[TrialState.READY]:
                return False
            if used is None and optimizer.exhausted:
                used = EndReason.SPACE
        if used is None:
            return False
        self.why = used.value
        logger.info("%s", self.why.capitalize())
        if requests.wishes:
            logger.warning(
                "%d added configurations were not evaluated: no budget is left for them (see `search extend`)",
                len(requests.wishes),
            )
        return True

    def _close(self, optimizer: Optimizer) -> None:
        """Withdraw what has not begun, write the results, let go of the search.

        When Balsam is away this waits for it; after `stop` it does not, and the next driver mends what is left.
        """
        optimizer.close()
        if self._signals.leave.is_set():
            return
        if self.why == "taken over":
            self.session.abandon(self.why)
            return
        try:
            withdrawn = self.patiently(self.session.cancel)
            if withdrawn:
                logger.info("Withdrew %d waiting trials", len(withdrawn))
            for result in self.patiently(self.session.collect):  # what ended since the last look
                self._see(result)
        except TakenOverError as error:
            logger.error("%s", error)
            self.session.abandon("taken over")
            return
        except BalsamError as error:
            logger.warning("Waiting trials could not be withdrawn: %s", error)
        asked_to_stop = self.requests is not None and self.requests.stopped_by is not None
        leave_running = self._signals.stop.is_set() or asked_to_stop
        try:
            self.patiently(lambda: self.session.close(self.why, leave_running=leave_running))
        except BalsamError as error:
            logger.warning("The allocations that were asked for could not be ended: %s", error)
        if self._exports is not None:
            self._exports.write(now=True)

    # --- the loop's parts ----------------------------------------------------------------------------------------

    def _look(self, optimizer: Optimizer, requests: RequestHandler) -> Progress:
        """Take in all that is new; how the search stands then."""
        self._record(self.patiently(self.session.collect), optimizer)
        gone = self.patiently(self.session.upkeep)
        if gone:
            optimizer.withdraw(gone)
        if self._exports is not None:
            self._exports.write_again()
        return self._progress(requests)

    def _record(self, arrived: list[Result], optimizer: Optimizer) -> None:
        if not arrived:
            return
        optimizer.tell([self._as_told(result) for result in arrived])
        self._rate.add(len(arrived), self.session.now())
        for result in arrived:
            self._see(result)
        if self._exports is not None:
            self._exports.write()
        if any(result.objective is not None for result in arrived):
            self._application.settle()
        if self.session.hopeless is not None:
            raise BrokenApplicationError(self.session.hopeless)
        for result in arrived:
            ours = result.number is not None and result.number >= self._first_of_ours  # it may have been mended since
            if ours and self._application.sees(result.objective, result.failure):
                raise BrokenApplicationError(self._broken_said(result))

    def _broken_said(self, last: Result) -> str:
        first = counted(self._application.limit, "trial")
        said = f"The first {first} all failed alike, so the search ended: {last.failure}"
        if last.traceback:
            said += f"\n\n{last.traceback.rstrip()}\n"
        return (
            f"{said}\nTry it here with `deephyper-balsam problem check`; {self.session.advice.where_runs_print}. "
            "To go on whatever fails: `max_failures=0` (--max-failures 0)."
        )

    def _see(self, result: Result) -> None:
        if result.objective is None:
            logger.info("Trial %s failed: %s", result.number, result.failure)
        elif self._best is None or result.objective > self._best["objective"]:
            self._best = self.session.line(result.number)
            shown = turned(result.objective, self._minimize)
            logger.info("Trial %s is the best so far: %.6g", result.number, shown)

    def _as_told(self, result: Result) -> Result:
        """A trial that an earlier driver withdrew, and a node ran all the same, teaches like a point from elsewhere."""
        config = None if result.number is None else self._withdrawn.get(result.number)
        return result if config is None else replace(result, number=None, config=config)

    def _ensure_allocation(self, progress: Progress, optimizer: Optimizer, requests: RequestHandler) -> None:
        """Ask for an allocation if one is wanted, and if there is something left that could run in it."""
        nothing_under_way = not (progress.states[TrialState.RUNNING] or progress.states[TrialState.READY])
        if nothing_under_way and self._first_of_ours:
            self._fill(optimizer, requests)  # of a search that goes on, only this tells whether its space is used up
            if optimizer.exhausted and not self.session.counts[TrialState.READY]:
                return
        self.patiently(partial(self.session.ensure_allocation, *progress.left))

    def _fill(self, optimizer: Optimizer, requests: RequestHandler) -> None:
        counts, max_evals = self.session.counts, requests.budget.max_evals
        wanted = self.session.room
        if max_evals is not None:
            ever = sum(number for state, number in counts.items() if state is not TrialState.CANCELLED)
            wanted = min(wanted, max_evals - ever)
        if wanted > 0:
            trials = optimizer.ask(min(wanted, _ASKED_A_LOOP))
            self.patiently(lambda: self.session.submit(trials))
            requests.note_submitted(trials)

    def _pause_s(self, progress: Progress, took_s: float) -> float:
        """Return how long to wait for the next look after one that took so long: more while no result can come."""
        poll_s = self.plan.poll_s
        if not progress.capacity and not progress.states[TrialState.RUNNING]:
            return poll_s * _IDLE_POLLS
        return max(_LEAST_PAUSE * poll_s, poll_s - took_s)

    def _progress(self, requests: RequestHandler) -> Progress:
        now = self.session.now()
        files = None if self._exports is None else self._exports.notice
        notice = self.patiently.notice or "; ".join(filter(None, (self.session.notice, files))) or None
        if requests.drain_until is not None:
            left_s = max(0.0, requests.drain_until - now)
            notice = f"stopping; running trials are waited for, {left_s:.0f} s at most"
        return Progress(
            states=self.session.counts,
            best=self._best,
            elapsed_s=self.elapsed_s,
            evaluations_per_min=self._rate.per_min(now, now if self._began_at is None else self._began_at),
            max_evals=requests.budget.max_evals,
            timeout_s=requests.budget.timeout_s,
            capacity=self.session.capacity,
            notice=notice,
            minimize=self._minimize,
        )


def _from_elsewhere(config: Config, objective: float | None) -> Result:
    return Result(None, objective, failure="it failed elsewhere" if objective is None else None, config=config)
