"""A fake of Balsam's API at the network boundary, and a site that moves its jobs step by step.

`BalsamApi` answers on loopback what `balsam/server/routers` and `balsam/server/models/crud` answer, from tables in
memory, with the server's own schemas and JSON encoder, so that what the real server refuses is refused here too. It
keeps a log of requests, and fails on request. `VirtualSite` is the site's agent and launcher, one method a step,
without threads; `PlayingSite` makes those steps by itself.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson
import pydantic
import yaml
from balsam import schemas

Row = dict[str, Any]
TOKEN = "a-token-of-the-fake"
WAITING = ("CREATED", "AWAITING_PARENTS", "READY", "STAGED_IN", "PREPROCESSED", "RESTART_READY")


class Refused(Exception):
    """An answer of the server other than 2xx."""

    def __init__(self, status: int, detail: Any) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass
class Request:
    """One request that arrived, and how many rows its answer held."""

    method: str
    path: str
    query: dict[str, list[str]]
    body: Any
    rows: list[Row] = field(default_factory=list)
    status: int = 0


@dataclass
class _Fault:
    kind: str  # "status", "page", "slow", "none", or "lost": the work is done, the answer is not sent
    matches: Callable[[Request], bool]
    value: float
    left: int


class BalsamApi:
    """The API of one account.

    Attributes
    ----------
    sites, apps, jobs, batch_jobs, sessions
        The tables: id -> row.
    events
        The log of state changes of jobs, oldest first.
    requests
        What was asked, oldest first.
    silent_sites
        The ids of sites whose agents are dead.
    away
        While true, every connection is dropped before anything is done.
    """

    def __init__(self) -> None:
        self.sites: dict[int, Row] = {}
        self.apps: dict[int, Row] = {}
        self.jobs: dict[int, Row] = {}
        self.batch_jobs: dict[int, Row] = {}
        self.sessions: dict[int, Row] = {}
        self.silent_sites: set[int] = set()
        self.events: list[Row] = []
        self.requests: list[Request] = []
        self.away = False
        self._last_job_id = 0
        self.token = TOKEN
        self.lock = threading.RLock()
        self._faults: list[_Fault] = []
        self._connections: set[socket.socket] = set()
        self._skew = timedelta()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    # --- its life ------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            _drop(connection)
        self._thread.join()

    def write_client_yml(self, path: Path, **changes: Any) -> Path:
        """Write a credentials file as `balsam login` does; `changes` replace or add settings."""
        settings = {
            "api_root": self.url,
            "client_class": "balsam.client.BasicAuthRequestsClient",
            "token": self.token,
            "token_expiry": datetime.now(timezone.utc).replace(tzinfo=None) + timedelta(days=30),
            "connect_timeout": 6.2,
            "read_timeout": 120.0,
            "retry_count": 10,
        }
        path.write_text(yaml.safe_dump({**settings, **changes}), encoding="utf-8")
        return path

    # --- faults --------------------------------------------------------------------------------------------------

    def answer_next(self, status: int, count: int = 1, method: str | None = None, path: str | None = None) -> None:
        """Answer the next `count` requests (of this method and path) with `status`, without doing anything."""
        self._faults.append(_Fault("status", _matcher(method, path), status, count))

    def answer_after(self, count: int, status: int, method: str | None = None, path: str | None = None) -> None:
        """Serve `count` such requests as they are, and answer the one after them with `status`."""
        self._faults.append(_Fault("none", _matcher(method, path), 0, count))
        self.answer_next(status, method=method, path=path)

    def lose_next_answer(self, method: str | None = None, path: str | None = None, count: int = 1) -> None:
        """Do what the next requests ask, then close the connection instead of answering."""
        self._faults.append(_Fault("lost", _matcher(method, path), 0, count))

    def lose_answer_after(self, count: int, method: str | None = None, path: str | None = None) -> None:
        """Serve `count` such requests as they are, and do the one after them without answering."""
        self._faults.append(_Fault("none", _matcher(method, path), 0, count))
        self.lose_next_answer(method, path)

    def be_slow(self, seconds: float, count: int = 1, path: str | None = None) -> None:
        """Wait before answering the next requests."""
        self._faults.append(_Fault("slow", _matcher(None, path), seconds, count))

    def answer_with_page(self) -> None:
        """Answer the next request with 200 and a web page, as another server or a proxy does."""
        self._faults.append(_Fault("page", _matcher(None, None), 0, 1))

    def _fault_for(self, request: Request) -> _Fault | None:
        for fault in self._faults:
            if fault.left and fault.matches(request):
                fault.left -= 1
                return fault
        return None

    def asked(self, method: str, path: str) -> list[Request]:
        """Return the requests of one method and path so far."""
        return [request for request in self.requests if (request.method, request.path) == (method, path)]

    # --- time ----------------------------------------------------------------------------------------------------

    def now(self) -> datetime:
        return datetime.now(timezone.utc) + self._skew

    def let_pass(self, seconds: float) -> None:
        """Move the server's clock on."""
        self._skew += timedelta(seconds=seconds)

    # --- what people and sites do --------------------------------------------------------------------------------

    def add_site(self, name: str) -> int:
        with self.lock:
            site_id = len(self.sites) + 1
            self.sites[site_id] = {
                "id": site_id,
                "name": name,
                "path": f"/sites/{name}",
                "last_refresh": self.now(),
                "creation_date": self.now(),
                "globus_endpoint_id": None,
                "backfill_windows": {},
                "queued_jobs": {},
                "optional_batch_job_params": {},
                "allowed_projects": ["local"],
                "allowed_queues": {},
                "transfer_locations": {},
            }
            return site_id

    def change_job(self, job_id: int, **change: Any) -> None:
        """Apply a PATCH of one job, as an agent or a launcher sends it."""
        with self.lock:
            self._update_jobs({job_id: {**change, "last_update": self.now()}})

    def change_batch_job(self, batch_job_id: int, **change: Any) -> None:
        """Apply a PATCH of a BatchJob (`balsam/server/models/crud/batch_jobs.py`, _update_fields)."""
        with self.lock:
            row = self.batch_jobs[batch_job_id]
            state = change.pop("state", row["state"])
            row.update(change)
            if row["state"] != "pending_deletion" or state == "finished":
                row["state"] = state

    def trials(self, search: str) -> dict[int, Row]:
        """Return the jobs of a search by trial number; two of one number are an error."""
        with self.lock:
            rows = [row for row in self.jobs.values() if row["tags"].get("search") == search]
            by_number = {int(row["tags"]["trial"]): row for row in rows}
            assert len(by_number) == len(rows), "a trial was created twice"
            return by_number

    # --- one request ---------------------------------------------------------------------------------------------

    def answer(self, request: Request, token: str | None) -> tuple[int, bytes]:
        """Do what is asked, and return the status and the body."""
        fault = self._fault_for(request)
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.value)
        if fault is not None and fault.kind == "status":
            return int(fault.value), b'{"detail": "injected"}'
        if fault is not None and fault.kind == "page":
            return 200, b"<html>Welcome</html>"
        if token != self.token:
            return 401, b'{"detail": "Could not validate credentials"}'
        with self.lock:
            before = copy.deepcopy((self.jobs, self.events)) if request.method == "PATCH" else None
            try:
                status, value = self._route(request)
                body = orjson.dumps(value)  # also fails on what the real server cannot encode
            except Refused as refused:
                status, body = refused.status, orjson.dumps({"detail": refused.detail})
            except pydantic.ValidationError as error:
                status, body = 422, orjson.dumps({"detail": json.loads(error.json())})
            except (TypeError, KeyError) as error:
                if before is not None:  # the transaction is rolled back
                    self.jobs, self.events = before
                status, body = 500, f"Internal Server Error: {error!r}".encode()
        if fault is not None and fault.kind == "lost":
            return 0, b""
        return status, body

    def _route(self, request: Request) -> tuple[int, Any]:
        table, _, item = request.path.strip("/").partition("/")
        route = getattr(self, f"_{request.method.lower()}_{table.replace('-', '_')}{'_item' if item else ''}", None)
        if route is None:
            raise Refused(404, "Not Found")
        answer: tuple[int, Any] = route(request, int(item)) if item else route(request)
        return answer

    # --- sites and apps ------------------------------------------------------------------------------------------

    def _get_sites(self, request: Request) -> tuple[int, Any]:
        for site_id, site in self.sites.items():
            if site_id not in self.silent_sites:  # its agent says every second what it sees
                site["last_refresh"] = self.now()
        return self._page(request, _where(self.sites.values(), request, id=int, name=str))

    def _get_apps(self, request: Request) -> tuple[int, Any]:
        return self._page(request, _where(self.apps.values(), request, id=int, site_id=int, name=str))

    def _post_apps(self, request: Request) -> tuple[int, Any]:
        app = json.loads(schemas.AppCreate(**request.body).json())
        if app["site_id"] not in self.sites:
            raise Refused(404, "Not found")
        if any((row["site_id"], row["name"]) == (app["site_id"], app["name"]) for row in self.apps.values()):
            raise Refused(400, "An app with this site_id and name already exists")
        app["id"] = len(self.apps) + 1
        self.apps[app["id"]] = app
        return 201, app

    def _put_apps_item(self, request: Request, app_id: int) -> tuple[int, Any]:
        if app_id not in self.apps:
            raise Refused(404, "Not found")
        self.apps[app_id].update(json.loads(schemas.AppUpdate(**request.body).json(exclude_unset=True)))
        return 200, self.apps[app_id]

    # --- jobs ----------------------------------------------------------------------------------------------------

    def _select_jobs(self, request: Request) -> list[Row]:
        query = request.query
        for state in query.get("state", []):
            schemas.JobState(state)
        rows = _where(self.jobs.values(), request, id=int, app_id=int, state=str)
        tags = dict(tag.split(":", 1) for tag in query.get("tags", []))
        rows = [row for row in rows if tags.items() <= row["tags"].items()]
        for text in query.get("last_update_after", []):
            after = _moment(text)
            rows = [row for row in rows if row["last_update"] >= after]
        for text in query.get("last_update_before", []):
            before = _moment(text)
            rows = [row for row in rows if row["last_update"] <= before]
        rows.sort(key=lambda row: int(row["id"]))
        for ordering in query.get("ordering", []):
            name = str(schemas.JobOrdering(ordering).value)
            rows.sort(key=lambda row: row[name.lstrip("-")], reverse=name.startswith("-"))
        return rows

    def _get_jobs(self, request: Request) -> tuple[int, Any]:
        return self._page(request, self._select_jobs(request))

    def _get_jobs_item(self, request: Request, job_id: int) -> tuple[int, Any]:
        if job_id not in self.jobs:
            raise Refused(404, "Not found")
        return 200, self.jobs[job_id]

    def _next_job_id(self) -> int:
        self._last_job_id = max(self._last_job_id, *self.jobs, 0) + 1  # never given again, as PostgreSQL's sequences
        return self._last_job_id

    def _post_jobs(self, request: Request) -> tuple[int, Any]:
        if len(request.body) > schemas.MAX_ITEMS_PER_BULK_OP:
            raise Refused(400, "Cannot bulk-create more than 5000 in a single API call.")
        specs = [schemas.ServerJobCreate(**job) for job in request.body]
        if {spec.app_id for spec in specs} - set(self.apps):
            raise Refused(404, "Could not find one or more Apps. Double check app_id fields.")
        if len({spec.workdir for spec in specs}) < len(specs):
            raise Refused(400, "Workdirs must be unique for each call to bulk-create Jobs.")
        rows = []
        for spec in specs:
            row = spec.dict(exclude={"transfers", "workdir", "parent_ids"})
            row.update(
                id=self._next_job_id(),
                workdir=spec.workdir.as_posix(),
                parent_ids=list(spec.parent_ids),
                last_update=self.now(),
                pending_file_cleanup=True,
                serialized_return_value="",
                serialized_exception="",
                batch_job_id=None,
                session_id=None,
                state="STAGED_IN",
            )
            self.jobs[row["id"]] = row
            self._log(row["id"], "CREATED", "STAGED_IN", {})
            rows.append(row)
        random.Random(len(self.jobs)).shuffle(rows)  # RETURNING promises no order
        return 201, [{**row, "last_update": row["last_update"].replace(tzinfo=None)} for row in rows]

    def _patch_jobs(self, request: Request) -> tuple[int, Any]:
        updates = [schemas.JobBulkUpdate(**row) for row in request.body]
        patches = {update.id: update.dict(exclude_unset=True, exclude={"id"}) for update in updates}
        if len(patches) < len(updates):
            raise Refused(400, "Duplicate Job ID keys provided")
        if set(patches) - set(self.jobs):
            raise Refused(400, "Could not find some Job IDs")
        self._update_jobs({job_id: {**patch, "last_update": self.now()} for job_id, patch in patches.items()})
        return 200, len(patches)

    def _put_jobs(self, request: Request) -> tuple[int, Any]:
        change = schemas.JobUpdate(**request.body).dict(exclude_unset=True)
        rows = self._select_jobs(request)
        self._update_jobs({row["id"]: {**change, "last_update": self.now()} for row in rows})
        return 200, len(rows)

    def _delete_jobs(self, request: Request) -> tuple[int, Any]:
        """`balsam/server/models/crud/jobs.py`, delete_query: what a session holds stays, without a word."""
        for row in self._select_jobs(request):
            if row["session_id"] is None:
                del self.jobs[row["id"]]
        return 204, None

    def _update_jobs(self, patches: dict[int, Row]) -> None:
        """`balsam/server/models/crud/jobs.py`, do_update_jobs: one UPDATE with the columns of the first row for all."""
        for job_id, patch in patches.items():
            row = self.jobs[job_id]
            state = patch.pop("state", None)
            state = getattr(state, "value", state)
            timestamp, data = patch.pop("state_timestamp", None), patch.pop("state_data", {})
            if state is None or state == row["state"]:
                continue
            patch["session_id"] = row["session_id"] if state == "RUNNING" else None
            patch["state"] = "JOB_FINISHED" if state in ("POSTPROCESSED", "STAGED_OUT") else state
            self._log(job_id, row["state"], patch["state"], data, timestamp)
        columns = list(next(iter(patches.values()), {}))
        for job_id, patch in patches.items():
            self.jobs[job_id].update({column: patch[column] for column in columns})  # a KeyError is the server's 500

    def _log(self, job_id: int, from_state: str, to_state: str, data: Row, at: datetime | None = None) -> None:
        at = (at or self.now()).replace(tzinfo=None)
        event = {"job_id": job_id, "timestamp": at, "from_state": from_state, "to_state": to_state, "data": data}
        self.events.append({"id": len(self.events) + 1, **event})

    # --- events and allocations ----------------------------------------------------------------------------------

    def _get_events(self, request: Request) -> tuple[int, Any]:
        rows = _where(self.events, request, job_id=int, from_state=str, to_state=str)
        tags = dict(tag.split(":", 1) for tag in request.query.get("tags", []))
        rows = [row for row in rows if tags.items() <= self.jobs[row["job_id"]]["tags"].items()]
        for text in request.query.get("timestamp_after", []):
            rows = [row for row in rows if row["timestamp"] >= _moment(text).replace(tzinfo=None)]
        [ordering] = request.query.get("ordering", ["-timestamp"])
        rows.sort(key=lambda row: row["timestamp"], reverse=ordering.startswith("-"))
        return self._page(request, rows)

    def _get_batch_jobs(self, request: Request) -> tuple[int, Any]:
        return self._page(request, _where(self.batch_jobs.values(), request, id=int, site_id=int, state=str))

    def _post_batch_jobs(self, request: Request) -> tuple[int, Any]:
        spec = json.loads(schemas.BatchJobCreate(**request.body).json())
        if spec["site_id"] not in self.sites:
            raise Refused(400, f"No site with ID {spec['site_id']}")
        row = {
            "id": len(self.batch_jobs) + 1,
            "scheduler_id": None,
            "state": "pending_submission",
            "status_info": {},
            "start_time": None,
            "end_time": None,
            **spec,
        }
        self.batch_jobs[row["id"]] = row
        return 201, row

    def _delete_batch_jobs_item(self, request: Request, batch_job_id: int) -> tuple[int, Any]:
        if batch_job_id not in self.batch_jobs:
            raise Refused(404, "Not found")
        del self.batch_jobs[batch_job_id]
        return 204, None

    def _patch_batch_jobs(self, request: Request) -> tuple[int, Any]:
        updates = [json.loads(schemas.BatchJobBulkUpdate(**row).json(exclude_unset=True)) for row in request.body]
        if {update["id"] for update in updates} - set(self.batch_jobs):
            raise Refused(400, "Could not find some Batch Job IDs")
        for update in updates:
            self.change_batch_job(update.pop("id"), **update)
        return 200, list(self.batch_jobs.values())

    # --- sessions (`balsam/server/models/crud/sessions.py`) ------------------------------------------------------

    def add_session(self, batch_job_id: int | None, jobs: Iterable[int] = ()) -> int:
        """Let a launcher take jobs, those that run included."""
        with self.lock:
            session_id = len(self.sessions) + 1
            site_id = self.batch_jobs[batch_job_id]["site_id"] if batch_job_id else next(iter(self.sites))
            row = {"id": session_id, "site_id": site_id, "batch_job_id": batch_job_id, "heartbeat": self.now()}
            self.sessions[session_id] = row
            for job_id in jobs:
                self.jobs[job_id]["session_id"] = session_id
            return session_id

    def _get_sessions(self, request: Request) -> tuple[int, Any]:
        return 200, {"count": len(self.sessions), "results": list(self.sessions.values())}

    def _delete_sessions_item(self, request: Request, session_id: int) -> tuple[int, Any]:
        if session_id not in self.sessions:
            raise Refused(404, "Not found")
        held = [row for row in self.jobs.values() if row["session_id"] == session_id]
        running = [row["id"] for row in held if row["state"] == "RUNNING"]
        self._update_jobs({job_id: {"state": "RUN_TIMEOUT", "last_update": self.now()} for job_id in running})
        for row in held:  # ON DELETE SET NULL
            row["session_id"] = None
        del self.sessions[session_id]
        return 204, None

    def _page(self, request: Request, rows: Iterable[Row]) -> tuple[int, Any]:
        rows = list(rows)
        limit, offset = (int(request.query.get(name, [default])[0]) for name, default in _PAGING)
        if limit > schemas.MAX_PAGE_SIZE:
            raise Refused(422, "limit is too large")
        request.rows = rows[offset : offset + limit]
        return 200, {"count": len(rows), "results": request.rows}


