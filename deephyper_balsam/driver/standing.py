"""How the runs of a search stand at the rungs of its stopper: read from their jobs, published in one small note.

The nodes decide from that note (`node.rungs`). Only the driver writes it, when there is something new, and at most once
a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from deephyper_balsam.node.stoppers import NEVER, Standing, Stopper
from deephyper_balsam.store import trial_data, trial_rows
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.notes import read_notes, write_note
from deephyper_balsam.store.schema import STAMP

_KIND = "standing"
_EVERY_S = 1.0


class RungValues:
    """What the runs of a search have recorded at the rungs of its stopper.

    Parameters
    ----------
    stopper
        The search's.

    Attributes
    ----------
    is_new
        Whether something was taken in since it was last set to False.
    """

    def __init__(self, stopper: Stopper) -> None:
        self.stopper = stopper
        self.is_new = False
        self._values: dict[float, dict[int, tuple[float, float]]] = {}  # rung -> trial -> when, and what it recorded
        self._longest: float | None = None
        self._latest = 0.0

    @property
    def standing(self) -> Standing:
        """What the nodes decide from."""
        values = {rung: [value for _, value in sorted(found.values())] for rung, found in self._values.items()}
        return self.stopper.standing(values, self._longest)

    def take_in(
        self,
        number: int,
        curve: Iterable[tuple[float, float]],
        decisions: Iterable[Mapping[str, Any]] = (),
        whole_budget: float | None = None,
    ) -> None:
        """Take in what a trial's run has recorded.

        Parameters
        ----------
        number
            The trial's.
        curve
            Pairs of a budget and an objective.
        decisions
            What was decided at its rungs: they have the values there also where the curve was thinned, and say when it
            was. What has none, since nobody could be asked, counts as recorded with the latest.
        whole_budget
            The budget of a run that came to its own end.
        """
        known = {decision["rung"]: (decision["at"], decision["value"]) for decision in decisions}
        for rung, (at, value) in known.items():
            self._latest = max(self._latest, at)
            self._put(number, rung, at, value)
        for rung, value in self.stopper.crossed(curve).items():
            if rung not in known and (number not in self._values.get(rung, {})):
                self._put(number, rung, self._latest, value)
        if whole_budget is not None and whole_budget > (self._longest or 0.0):
            self._longest, self.is_new = whole_budget, True

    def _put(self, number: int, rung: float, at: float, value: float) -> None:
        of_trials = self._values.setdefault(rung, {})
        if of_trials.get(number) != (at, value):
            of_trials[number] = at, value
            self.is_new = True


class StandingNote:
    """The note of one search in Balsam.

    Parameters
    ----------
    gateway
        Balsam's API.
    search
        The search's name.
    site_id
        The site that a new note belongs to.
    stopper
        The search's; where it compares nothing there is no note, and nothing is done.
    clock
        Seconds.
    """

    def __init__(
        self, gateway: Gateway, search: str, site_id: int, stopper: Stopper, clock: Callable[[], float]
    ) -> None:
        self._gateway, self._clock = gateway, clock
        self.values = RungValues(stopper)
        self._published_at = float("-inf")
        self._note: int | None = None
        if stopper.compares:
            found = next(iter(read_notes(gateway, search, _KIND)), None)
            self._note = write_note(gateway, site_id, search, _KIND, {}) if found is None else found["id"]

    @property
    def of_a_job(self) -> trial_data.Stopping | None:
        """What a job of the search says of it; None: nobody stops its runs."""
        if self.values.stopper == NEVER:
            return None
        told = trial_data.Stopping(settings=self.values.stopper.to_dict())
        return told if self._note is None else {**told, "note": self._note}

    def take_in(self, row: Row) -> None:
        """Take in what a trial's run has recorded.

        Parameters
        ----------
        row
            The trial's job as it is now.
        """
        if self._note is not None:
            number, budget = trial_rows.trial_number(row), trial_data.whole_budget(row)
            self.values.take_in(number, trial_data.curve(row), trial_data.rungs(row), budget)

    def publish(self) -> None:
        """Write the note where there is something new, and the last time is a while ago."""
        now = self._clock()
        if self._note is None or not self.values.is_new or now - self._published_at < _EVERY_S:
            return
        self._gateway.write_data({self._note: {**STAMP, "standing": self.values.standing}})
        self._published_at, self.values.is_new = now, False
