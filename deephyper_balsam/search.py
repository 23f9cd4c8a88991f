"""The driver of a search: collect, record, tell; then fill what is free: ask, submit.

It knows an optimizer by ask and tell, and an evaluator by submit and collect. Balsam's job table is the record; the
files in the search's folder are exports.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
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
    SettingsError,
    UnreachableError,
)
from deephyper_balsam.evaluators.balsam import BalsamEvaluator
from deephyper_balsam.faults import DEFAULT_MAX_FAILURES, BrokenApplication
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.problem import HpProblem
from deephyper_balsam.trial import Config, Result, TrialState

if TYPE_CHECKING:
    import pandas as pd

    from deephyper_balsam.optimizers.base import Optimizer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_RETRY_S = 30.0
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
        Seconds since the search began, over all its lives.
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


@dataclass
class _Budget:
    max_evals: int | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_evals is None and self.timeout_s is None:
            raise SettingsError("A search needs an end: give `max_evals` (evaluations), `timeout` (seconds) or both.")
        if self.max_evals is not None and self.max_evals < 1:
            raise SettingsError(f"`max_evals >= 1` must hold, but got {self.max_evals}.")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise SettingsError(f"`timeout > 0` (seconds) must hold, but got {self.timeout_s}.")


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
        **options: Any,
    ) -> None:
        problem.check()
        self.problem = problem
        self.evaluator = evaluator
        self.name = name
        self.method = method
        self.folder = Path(log_dir) / name
        self._seed = seed
        self._options = options
        self._poll_s = poll_s
        self._clock = clock
        self._asked_for = asked_for or {"method": method, "seed": seed, **options}
        self._application = BrokenApplication(max_failures)
        self._stop = threading.Event()
        self._rate = _Rate()
        self._withdrawn: dict[int, Config] = {}
        self._first_of_ours = 0
        self._notice: str | None = None
        self._best: dict[str, Any] | None = None
        self._exported_at = -1e9
        self._export_took_s = 0.0
        # Made once here, so that a wrong method or option is refused before anything is begun
        make_optimizer(method, problem, seed=seed, **options).close()

    @property
    def settings(self) -> dict[str, Any]:
        """What the search is, as written into its record."""
        return {
            "problem": self.problem.to_dict(),
            "method": self.method,
            "options": self._options,
            "seed": self._seed,
        }

    def stop(self) -> None:
        """Ask a running `search` to end: no new trials, waiting ones withdrawn, results written.

        Safe in a signal handler.
        """
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def search(
        self,
        max_evals: int | None = None,
        timeout: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> pd.DataFrame:
        """Run until the budget is used, every configuration is evaluated, or `stop` is called.

        Parameters
        ----------
        max_evals
            Evaluations of the whole search, over all its lives.
        timeout
            Seconds of the whole search.
        on_progress
            Called after every look at Balsam.

        Returns
        -------
        pandas.DataFrame
            A row a trial, the columns of `results.csv`.

        Raises
        ------
        BrokenApplicationError
            The first trials all failed alike; what was found is written.
        """
        budget = _Budget(max_evals, timeout)
        results.claim_folder(self.folder)
        with _log_to(self.folder / "search.log"):
            self._drive(budget, on_progress)
        return results.table(self.evaluator.lines, self.problem.hyperparameter_names)

    def _drive(self, budget: _Budget, on_progress: Callable[[Progress], None] | None) -> None:
        optimizer = self._open(budget)
        began_at = self._clock()
        try:
            while not self._stop.is_set():
                if self._patiently(self.evaluator.heartbeat):
                    logger.info("Asked to stop by `search stop`")
                    break
                arrived = self._patiently(self.evaluator.collect)
                self._record(arrived, optimizer)
                progress = self._progress(budget, began_at)
                self._patiently(partial(self.evaluator.ensure_allocation, *progress.left))
                if on_progress is not None:
                    on_progress(progress)
                if self._ended(progress, optimizer):
                    break
                self._fill(budget, optimizer)
                self._stop.wait(self._poll_s)
        except KeyboardInterrupt:
            self.stop()
        except (UnreachableError, NotLoggedInError):
            if not self._stop.is_set():  # asked to stop while Balsam is away: what is in it can be resumed
                raise
        finally:
            self._close(optimizer)

    # --- the beginning and the end -------------------------------------------------------------------------------

    def _open(self, budget: _Budget) -> Optimizer:
        history = self.evaluator.open(self.name, self.settings, budget.max_evals)
        self._zero = history.record.created_at
        recorded = history.record.settings
        seed, workers = recorded["seed"], recorded["num_workers"]
        options = dict(self._options)
        if self.method == "ambs":
            options = {"max_evals": recorded.get("max_evals"), **options, "background": True}
        optimizer = make_optimizer(self.method, self.problem, seed=seed, num_workers=workers, **options)
        if history.trials:
            optimizer.restore(history.trials, history.results, history.withdrawn)
            configs = {trial.number: trial.config for trial in history.trials}
            self._withdrawn = {number: configs[number] for number in history.withdrawn}
            logger.info("Going on with %d trials, %d results", len(history.trials), len(history.results))
        self._best = results.best(self.evaluator.lines)
        if self._best is not None:
            self._application.settle()
        self._first_of_ours = 1 + max((trial.number for trial in history.trials), default=-1)
        if not (self.folder / "search.yaml").exists():
            asked_for = {**self._asked_for, "seed": seed}  # the one that was drawn, if none was given
            results.write_whole(self.folder / "search.yaml", yaml.safe_dump(asked_for, sort_keys=False))
        return optimizer

    def _ended(self, progress: Progress, optimizer: Optimizer) -> bool:
        under_way = progress.states[TrialState.RUNNING] + progress.states[TrialState.READY]
        if progress.timeout_s is not None and progress.elapsed_s >= progress.timeout_s:
            logger.info("The time is over")
            return True
        if under_way:
            return False
        if progress.max_evals is not None and progress.evaluated >= progress.max_evals:
            return True
        if optimizer.exhausted:
            logger.info("Every configuration of the space has been evaluated")
            return True
        return False

    def _close(self, optimizer: Optimizer) -> None:
        """Withdraw what has not begun and write the results; a Balsam that is gone now must not cost us the files."""
        try:
            withdrawn = self.evaluator.cancel()
            if withdrawn:
                logger.info("Withdrew %d waiting trials", len(withdrawn))
        except BalsamError as error:
            logger.warning("Waiting trials could not be withdrawn: %s", error)
        try:
            self.evaluator.close(leave_running=self._stop.is_set())
        except BalsamError as error:
            logger.warning("The allocations that were asked for could not be ended: %s", error)
        optimizer.close()
        self._export(now=True)

    # --- the loop's parts ----------------------------------------------------------------------------------------

    def _record(self, arrived: list[Result], optimizer: Optimizer) -> None:
        if not arrived:
            return
        optimizer.tell([self._as_told(result) for result in arrived])
        self._rate.add(len(arrived), self._clock())
        for result in arrived:
            if result.objective is None:
                logger.info("Trial %s failed: %s", result.number, result.failure)
            elif self._best is None or result.objective > self._best["objective"]:
                self._best = self.evaluator.line(result.number)
                logger.info("Trial %s is the best so far: %.6g", result.number, result.objective)
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

    def _as_told(self, result: Result) -> Result:
        """A trial that an earlier life withdrew, and a node ran all the same, teaches like a point from elsewhere."""
        config = None if result.number is None else self._withdrawn.get(result.number)
        return result if config is None else replace(result, number=None, config=config)

    def _fill(self, budget: _Budget, optimizer: Optimizer) -> None:
        counts = self.evaluator.counts
        under_way = counts[TrialState.RUNNING] + counts[TrialState.READY]
        wanted = self.evaluator.capacity + self.evaluator.backlog - under_way
        if budget.max_evals is not None:
            ever = under_way + counts[TrialState.DONE] + counts[TrialState.FAILED]
            wanted = min(wanted, budget.max_evals - ever)
        if wanted > 0:
            trials = optimizer.ask(wanted)
            self._patiently(lambda: self.evaluator.submit(trials))

    def _patiently(self, call: Callable[[], T]) -> T:
        """Call until Balsam answers, with pauses that grow to 30 s; nothing is lost meanwhile."""
        pause_s = 1.0
        while True:
            try:
                answer = call()
            except (UnreachableError, NotLoggedInError) as error:
                if self._stop.is_set():
                    raise
                self._notice = f"{error} Trying again in {pause_s:.0f} s."
                logger.warning("%s", self._notice)
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_RETRY_S)
                if isinstance(error, NotLoggedInError):
                    self._log_in_again()
            else:
                self._notice = None
                return answer

    def _log_in_again(self) -> None:
        try:
            self.evaluator.gateway.reconnect()
        except NotLoggedInError as error:
            logger.debug("Still not logged in: %s", error)

    def _progress(self, budget: _Budget, began_at: float) -> Progress:
        now = self._clock()
        return Progress(
            states=self.evaluator.counts,
            best=self._best,
            elapsed_s=now - self._zero,
            evaluations_per_min=self._rate.per_min(now, began_at),
            max_evals=budget.max_evals,
            timeout_s=budget.timeout_s,
            capacity=self.evaluator.capacity,
            notice=self._notice or self.evaluator.notice,
        )

    def _export(self, now: bool = False) -> None:
        """Write `results.csv`, seldom enough that it never takes more than a twentieth of the driver's time."""
        moment = time.monotonic()
        if not now and moment - self._exported_at < max(1.0, self._export_took_s / _EXPORT_SHARE):
            return
        frame = results.table(self.evaluator.lines, self.problem.hyperparameter_names)
        results.write_whole(self.folder / "results.csv", frame.to_csv(index=False))
        self._exported_at = time.monotonic()
        self._export_took_s = self._exported_at - moment


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
