"""The process that keeps PostgreSQL: a program that sleeps stands in its place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deephyper_balsam.server.keeper import Keeper
from deephyper_balsam.server.sign_of_life import Claims, Owner, take
from deephyper_balsam.server.stack_folder import CLAIM_VARIABLE, MARK_VARIABLE
from deephyper_balsam.server.stack_state import Waits


def wait_for(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Kept:
    """A keeper whose file system can be away."""

    def __init__(self, folder: Path, fence_s: float) -> None:
        self.owner = take(folder, Waits(), [].append)
        self.started: list[subprocess.Popen[bytes]] = []
        self.ended = threading.Event()
        self.away = False
        beat = self.owner.beat

        def maybe() -> None:
            if self.away:
                raise OSError(5, "Input/output error")
            beat()

        self.owner.beat = maybe  # type: ignore[method-assign]
        self.keeper = Keeper(self.owner, self._start, self.ended.set, sign_s=0.05, fence_s=fence_s)
        self.codes: list[int] = []
        self.thread = threading.Thread(target=lambda: self.codes.append(self.keeper.run()))
        self.thread.start()
        wait_for(lambda: self.started)

    def _start(self) -> subprocess.Popen[bytes]:
        self.started.append(subprocess.Popen(["sleep", "300"]))
        return self.started[-1]

    def close(self) -> None:
        for child in self.started:
            child.kill()
            child.wait()
        self.thread.join(10)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path, fence_s=1.0)
    yield made
    made.close()


def test_it_ends_with_postgresql_and_gives_signs_of_life_until_then(kept: Kept, tmp_path: Path) -> None:
    path = tmp_path / "alive" / "1.json"
    before = path.read_text()
    wait_for(lambda: path.read_text() != before)
    kept.started[0].kill()
    kept.thread.join(10)
    assert kept.codes == [-signal.SIGKILL]
    assert not kept.ended.is_set()


def test_a_signal_goes_to_postgresql(kept: Kept) -> None:
    kept.keeper.pass_on(signal.SIGTERM)
    kept.thread.join(10)
    assert kept.codes == [-signal.SIGTERM]


def test_a_host_that_was_taken_over_stops_postgresql_and_all_the_rest_and_says_so(kept: Kept, tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    assert claims.make(2) is not None
    kept.thread.join(10)
    assert kept.started[0].returncode == -signal.SIGKILL
    assert kept.ended.is_set()
    assert json.loads((tmp_path / "alive" / "1.json").read_text())["why"] == "taken over"
    assert claims._numbers() == [1, 2]


def test_postgresql_stands_still_while_no_sign_of_life_gets_through(kept: Kept) -> None:
    kept.away = True
    wait_for(lambda: kept.started[0].poll() is not None)
    assert kept.started[0].returncode == -signal.SIGKILL
    time.sleep(0.5)
    assert len(kept.started) == 1
    kept.away = False
    wait_for(lambda: len(kept.started) == 2)
    assert kept.started[1].poll() is None
    assert not kept.ended.is_set()


def test_a_short_silence_stops_nothing(tmp_path: Path) -> None:
    made = Kept(tmp_path, fence_s=30.0)
    try:
        made.away = True
        time.sleep(1.5)
        made.away = False
        assert made.started[0].poll() is None
    finally:
        made.close()


def test_a_host_that_comes_back_after_it_was_taken_over_does_not_start_postgresql_again(
    kept: Kept, tmp_path: Path
) -> None:
    kept.away = True
    wait_for(lambda: kept.started[0].poll() is not None)
    assert Claims(tmp_path).make(2) is not None
    kept.away = False
    kept.thread.join(10)
    assert len(kept.started) == 1
    assert kept.ended.is_set()


def test_a_host_that_slept_looks_before_it_stops_anything(tmp_path: Path) -> None:
    owner = take(tmp_path, Waits(), [].append)
    slept_s = [0.0]
    child = subprocess.Popen(["sleep", "300"])
    keeper = Keeper(
        owner, lambda: child, lambda: None, sign_s=0.3, fence_s=40.0, clock=lambda: time.monotonic() + slept_s[0]
    )
    thread = threading.Thread(target=keeper.run)
    thread.start()
    try:
        time.sleep(0.7)
        slept_s[0] = 8 * 3600.0
        time.sleep(1.5)
        assert child.poll() is None
    finally:
        child.kill()
        thread.join(10)


def test_nothing_is_started_under_a_claim_that_is_lost_already(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    first = claims.make(1)
    assert first is not None
    assert claims.make(2) is not None

    def start() -> subprocess.Popen[bytes]:
        raise AssertionError

    assert Keeper(Owner(claims, first), start, lambda: None, sign_s=1, fence_s=1).run() == 1


def begin(folder: Path, pid_file: Path, claim: int) -> subprocess.Popen[bytes]:
    command = ["bash", "-c", f"echo $$ > {pid_file}.tmp; mv {pid_file}.tmp {pid_file}; exec sleep 300"]
    order = {
        "command": command,
        "data": str(folder),
        "folder": str(folder),
        "claim": claim,
        "sign_s": 0.1,
        "fence_s": 9,
    }
    environment = {**os.environ, MARK_VARIABLE: str(folder), CLAIM_VARIABLE: str(claim)}
    words = [sys.executable, "-m", "deephyper_balsam.server.keeper"]
    made = subprocess.Popen(words, stdin=subprocess.PIPE, env=environment)
    assert made.stdin is not None
    with made.stdin:
        made.stdin.write(json.dumps(order).encode())
    wait_for(pid_file.exists)
    return made


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells the child of its parent's end on Linux alone")
def test_postgresql_does_not_outlive_a_keeper_that_is_killed(tmp_path: Path) -> None:
    take(tmp_path, Waits(), [].append)
    made = begin(tmp_path, tmp_path / "pid", 1)
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: psutil.Process(pid).name() == "sleep")  # bash ignores the signal
    made.kill()
    made.wait()
    wait_for(lambda: not alive(pid))


def test_what_was_started_under_the_lost_claim_is_ended_and_nothing_else(tmp_path: Path) -> None:
    take(tmp_path, Waits(), [].append)
    made = begin(tmp_path, tmp_path / "pid", 1)
    others = [
        subprocess.Popen(["sleep", "300"], env={**os.environ, MARK_VARIABLE: folder, CLAIM_VARIABLE: claim})
        for folder, claim in ((str(tmp_path), "1"), (str(tmp_path), "2"), ("/elsewhere", "1"))
    ]
    try:
        assert Claims(tmp_path).make(2) is not None
        assert made.wait(20) == 1
        others[0].wait(5)
        assert [other.poll() is None for other in others] == [False, True, True]
    finally:
        for other in others:
            other.kill()
            other.wait()
