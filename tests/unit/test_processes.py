"""Which processes are taken for ours: those that our account started, whatever others claim."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deephyper_balsam.common import processes
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.sites.local_batch import ID_VARIABLE, BatchJobs

STRANGER = 65533
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another account")
Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that does nothing, with an environment, as an account."""
    made = []

    def begin(account: int | None = None, **environment: str) -> int:
        made.append(subprocess.Popen(["sleep", "60"], cwd="/", env=environment, user=account))
        return made[-1].pid

    yield begin
    for child in made:
        child.kill()
        child.wait()


@as_root
def test_a_strangers_process_with_our_environment_is_none_of_ours(start: Start, tmp_path: Path) -> None:
    marks = {"DEEPHYPER_BALSAM_STACK": str(tmp_path), "BALSAM_SITE_PATH": str(tmp_path / "site"), ID_VARIABLE: "7"}
    theirs, ours = start(STRANGER, **marks), start(**marks)
    of_stack = processes.carries("DEEPHYPER_BALSAM_STACK", str(tmp_path))
    assert [found.pid for found in processes.matching(of_stack)] == [ours]
    assert {found.pid for found in processes.matching(of_stack, also=[STRANGER])} == {ours, theirs}
    (tmp_path / "site").mkdir()
    jobs = BatchJobs(tmp_path / "site")
    job = type("Job", (), {"id": 7})()
    assert [found.pid for found in jobs._strays(job)] == [ours]
    LocalStack(tmp_path).down()
    assert psutil.Process(theirs).status() != psutil.STATUS_ZOMBIE
    assert psutil.Process(ours).status() == psutil.STATUS_ZOMBIE
