"""A search as users see it: `AMBS(problem, evaluator, "name").search(max_evals=100)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from deephyper_balsam.common.objective import title, turned
from deephyper_balsam.common.plain import plain
from deephyper_balsam.driver.exports import Exports
from deephyper_balsam.driver.loop import Driver, SearchPlan, StopSignals
from deephyper_balsam.driver.progress import Narrator, Progress, by_state, duration, why_failed
from deephyper_balsam.driver.search_log import log_to
from deephyper_balsam.driver.session import FailureLimits, SearchSession
from deephyper_balsam.errors import SettingsError
from deephyper_balsam.node.failure_policy import DEFAULT_MAX_CUTS, DEFAULT_MAX_FAILURES
from deephyper_balsam.node.stoppers import NEVER, parse_stopper
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.results import table as results
from deephyper_balsam.results.early import saved
from deephyper_balsam.store.search_state import Budget, EndReason
from deephyper_balsam.trial import Result

if TYPE_CHECKING:
    import pandas as pd

    from deephyper_balsam.driver.balsam_session import BalsamEvaluator
    from deephyper_balsam.store.allocation_request import Requests

Session = TypeVar("Session", bound=SearchSession)


class Search(Generic[Session]):
    """One search: a problem, a method, an evaluator, a name.

    Parameters
    ----------
    problem
        What is searched. Its objective is maximised, or minimised where it says `minimize`.
    evaluator
        Where the trials run: `BalsamEvaluator`, or `InProcessEvaluator` for processes of this machine.
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
    max_cuts
        After so many cuts by the end of allocations that a run had from their beginning, its trial fails: it is longer
        than they are; 0: it is run again and again.
    stopper
        Says which runs that record their objective as they go end early: ``"sha:max=27,min=1,factor=3"``, ``"median"``,
        ``"epoch:3"`` or ``"none"`` (see `node.stoppers.parse_stopper`).
    asked_for
        What `search.yaml` says, when it is more than method, seed and options: the settings of the command line.
    warm_start
        Points from elsewhere, ``Result(None, y, config={...})``, told before the first trial and kept in the record; a
        search that goes on has those that it was begun with.
    options
        Of the method; see `optimizers.make_optimizer`.

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
        evaluator: Session,
        name: str,
        method: str,
        *,
        seed: int | None = None,
        log_dir: str | Path = ".",
        poll_s: float = 0.5,
        max_failures: int = DEFAULT_MAX_FAILURES,
        max_cuts: int = DEFAULT_MAX_CUTS,
        stopper: str = "none",
        asked_for: dict[str, Any] | None = None,
        warm_start: Sequence[Result] = (),
        **options: Any,
    ) -> None:
        problem.check()
        warm = [[problem.check_configuration(one.config or {}), plain(one.objective)] for one in warm_start]
        seed, options, max_failures, max_cuts = plain(seed), plain(options), plain(max_failures), plain(max_cuts)
        stops = parse_stopper(stopper)
        own = {"method": method, "seed": seed, **options, "max_failures": max_failures, "max_cuts": max_cuts}
        own.update({"stopper": stops.to_text()} if stops != NEVER else {})
        self.evaluator = evaluator
        self.folder = Path(log_dir) / name
        self._plan = SearchPlan(
            problem,
            name,
            method,
            seed,
            options,
            warm,
            poll_s,
            FailureLimits(max_failures, max_cuts),
            stops,
            plain(asked_for or own),
        )
        self._signals = StopSignals()
        self._driver: Driver | None = None
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
    ) -> Search[BalsamEvaluator]:
        """Return the search `name`, rebuilt from Balsam alone; call its `search()` to go on within its budget.

        Parameters
        ----------
        name
            The search's name.
        log_dir
            The folder in which the search's own folder is made, or lies already.
        allocation
            In place of the one that the search was begun with.
        client_path
            Balsam's credentials file; by default ``BALSAM_CLIENT_PATH``, else ``~/.balsam/client.yml``.
        poll_s
            Seconds between two looks at Balsam.

        Returns
        -------
        Search
            With a `BalsamEvaluator`.

        Raises
        ------
        UnknownSearchError
            There is no such search; the message names those there are.
        """
        from deephyper_balsam.driver.balsam_session import BalsamEvaluator

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
            max_cuts=settings["asked_for"].get("max_cuts", DEFAULT_MAX_CUTS),
            stopper=settings.get("stopper", "none"),
            **settings["options"],
        )

    @property
    def problem(self) -> HpProblem:
        """What is searched."""
        return self._plan.problem

    @property
    def name(self) -> str:
        """The search's name."""
        return self._plan.name

    @property
    def method(self) -> str:
        """The method's name."""
        return self._plan.method

    @property
    def settings(self) -> dict[str, Any]:
        """What the search is, as written into its record."""
        return self._plan.settings

    @property
    def asked_for(self) -> dict[str, Any]:
        """In what words it was asked for, as `search.yaml` has them."""
        return dict(self._plan.asked_for)

    @property
    def minimize(self) -> bool:
        """Whether the run function returns a loss: by its problem, or its shell command."""
        return self._plan.minimises(self.evaluator)

    def stop(self) -> None:
        """Ask a running `search` to end: no new trials, waiting ones withdrawn, results written.

        It does not wait for running trials, and for Balsam only a few seconds: they are collected when the search goes
        on. Safe in a signal handler.
        """
        if self._driver is not None:
            self._driver.stop()
        self._signals.stop.set()

    def leave_now(self) -> None:
        """Make a running `search` that was stopped leave everything as it is; the next driver mends it."""
        self._signals.leave.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._signals.stop.is_set()

    @property
    def ended_because(self) -> EndReason | None:
        """Why `search` found nothing more to do; None: it was stopped, failed, or has not ended."""
        return None if self._driver is None else EndReason.of(self._driver.why)

    @property
    def unmet_additions(self) -> int:
        """How many configurations that people added are not submitted; after the end: did not fit the budget."""
        requests = None if self._driver is None else self._driver.requests
        return 0 if requests is None else len(requests.wishes)

    @property
    def outage(self) -> str | None:
        """Why the search waits for Balsam now; None: it does not."""
        return None if self._driver is None else self._driver.patiently.notice

    @property
    def elapsed_s(self) -> float:
        """Seconds that drivers have driven the search, over all its drivers; 0 before it was begun."""
        return 0.0 if self._driver is None else self._driver.elapsed_s

    def search(
        self,
        max_evals: int | None = None,
        timeout: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        takeover: bool = False,
        show: bool = True,
    ) -> pd.DataFrame:
        """Run until the budget is used, every configuration is evaluated, or `stop` is called.

        A search of this name that was begun before goes on where it stands; so does another call of this method.

        Parameters
        ----------
        max_evals
            Evaluations of the whole search, over all its drivers.
        timeout
            Seconds of the whole search; only the time counts in which a driver was at work. Without `max_evals` and
            `timeout` a search goes on within the budget that it has.
        on_progress
            Called after every look at the trials.
        takeover
            The driver that there is, is gone for good, however lately it gave a sign of life.
        show
            Without `on_progress`: say on the standard error output how the search stands, in one line of a terminal, a
            bar in a notebook, plain lines elsewhere; and at its end what came of it.

        Returns
        -------
        pandas.DataFrame
            A row a trial, the columns of `results.csv`; `objective` is maximised, and a loss stands in `m:loss`.

        Raises
        ------
        SearchRunningError
            Another driver is at work on the search.
        TakenOverError
            Another driver has taken over this one's search.
        BrokenApplicationError
            The first trials all failed alike; what was found is written.
        """
        budget = Budget(plain(max_evals), plain(timeout))
        if max_evals is None and timeout is None and not self.evaluator.begun(self.name, self.folder):
            raise SettingsError("A search needs an end: give `max_evals` (evaluations), `timeout` (seconds) or both.")
        results.claim_folder(self.folder)
        if self._driver is not None:  # a `stop` before the first call counts
            self._signals.clear()
        exports = Exports(self.folder, self.evaluator, self.problem.hyperparameter_names, self._plan.asked_for)
        self._driver = driver = Driver(self._plan, self.evaluator, self._signals, exports)
        narrator, last_words = Narrator() if show and on_progress is None else None, list[str]()
        try:
            with log_to(self.folder / "search.log"):
                driver.drive(budget, on_progress or narrator, takeover)
            last_words = self._last_words(driver)
        finally:
            self.evaluator.hurry(False)
            if narrator is not None:
                narrator.end(last_words)
        return results.table(self.evaluator.lines, self.problem.hyperparameter_names)

    def _last_words(self, driver: Driver) -> list[str]:
        """Return what came of the search, and how to go on with one that was interrupted."""
        lines = self.evaluator.lines
        said = [f"Search {self.name}: {by_state(lines)}. It took {duration(self.elapsed_s)} ({driver.why})."]
        best = results.best(lines)
        if best is not None:
            value, number = f"{turned(best['objective'], self.minimize):.6g}", best["job_id"]
            said.append(f"Best {title(self.minimize)} {value} (trial {number}): {results.configuration(best)}")
        early = saved(lines)
        said += [f"Early: {early}."] if early is not None else []
        said += [f"Failed: {reason}" for reason in why_failed(lines)]
        said.append(f"Results: {self.folder / 'results.csv'}")
        if self.stopped or (driver.requests is not None and driver.requests.stopped_by is not None):
            said.append(self.evaluator.advice.to_go_on)
        return said


class AMBS(Search[Session]):
    """Asynchronous model-based search (Balaprakash et al., HiPC 2018): a surrogate chooses the next configurations.

    Options: `surrogate`, `acq_func`, `kappa`, `xi`, `liar_strategy`, `initial_design` and the others of the optimizer
    ``"ambs"``. See `Search` for the rest.
    """

    def __init__(self, problem: HpProblem, evaluator: Session, name: str, **options: Any) -> None:
        super().__init__(problem, evaluator, name, "ambs", **options)


class RandomSearch(Search[Session]):
    """Independent draws from the space: the yardstick of every other method."""

    def __init__(self, problem: HpProblem, evaluator: Session, name: str, **options: Any) -> None:
        super().__init__(problem, evaluator, name, "random", **options)


class GA(Search[Session]):
    """Batch-synchronous genetic algorithm, as in the 2018 DeepHyper: each generation is evaluated before the next."""

    def __init__(self, problem: HpProblem, evaluator: Session, name: str, **options: Any) -> None:
        super().__init__(problem, evaluator, name, "ga", **options)
