"""A launcher's end: it starts what fits, and nothing else, and ends in time to stop its runs in order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deephyper_balsam.sites.batch import WALL_TIME_VARIABLE
from deephyper_balsam.sites.ending import (
    NOTHING,
    Ending,
    precise_master,
    precise_mpi_source,
    precise_serial_source,
    precise_updater,
    precise_worker,
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
    assert Ending(wall_time_min, Clock()).left_s == pytest.approx(ends_after_s)


def test_the_minutes_of_what_may_start_are_rounded_down_and_in_the_last_nothing_starts() -> None:
    clock = Clock()
    ending = Ending(5, clock)  # it ends after 270 s
    seen = []
    for _ in range(5):
        seen.append(ending.startable_min)
        clock.sleep(54)
    assert seen == [4, 3, 2, 1, NOTHING]


def test_in_a_very_short_allocation_a_run_of_a_minute_may_always_start() -> None:
    clock = Clock()
    ending = Ending(1, clock)
    clock.sleep(40)
    assert ending.startable_min == 1


def test_the_timer_ends_when_the_time_does() -> None:
    clock = Clock()
    ending = Ending(1, clock)
    ticks = list(ending.timer(10, clock.sleep))
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
    ending = Ending(5, clock)
    assert precise_mpi_source(Source, ending)().get_jobs(max_num_jobs=2) == (2, 4)
    assert precise_serial_source(Source, ending)()._get_acquire_parameters(7) == {
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

    ending = Ending(5, Clock())
    source, updater = precise_mpi_source(Sessioned, ending)(), precise_updater(Updater, ending)()
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
    worker = precise_worker(Worker, Ending(5, clock))()
    specs = [master.job_to_dict(SimpleNamespace(id=n, wall_time_min=n)) for n in range(5)]
    assert specs[3]["envs"] == {WALL_TIME_VARIABLE: "3"}
    worker.runnable_cache = {spec["id"]: spec for spec in specs}
    clock.sleep(100)  # 170 s are left
    assert worker.start_jobs() == [0, 1, 2]
    assert list(worker.runnable_cache) == [3, 4]
