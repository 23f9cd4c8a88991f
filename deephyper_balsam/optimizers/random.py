"""Random search: the base line, and the fallback of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from deephyper_balsam.optimizers.base import HistoryOptimizer, Suggestion


class RandomSearch(HistoryOptimizer):
    """Independent draws from the space, each configuration at most once.

    A trial's configuration depends on the seed, its number and the configurations known before it, and on nothing else:
    not on results, and not on how many trials are asked at a time.
    """

    method: ClassVar[str] = "random"

    def _suggest(self, n: int) -> Sequence[Suggestion]:
        return ()  # what is not suggested is filled with random configurations
