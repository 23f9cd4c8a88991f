"""PostgreSQL's data on local storage: what was acknowledged outlives the node and its storage."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from balsam.schemas import serialize

from deephyper_balsam.common import processes
from deephyper_balsam.errors import BalsamError
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.gateway import Gateway

from .conftest import leftovers
from .waiting import wait_for

pytestmark = pytest.mark.live


@pytest.fixture
def top() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="dhb local "))
    yield path
    shutil.rmtree(path, ignore_errors=True)


class Client:
    """Makes jobs at a site that has no agent, and knows which were acknowledged."""

    def __init__(self, stack: LocalStack) -> None:
        self.call = Gateway(stack.client_path)._call
        self.acknowledged: list[int] = []
        self._over = threading.Event()

    def prepare(self) -> int:
        site = self.call("POST", "sites/", body={"name": "without agent", "path": "/nowhere"})["id"]
        app = {"site_id": site, "name": "nothing", "serialized_class": "", "source_code": "", "parameters": {}}
        return int(self.call("POST", "apps/", body=app)["id"])

    def make(self, app: int, number: int) -> None:
        job = {"app_id": app, "workdir": f"w{number}", "serialized_parameters": serialize({})}
        self.acknowledged += [int(row["id"]) for row in self.call("POST", "jobs/", body=[job])]

    def make_until_it_fails(self, app: int) -> threading.Thread:
        def run() -> None:
            number = 1000
            try:
                while not self._over.is_set():
                    self.make(app, number)
                    number += 1
            except BalsamError:
                pass

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def stop(self, thread: threading.Thread) -> None:
        self._over.set()
        thread.join(60)


def ids(stack: LocalStack) -> set[int]:
    found = Gateway(stack.client_path)._call("GET", "jobs/", params={"limit": 5000})
    return {int(row["id"]) for row in found["results"]}


def test_nothing_that_was_acknowledged_is_lost_with_the_node_and_its_storage(top: Path) -> None:
    local = top / "fast"
    local.mkdir()
    stack = LocalStack(top / "shared" / "stack")
    try:
        stack.up(site=False)
        client = Client(stack)
        app = client.prepare()
        client.make(app, 1)
        stack.up(site=False, data=f"node-local:{local}")
        [data] = local.iterdir()
        assert data.stat().st_mode & 0o777 == 0o700
        assert not (stack.folder / "postgres").exists()
        assert ids(stack) == set(client.acknowledged)
        thread = client.make_until_it_fails(app)
        wait_for(lambda: len(client.acknowledged) > 50, "jobs to be made")
        for process in stack.every_process():
            processes.send(process, signal.SIGKILL)
        client.stop(thread)
        shutil.rmtree(local)
        local.mkdir()
        stack.up(site=False)
        assert set(client.acknowledged) <= ids(stack)
        stack.down()
        assert list(local.iterdir()) == [], "what is shipped is enough"
        stack.up(site=False, data="shared")
        assert set(client.acknowledged) <= ids(stack)
        assert (stack.folder / "postgres" / "PG_VERSION").exists()
        assert not (stack.folder / "shipped").exists()
    finally:
        stack.down()
    assert leftovers(stack) == []


def test_commits_wait_for_the_stacks_folder_and_go_on_when_the_receiver_was_killed(top: Path) -> None:
    stack = LocalStack(top / "stack")
    try:
        stack.up(site=False, data=f"node-local:{top}")
        client = Client(stack)
        app = client.prepare()
        for number in range(3):
            client.make(app, number)
            receivers = [one for one in stack.every_process() if one.name().startswith("pg_receivewal")]
            assert len(receivers) == 1
            processes.send(receivers[0], signal.SIGKILL)
        client.make(app, 3)
        assert ids(stack) == set(client.acknowledged)
    finally:
        stack.down()
    assert leftovers(stack) == []
