"""Serial mode: a node takes what it can start, and leaves the rest to the others."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from balsam.site.launcher._serial_mode_worker import Worker
from balsam.site.launcher.node_manager import NodeManager

from deephyper_balsam.launcher.serial_mode import fair_worker, sharing_master, sharing_source
from deephyper_balsam.sites.local import LocalNode


class Master:
    """The other end of the worker's socket: it gives as many jobs as are asked for while there are any."""

    def __init__(self, num_jobs: int, packing: int) -> None:
        self.waiting = list(range(num_jobs))
        self.packing = packing
        self.said: list[dict[str, Any]] = []

    def send_json(self, message: dict[str, Any]) -> None:
        self.said.append(message)

    def recv_json(self) -> dict[str, Any]:
        count = self.said[-1]["request_num_jobs"]
        given, self.waiting = self.waiting[:count], self.waiting[count:]
        more: dict[str, Any] = {
            "cwd": "/x",
            "cmdline": "true",
            "preamble": "",
            "envs": {},
            "threads_per_rank": 1,
            "threads_per_core": 1,
            "gpus_per_rank": 0,
        }
        return {"new_jobs": [{"id": job, "node_occupancy": 1 / self.packing, **more} for job in given]}


class Running:
    """A run that ends when it is told to."""

    def __init__(self, **spec: Any) -> None:
        self.code: int | None = None

    def start(self) -> None:
        pass

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.code = 0

    def wait(self, timeout: float) -> int | None:
        return self.code


@pytest.fixture
def worker() -> Any:
    nodes = [LocalNode("n", "n")]
    return fair_worker(Worker)(
        app_run=Running, node_manager=NodeManager(nodes), master_host="h", master_port=1, delay_sec=1,
        error_tail_num_lines=1, num_prefetch_jobs=64, master_subproc=None,
    )  # fmt: skip


def test_a_node_fills_itself_and_leaves_what_it_cannot_start_to_others(worker: Any) -> None:
    worker.socket = master = Master(10, packing=4)
    for _ in range(4):
        assert worker.cycle()
    assert len(worker.app_runs) == 4
    assert worker.runnable_cache == {}
    assert len(master.waiting) == 6


def test_each_start_is_told_once_and_an_ended_run_is_replaced_in_the_same_cycle(worker: Any) -> None:
    worker.socket = master = Master(10, packing=2)
    for _ in range(3):
        worker.cycle()
    worker.app_runs[0].code = 0
    worker.cycle()
    assert sorted(worker.app_runs) == [1, 2]
    worker.cycle()
    assert [job for message in master.said for job in message["started"]] == [0, 1, 2]
    assert [job for message in master.said for job in message["done"]] == [0]


def test_runs_that_end_between_two_looks_do_not_keep_a_node_at_one_at_a_time(worker: Any) -> None:
    worker.socket = master = Master(100, packing=8)
    for look in range(6):
        assert worker.cycle()
        assert len(worker.app_runs) == (1 if look == 0 else 8)
        for run in worker.app_runs.values():
            run.code = 0
    assert len(master.waiting) == 100 - 1 - 5 * 8
    assert worker.runnable_cache == {}


def test_a_node_looks_as_often_as_the_launcher_is_told_to(worker: Any) -> None:
    nodes = [LocalNode("n", "n")]
    quick = fair_worker(Worker, poll_s=0.25)(
        app_run=Running, node_manager=NodeManager(nodes), master_host="h", master_port=1, delay_sec=1,
        error_tail_num_lines=1, num_prefetch_jobs=64, master_subproc=None,
    )  # fmt: skip
    assert (quick.delay_sec, worker.delay_sec) == (0.25, 1.0)


class Queue:
    """What of Balsam's serial master and its job source stands behind the sharing ones."""

    def __init__(self) -> None:
        self.ready: list[dict[str, Any]] = []
        self.active_ids: set[int] = set()
        self.num_outstanding_jobs = 0
        self.source = sharing_source(Depth, at_first=2)(prefetch_depth=64)
        self.job_source = self.source
        self.socket = self

    def setsockopt(self, option: int, value: int) -> None:
        pass

    def update_job_states(self, *told: Any) -> None:
        pass

    def acquire_jobs(self, count: int) -> list[dict[str, Any]]:
        given, self.ready = self.ready[:count], self.ready[count:]
        return given

    def recv_multipart(self) -> list[bytes]:
        return [json.dumps(self.message).encode()]

    def send_json(self, message: dict[str, Any]) -> None:
        pass

    def hear(self, source: str, wanted: int, done: list[int]) -> int:
        """What the source keeps ready after a worker's message."""
        self.message = {"source": source, "started": [], "done": done, "error": [], "request_num_jobs": wanted}
        self.handle_request()  # type: ignore[attr-defined]
        return int(self.source.prefetch_depth)


class Depth:
    def __init__(self, prefetch_depth: int) -> None:
        self.prefetch_depth = prefetch_depth


def test_the_master_holds_what_was_asked_for_and_not_given_and_no_more() -> None:
    master: Any = sharing_master(Queue, clock=lambda: 0.0)()
    assert master.source.prefetch_depth == 2  # one for each node, until somebody has asked
    assert master.hear("a", 4, []) == 4
    assert master.hear("b", 3, []) == 7
    master.ready = [{"id": n} for n in range(5)]
    assert master.hear("a", 4, []) == 3
    assert master.hear("b", 3, []) == 2
    assert master.hear("b", 0, []) == 0  # all run, for long: nothing is taken from other launchers


def test_the_master_holds_what_short_runs_will_leave_room_for() -> None:
    now = [0.0]
    master: Any = sharing_master(Queue, clock=lambda: now[0])()
    for now[0] in range(1, 21):
        depth = master.hear("a", 0, list(range(8)))
    assert depth in (8, 9)  # eight a second
    for now[0] in range(21, 40):
        depth = master.hear("a", 0, [])
    assert depth == 0


def test_a_master_that_ends_gets_no_more_starts(worker: Any) -> None:
    worker.socket = SimpleNamespace(send_json=lambda message: None, recv_json=lambda: {"exit": True})
    assert not worker.cycle()
    assert worker.app_runs == {}
