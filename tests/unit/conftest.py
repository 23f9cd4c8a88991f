"""What several unit tests need."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deephyper_balsam.common.bundled_files import folder


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """Take back the signal handlers that Balsam's launchers set in the process that they run in."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def modules_as_they_were(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Take back what loading a target changes on purpose: Python's path, and the modules of users and of `apps/`.

    Libraries that were imported on the way stay: a second copy of one has other exception classes than the first.
    """
    places = (tmp_path_factory.getbasetemp(), folder("apps"))
    path, before = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and any(Path(file).is_relative_to(place) for place in places):
            del sys.modules[name]


@pytest.fixture
def in_time() -> Iterator[None]:
    """End a test that waits for a pipe that nobody writes to."""

    def end(*_args: object) -> None:
        pytest.fail("it waits without end")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
