"""One real local Balsam for all live tests of a session; it is stopped at the end, and must leave no process behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deephyper_balsam.sites import processes
from deephyper_balsam.sites.local import LocalStack


def stack_environment(stack: LocalStack) -> dict[str, str]:
    """The environment for a subprocess that is to work with `stack`: ours, with its variables instead of other ones."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BALSAM_")}
    return {**kept, **stack.env}


def leftovers(stack: LocalStack) -> list[str]:
    """What still runs of a stack that was stopped."""
    found = processes.matching(processes.carries("DEEPHYPER_BALSAM_STACK", str(stack.folder)))
    return [f"{process.pid} {process.cmdline()}" for process in found]


@pytest.fixture(scope="session")
def stack() -> Iterator[LocalStack]:
    """A running stack with its site "local" and its agent. With pytest-xdist each worker has its own."""
    # Not pytest's own temporary folder: that is removed only some sessions later, and a database is large.
    folder = Path(tempfile.mkdtemp(prefix="live stack "))
    made = LocalStack(folder / "balsam")
    try:
        made.up()
        yield made
    finally:
        made.down()
        left = leftovers(made)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"the stack left processes behind: {left}"


@pytest.fixture
def balsam_env(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Point this process at the stack for one test; the same for a subprocess is returned."""
    environment = stack_environment(stack)
    for name in [name for name in os.environ if name.startswith("BALSAM_")]:
        monkeypatch.delenv(name)
    for name, value in stack.env.items():
        monkeypatch.setenv(name, value)
    return environment
