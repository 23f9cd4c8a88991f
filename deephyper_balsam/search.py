"""The driver of a search: collect, record, tell; then fill what is free: ask, submit.

It knows an optimizer by ask and tell, and an evaluator by submit and collect. Balsam's job table is the record; the
files in the search's folder are exports.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from deephyper_balsam import results
from deephyper_balsam.errors import (
    BalsamError,
    BrokenApplicationError,
    NotLoggedInError,
    ProblemError,
    SettingsError,
    TakenOverError,
    UnreachableError,
)
from deephyper_balsam.evaluators.balsam import BalsamEvaluator, History
from deephyper_balsam.evaluators.base import EXHAUSTED
from deephyper_balsam.faults import DEFAULT_MAX_FAILURES, BrokenApplication
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.problem import HpProblem
from deephyper_balsam.trial import Config, Result, TrialState

if TYPE_CHECKING:
    import pandas as pd

    from deephyper_balsam.allocations import Requests
    from deephyper_balsam.optimizers.base import Optimizer
    from deephyper_balsam.orders import Order

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_RETRY_S = 30.0
_IDLE_POLLS = 4  # while nothing runs
_ASKED_A_LOOP = 300  # thousands at once: the first nodes begin while the rest is asked
_LEAST_PAUSE = 0.2  # of a poll: what a loop that takes long leaves to the server
_EXPORT_SHARE = 0.05  # of the driver's time, at most, goes into writing results.csv


@dataclass(frozen=True)
class Progress:
    """How a search stands, for whoever watches it.

    Attributes
    ----------
    states
        Number of trials in each state.
    best
        The line of the best trial so far, or None.
    elapsed_s
        Seconds that drivers have driven the search, over all its lives.
    evaluations_per_min
        Over the last minutes of this driver.
    max_evals, timeout_s
        The budgets of the whole search; None: no limit.
    capacity
        How many trials can run at once now.
    notice
        What a person should know, or None.
    """

    states: dict[TrialState, int]
    best: dict[str, Any] | None
    elapsed_s: float
    evaluations_per_min: float
    max_evals: int | None
    timeout_s: float | None
    capacity: int
    notice: str | None

    @property
    def evaluated(self) -> int:
        """Trials that count against `max_evals`: done and failed."""
        return self.states[TrialState.DONE] + self.states[TrialState.FAILED]

    @property
    def left(self) -> tuple[int | None, float | None]:
        """Evaluations and seconds that are left of the budgets; None: no limit."""
        return (
            None if self.max_evals is None else max(0, self.max_evals - self.evaluated),
            None if self.timeout_s is None else max(0.0, self.timeout_s - self.elapsed_s),
        )


@dataclass(frozen=True)
class _Budget:
    """What the whole search may take; None: no limit."""

    max_evals: int | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_evals is not None and self.max_evals < 1:
            raise SettingsError(f"`max_evals >= 1` must hold, but got {self.max_evals}.")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise SettingsError(f"`timeout > 0` (seconds) must hold, but got {self.timeout_s}.")

    def extended(self, order: Order) -> _Budget:
        """Return the budget after an order to extend it; it never shrinks, and what has no limit gets none."""
        pairs = ((self.max_evals, order.max_evals), (self.timeout_s, order.timeout_s))
        return _Budget(*(now if now is None or new is None else max(now, new) for now, new in pairs))  # type: ignore[arg-type]

    def __str__(self) -> str:
        parts = [f"{self.max_evals} evaluations"] if self.max_evals is not None else []
        parts += [f"{self.timeout_s:g} s"] if self.timeout_s is not None else []
        return " and ".join(parts)


@dataclass
class _Rate:
    """Evaluations a minute over the last `window_s` seconds."""

    window_s: float = 300.0
    _times: list[float] = field(default_factory=list)

    def add(self, count: int, now: float) -> None:
        self._times.extend([now] * count)
        self._times = [at for at in self._times if now - at <= self.window_s]

    def per_min(self, now: float, began_at: float) -> float:
        span_s = min(self.window_s, max(now - began_at, 1.0))
        return 60.0 * len(self._times) / span_s


class Search:
    """One search: a problem, a method, an evaluator, a name.

    Parameters
    ----------
    problem
        What is searched; the objective is maximised.
    evaluator
        Where the trials run.
    name
        The search's name in Balsam and of its folder.
    method
        ``"ambs"``, ``"random"`` or ``"ga"``.
    seed
        The same seed and the same order of results give the same trials. None: drawn once and recorded.
    log_dir
        The folder in which the search's own folder is made.
    poll_s
        Seconds between two looks at Balsam.
    max_failures
        When so many trials, the first of this driver, all fail alike and none has ever had an objective, the search
        ends; 0: never.
    asked_for
        What `search.yaml` says, when it is more than method, seed and options: the settings of the command line.
    warm_start
        Points from elsewhere, ``Result(None, y, config={...})``, told before the first trial and kept in the record; a
        search that goes on has those that it was begun with.
    options
        Of the method; see `deephyper_balsam.optimizers.make_optimizer`.

    Raises
    ------
    SettingsError
        An unknown method or option.
    ProblemError
        The problem has no legal configuration.
    """

    def __init__(
        self,
        problem: HpProblem,
        evaluator: BalsamEvaluator,
        name: str,
        method: str,
        *,
        seed: int | None = None,
        log_dir: str | Path = ".",
        poll_s: float = 0.5,
        max_failures: int = DEFAULT_MAX_FAILURES,
        clock: Callable[[], float] = time.time,
        asked_for: dict[str, Any] | None = None,
        warm_start: Sequence[Result] = (),
        **options: Any,
    ) -> None:
        problem.check()
        self._warm_start = [[problem.check_configuration(one.config or {}), one.objective] for one in warm_start]
        self.problem = problem
        self.evaluator = evaluator
        self.name = name
        self.method = method
        self.folder = Path(log_dir) / name
        self._seed = seed
        self._options = options
        self._poll_s = poll_s
        self._clock = clock
        self._asked_for = asked_for or {"method": method, "seed": seed, **options, "max_failures": max_failures}
        self._application = BrokenApplication(max_failures)
        self._stop = threading.Event()
        self._leave_now = False
        self._budget = _Budget()
        self._drain_until: float | None = None  # someone asked to stop; running trials are waited for so long
        self._asked_to_stop = False
        self._why = "it was closed"
        self._wishes: dict[bytes, Order] = {}  # configurations that people added, not submitted yet
        self._driven_before_s = 0.0
        self._rate = _Rate()
        self._withdrawn: dict[int, Config] = {}
        self._first_of_ours = 0
        self._notice: str | None = None
        self._best: dict[str, Any] | None = None
        self._file = results.ResultsFile(self.folder / "results.csv", problem.hyperparameter_names)
        self._exported_at = -1e9
        self._export_took_s = 0.0
        # Made once here, so that a wrong method or option is refused before anything is begun
        make_optimizer(method, problem, seed=seed, **options).close()

    @classmethod
    def resume(
        cls,
        name: str,
        *,
        log_dir: str | Path = ".",
        allocation: Requests = None,
        client_path: str | Path | None = None,
        poll_s: float = 0.5,
    ) -> Search:
        """Return the search `name`, rebuilt from Balsam alone; call its `search()` to go on within its budget.

        Parameters
        ----------
        log_dir
            The folder in which the search's own folder is made, or lies already.
        allocation
            In place of the one that the search was begun with.

        Raises
        ------
        UnknownSearchError
            There is no such search; the message names those there are.
        """
        evaluator, record = BalsamEvaluator.recorded(name, allocation=allocation, client_path=client_path)
        settings = record.settings
        return Search(
            HpProblem.from_dict(settings["problem"]),
            evaluator,
            name,
            settings["method"],
            seed=settings["seed"],
            log_dir=log_dir,
            poll_s=poll_s,
            asked_for=settings["asked_for"],
            max_failures=settings["asked_for"].get("max_failures", DEFAULT_MAX_FAILURES),
            **settings["options"],
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the search is, as written into its record."""
        return {
            "problem": self.problem.to_dict(),
            "method": self.method,
            "options": self._options,
            "seed": self._seed,
            **({"warm_start": self._warm_start} if self._warm_start else {}),
        }

    def stop(self) -> None:
        """Ask a running `search` to end: no new trials, waiting ones withdrawn, results written.

        It does not wait for running trials, and for Balsam only a few seconds: they are collected when the search goes
        on. Safe in a signal handler.
        """
        self._why = "interrupted"
        self.evaluator.gateway.hurry()
        self._stop.set()

    def leave_now(self) -> None:
        """Make a running `search` that was stopped leave everything as it is; the next life mends it."""
        self._leave_now = True

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def search(
        self,
        max_evals: int | None = None,
        timeout: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        takeover: bool = False,
    ) -> pd.DataFrame:
        """Run until the budget is used, every configuration is evaluated, or `stop` is called.

        A search of this name that was begun before goes on where it stands.

        Parameters
        ----------
        max_evals
            Evaluations of the whole search, over all its lives.
        timeout
            Seconds of the whole search; only the time counts in which a driver was at work. Without `max_evals` and
            `timeout` a search goes on within the budget that it has.
        on_progress
            Called after every look at Balsam.
        takeover
            The driver that there is, is gone for good, however lately it gave a sign of life.

        Returns
        -------
        pandas.DataFrame
            A row a trial, the columns of `results.csv`.

        Raises
        ------
        SearchRunningError
            Another driver is at work on the search.
        TakenOverError
            Another driver has taken over this one's search.
        BrokenApplicationError
            The first trials all failed alike; what was found is written.
        """
        budget = _Budget(max_evals, timeout)
        if max_evals is None and timeout is None and not self.evaluator.knows(self.name):
            raise SettingsError("A search needs an end: give `max_evals` (evaluations), `timeout` (seconds) or both.")
        results.claim_folder(self.folder)
        with _log_to(self.folder / "search.log"):
            self._drive(budget, on_progress, takeover)
        return results.table(self.evaluator.lines, self.problem.hyperparameter_names)

    def _drive(self, budget: _Budget, on_progress: Callable[[Progress], None] | None, takeover: bool) -> None:
        optimizer = self._open(budget, takeover)
        self._began_at = self._clock()
        try:
            while not self._stop.is_set():
                looked_at = time.monotonic()
                if self._obey(self._patiently(self.evaluator.heartbeat), optimizer):
                    break
                arrived = self._patiently(self.evaluator.collect)
                self._record(arrived, optimizer)
                self._patiently(self.evaluator.archive)
                progress = self._progress()
                if self._drain_until is None:
                    self._patiently(partial(self.evaluator.ensure_allocation, *progress.left))
                if on_progress is not None:
                    on_progress(progress)
                if self._ended(progress, optimizer):
                    break
                if self._drain_until is None:
                    self._fill(optimizer)
                self._stop.wait(self._pause_s(progress, time.monotonic() - looked_at))
        except KeyboardInterrupt:
            self.stop()
        except TakenOverError as error:
            logger.error("%s", error)
            self._why = "taken over"
            raise
        except (UnreachableError, NotLoggedInError) as error:
            if not self._stop.is_set():  # asked to stop while Balsam is away: what is in it can be resumed
                self._why = f"error: {error}"
                raise
        except Exception as error:
            self._why = f"error: {type(error).__name__}: {error}"
            raise
        finally:
            self._close(optimizer)

    # --- the beginning and the end -------------------------------------------------------------------------------

    def _open(self, budget: _Budget, takeover: bool) -> Optimizer:
        history = self.evaluator.open(
            self.name,
            self.settings,
            max_evals=budget.max_evals,
            timeout_s=budget.timeout_s,
            asked_for=self._asked_for,
            takeover=takeover,
        )
        try:
            return self._begin(history)
        except BaseException as error:
            self.evaluator.abandon(f"could not begin: {str(error) or type(error).__name__}")
            raise

    def _begin(self, history: History) -> Optimizer:
        recorded = history.record.settings
        self._budget = _Budget(history.max_evals, history.timeout_s)
        self._driven_before_s = history.drove_s
        seed, workers = recorded["seed"], recorded["num_workers"]
        options = dict(self._options)
        if self.method == "ambs":
            options = {"max_evals": recorded.get("max_evals"), **options, "background": True}
        optimizer = make_optimizer(self.method, self.problem, seed=seed, num_workers=workers, **options)
        warm = [_from_elsewhere(config, objective) for config, objective in recorded.get("warm_start", [])]
        if warm and not history.trials:
            optimizer.tell(warm)
            logger.info("Begins with %d points from elsewhere", len(warm))
        if history.trials:
            optimizer.restore(history.trials, [*warm, *history.results], history.withdrawn)
            configs = {trial.number: trial.config for trial in history.trials}
            self._withdrawn = {number: configs[number] for number in history.withdrawn}
            logger.info("Going on with %d trials, %d results", len(history.trials), len(history.results))
        self._take_up(history.orders, optimizer)
        self._best = results.best(self.evaluator.lines)
        if self._best is not None:
            self._application.settle()
        self._first_of_ours = 1 + max((trial.number for trial in history.trials), default=-1)
        if not (self.folder / "search.yaml").exists():
            asked_for = {**self._asked_for, "seed": seed}  # the one that was drawn, if none was given
            results.write_whole(self.folder / "search.yaml", yaml.safe_dump(asked_for, sort_keys=False))
        if history.trials:
            self._export(now=True)  # of a long search it takes a second, which no node waits for yet
        return optimizer

    def _take_up(self, orders: list[Order], optimizer: Optimizer) -> None:
        """Do what was asked while nobody drove; and again what was added, if its trial was withdrawn before it ran."""
        for order in orders:
            if order.what == "add":
                self._add(order, optimizer)
            elif order.what == "extend" and order.handled is None:
                self.evaluator.answer(order, f"the budget is {self._budget}")

    def _obey(self, orders: list[Order], optimizer: Optimizer) -> bool:
        """Do what people asked for; whether to leave at once."""
        leave = False
        for order in orders:
            logger.info("Asked by %s: %s", order.by, order)
            if order.what == "add":
                self._add(order, optimizer)
            elif order.what == "extend":
                self._budget = self._budget.extended(order)
                self._answer(order, f"the budget is {self._budget}")
            elif order.what == "stop":
                leave = self._begin_to_stop(order) or leave
        return leave

    def _begin_to_stop(self, order: Order) -> bool:
        withdrawn = self._patiently(self.evaluator.cancel)
        running = self.evaluator.counts[TrialState.RUNNING]
        self._why = f"stopped by {order.by}"
        self._asked_to_stop = True
        leave = order.wait_s <= 0 or not running
        did = f"withdrew {len(withdrawn)} waiting trials, "
        did += f"leaves {running} running" if leave else f"waits up to {order.wait_s:.0f} s for {running} running"
        self._answer(order, did)
        if not leave:
            self._drain_until = self._clock() + order.wait_s
        return leave

    def _add(self, order: Order, optimizer: Optimizer) -> None:
        try:
            config = self.problem.check_configuration(order.config)
            if optimizer.add(config):
                self._wishes[self.problem.encoder.key(config)] = order
            elif order.handled is None:
                number = self._number_of(config)
                known = "it is in line already" if number is None else f"it is trial {number}"
                self._answer(order, known, **({} if number is None else {"trial": number}))
        except ProblemError as error:
            if order.handled is None:
                self._answer(order, f"refused: {error}")

    def _number_of(self, config: Config) -> int | None:
        """Return the number of the trial of this configuration."""
        key = self.problem.encoder.key(config)
        for line in self.evaluator.lines:
            other = {name[2:]: value for name, value in line.items() if name.startswith("p:")}
            if other and self.problem.encoder.key(other) == key:
                return int(line["job_id"])
        return None

    def _answer(self, order: Order, did: str, **details: Any) -> None:
        self._patiently(lambda: self.evaluator.answer(order, did, **details))

    def _ended(self, progress: Progress, optimizer: Optimizer) -> bool:
        running = progress.states[TrialState.RUNNING]
        if self._drain_until is not None:
            return not running or self._clock() >= self._drain_until
        if progress.timeout_s is not None and progress.elapsed_s >= progress.timeout_s:
            self._why = "the time is over"
        elif running or progress.states[TrialState.READY]:
            return False
        elif progress.max_evals is not None and progress.evaluated >= progress.max_evals:
            self._why = "complete"
        elif optimizer.exhausted:
            self._why = EXHAUSTED
        else:
            return False
        logger.info("%s", self._why.capitalize())
        return True

    def _close(self, optimizer: Optimizer) -> None:
        """Withdraw what has not begun, write the results, leave the wheel.

        When Balsam is away this waits for it; after `stop` it does not, and the next life mends what is left.
        """
        optimizer.close()
        if self._leave_now:
            return
        if self._why == "taken over":
            self.evaluator.abandon(self._why)
            return
        try:
            withdrawn = self._patiently(self.evaluator.cancel)
            if withdrawn:
                logger.info("Withdrew %d waiting trials", len(withdrawn))
            for result in self._patiently(self.evaluator.collect):  # what ended since the last look
                self._see(result)
        except TakenOverError as error:
            logger.error("%s", error)
            self.evaluator.abandon("taken over")
            return
        except BalsamError as error:
            logger.warning("Waiting trials could not be withdrawn: %s", error)
        try:
            leave_running = self._stop.is_set() or self._asked_to_stop
            self._patiently(lambda: self.evaluator.close(self._why, leave_running=leave_running))
        except BalsamError as error:
            logger.warning("The allocations that were asked for could not be ended: %s", error)
        self._export(now=True)

    # --- the loop's parts ----------------------------------------------------------------------------------------

    def _pause_s(self, progress: Progress, took_s: float) -> float:
        """Return how long to wait for the next look after one that took so long: more while no result can come."""
        if not progress.capacity and not progress.states[TrialState.RUNNING]:
            return self._poll_s * _IDLE_POLLS
        return max(_LEAST_PAUSE * self._poll_s, self._poll_s - took_s)

    def _record(self, arrived: list[Result], optimizer: Optimizer) -> None:
        if not arrived:
            return
        optimizer.tell([self._as_told(result) for result in arrived])
        self._rate.add(len(arrived), self._clock())
        for result in arrived:
            self._see(result)
        self._export()
        if any(result.objective is not None for result in arrived):
            self._application.settle()
        for result in arrived:
            ours = result.number is not None and result.number >= self._first_of_ours  # it may have been mended since
            if ours and self._application.sees(result.objective, result.failure):
                raise BrokenApplicationError(self._broken_said(result))

    def _broken_said(self, last: Result) -> str:
        said = f"The first {self._application.limit} trials all failed alike, so the search ended: {last.failure}"
        if last.traceback:
            said += f"\n\n{last.traceback.rstrip()}\n"
        return (
            f"{said}\nTry it here with `deephyper-balsam problem check`; what each trial left is in job.out of its "
            f"folder {self.name}/<number> in the site's data. To go on whatever fails: --max-failures 0."
        )

    def _see(self, result: Result) -> None:
        if result.objective is None:
            logger.info("Trial %s failed: %s", result.number, result.failure)
        elif self._best is None or result.objective > self._best["objective"]:
            self._best = self.evaluator.line(result.number)
            logger.info("Trial %s is the best so far: %.6g", result.number, result.objective)

    def _as_told(self, result: Result) -> Result:
        """A trial that an earlier life withdrew, and a node ran all the same, teaches like a point from elsewhere."""
        config = None if result.number is None else self._withdrawn.get(result.number)
        return result if config is None else replace(result, number=None, config=config)

    def _fill(self, optimizer: Optimizer) -> None:
        counts = self.evaluator.counts
        under_way = counts[TrialState.RUNNING] + counts[TrialState.READY]
        wanted = self.evaluator.room
        if self._budget.max_evals is not None:
            ever = under_way + counts[TrialState.DONE] + counts[TrialState.FAILED]
            wanted = min(wanted, self._budget.max_evals - ever)
        if wanted > 0:
            trials = optimizer.ask(min(wanted, _ASKED_A_LOOP))
            self._patiently(lambda: self.evaluator.submit(trials))
            for trial in trials if self._wishes else ():
                order = self._wishes.pop(self.problem.encoder.key(trial.config), None)
                if order is not None:
                    self._answer(order, f"submitted as trial {trial.number}", trial=trial.number)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Call until Balsam answers, with pauses that grow to 30 s; nothing is lost meanwhile."""
        pause_s = 1.0
        outage: tuple[float, str] | None = None
        while True:
            try:
                answer = call()
            except (UnreachableError, NotLoggedInError) as error:
                if self._stop.is_set():
                    raise
                outage = outage or (self._clock(), str(error))
                self._notice = f"{error} Trying again in {pause_s:.0f} s."
                logger.warning("%s", self._notice)
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_RETRY_S)
                self._log_in_again()
            else:
                self._notice = None
                if outage is not None:
                    self.evaluator.note_outage(*outage)
                    logger.info("Balsam answers again, after %.0f s", self._clock() - outage[0])
                return answer

    def _log_in_again(self) -> None:
        """Read the credentials again: after a login, or after a local server came back at another address."""
        try:
            self.evaluator.gateway.reconnect()
        except NotLoggedInError as error:
            logger.debug("Still not logged in: %s", error)

    def _progress(self) -> Progress:
        now = self._clock()
        notice = self._notice or self.evaluator.notice
        if self._drain_until is not None:
            notice = f"stopping; running trials are waited for, {max(0.0, self._drain_until - now):.0f} s at most"
        return Progress(
            states=self.evaluator.counts,
            best=self._best,
            elapsed_s=self._driven_before_s + now - self._began_at,
            evaluations_per_min=self._rate.per_min(now, self._began_at),
            max_evals=self._budget.max_evals,
            timeout_s=self._budget.timeout_s,
            capacity=self.evaluator.capacity,
            notice=notice,
        )

    def _export(self, now: bool = False) -> None:
        """Write `results.csv`, seldom enough that it never takes more than a twentieth of the driver's time."""
        moment = time.monotonic()
        if not now and moment - self._exported_at < max(1.0, self._export_took_s / _EXPORT_SHARE):
            return
        self._file.write(self.evaluator.take_changed_lines(), lambda: self.evaluator.lines)
        self._exported_at = time.monotonic()
        self._export_took_s = self._exported_at - moment


