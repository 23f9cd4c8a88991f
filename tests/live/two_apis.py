"""Our API and Balsam's own, each on a database of its own in one PostgreSQL, and how to ask them over Unix sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg2

from deephyper_balsam.server.postgres import Postgres

_BEGIN = """
import sys
from deephyper_balsam.server.no_redis import stand_in_for_aredis
stand_in_for_aredis()
import uvicorn
from balsam.server.main import app
from balsam.server.models.base import get_engine
from balsam.server.pubsub import pubsub
from deephyper_balsam.server.api import create_tables
"""
_RUN = """
uvicorn.run(app, uds=sys.argv[1], log_level="critical", access_log=False)
"""
_OURS = f"""{_BEGIN}
from deephyper_balsam.server.fast_paths import install_fast_paths
create_tables(install_fast_paths(app))
app.state.tokens.users.prepare()
{_RUN}
"""
_OWN = f"""{_BEGIN}
pubsub.publish = lambda *_, **__: None  # there is no Redis
create_tables(get_engine())
{_RUN}
"""
_TIMES = ("last_update", "timestamp", "heartbeat", "creation_date", "last_refresh")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass
class Api:
    """One of the two: its socket, its process, its database."""

    name: str
    socket_path: Path
    process: subprocess.Popen[bytes]
    database: str
    tokens: dict[str, str] = field(default_factory=dict)

    def send(self, method: str, path: str, content: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Send bytes as they are; the status and the bytes of the answer."""
        connection = _Connection(self.socket_path)
        try:
            connection.request(method, f"/{path}", content, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, user: str = "ann") -> tuple[int, Any]:
        """Ask as `user`; the status and the JSON of the answer. Bytes are sent as they are."""
        headers = {"Authorization": f"Bearer {self.tokens[user]}", "Content-Type": "application/json"}
        content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        status, answer = self.send(method, path, content, **headers)
        try:
            return status, json.loads(answer) if answer else None
        except ValueError:
            return status, answer.decode("utf-8", "replace")

    def made(self, path: str, body: Any, user: str = "ann") -> Any:
        """Create something."""
        status, answer = self.ask("POST", path, body, user)
        assert status in (200, 201), answer
        return answer

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement in its database."""
        with contextlib.closing(psycopg2.connect(self.database)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, values)
                return list(cursor.fetchall()) if cursor.description else []

    def tables(self) -> dict[str, list[Any]]:
        """Everything that the database holds, but for moments, and for the numbers of log entries."""
        found = {}
        for table in ("sites", "apps", "jobs", "batch_jobs", "sessions", "transfer_items", "log_events"):
            rows = [row[0] for row in self.sql(f"SELECT row_to_json({table}) FROM {table} ORDER BY id")]
            if table == "log_events":
                rows = sorted(({**row, "id": None} for row in map(without_times, rows)), key=json.dumps)
            found[table] = [without_times(row) for row in rows]
        return found

    def resident_bytes(self, what: str) -> int:
        """Memory of its process now (``VmRSS``) or at most (``VmHWM``)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def without_times(value: Any) -> Any:
    """Return an answer without what differs from call to call."""
    if isinstance(value, list):
        return [without_times(one) for one in value]
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if key not in _TIMES}
    return value


@contextlib.contextmanager
def two_apis(secret: str = "") -> Iterator[tuple[Api, Api]]:
    """Start ours and Balsam's own; the users ann and bob are known to both."""
    folder = Path(tempfile.mkdtemp(prefix="two-apis-"))
    (folder / "logs").mkdir()
    folder.chmod(0o755)
    database = Postgres(folder, None, secrets.token_hex(16))
    recorded = None
    apis: list[Api] = []
    try:
        recorded = database.start(None, os.environ, database.log)
        database.wait_ready(recorded, 60)
        for name, code in (("ours", _OURS), ("own", _OWN)):
            host = f"host={database.socket_dir} user=postgres password={database.password}"
            with contextlib.closing(psycopg2.connect(f"{host} dbname=balsam")) as connection:
                connection.autocommit = True
                connection.cursor().execute(f"CREATE DATABASE {name}")
            place = folder / name
            place.mkdir()
            environment = {
                **{key: value for key, value in os.environ.items() if not key.startswith("BALSAM_")},
                "BALSAM_DATABASE_URL": database.url.replace("/balsam?", f"/{name}?"),
                "BALSAM_AUTH_LOGIN_METHODS": '["password"]',
                "BALSAM_AUTH_SECRET_KEY": secrets.token_hex(32),
                "BALSAM_LOG_DIR": str(place),
            }
            socket_path = Path(database.socket_dir or folder) / f"{name}.sock"
            with (place / "out.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", code, str(socket_path)], cwd=place, env=environment, stdout=log, stderr=log
                )
            apis.append(Api(name, socket_path, process, f"{host} dbname={name}"))
        for api in apis:
            _wait_for(api)
            for user in ("ann", "bob"):
                _log_in(api, user)
        yield apis[0], apis[1]
    finally:
        for api in apis:
            api.process.terminate()
            api.process.wait(30)
        database.stop(recorded)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(api: Api) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if api.send("GET", "auth/how")[0] == 200:
                return
        except OSError:
            assert api.process.poll() is None, f"{api.name} ended"
            assert time.monotonic() < deadline, f"{api.name} does not answer"
            time.sleep(0.05)


def _log_in(api: Api, user: str) -> None:
    account = {"username": user, "password": secrets.token_hex(8)}
    json_type, form_type = "application/json", "application/x-www-form-urlencoded"
    api.send("POST", "auth/password/register", json.dumps(account).encode(), **{"Content-Type": json_type})
    form = urlencode(account).encode()
    status, answer = api.send("POST", "auth/password/login", form, **{"Content-Type": form_type})
    assert status == 200, answer
    api.tokens[user] = json.loads(answer)["access_token"]
