"""Models made from results, in this thread or in one of their own, so that `ask` answers at once."""

from __future__ import annotations

import functools
import logging
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from deephyper_balsam.optimizers.acquisition import Criterion
from deephyper_balsam.optimizers.model import Losses, Model, Teacher
from deephyper_balsam.problem.space import FloatArray

log = logging.getLogger(__name__)

_MOST_LIES = 512
"""Most running trials that a fresh model is told lies about, the latest ones; each costs one pass over the pool."""


@dataclass(frozen=True)
class Lesson:
    """What a model is made from: results, and running trials by number; `early` ran when the last result was told."""

    history: Losses
    criteria: tuple[Criterion, ...]
    numbers: np.ndarray[Any, np.dtype[np.int64]]
    rows: FloatArray
    early: np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Taught:
    """A model, and the numbers of the running trials that it was told of."""

    model: Model
    numbers: np.ndarray[Any, np.dtype[np.int64]]


def make_model(teacher: Teacher, lesson: Lesson, liar_strategy: str) -> Taught:
    """A model that knows the running trials, in the order and the groups in which an uninterrupted search told it."""
    with one_thread():
        model = teacher.learn(lesson.history, lesson.criteria)
        encoder = teacher.near.encoder
        for rows in (lesson.rows[lesson.early][-_MOST_LIES:], lesson.rows[~lesson.early]):
            model.pend_rows(rows, encoder.keys(rows), liar_strategy)
    return Taught(model, lesson.numbers)


@functools.cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """Keep linear algebra on one thread: on the small matrices of a model, several threads wait for one another.

    Ten to twenty times slower was measured on a busy machine; and sums in another order give another model.
    """
    return _thread_pools().limit(limits=1)  # type: ignore[no-any-return]


class Learner:
    """A thread that learns the newest lesson; lessons that come while it learns replace one another."""

    def __init__(self, teacher: Teacher, liar_strategy: str) -> None:
        self._teacher = teacher
        self._liar_strategy = liar_strategy
        self._changed = threading.Condition()
        self._lesson: Lesson | None = None
        self._ready: Taught | None = None
        self._busy = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ambs-model", daemon=True)
        self._thread.start()

    def learn(self, lesson: Lesson) -> None:
        """Hand over a lesson and return at once."""
        with self._changed:
            self._lesson = lesson
            self._changed.notify_all()

    def take(self) -> Taught | None:
        """The newest model if it was not taken yet."""
        with self._changed:
            ready, self._ready = self._ready, None
            return ready

    def wait(self, timeout_s: float | None) -> bool:
        """Block until there is nothing to learn."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or (self._lesson is None and not self._busy), timeout_s)

    def close(self) -> None:
        """End after the current fit."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._lesson is not None)
                if self._closed:
                    return
                lesson, self._lesson, self._busy = self._lesson, None, True
            assert lesson is not None
            taught: Taught | None = None
            try:
                taught = make_model(self._teacher, lesson, self._liar_strategy)
            except Exception:
                log.exception(
                    "No model could be made of %d results; the search goes on with the last.",
                    len(lesson.history),
                )
            with self._changed:
                if taught is not None:
                    self._ready = taught
                self._busy = False
                self._changed.notify_all()
