"""The embedded API answers what Balsam's own would: both stand on one database and are asked the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import jwt
import psutil
import pytest
import requests

from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store import sockets
from deephyper_balsam.store.encoding import pack
from deephyper_balsam.store.gateway import Gateway

from .waiting import wait_for

pytestmark = pytest.mark.live

_CHANGES_BY_ITSELF = ("last_update", "timestamp")


@dataclass
class Both:
    """Our API and Balsam's own; `secret` is what they sign tokens with."""

    ours: str
    own: str
    token: str
    secret: str

    def ask(self, method: str, path: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
        """Ask both, Balsam's own first; return the status and the answer, which must be alike."""
        own, ours = (self._ask(root, method, path, body, token) for root in (self.own, self.ours))
        assert ours == own
        return ours

    def _ask(self, root: str, method: str, path: str, body: Any, token: str | None) -> tuple[int, Any]:
        header = {"Authorization": f"Bearer {self.token if token is None else token}"}
        socket_path = sockets.path_of(root)
        if socket_path is not None:
            connection = sockets.Connection(socket_path)
            content = None if body is None else json.dumps(body)
            connection.request(method, f"/{path}", content, {**header, "Content-Type": "application/json"})
            answer = connection.getresponse()
            raw = answer.read()
            connection.close()
            return answer.status, _without_times(json.loads(raw) if raw else None)
        response = requests.request(method, f"{root}/{path}", json=body, headers=header, timeout=60)
        return response.status_code, _without_times(response.json() if response.content else None)


def _without_times(answer: Any) -> Any:
    if isinstance(answer, list):
        return [_without_times(one) for one in answer]
    if isinstance(answer, dict):
        return {key: _without_times(value) for key, value in answer.items() if key not in _CHANGES_BY_ITSELF}
    return answer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def both(stack: LocalStack) -> Iterator[Both]:
    """Balsam's own server beside that of the stack."""
    pids = {part.name: part.pid for part in stack.status().processes}
    order = stack.api.settings(stack.database(stack.files.state()).url)
    environment = {**psutil.Process(pids["api"]).environ(), **order}
    port = _free_port()
    program = (
        "from deephyper_balsam.server.no_redis import stand_in_for_aredis; stand_in_for_aredis(); "  # no Redis here
    )
    program += f"import uvicorn; uvicorn.run('balsam.server.main:app', port={port}, log_level='error')"
    command = [sys.executable, "-c", program]
    own = subprocess.Popen(command, env=environment, cwd=stack.folder / "api", stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                return requests.get(f"{url}/auth/how", timeout=5).status_code == 200
            except requests.ConnectionError:
                assert own.poll() is None
                return False

        wait_for(answers, "Balsam's own API")
        token = Gateway(stack.client_path)._client.token  # type: ignore[attr-defined]
        yield Both(stack.url or "", url, token, environment["BALSAM_AUTH_SECRET_KEY"])
    finally:
        own.terminate()
        own.wait(30)


@pytest.fixture
def job_ids(stack: LocalStack) -> list[int]:
    """Three jobs that nobody runs: they are at a site of their own, which has no agent."""
    gateway = Gateway(stack.client_path)
    site_id = gateway.create_site(f"asked-{time.time_ns()}", f"/asked/{time.time_ns()}")
    app = {"site_id": site_id, "name": f"asked_{time.time_ns()}", "serialized_class": "", "source_code": ""}
    app_id = gateway.create_app({**app, "description": "", "parameters": {}, "transfers": {}})["id"]
    common = {
        "app_id": app_id,
        "tags": {"asked": str(os.getpid())},
        "serialized_parameters": pack({}),
        "data": {"a": 1},
    }
    ids = gateway.create_jobs([{**common, "workdir": f"asked/{number}"} for number in range(3)])
    gateway._call("PATCH", "jobs/", body=[{"id": one, "state": "FAILED", "state_data": {}} for one in ids])
    return ids


def test_jobs_are_read_and_written_alike(both: Both, job_ids: list[int]) -> None:
    first, second, third = job_ids
    assert both.ask("GET", f"jobs/{first}")[1]["data"] == {"a": 1}
    assert both.ask("PATCH", "jobs/", [{"id": first, "data": {"a": [1, None, {"ü": 2.5}]}}]) == (200, 1)
    assert both.ask("GET", f"jobs/{first}")[1]["data"] == {"a": [1, None, {"ü": 2.5}]}
    many = [{"id": one, "data": {"b": one}, "state_data": {}} for one in (third, second)]
    assert both.ask("PATCH", "jobs/", many) == (200, 2)
    status, listed = both.ask("GET", f"jobs/?tags=asked:{os.getpid()}&limit=2&ordering=-id")
    assert status == 200
    assert len(listed["results"]) == 2


def test_a_change_of_state_is_logged_alike(both: Both, job_ids: list[int]) -> None:
    for state, job_id in zip(("RESTART_READY", "FAILED"), job_ids, strict=False):
        change = {"state": state, "state_data": {"message": "asked"}}
        for root in (both.own, both.ours):
            assert both._ask(root, "PATCH", "jobs/", [{"id": job_id, **change}], None) == (200, 1)
        status, job = both.ask("GET", f"jobs/{job_id}")
        assert (status, job["state"]) == (200, state)
        _, events = both.ask("GET", f"events/?job_id={job_id}")
        assert events["count"] >= 1
    for job_id in job_ids:  # nothing of it may start
        both._ask(both.ours, "PATCH", "jobs/", [{"id": job_id, "state": "FAILED", "state_data": {}}], None)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "jobs/999999999", None),
        ("GET", "jobs/none", None),
        ("PATCH", "jobs/", [{"id": 999999999, "data": {}}]),
        ("PATCH", "jobs/", [{"data": {}}]),
        ("PATCH", "jobs/", {"id": 1}),
        ("PATCH", "jobs/", []),
        ("GET", "jobs/?state=NONE", None),
        ("DELETE", "jobs/999999999", None),
    ],
)
def test_what_is_refused_is_refused_alike(both: Both, method: str, path: str, body: Any) -> None:
    both.ask(method, path, body)


