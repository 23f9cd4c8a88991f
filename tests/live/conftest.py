"""One real local Balsam for all live tests of a session; it is stopped at the end, and must leave no process behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from deephyper_balsam.common import processes
from deephyper_balsam.server.stack import LocalStack

# One process runs a whole file: those that take minutes begin first, so that none waits for another at the end
_LONG = (
    "test_docs_code_live.py",
    "test_standalone_live.py",
    "test_faults_live.py",
    "test_batch_systems_live.py",
    "test_search_live.py",
    "test_submit_live.py",
    "test_stopping_live.py",
    "test_shared_folder_live.py",
    "test_network_live.py",
    "test_local_stack.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def stack_environment(stack: LocalStack) -> dict[str, str]:
    """The environment for a subprocess that is to work with `stack`: ours, with its variables instead of other ones."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BALSAM_")}
    return {**kept, **stack.env}


def leftovers(stack: LocalStack) -> list[str]:
    """What still runs of a stack that was stopped."""
    found = stack.every_process()
    return [f"{process.pid} {process.cmdline()}" for process in found]


def listening(members: Iterable[psutil.Process]) -> set[int]:
    """The ports at which processes listen; one may end while it is asked, such as a child of a run."""
    found = set()
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {c.laddr.port for c in member.connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


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


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    """End the searches that a test started, also when it failed before it could do so."""
    before = {child.pid for child in psutil.Process().children()}
    yield
    left = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            words = child.cmdline()
            if child.pid not in before and "search" in words and "deephyper_balsam" in words:
                left.append(child)
    processes.end(left, grace_s=30)


@pytest.fixture
def balsam_env(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Point this process at the stack for one test; the same for a subprocess is returned."""
    environment = stack_environment(stack)
    for name in [name for name in os.environ if name.startswith("BALSAM_")]:
        monkeypatch.delenv(name)
    for name, value in stack.env.items():
        monkeypatch.setenv(name, value)
    return environment
