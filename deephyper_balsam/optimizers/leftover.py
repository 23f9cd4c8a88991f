"""The configurations of a finite space that are left, when random draws find few new ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from deephyper_balsam.problem.space import FloatArray


class Leftover:
    """All configurations of a finite space, to find the last ones without drawing in vain."""

    def __init__(self, rows: FloatArray | None, keys: list[bytes]) -> None:
        self.rows = rows
        self._keys = keys
        self.reset()

    def reset(self) -> None:
        # next[i]: where to look on for the first free configuration at or after i (a union-find with path compression).
        self._next: npt.NDArray[np.int64] = np.arange(len(self._keys) + 1)

    def pick(
        self, rng: np.random.Generator, known: Mapping[bytes, int], taken: Mapping[bytes, None]
    ) -> tuple[FloatArray, bytes] | None:
        """The first free one at or after a random place, going round; a function of the draw and of what is known."""
        assert self.rows is not None
        if not self._keys:
            return None
        start = int(rng.integers(len(self._keys)))
        for begin in (start, 0):
            index = self._first_free(begin, known, taken)
            if index < len(self._keys):
                return self.rows[index], self._keys[index]
        return None

    def _first_free(self, index: int, known: Mapping[bytes, int], taken: Mapping[bytes, None]) -> int:
        path: list[int] = []
        while index < len(self._keys):
            following = int(self._next[index])
            if following == index:
                key = self._keys[index]
                if key in known:
                    following = index + 1
                elif key in taken:
                    index += 1  # only for this call: it is not known yet
                    continue
                else:
                    break
            path.append(index)
            index = following
        for seen in path:
            if self._keys[seen] in known:
                self._next[seen] = max(int(self._next[seen]), seen + 1)
        return index
