"""A search that only this process knows: its trials, their lines and counts, and its history when it goes on."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from deephyper_balsam.common.objective import LOSS, minimises, turned
from deephyper_balsam.driver.live_table import LiveTable
from deephyper_balsam.driver.session import DEFAULT_LIMITS, FailureLimits, Line, SearchHistory
from deephyper_balsam.errors import SearchExistsError, SettingsError
from deephyper_balsam.store.driver_requests import DriverRequest
from deephyper_balsam.store.trial_data import Outcome
from deephyper_balsam.store.trial_rows import add_curve, add_metadata, read_result
from deephyper_balsam.trial import Result, Trial, TrialState


class InMemorySession:
    """What sessions have in common that keep no record: all of `driver.session.SearchSession` but running trials.

    Nobody can ask anything of such a search, and nothing befalls its trials from outside. It goes on as long as the
    session lives: `open` with the same name and settings finds it as it was left.

    Parameters
    ----------
    site
        What the lines say of where the trials run.
    num_workers
        How many run at once.
    spec
        Of the run function.

    Raises
    ------
    SettingsError
        Without a worker.
    """

    def __init__(self, site: str, num_workers: int, spec: Mapping[str, Any]) -> None:
        if num_workers < 1:
            raise SettingsError(f"`num_workers >= 1` must hold, but got {num_workers}.")
        self._site, self._workers, self._spec = site, num_workers, dict(spec)
        self._table = LiveTable()
        self._minimize = False
        self._name: str | None = None
        self._settings: dict[str, Any] = {}
        self._budget: tuple[int | None, float | None] = (None, None)
        self._trials: dict[int, Trial] = {}
        self._results: list[Result] = []
        self._zero = 0.0
        self._opened_at = 0.0
        self._drove_s = 0.0

    # --- what a child must have ----------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the time in seconds by a clock that only goes forward."""
        raise NotImplementedError

    def moment(self) -> float:
        """Return the time by the clock of the results."""
        raise NotImplementedError

    # --- the beginning and the end -------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """What the session adds to the settings of its searches."""
        return {"run": self._spec}

    def begun(self, name: str, folder: Path) -> bool:
        """Return whether this session has had a search of this name last."""
        return name == self._name

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
        """Begin the search `name`, or pick it up where it was left; see `driver.session.SearchSession.open`."""
        del asked_for, takeover, folder, limits
        if name == self._name:
            self._check_same(settings)
        elif max_evals is None and timeout_s is None:
            raise SettingsError("A search needs an end: give `max_evals` (evaluations), `timeout` (seconds) or both.")
        else:
            self._forget(name, settings, max_evals)
        if (max_evals, timeout_s) != (None, None):
            self._budget = (max_evals, timeout_s)
        self._opened_at = self.now()
        return SearchHistory(
            settings=self._settings,
            trials=[self._trials[number] for number in sorted(self._trials)],
            results=list(self._results),
            withdrawn=[line["job_id"] for line in self.lines if line["job_status"] == TrialState.CANCELLED.value],
            requests=[],
            max_evals=self._budget[0],
            timeout_s=self._budget[1],
            drove_s=self._drove_s,
        )

    def _check_same(self, settings: Mapping[str, Any]) -> None:
        differing = [
            key
            for key, value in settings.items()
            if json.dumps(self._settings.get(key)) != json.dumps(value) and (key, value) != ("seed", None)
        ]
        if differing:
            raise SearchExistsError(
                f"The search {self._name!r} was begun with another {', '.join(differing)}. Choose another name, or use "
                "its settings to go on with it."
            )

    def _forget(self, name: str, settings: Mapping[str, Any], max_evals: int | None) -> None:
        seed = settings.get("seed")
        self._name = name
        self._minimize = minimises({**self.settings, **settings})
        self._settings = {
            **settings,
            **self.settings,
            "seed": secrets.randbits(31) if seed is None else seed,
            "num_workers": self._workers,
            "max_evals": max_evals,
        }
        self._table.clear()
        self._trials, self._results, self._drove_s = {}, [], 0.0
        self._zero = self.moment()

    def close(self, why: str = "it was closed", *, leave_running: bool = False) -> None:
        """Let go of the search."""
        if self._name is not None:
            self._drove_s += self.now() - self._opened_at
            self._opened_at = self.now()

    def abandon(self, why: str) -> None:
        """Let go of the search."""
        self.close(why)

    # --- trials --------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """The number of workers."""
        return self._workers

    @property
    def counts(self) -> dict[TrialState, int]:
        """How many trials are in each state."""
        return {state: self._table.count(state) for state in TrialState}

    @property
    def lines(self) -> list[Line]:
        """The lines of `results.csv`, by trial number."""
        return self._table.lines

    def line(self, number: int | None) -> Line:
        """Return the line of `results.csv` of one trial."""
        assert number is not None
        return self._table[number]

    def take_changed_lines(self) -> list[Line]:
        """Return the lines of `results.csv` that changed since the last call."""
        return self._table.take_changed()

    def _put_new(self, trial: Trial) -> bool:
        """Take in a trial that waits; False: it is known already, from the same call before an error."""
        if trial.number in self._trials:
            return False
        self._trials[trial.number] = trial
        line: Line = {f"p:{name}": value for name, value in trial.config.items()}
        line.update(objective=None, job_id=trial.number, job_status=TrialState.READY.value)
        line["m:timestamp_submit"] = self._since(self.moment())
        for name in ("timestamp_start", "timestamp_end", "timestamp_gather", "duration"):
            line[f"m:{name}"] = None
        if self._minimize:
            line[LOSS] = None
        self._table.put({**line, "m:site": self._site, "m:node": None, "m:failure": None})
        return True

    def _put_running(self, number: int, started_at: float) -> None:
        line = self._table[number]
        self._table.put({**line, "job_status": TrialState.RUNNING.value, "m:timestamp_start": self._since(started_at)})

    def _put_withdrawn(self, numbers: Iterable[int], why: str) -> None:
        for number in numbers:
            line = {**self._table[number], "job_status": TrialState.CANCELLED.value, "m:failure": why}
            self._table.put({**line, "m:timestamp_start": None})

    def _put_result(self, result: Result, retried_after: str = "") -> None:
        assert result.number is not None
        self._results.append(result)
        line = {**self._table[result.number], "objective": result.objective, "job_status": result.state.value}
        if self._minimize:
            line[LOSS] = None if result.objective is None else turned(result.objective, True)
        line["m:timestamp_start"], line["m:timestamp_end"] = map(self._since, (result.started_at, result.ended_at))
        line["m:timestamp_gather"] = self._since(self.moment())
        if result.started_at is not None and result.ended_at is not None:
            line["m:duration"] = round(result.ended_at - result.started_at, 3)
        line["m:node"], line["m:failure"] = result.host, result.failure
        if retried_after:
            line["m:retried_after"] = retried_after
        add_curve(line, result.curve, stopped=result.stopped)
        add_metadata(line, result.metadata)
        self._table.put(line)

    def _since(self, moment: float | None) -> float | None:
        return None if moment is None else round(moment - self._zero, 3)

    # --- what nobody does to a search that only this process knows -----------------------------------------------

    def requests(self) -> list[DriverRequest]:
        """Return nothing: nobody can ask anything of it."""
        return []

    def answer(self, request: DriverRequest, did: str, **details: Any) -> None:
        """Do nothing: there are no requests."""

    def upkeep(self) -> list[int]:
        """Return no trial: none is withdrawn from outside."""
        return []

    def ensure_allocation(self, evaluations: int | None = None, seconds: float | None = None) -> None:
        """Do nothing: the workers are there."""

    @property
    def hopeless(self) -> str | None:
        """None: a worker has time for any run."""
        return None

    @property
    def notice(self) -> str | None:
        """None: there is nothing to say of the workers."""
        return None

    def hurry(self, hurried: bool = True) -> None:
        """Do nothing: no call waits."""

    def reconnect(self) -> None:
        """Do nothing: nobody is talked to."""

    def note_outage(self, lasted_s: float, why: str) -> None:
        """Do nothing: no call is of no avail."""


def result_of(number: int, outcome: Mapping[str, Any]) -> Result:
    """Return the result of a trial that was evaluated here, from its outcome as of `node.worker.evaluate`."""
    return read_result(number, cast("Outcome", outcome))
