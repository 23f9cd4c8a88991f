"""When a run that records its objective as it goes is stopped early: by its standing among the others at a rung.

A rung is a budget (an epoch, a number of samples) at which runs are compared. The driver publishes the standing at each
rung, a small note of how many values were recorded there and the cutoff for the next one; the node decides from that
note alone. Nobody asks the driver: without a note a run goes on.

Every objective here is maximised: for a loss it is minus that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from deephyper_balsam.errors import SettingsError

Standing = dict[str, Any]
"""``{"rungs": {"3": [12, 0.81]}, "max": 27.0}``: for each rung how many values were recorded there and the cutoff for
the next one, or None; `max` is the largest budget of a run, if it is known."""

DEFAULT_COMPETING = 5
DEFAULT_RECENT = 30

_GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples fill the unit interval evenly: those of them below a share are that share of the multiples."""
_SLACK = 1e-9
"""Budgets that differ by less, relatively, are the same: ten times 0.1 is a whole epoch."""
_MOST_RUNGS = 1000
"""No more rungs are compared at: of a `median` that is asked at every step of a million."""


@dataclass(frozen=True)
class Decision:
    """What was decided of a run at a rung, with all the numbers that it was decided from.

    Attributes
    ----------
    stop
        Whether the run ends here.
    rung
        Where it was compared.
    value
        What it had recorded there; maximised.
    n
        How many values of others it was compared with.
    cutoff
        The least value that goes on; None: every one does, or for `epoch:K` none.
    """

    stop: bool
    rung: float
    value: float
    n: int
    cutoff: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as JSON values."""
        return {"stop": self.stop, "rung": self.rung, "value": self.value, "n": self.n, "cutoff": self.cutoff}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Decision:
        """Return the decision that `to_dict` gave; what a later version added to it is left out."""
        return cls(**{field.name: said[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Stopper:
    """Decides which runs end early; this one stops none.

    It keeps no state: the rungs follow from its settings, the standing from the values recorded, the decision from the
    standing. So node, driver and whoever checks a search afterwards come to the same.
    """

    kind: ClassVar[str] = "none"
    compares: ClassVar[bool] = False
    """Whether what others recorded counts: only then is there a note to publish and to ask for."""

    # --- rungs

    def rung(self, before: float | None, budget: float) -> float | None:
        """Return the highest rung that a record at `budget` crosses, the last record having been at `before`.

        Parameters
        ----------
        before
            The budget of the record before; None: it is the first.
        budget
            The budget of this record.

        Returns
        -------
        float or None
            None where it crosses none, and where budgets go backwards.
        """
        highest = self._highest_rung(budget)
        if highest is None or (before is not None and _reaches(before, highest)):
            return None
        return highest

    def crossed(self, curve: Iterable[tuple[float, float]]) -> dict[float, float]:
        """Return what a curve counts for: at each rung that a record of it crossed, the value of that record.

        Parameters
        ----------
        curve
            Pairs of budget and objective in the order recorded.
        """
        found: dict[float, float] = {}
        before: float | None = None
        for budget, value in curve:
            rung = self.rung(before, budget)
            if rung is not None:
                found[rung] = value
            before = budget if before is None else max(before, budget)
        return found

    def _highest_rung(self, budget: float) -> float | None:
        del budget
        return None

    # --- what the driver publishes

    def standing(self, values: Mapping[float, Sequence[float]], max_budget: float | None = None) -> Standing:
        """Return what the nodes need to decide: small, and JSON.

        Parameters
        ----------
        values
            For each rung the values recorded there so far, in the order in which they were; those that are not finite
            are left out.
        max_budget
            The largest budget of the runs that ended by themselves, if there are any: for a stopper that nobody gave
            its `max`. A run that is there is not stopped any more.
        """
        rungs: dict[str, list[Any]] = {}
        for rung in sorted(values):
            finite = [value for value in values[rung] if math.isfinite(value)]
            rungs[_key(rung)] = [len(finite), self._cutoff(finite)]
        known = self._max if self._max is not None else max_budget
        return {"rungs": rungs, **({} if known is None else {"max": known})}

    @property
    def _max(self) -> float | None:
        return None

    def _cutoff(self, others: list[float]) -> float | None:
        """Return the least value with which the next run goes on; `others` are in the order recorded."""
        del others
        return None

    # --- what the node decides

    def decide(self, rung: float, value: float, standing: Mapping[str, Any] | None) -> Decision:
        """Return whether a run with `value` at `rung` ends there.

        Parameters
        ----------
        rung
            As of `rung`.
        value
            What the run recorded; maximised. NaN is worse than every number.
        standing
            What the driver published last; None, and one that does not know the rung: the run goes on.
        """
        entry = None if standing is None else standing["rungs"].get(_key(rung))
        n, cutoff = (0, None) if entry is None else (int(entry[0]), entry[1])
        largest = None if standing is None else standing.get("max")
        if largest is not None and _reaches(rung, largest):  # nothing is left of it to save
            n, cutoff = 0, None
        return Decision(self._ends(value, cutoff), rung, value, n, cutoff)

    def agrees(self, decision: Decision) -> bool:
        """Return whether the numbers of a decision lead to what was decided."""
        return decision.stop == self._ends(decision.value, decision.cutoff)

    def _ends(self, value: float, cutoff: float | None) -> bool:
        return cutoff is not None and not value >= cutoff

    # --- as text and JSON

    def to_text(self) -> str:
        """Return what `parse_stopper` reads."""
        given = [f"{name}={_said(value)}" for name, value in self._given().items() if value is not None]
        return self.kind + (":" + ",".join(given) if given else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, with the `kind`."""
        return {"kind": self.kind, **self._given()}

    @staticmethod
    def from_dict(said: Mapping[str, Any]) -> Stopper:
        """Return the stopper that `to_dict` gave.

        Raises
        ------
        SettingsError
            Of an unknown kind or setting, or a value that is not allowed.
        """
        settings = dict(said)
        kind = settings.pop("kind", None)
        return _made(kind, settings, dict(said))

    def _given(self) -> dict[str, Any]:
        return {_NAMES.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class SuccessiveHalving(Stopper):
    """Asynchronous successive halving, the variant that stops (Li et al. 2020, MLSys, arXiv:1810.05934).

    At the rungs ``min * factor**k`` below `max` a run goes on if it is among the best ``floor(n / factor)`` of the n
    that were there so far, itself included: the paper's count, but one at least, since a search of fewer than `factor`
    runs must finish one. Of many equal values no more go on than the share has room for: now and then, by n, since a
    rung at which all are equal must neither stop all nor none.

    Attributes
    ----------
    max_budget
        The budget of a whole run (`max`); None: learnt from the first that finish.
    min_budget
        The first rung (`min`).
    factor
        A run in so many goes on at each rung, and the next rung is so many times further.
    competing
        While fewer runs than these were there, nobody is stopped.
    recent
        A run must be among that share of the last so many that were there, too; 0: among that of all is enough. In a
        search that learns, what is asked later is better: nearly all of it is among the best of all that ever were, and
        would run to its end.
    """

    kind: ClassVar[str] = "sha"
    compares: ClassVar[bool] = True

    max_budget: float | None = None
    min_budget: float = 1.0
    factor: float = 3.0
    competing: int = DEFAULT_COMPETING
    recent: int = DEFAULT_RECENT

    def __post_init__(self) -> None:
        _positive("min", self, "min_budget")
        _positive("max", self, "max_budget", optional=True)
        _number("factor", self, "factor")
        _count("competing", self, "competing")
        _count("recent", self, "recent")
        if not self.factor >= 1.1:
            raise SettingsError(f"`factor >= 1.1` must hold, but got (factor={self.factor:g}); usual are 2, 3 and 4.")
        _in_order(self.min_budget, self.max_budget)

    @property
    def _max(self) -> float | None:
        return self.max_budget

    def _highest_rung(self, budget: float) -> float | None:
        if not _reaches(budget, self.min_budget) or budget == math.inf:
            return None
        k = int(math.log(budget / self.min_budget) / math.log(self.factor) + _SLACK)
        while k >= 0 and not self._is_rung(k, budget):
            k -= 1
        return None if k < 0 else self._rung_at(k)

    def _rung_at(self, k: int) -> float:
        return _rounded(self.min_budget * self.factor**k)

    def _is_rung(self, k: int, budget: float) -> bool:
        rung = self._rung_at(k)
        return _reaches(budget, rung) and (self.max_budget is None or not _reaches(rung, self.max_budget))

    def _cutoff(self, others: list[float]) -> float | None:
        if len(others) < max(1, self.competing):
            return None
        phase = len(others) * _GOLDEN % 1.0
        cutoff = self._share(others, phase)
        return max(cutoff, self._share(others[-self.recent :], phase)) if self.recent else cutoff

    def _share(self, others: list[float], phase: float) -> float:
        """Return the least value that is among the best share of `others` and itself.

        Where many are equal to it, a new one counts as among them when `phase`, from 0 to 1, is below what the share
        has room for.
        """
        n, ranked = len(others), sorted(others, reverse=True)
        going_on = min(max(1, int((n + 1) / self.factor + _SLACK)), n)
        least = ranked[going_on - 1]
        equals = ranked.count(least)
        if equals == 1:
            return least
        share = (going_on - sum(value > least for value in ranked)) / (equals + 1)
        return least if phase < share else math.nextafter(least, math.inf)


@dataclass(frozen=True)
class Median(Stopper):
    """The median rule (Golovin et al. 2017, KDD, Vizier), at rungs as in DeepHyper's MedianStopper.

    At the rungs ``min + k * interval`` a run ends whose value is below the median of those that were there so far.

    Attributes
    ----------
    max_budget
        The budget of a whole run (`max`); None: learnt from the first that finish.
    min_budget
        The first rung (`min`).
    interval
        From one rung to the next.
    competing
        While fewer runs than these were there, nobody is stopped.
    """

    kind: ClassVar[str] = "median"
    compares: ClassVar[bool] = True

    max_budget: float | None = None
    min_budget: float = 1.0
    interval: float = 1.0
    competing: int = DEFAULT_COMPETING

    def __post_init__(self) -> None:
        _positive("min", self, "min_budget")
        _positive("max", self, "max_budget", optional=True)
        _positive("interval", self, "interval")
        _count("competing", self, "competing")
        _in_order(self.min_budget, self.max_budget)
        if self.max_budget is not None and (self.max_budget - self.min_budget) / self.interval > _MOST_RUNGS:
            raise SettingsError(
                f"`median` compares at {_MOST_RUNGS} rungs at most, but got (min={self.min_budget:g}, "
                f"max={self.max_budget:g}, interval={self.interval:g}); make the interval longer."
            )

    @property
    def _max(self) -> float | None:
        return self.max_budget

    def _highest_rung(self, budget: float) -> float | None:
        if not _reaches(budget, self.min_budget) or budget == math.inf:
            return None
        k = min(_MOST_RUNGS, int((budget - self.min_budget) / self.interval + _SLACK * budget / self.interval + _SLACK))
        if self.max_budget is not None:  # the last one below the whole run
            k = min(k, math.ceil((self.max_budget - self.min_budget) / self.interval - _SLACK) - 1)
        return None if k < 0 else _rounded(self.min_budget + k * self.interval)

    def _cutoff(self, others: list[float]) -> float | None:
        return None if len(others) < max(1, self.competing) else statistics.median(others)


@dataclass(frozen=True)
class AtBudget(Stopper):
    """Every run ends at one budget, whatever it is worth (``epoch:K``); it needs no note.

    With the best ones finished afterwards this is hard to beat (Egele et al. 2024, Neurocomputing, arXiv:2404.04111).

    Attributes
    ----------
    budget
        Where.
    """

    kind: ClassVar[str] = "epoch"

    budget: float = 1.0

    def __post_init__(self) -> None:
        _positive("epoch", self, "budget")

    def _highest_rung(self, budget: float) -> float | None:
        return self.budget if _reaches(budget, self.budget) else None

    def _ends(self, value: float, cutoff: float | None) -> bool:
        del value, cutoff
        return True

    def to_text(self) -> str:
        """Return what `parse_stopper` reads."""
        return f"{self.kind}:{_said(self.budget)}"


NEVER = Stopper()
"""Stops no run."""

_KINDS: dict[str, type[Stopper]] = {one.kind: one for one in (SuccessiveHalving, Median, AtBudget, Stopper)}
_COUNTS = ("competing", "recent")
_NAMES = {"max_budget": "max", "min_budget": "min"}
_FORMS = "sha:max=27,min=1,factor=3,competing=5,recent=30; median:min=1,interval=1,competing=5; epoch:K; none"


def parse_stopper(text: str) -> Stopper:
    """Return the stopper that a text names.

    Parameters
    ----------
    text
        ``sha:max=27,min=1,factor=3,competing=5,recent=30``, ``median:max=27,min=1,interval=1,competing=5``,
        ``epoch:K`` or ``none``. What is left out has its default, and `max` is learnt from the runs that finish.

    Raises
    ------
    SettingsError
        Of an unknown kind or setting, or a value that is not allowed.
    """
    kind, _, rest = text.strip().partition(":")
    settings: dict[str, Any] = {}
    for part in rest.split(",") if rest.strip() else []:
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if kind == "epoch" and not sign:
            name, value = "budget", name
        elif not sign:
            raise SettingsError(f"A stopper is one of {_FORMS}; but got {text!r}, in which {part!r} has no value.")
        if name in settings:
            raise SettingsError(f"A stopper has each setting once, but got {text!r}, which has {name!r} twice.")
        settings[name] = _as_number(name, value, text)
    if kind == "epoch" and not settings:
        raise SettingsError(f"`epoch:K` needs K, the budget at which every run ends, but got {text!r}.")
    return _made(kind, settings, text)


def _made(kind: Any, settings: dict[str, Any], said: Any) -> Stopper:
    made = _KINDS.get(kind) if isinstance(kind, str) else None
    if made is None:
        raise SettingsError(f"A stopper is one of {_FORMS}; but got {said!r}.")
    allowed = {_NAMES.get(field.name, field.name): field.name for field in fields(made)}
    unknown = [name for name in settings if name not in allowed]
    if unknown:
        has = f"the settings {', '.join(allowed)}" if allowed else "no settings"
        raise SettingsError(f"The stopper `{kind}` has {has}, but got {unknown[0]!r} in {said!r}.")
    return made(**{allowed[name]: value for name, value in settings.items()})


def _as_number(name: str, value: str, text: str) -> float | int:
    try:
        return int(value) if name in _COUNTS else float(value)
    except ValueError:
        what = "a whole number" if name in _COUNTS else "a number"
        raise SettingsError(f"`{name}` of a stopper must be {what}, but got {value!r} in {text!r}.") from None


def _number(name: str, stopper: Stopper, attribute: str) -> None:
    value = getattr(stopper, attribute)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SettingsError(f"`{name}` of a stopper must be a finite number, but got ({name}={value!r}).")
    object.__setattr__(stopper, attribute, float(value))


def _positive(name: str, stopper: Stopper, attribute: str, optional: bool = False) -> None:
    if optional and getattr(stopper, attribute) is None:
        return
    _number(name, stopper, attribute)
    value = getattr(stopper, attribute)
    if not value > 0:
        raise SettingsError(f"`{name} > 0` must hold of a stopper, but got ({name}={value:g}).")


def _count(name: str, stopper: Stopper, attribute: str) -> None:
    value = getattr(stopper, attribute)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SettingsError(f"`{name}` of a stopper must be a whole number of at least 0, but got ({name}={value!r}).")


def _in_order(least: float, largest: float | None) -> None:
    if largest is not None and not least < largest:
        raise SettingsError(f"`min < max` must hold of a stopper, but got (min={least:g}, max={largest:g}).")


def _reaches(budget: float, rung: float) -> bool:
    return budget >= rung * (1 - _SLACK)


def _rounded(rung: float) -> float:
    return float(_key(rung))


def _key(rung: float) -> str:
    return format(rung, ".12g")


def _said(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
