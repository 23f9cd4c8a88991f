"""A launcher's end: it starts what fits, and nothing else, and ends in time to stop its runs in order."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from deephyper_balsam.launcher.wall_time import (
    NOTHING,
    WALL_TIME_VARIABLE,
    LauncherEnd,
    precise_master,
    precise_mpi_source,
    precise_serial_source,
    precise_updater,
    precise_worker,
    when_told,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("wall_time_min", "ends_after_s"), [(60, 3480), (20, 1080), (3, 162), (1, 54), (1440, 86280)])
def test_a_launcher_ends_a_tenth_before_its_allocation_and_two_minutes_at_most(
    wall_time_min: int, ends_after_s: float
) -> None:
    assert LauncherEnd(wall_time_min, Clock()).left_s == pytest.approx(ends_after_s)


def test_the_minutes_of_what_may_start_are_rounded_down_and_in_the_last_nothing_starts() -> None:
    clock = Clock()
    end = LauncherEnd(5, clock)  # it ends after 270 s
    seen = []
    for _ in range(5):
        seen.append(end.startable_min)
        clock.sleep(54)
    assert seen == [4, 3, 2, 1, NOTHING]


def test_in_a_very_short_allocation_a_run_of_a_minute_may_always_start() -> None:
    clock = Clock()
    end = LauncherEnd(1, clock)
    clock.sleep(40)
    assert end.startable_min == 1


def test_the_timer_ends_when_the_time_does() -> None:
    clock = Clock()
    end = LauncherEnd(1, clock)
    ticks = list(end.timer(10, clock.sleep))
    assert [round(60 * tick) for tick in ticks] == [44, 34, 24, 14, 4]
    assert clock.now == pytest.approx(1054)


class Source:
    max_wall_time_min, start_time = 5, 0.0

    def get_jobs(self, max_num_jobs: int) -> Any:
        return (max_num_jobs, self.max_wall_time_min)

    def _get_acquire_parameters(self, num_jobs: int) -> dict[str, Any]:
        return {"max_num_jobs": num_jobs, "max_wall_time_min": 4.7}


def test_both_modes_ask_for_what_may_start() -> None:
    clock = Clock()
    end = LauncherEnd(5, clock)
    assert precise_mpi_source(Source, end)().get_jobs(max_num_jobs=2) == (2, 4)
    assert precise_serial_source(Source, end, told=None)()._get_acquire_parameters(7) == {
        "max_num_jobs": 7,
        "max_wall_time_min": 4,
    }


def test_the_session_is_given_back_after_the_last_word_of_the_launcher() -> None:
    happened = []

    class Sessioned(Source):
        def terminate(self) -> None:
            happened.append("session given back")

    class Updater:
        def join(self) -> None:
            happened.append("last word")

    end = LauncherEnd(5, Clock())
    source, updater = precise_mpi_source(Sessioned, end)(), precise_updater(Updater, end, None)()
    source.terminate()
    updater.join()
    assert happened == ["last word", "session given back"]


def test_a_serial_worker_does_not_start_what_was_fetched_early_and_no_longer_fits() -> None:
    class Master:
        def job_to_dict(self, job: Any) -> dict[str, Any]:
            return {"id": job.id, "envs": {}}

    class Worker:
        def __init__(self) -> None:
            self.runnable_cache: dict[int, dict[str, Any]] = {}

        def start_jobs(self) -> list[int]:
            started, self.runnable_cache = list(self.runnable_cache), {}
            return started

    clock = Clock()
    master = precise_master(Master)()
    worker = precise_worker(Worker, LauncherEnd(5, clock))()
    specs = [master.job_to_dict(SimpleNamespace(id=n, wall_time_min=n)) for n in range(5)]
    assert specs[3]["envs"] == {WALL_TIME_VARIABLE: "3"}
    worker.runnable_cache = {spec["id"]: spec for spec in specs}
    clock.sleep(100)  # 170 s are left
    assert worker.start_jobs() == [0, 1, 2]
    assert list(worker.runnable_cache) == [3, 4]


# --- signals ---------------------------------------------------------------------------------------------------------


def test_a_helper_that_is_signalled_with_its_launcher_ends_only_when_the_launcher_says_so() -> None:
    fork = multiprocessing.get_context("fork")
    told, listens = fork.Event(), fork.Event()
    words: Any = fork.SimpleQueue()

    def work() -> None:
        handler = when_told(told)()
        listens.set()
        while not handler.wait_until_exit(0.05):
            pass
        words.put("the last word")

    helper = fork.Process(target=work)
    helper.start()
    assert listens.wait(20)
    assert helper.pid is not None
    os.kill(helper.pid, signal.SIGTERM)
    os.kill(helper.pid, signal.SIGINT)
    helper.join(0.3)
    assert helper.is_alive()
    told.set()
    helper.join(20)
    assert (helper.exitcode, words.get()) == (0, "the last word")


def test_news_of_runs_is_sent_while_more_of_it_comes() -> None:
    from balsam.site.status_updater import BulkStatusUpdater

    sent, told = list[list[int]](), threading.Event()
    client = SimpleNamespace(
        close_session=lambda: None, bulk_patch=lambda _path, rows: sent.append([row["id"] for row in rows])
    )
    updater = precise_updater(BulkStatusUpdater, LauncherEnd(5, Clock()), told, hold_s=0.1)(client)

    def runs() -> None:
        for number in range(20):
            updater.put(number, "RUNNING", state_timestamp=datetime.now())
            time.sleep(0.05)
        told.set()

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    feeder = threading.Thread(target=runs)
    feeder.start()
    try:
        updater._run()
    finally:
        feeder.join()
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert sorted(number for batch in sent for number in batch) == list(range(20))
    assert len(sent) >= 4  # Balsam's own sends all of it at the end


def test_the_launcher_tells_its_helpers_by_their_events_alone() -> None:
    told = multiprocessing.Event()
    precise_updater(Source, LauncherEnd(5, Clock()), told)().terminate()
    assert told.is_set()
    told.clear()
    precise_serial_source(Source, LauncherEnd(5, Clock()), told)().terminate()
    assert told.is_set()


class BalsamMaster:
    """What Balsam's serial master does at its end, in words."""

    def __init__(self, happened: list[Any], workers: list[dict[str, Any]], signalled: bool) -> None:
        self.happened, self._workers = happened, list(workers)
        self.num_workers, self.active_ids = 2, {1, 2, 3}
        self.sig_handler = SimpleNamespace(is_set=lambda: signalled)
        self.socket = self

    def setsockopt(self, option: int, value: int) -> None:
        pass

    def recv_multipart(self) -> list[bytes]:
        import zmq

        if not self._workers:
            raise zmq.Again
        return [json.dumps(self._workers.pop(0)).encode()]

    def send_json(self, message: dict[str, Any]) -> None:
        self.happened.append(message)

    def update_job_states(self, done: list[int], errors: list[Any], started: list[int]) -> None:
        self.happened += [("started", run) for run in started]
        self.happened += [("ended", run) for run in [*done, *errors]]

    def shutdown(self) -> None:
        self.happened.append(("timed out", sorted(self.active_ids), self.num_workers))