_PAGING = (("limit", "100000"), ("offset", "0"))


def _where(rows: Iterable[Row], request: Request, **columns: Callable[[str], Any]) -> list[Row]:
    selected = list(rows)
    for column, kind in columns.items():
        if column in request.query:
            wanted = {kind(value) for value in request.query[column]}
            selected = [row for row in selected if row[column] in wanted]
    return selected


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _matcher(method: str | None, path: str | None) -> Callable[[Request], bool]:
    return lambda request: method in (None, request.method) and path in (None, request.path)


def _drop(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        pass  # a client that gave up waiting


def _handler_of(api: BalsamApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # head and body in one packet
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            api._connections.add(self.request)

        def finish(self) -> None:
            api._connections.discard(self.request)
            with contextlib.suppress(OSError):  # the connection was dropped on purpose
                super().finish()

        def log_message(self, *args: Any) -> None:
            pass

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            text = self.rfile.read(length)
            if api.away:
                self._drop()
                return
            parts = urlsplit(self.path)
            body = json.loads(text) if text else None
            request = Request(self.command, parts.path.lstrip("/"), parse_qs(parts.query), body)
            authorization = self.headers.get("Authorization", "")
            status, answer = api.answer(request, authorization.removeprefix("Bearer ") or None)
            request.status = status
            api.requests.append(request)
            if not status:
                self._drop()
                return
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _drop(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(api.now().timestamp() if timestamp is None else timestamp)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _serve

    return Handler


# --- the site -------------------------------------------------------------------------------------------------------


class VirtualSite:
    """The agent and the launcher of one site, moved by hand."""

    def __init__(self, api: BalsamApi, name: str = "lab") -> None:
        self.api, self.name = api, name
        self.id = api.add_site(name)

    # allocations

    def add_allocation(
        self, nodes: int = 1, state: str = "running", filter_tags: Mapping[str, str] | None = None
    ) -> int:
        """Add a BatchJob that someone else asked for."""
        with self.api.lock:
            spec = {
                "site_id": self.id,
                "num_nodes": nodes,
                "wall_time_min": 60,
                "job_mode": "mpi",
                "project": "local",
                "queue": "local",
                "filter_tags": dict(filter_tags or {}),
            }
            _, row = self.api._post_batch_jobs(Request("POST", "batch-jobs/", {}, spec))
            row["state"] = state
            return int(row["id"])

    def schedule(self) -> list[int]:
        """Start what was asked for and end what is to be ended; the BatchJobs that run."""
        with self.api.lock:
            rows = [row for row in self.api.batch_jobs.values() if row["site_id"] == self.id]
            for row in rows:
                if row["state"] in ("pending_submission", "queued"):
                    row.update(state="running", scheduler_id=row["id"] + 1000, start_time=self.api.now())
                elif row["state"] == "pending_deletion":
                    row.update(state="finished", end_time=self.api.now())
            return [row["id"] for row in rows if row["state"] == "running"]

    def end_allocation(self, batch_job_id: int, state: str = "finished", **status_info: str) -> None:
        self.api.change_batch_job(batch_job_id, state=state, status_info=status_info)

    # runs

    def acquire(self, count: int) -> list[int]:
        """Begin up to `count` waiting jobs, the oldest first, and return their ids."""
        with self.api.lock:
            waiting = [
                row["id"]
                for row in self.api.jobs.values()
                if row["state"] in WAITING
                and "search" in row["tags"]
                and self.api.apps[row["app_id"]]["site_id"] == self.id
            ]
            for job_id in waiting[:count]:
                if self.api.jobs[job_id]["state"] == "STAGED_IN":
                    self.api.change_job(job_id, state="PREPROCESSED")
                self.api.change_job(job_id, state="RUNNING")
                self.api.jobs[job_id]["session_id"] = 1
            return waiting[:count]

    def config(self, job_id: int) -> dict[str, Any]:
        return dict(schemas.deserialize(self.api.jobs[job_id]["serialized_parameters"]))

    def outcome(self, objective: float | None = 1.0, failure: str | None = None, **more: Any) -> Row:
        """Return an outcome in the words of `deephyper_balsam.node.worker`."""
        now = time.time()
        words = {"objective": objective, "failure": failure, "metadata": {}, "start": now - 0.5, "end": now}
        return {**words, "host": "node-1", **more}

    def deliver(self, job_id: int, objective: float | None = 1.0, failure: str | None = None, **more: Any) -> None:
        """Write the result into the job, as the run does when it ends; the job's state comes later."""
        with self.api.lock:
            data = self.api.jobs[job_id]["data"]
            self.api.change_job(job_id, data={**data, "result": self.outcome(objective, failure, **more)})

    def end_run(self, job_id: int, return_value: Any = None) -> None:
        """Let the states of a run that ended arrive."""
        packed = schemas.serialize(return_value) if return_value is not None else ""
        self.api.change_job(job_id, state="RUN_DONE")
        self.api.change_job(job_id, state="POSTPROCESSED", serialized_return_value=packed, serialized_exception="")

    def finish(self, job_id: int, objective: float | None = 1.0, failure: str | None = None, **more: Any) -> None:
        """End a run whose node reaches the API: result first, then the states."""
        self.deliver(job_id, objective, failure, **more)
        self.end_run(job_id, self.api.jobs[job_id]["data"]["result"])

    def finish_by_value(self, job_id: int, objective: float | None = 1.0, failure: str | None = None) -> None:
        """End a run whose node cannot reach the API: only Balsam's return value brings the result."""
        self.end_run(job_id, self.outcome(objective, failure))

    def finish_by_exception(self, job_id: int, error: Exception) -> None:
        """End a run whose application raised outside the run function, and that was finished all the same."""
        self.api.change_job(job_id, state="RUN_DONE")
        packed = schemas.serialize((error, None))
        self.api.change_job(job_id, state="POSTPROCESSED", serialized_return_value="", serialized_exception=packed)

    def crash(self, job_id: int, returncode: int = -9, error: str = "Killed") -> None:
        """End a run that left nothing, as the launcher and then the agent see it."""
        self.api.change_job(job_id, state="RUN_ERROR", state_data={"returncode": returncode, "error": error})
        self.api.change_job(job_id, state="FAILED")

    def time_out(self, job_id: int) -> None:
        """Cut a run by the end of its allocation; it waits for the next."""
        self.api.change_job(job_id, state="RUN_TIMEOUT")
        self.api.change_job(job_id, state="RESTART_READY")


class PlayingSite(threading.Thread):
    """A site that works by itself: starts allocations, runs as many jobs at once as they have nodes, ends them.

    `run` maps a configuration to an objective, or raises: then the trial failed with that reason.
    """

    def __init__(
        self, site: VirtualSite, run: Callable[[dict[str, Any]], float], step_s: float = 0.01, crash: bool = False
    ) -> None:
        super().__init__(daemon=True)
        self._site, self._function, self._step_s, self._crash = site, run, step_s, crash
        self._ended = threading.Event()
        self.most_at_once = 0

    def run(self) -> None:
        running: list[int] = []
        while not self._ended.wait(self._step_s):
            allocations = self._site.schedule()
            nodes = sum(self._site.api.batch_jobs[key]["num_nodes"] for key in allocations)
            if running:
                self._end(running.pop(0))
            running += self._site.acquire(nodes - len(running))
            self.most_at_once = max(self.most_at_once, len(running))

    def _end(self, job_id: int) -> None:
        try:
            objective = self._function(self._site.config(job_id))
        except Exception as error:
            if self._crash:
                self._site.crash(job_id, 1, str(error))
            else:
                self._site.finish(job_id, None, f"{type(error).__name__}: {error}")
        else:
            self._site.finish(job_id, objective)

    def close(self) -> None:
        self._ended.set()
        self.join()