def _from_elsewhere(config: Config, objective: float | None) -> Result:
    return Result(None, objective, failure="it failed elsewhere" if objective is None else None, config=config)


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Write the package's log lines into `path` while the block runs."""
    logger = logging.getLogger("deephyper_balsam")
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


class AMBS(Search):
    """Asynchronous model-based search (Balaprakash et al., HiPC 2018): a surrogate chooses the next configurations.

    Options: `surrogate`, `acq_func`, `kappa`, `xi`, `liar_strategy`, `initial_design` and the others of the optimizer
    ``"ambs"``. See `Search` for the rest.
    """

    def __init__(self, problem: HpProblem, evaluator: BalsamEvaluator, name: str, **options: Any) -> None:
        super().__init__(problem, evaluator, name, "ambs", **options)


class RandomSearch(Search):
    """Independent draws from the space: the yardstick of every other method."""

    def __init__(self, problem: HpProblem, evaluator: BalsamEvaluator, name: str, **options: Any) -> None:
        super().__init__(problem, evaluator, name, "random", **options)


class GA(Search):
    """Batch-synchronous genetic algorithm, as in the 2018 DeepHyper: each generation is evaluated before the next."""

    def __init__(self, problem: HpProblem, evaluator: BalsamEvaluator, name: str, **options: Any) -> None:
        super().__init__(problem, evaluator, name, "ga", **options)