def test_the_same_job_twice_is_refused_alike(both: Both, job_ids: list[int]) -> None:
    status, _ = both.ask("PATCH", "jobs/", [{"id": job_ids[0], "data": {}}] * 2)
    assert status == 400


def test_tokens_are_accepted_and_refused_alike(both: Both) -> None:
    claims = jwt.decode(both.token, both.secret, algorithms=["HS256"], options={"verify_sub": False})
    past = datetime.now(timezone.utc) - timedelta(seconds=1)
    soon = datetime.now(timezone.utc) + timedelta(seconds=5)
    expired = jwt.encode({**claims, "exp": past}, both.secret, algorithm="HS256")
    expiring = jwt.encode({**claims, "exp": soon}, both.secret, algorithm="HS256")
    forged = jwt.encode(claims, "another secret", algorithm="HS256")
    stranger = jwt.encode({**claims, "sub": 999999}, both.secret, algorithm="HS256")
    assert both.ask("GET", "sites/")[0] == 200
    for token in (expired, forged, "nonsense", ""):
        assert both.ask("GET", "sites/", token=token)[0] == 401
    # Balsam's own does not look whether the account of a token exists; ours refuses it
    assert both._ask(both.own, "GET", "sites/", None, stranger) == (200, {"count": 0, "results": []})
    assert both._ask(both.ours, "GET", "sites/", None, stranger)[0] == 401
    assert both.ask("GET", "sites/", token=expiring)[0] == 200
    wait_for(lambda: time.time() > soon.timestamp(), "the end of a token")
    assert both.ask("GET", "sites/", token=expiring)[0] == 401  # though it was known