def said(done: list[int], errors: list[Any], started: list[int], source: str = "n") -> dict[str, Any]:
    return {"done": done, "error": errors, "started": started, "source": source, "request_num_jobs": 0}


def ticking() -> Any:
    """A clock that goes on by a second with each look."""
    clock = Clock()

    def tell() -> float:
        clock.sleep(1)
        return clock()

    return tell


def test_a_serial_master_ends_the_runs_before_its_last_word_and_takes_those_that_a_signal_ended_for_cut() -> None:
    happened: list[Any] = []
    workers = [said([1], [], [4]), said([], [(2, -15, "")], [], source="m")]
    master = precise_master(BalsamMaster, lambda _seconds: happened.append("the runs end"))
    master(happened, workers, signalled=True).shutdown()
    told = {"exit": True}
    timed_out = ("timed out", [2, 3, 4], 0)
    assert happened == [("started", 4), ("ended", 1), told, told, "the runs end", timed_out]


def test_at_the_end_of_the_time_a_run_that_failed_has_failed_and_a_worker_that_is_gone_is_not_waited_for() -> None:
    happened: list[Any] = []
    master = precise_master(BalsamMaster, lambda _seconds: happened.append("the runs end"), ticking())
    master(happened, [said([], [(2, 1, "")], [])], signalled=False).shutdown()
    failed = ("ended", (2, 1, ""))
    assert happened == [failed, {"exit": True}, "the runs end", ("timed out", [1, 3], 0)]


def test_rubbish_does_not_cut_the_end_short() -> None:
    happened: list[Any] = []
    master = precise_master(BalsamMaster, lambda _seconds: None)
    rubbish: Any = ["", {"done": 3}, None]
    master(happened, [*rubbish, said([1], [], []), said([2], [], [], source="m")], signalled=False).shutdown()
    assert [what for what in happened if "ended" in what] == [("ended", 1), ("ended", 2)]
    assert happened[-1] == ("timed out", [3], 0)


def test_of_a_run_that_began_and_ended_between_two_looks_its_beginning_is_said_first() -> None:
    happened: list[Any] = []
    precise_master(BalsamMaster)(happened, [], signalled=False).update_job_states([7], [], [7])
    assert happened == [("started", 7), ("ended", 7)]
