"""What people ask of a running search is done: stop, go on for longer, evaluate a configuration of theirs."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from deephyper_balsam.driver.patience import Patience
from deephyper_balsam.driver.session import SearchSession
from deephyper_balsam.errors import ProblemError
from deephyper_balsam.optimizers.base import Optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.results import table as results
from deephyper_balsam.store.driver_requests import ADD, EXTEND, STOP, DriverRequest
from deephyper_balsam.store.search_state import Budget
from deephyper_balsam.trial import Config, Trial, TrialState

logger = logging.getLogger(__name__)


class RequestHandler:
    """Obeys requests, and answers each.

    Parameters
    ----------
    problem, session, patiently, optimizer
        Of the search.
    budget
        What the search may take.

    Attributes
    ----------
    budget
        What it may take now.
    wishes
        Configurations that people added and that are not submitted yet, by their keys.
    stopped_by
        Who asked the search to stop; None: nobody.
    drain_until
        When running trials are waited for no longer, by the session's clock; None: the search goes on.
    """

    def __init__(
        self, problem: HpProblem, session: SearchSession, patiently: Patience, optimizer: Optimizer, budget: Budget
    ) -> None:
        self._problem, self._session, self._patiently, self._optimizer = problem, session, patiently, optimizer
        self.budget = budget
        self.wishes: dict[bytes, DriverRequest] = {}
        self.stopped_by: str | None = None
        self.drain_until: float | None = None

    def take_up(self, requests: Iterable[DriverRequest]) -> None:
        """Do what was asked while nobody drove; and again what was added, if its trial was withdrawn before it ran."""
        for request in requests:
            if request.what == ADD:
                self._add(request)
            elif request.what == EXTEND and request.handled is None:
                self._session.answer(request, f"the budget is {self.budget}")

    def obey(self, requests: Iterable[DriverRequest]) -> bool:
        """Do what people asked for; whether to leave at once."""
        leave = False
        for request in requests:
            logger.info("Asked by %s: %s", request.by, request)
            if request.what == ADD:
                self._add(request)
            elif request.what == EXTEND:
                self.budget = self.budget.extended(request)
                self._answer(request, f"the budget is {self.budget}")
            elif request.what == STOP:
                leave = self._begin_to_stop(request) or leave
        return leave

    def note_submitted(self, trials: Iterable[Trial]) -> None:
        """Answer those whose configurations are trials now."""
        for trial in trials if self.wishes else ():
            request = self.wishes.pop(self._problem.encoder.key(trial.config), None)
            if request is not None:
                self._answer(request, f"submitted as trial {trial.number}", trial=trial.number)

    def _begin_to_stop(self, request: DriverRequest) -> bool:
        withdrawn = self._patiently(self._session.cancel)
        running = self._session.counts[TrialState.RUNNING]
        self.stopped_by = request.by
        leave = request.wait_s <= 0 or not running
        did = f"withdrew {len(withdrawn)} waiting trials, "
        did += f"leaves {running} running" if leave else f"waits up to {request.wait_s:.0f} s for {running} running"
        self._answer(request, did)
        if not leave:
            self.drain_until = self._session.now() + request.wait_s
        return leave

    def _add(self, request: DriverRequest) -> None:
        try:
            config = self._problem.check_configuration(request.config)
            if self._optimizer.add(config):
                self.wishes[self._problem.encoder.key(config)] = request
            elif request.handled is None:
                number = self._number_of(config)
                known = "it is in line already" if number is None else f"it is trial {number}"
                self._answer(request, known, **({} if number is None else {"trial": number}))
        except ProblemError as error:
            if request.handled is None:
                self._answer(request, f"refused: {error}")

    def _number_of(self, config: Config) -> int | None:
        """Return the number of the trial of this configuration."""
        key = self._problem.encoder.key(config)
        for line in self._session.lines:
            other = results.configuration(line)
            if other and self._problem.encoder.key(other) == key:
                return int(line["job_id"])
        return None

    def _answer(self, request: DriverRequest, did: str, **details: Any) -> None:
        self._patiently(lambda: self._session.answer(request, did, **details))
