"""Serial mode: a node takes what it can start, and leaves the rest to the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from balsam.site.launcher._serial_mode_worker import Worker
from balsam.site.launcher.node_manager import NodeManager

from deephyper_balsam.sites.platforms import LocalNode
from deephyper_balsam.sites.serial_mode import fair_worker


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


def test_a_master_that_ends_gets_no_more_starts(worker: Any) -> None:
    worker.socket = SimpleNamespace(send_json=lambda message: None, recv_json=lambda: {"exit": True})
    assert not worker.cycle()
    assert worker.app_runs == {}
