"""What evaluations get of a machine: the same for all, or a function of the configuration."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import InputError
from deephyper_balsam.node.targets import reason
from deephyper_balsam.node.worker import make_run_function
from deephyper_balsam.store.applications import resolve_resources
from deephyper_balsam.trial import Config, Resources

_RECENT_TRIALS = 200

ResourcesOf = Callable[[Config], Resources]


class TrialResources:
    """The resources of each evaluation of a search.

    Parameters
    ----------
    given
        Resources for all; a function that takes a configuration and returns them, itself or as ``"file.py:resources"``;
        what a search recorded (`recorded`); None: one process on one node.

    Raises
    ------
    TargetError
        The function cannot be loaded.
    """

    def __init__(self, given: Resources | ResourcesOf | str | Mapping[str, Any] | None) -> None:
        self.fixed: Resources | None = None
        self._spec: dict[str, Any] = {}
        self._shares: deque[float] = deque(maxlen=_RECENT_TRIALS)  # nodes, or shares of one, of the last trials
        if given is None or isinstance(given, Resources):
            self.fixed = given or Resources()
            return
        if isinstance(given, Mapping) and "function" not in given:
            self.fixed = Resources(**given)
            return
        self._spec = dict(given["function"]) if isinstance(given, Mapping) else resolve_resources(given)
        self._function: Callable[[Any], Any] = given if callable(given) else make_run_function(self._spec, Path())

    @property
    def recorded(self) -> dict[str, Any]:
        """What a search writes into its record, to be given to `TrialResources` again."""
        return {"function": self._spec} if self.fixed is None else asdict(self.fixed)

    def of(self, config: Config) -> Resources:
        """Return what the evaluation of a configuration gets.

        Raises
        ------
        InputError
            The function raises for this configuration, or returns something else.
        """
        if self.fixed is not None:
            return self.fixed
        try:
            found = self._function(dict(config))
        except Exception as error:
            raise InputError(f"its resources cannot be told: {reason(error)}") from error
        if not isinstance(found, Resources):
            raise InputError(f"its resources must be a Resources, but the function returned {found!r}")
        return found

    def check_fits(self, most_nodes: int, most_ranks: int | None = None) -> None:
        """Refuse what no evaluation can get, where all get the same.

        Parameters
        ----------
        most_nodes
            Of one evaluation in the allocations that are asked for.
        most_ranks
            Of one evaluation on a node; None: as many as it wants.

        Raises
        ------
        InputError
            The message says how large the allocation must be.
        """
        if self.fixed is not None and self.fixed.num_nodes > most_nodes:
            needed = self.fixed.num_nodes
            raise InputError(
                f"An evaluation takes {counted(needed, 'node')}, and the allocation that is asked for gives it at most "
                f"{most_nodes}: nothing would ever start. Ask for as many `nodes`, --nodes {needed} or more, in "
                "job mode mpi."
            )

        if self.fixed is not None and most_ranks is not None and self.fixed.ranks_per_node > most_ranks:
            raise InputError(
                f"An evaluation takes {self.fixed.ranks_per_node} ranks on a node, and job mode serial gives it "
                f"{most_ranks}: nothing would ever start. Ask for job mode mpi, or for `ranks_per_node={most_ranks}` "
                f"(--ranks-per-node {most_ranks})."
            )

    def note(self, num_nodes: int, evals_per_node: int) -> None:
        """Say what a trial that was submitted gets: by what the last ones got, `slots` reckons."""
        self._shares.append(num_nodes / evals_per_node)

    def slots(self, nodes: int) -> int:
        """Return how many evaluations an allocation of `nodes` nodes runs at once, as far as can be told.

        Where a function decides, by the mean of the last trials; one before the first of them.
        """
        if self.fixed is not None:
            return self.fixed.slots(nodes)
        if not nodes:
            return 0
        return max(1, int(nodes / fmean(self._shares))) if self._shares else 1

    @property
    def wave(self) -> int:
        """How many evaluations are worth submitting while no allocation is known."""
        return 1 if self.fixed is None else self.fixed.slots(self.fixed.num_nodes)

    def laid_out(self, nodes: int) -> int:
        """Return for how many evaluations at once a search with `nodes` nodes is laid out."""
        return nodes if self.fixed is None else self.fixed.slots(nodes)
