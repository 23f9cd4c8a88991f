"""`site check` within an allocation asks the API from every node. The way to start ranks is made up: a process."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.sites.reach import allocation_of, try_from_nodes
from deephyper_balsam.store.gateway import Gateway

pytest_plugins = ["balsam_fixtures"]


class Ranks:
    """Starts one process for all nodes, which are this host."""

    def __init__(self, cmdline: str, _preamble: Any, envs: Any, cwd: Path, outfile: Path, spec: Any, *_: Any) -> None:
        self.cmdline, self.cwd, self.outfile, self.hosts = cmdline, cwd, outfile, spec.hostnames

    def start(self) -> None:
        with self.outfile.open("w") as out:
            self.process = subprocess.Popen(self.cmdline, shell=True, cwd=self.cwd, stdout=out, stderr=out)

    def wait(self, timeout: float) -> int:
        return self.process.wait(timeout)

    def tail_output(self, lines: int) -> str:
        return self.outfile.read_text()


def settings(ranks: Any = Ranks, hosts: tuple[str, ...] = ("a",), scheduler_id: Any = "7") -> Any:
    node = SimpleNamespace(
        get_scheduler_id=lambda: scheduler_id,
        get_job_nodelist=lambda: [SimpleNamespace(node_id=host, hostname=host) for host in hosts],
    )
    return SimpleNamespace(scheduler=object(), launcher=SimpleNamespace(compute_node=node, mpi_app_launcher=ranks))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path


def test_outside_of_an_allocation_or_without_a_scheduler_there_is_nothing_to_try() -> None:
    assert allocation_of(settings()) == 7
    assert allocation_of(settings(scheduler_id=None)) is None
    assert allocation_of(SimpleNamespace(scheduler=None)) is None


def test_a_node_that_reaches_the_api_is_told(folder: Path, gateway: Gateway, site: VirtualSite) -> None:
    reached, told = try_from_nodes(settings(), folder, gateway.client_path)
    assert (reached, told) == (True, "1 nodes of this allocation reach it")
    assert list((folder / "log").iterdir()) == []


def test_a_node_that_does_not_reach_it_is_named_with_its_reason(folder: Path, gateway: Gateway, api: BalsamApi) -> None:
    client = folder / "client.yml"
    client.write_text(gateway.client_path.read_text().replace(api.url, "http://127.0.0.1:9"))
    reached, told = try_from_nodes(settings(), folder, client)
    assert not reached
    assert told.startswith(f"1 of 1 nodes do not reach it; {socket.gethostname()}: Balsam does not answer")


def test_a_node_that_says_nothing_counts_as_one_that_does_not_reach_it(folder: Path, gateway: Gateway) -> None:
    reached, told = try_from_nodes(settings(hosts=("a", "b", "c")), folder, gateway.client_path)
    assert not reached
    assert told.startswith("1 of 3 nodes told that they reach it; the run on them ended with 0")
