"""A stack that listens for other hosts: everything goes over TLS, strangers on the network get nowhere."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
import pytest
import yaml

from deephyper_balsam.errors import InputError, NotLoggedInError
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.gateway import Gateway

from .conftest import leftovers, listening, stack_environment

pytestmark = pytest.mark.live

_FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalStack]:
    folder = Path(tempfile.mkdtemp(prefix="live network "))
    made = LocalStack(folder / "balsam")
    try:
        made.up(listen="127.0.0.1")
        yield made
    finally:
        made.down()
        left = leftovers(made)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left


def ask(
    stack: LocalStack, method: str, path: str, body: bytes | None = None, kind: str = "", token: str = ""
) -> tuple[int, Any]:
    """Ask as somebody on the network, who trusts whatever certificate there is."""
    there = urlsplit(stack.url or "")
    context = ssl._create_unverified_context()
    connection = HTTPSConnection(str(there.hostname), there.port, timeout=30, context=context)
    headers = {"Content-Type": kind} if kind else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_a_search_runs_over_it_with_agent_launcher_and_runs(stack: LocalStack, tmp_path: Path) -> None:
    assert str(stack.url).startswith("https://127.0.0.1:")
    (tmp_path / "bowl.py").write_text(
        "from deephyper_balsam import HpProblem\n"
        "problem = HpProblem('bowl')\n"
        "problem.add_hyperparameter((-3.0, 3.0), 'x')\n"
        "def run(job):\n    return -job['x'] ** 2\n"
    )
    command = [sys.executable, "-m", "deephyper_balsam", "search", "run", "tls", "--problem", "bowl.py:problem"]
    command += ["--run", "bowl.py:run", "--site", "local", "--nodes", "1", "--wall-time-min", "10"]
    command += ["--evals-per-node", "2", "--max-evals", "8"]
    done = subprocess.run(
        command, cwd=tmp_path, env=stack_environment(stack), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 done" in done.stdout
    rows = list(Gateway(stack.client_path).jobs({"search": "tls"}))
    assert sum(row["state"] == "JOB_FINISHED" for row in rows) == 8
    assert all(row["data"].get("result") for row in rows if "trial" in row["tags"]), "the runs delivered by themselves"


def test_balsams_own_commands_use_it(stack: LocalStack) -> None:
    balsam = Path(sys.executable).with_name("balsam")
    done = subprocess.run(
        [balsam, "site", "ls"], env=stack_environment(stack), capture_output=True, text=True, timeout=60
    )
    assert "local" in done.stdout, done.stderr


def test_strangers_on_the_network_are_refused(stack: LocalStack) -> None:
    secrets = stack.credentials.secrets()
    user = json.dumps({"username": "eve", "password": "eve"}).encode()
    assert ask(stack, "POST", "/auth/password/register", user, "application/json")[0] == 404
    assert ask(stack, "POST", "/auth/password/login", b"username=local&password=guess", _FORM)[0] == 401
    forged = jwt.encode({"sub": 1, "exp": 4e9, "username": "local"}, "guess", algorithm="HS256")
    unsigned = jwt.encode({"sub": 1, "exp": 4e9, "username": "local"}, None, algorithm="none")
    expired = jwt.encode({"sub": 1, "exp": 1e9, "username": "local"}, secrets["signing_key"], algorithm="HS256")
    before = list(Gateway(stack.client_path).jobs({}))
    for token in ("", forged, unsigned, expired, "x"):
        for path in (
            "/jobs/",
            "/jobs/1",
            "/sites/",
            "/apps/",
            "/batch-jobs/",
            "/sessions/",
            "/events/",
            "/auth/password/me",
        ):
            assert ask(stack, "GET", path, token=token)[0] == 401, (path, token)
        for method in ("POST", "PATCH", "PUT", "DELETE"):
            assert ask(stack, method, "/jobs/", b"[]", "application/json", token)[0] in (401, 405), (method, token)
    assert ask(stack, "POST", "/jobs/", b"x" * 10_000_000, "application/json")[0] == 413
    assert list(Gateway(stack.client_path).jobs({})) == before
    log = (stack.logs / "api.log").read_text(encoding="utf-8")
    assert "A login as 'local' from 127.0.0.1" in log
    assert not any(value in log for name, value in secrets.items() if name != "username")


def test_plain_http_is_told_to_use_tls(stack: LocalStack) -> None:
    there = urlsplit(stack.url or "")
    connection = HTTPConnection(str(there.hostname), there.port, timeout=30)
    connection.request("GET", "/auth/how")
    answer = connection.getresponse()
    assert (answer.status, b"speaks TLS alone" in answer.read()) == (400, True)
    connection.close()


def test_nothing_else_of_the_stack_listens_on_a_network(stack: LocalStack) -> None:
    port = urlsplit(stack.url or "").port
    assert listening(stack.every_process()) == {port}


def test_the_files_of_it_are_for_the_owner_alone(stack: LocalStack) -> None:
    names = {"client.yml", "client.key", "client.ca.pem", "tls/ca.key", "tls/ca.pem", "tls/server.pem"}
    assert {(stack.folder / name).stat().st_mode & 0o777 for name in names} == {0o600}
    assert (stack.folder / "tls").stat().st_mode & 0o777 == 0o700


def test_the_address_stays_over_a_restart_and_clients_follow_when_it_is_taken_away(stack: LocalStack) -> None:
    gateway, url = Gateway(stack.client_path), stack.url
    token = gateway._client.token
    stack.down()
    stack.up()
    assert stack.url == url
    assert gateway.sites()
    lone = Gateway(stack.client_path)  # who has the token of before, and nothing else
    lone._client.credentials_path = Path("/nowhere/client.yml")
    shutil.copy(stack.folder / "client.ca.pem", stack.folder / "lone.ca.pem")
    lone._client.credentials_path = stack.folder / "lone.yml"
    lone._client.token = token
    with pytest.raises(NotLoggedInError):
        lone.sites()
    stack.up(listen="none")
    assert str(stack.url).startswith("http+unix://")
    assert not (stack.folder / "client.ca.pem").exists()
    assert gateway.sites()
    stack.up(listen="127.0.0.1")
    assert gateway.sites()
    settings = yaml.safe_load(stack.client_path.read_text())
    assert settings["api_root"] == stack.url


def test_an_address_of_another_host_is_refused_and_nothing_changes(stack: LocalStack) -> None:
    before = (stack.url, [part.pid for part in stack.status().processes])
    with pytest.raises(InputError, match="no such address or network interface"):
        stack.up(listen="192.0.2.77")
    assert (stack.url, [part.pid for part in stack.status().processes]) == before
