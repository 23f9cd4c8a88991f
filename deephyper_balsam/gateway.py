"""The few calls of Balsam's API that a search needs, in our words and errors. The only importer of Balsam's client.

Balsam's own client retries a refused request for minutes and builds a model of every row. The gateway makes one
attempt, raises an error that says whether trying again can help, and hands out rows as plain dicts. Who must be patient
waits itself (`deephyper_balsam.search`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from deephyper_balsam.errors import BalsamError, InputError, NotLoggedInError, UnknownSiteError, UnreachableError

Row = dict[str, Any]
"""One row of Balsam's API as JSON gives it: a job, a site, an application, a BatchJob."""

WAITING_STATES = ("CREATED", "AWAITING_PARENTS", "READY", "STAGED_IN", "PREPROCESSED", "RESTART_READY")
"""Job states in which no node has begun."""

_CONNECT_TIMEOUT_S = 6.0
_READ_TIMEOUT_S = 30.0
_HURRIED_TIMEOUT_S = 5.0
_JSON_HEADERS = {"Content-Type": "application/json"}
_PLAIN = (str, int, float, bool, type(None))
_PAGE_ROWS = 5000
_BULK_ROWS = 1000
_IDS_A_CALL = 200


class Gateway:
    """Balsam's API for one account.

    Raises, from every method
    -------------------------
    UnreachableError
        The API does not answer, or answers 5xx: try again.
    NotLoggedInError
        The login is missing or expired: `balsam login`, then `reconnect()`.
    BalsamError
        The API refused the request; the message is its own.
    """

    def __init__(self, client_path: str | Path | None = None) -> None:
        """Use the credentials in `client_path`; by default ``BALSAM_CLIENT_PATH``, else ``~/.balsam/client.yml``."""
        named = client_path or os.environ.get("BALSAM_CLIENT_PATH") or Path.home() / ".balsam" / "client.yml"
        self.client_path = Path(named)
        self._read_timeout_s = _READ_TIMEOUT_S
        self._ahead_s = 0.0
        self.reconnect()

    def now(self) -> float:
        """Seconds since the epoch by the server's clock, as far as its last answer told it; within a second or two."""
        return time.time() + self._ahead_s

    def hurry(self) -> None:
        """Wait only a few seconds for each answer from now on: this process is about to end."""
        self._read_timeout_s = _HURRIED_TIMEOUT_S

    def reconnect(self) -> None:
        """Read the credentials again, after a login."""
        import yaml
        from balsam.config import ClientSettings

        try:
            settings = yaml.safe_load(self.client_path.read_text())
            self._client = ClientSettings(**settings).build_client()
        except FileNotFoundError:
            raise NotLoggedInError(
                f"Not logged in to Balsam: there are no credentials at {self.client_path}. Run `balsam login`, or "
                "start a local server with `deephyper-balsam server up` and set BALSAM_CLIENT_PATH as it says."
            ) from None
        except (OSError, TypeError, ValueError, ImportError, yaml.YAMLError) as error:
            raise NotLoggedInError(f"The credentials at {self.client_path} cannot be read: {error}") from error

    # --- one request ---------------------------------------------------------------------------------------------

    def _call(self, method: str, path: str, params: Mapping[str, Any] | None = None, body: Any = None) -> Any:
        import orjson
        import requests

        if not self._client._authenticated:
            raise NotLoggedInError(f"The Balsam login in {self.client_path} has expired. Run `balsam login`.")
        root = self._client.api_root.rstrip("/")
        try:
            response = self._client.session.request(
                method,
                f"{root}/{path}",
                params=params,
                data=None if body is None else _json(body),
                headers=None if body is None else _JSON_HEADERS,
                timeout=(_CONNECT_TIMEOUT_S, self._read_timeout_s),
            )
        except requests.RequestException as error:
            raise UnreachableError(f"Balsam does not answer at {root}: {_cause(error)}") from error
        with contextlib.suppress(KeyError, TypeError, ValueError):  # a proxy may leave the date out
            self._ahead_s = parsedate_to_datetime(response.headers["Date"]).timestamp() + 0.5 - time.time()
        if response.status_code < 400:
            try:
                return orjson.loads(response.content) if response.content else None
            except ValueError as error:
                raise BalsamError(
                    f"{method} {root}/{path} answered no JSON but {response.text[:60]!r}: is this Balsam's API? "
                    f"The address stands in {self.client_path}."
                ) from error
        said = f"{method} {root}/{path} answered {response.status_code} {response.reason}: {response.text[:500]}"
        if response.status_code == 401:
            raise NotLoggedInError(
                f"Balsam does not accept the login in {self.client_path}. Run `balsam login`. ({said})"
            )
        if response.status_code >= 500:
            raise UnreachableError(said)
        raise BalsamError(said)

    def _pages(self, path: str, params: Mapping[str, Any]) -> Iterator[Row]:
        def read(offset: int) -> list[Row]:
            rows: list[Row] = self._call("GET", path, {**params, "limit": _PAGE_ROWS, "offset": offset})["results"]
            return rows

        page, offset = read(0), 0
        with ThreadPoolExecutor(1) as ahead:  # the server makes the next page while this one is worked on
            while len(page) == _PAGE_ROWS:
                offset += _PAGE_ROWS
                following = ahead.submit(read, offset)
                yield from page
                page = following.result()
        yield from page

    def _pages_of(self, path: str, params: Mapping[str, Any], key: str, ids: Sequence[int]) -> Iterator[Row]:
        """Yield the rows of many ids, which would not all fit into one address."""
        for batch in _batches(ids, _IDS_A_CALL):
            yield from self._pages(path, {**params, key: list(batch)})

    # --- sites and applications ----------------------------------------------------------------------------------

    def sites(self) -> list[Row]:
        """Every site of the account."""
        return list(self._pages("sites/", {}))

    def site(self, name: str) -> Row:
        """Return the site `name`; UnknownSiteError names those there are."""
        sites = self.sites()
        for site in sites:
            if site["name"] == name or str(site["id"]) == name:
                return site
        known = ", ".join(sorted(site["name"] for site in sites)) or "none"
        raise UnknownSiteError(
            f"There is no Balsam site {name!r}; the sites of this account are: {known}. "
            "Make one with `deephyper-balsam site init`."
        )

    def create_site(self, name: str, path: str) -> int:
        """Make a site known; its id."""
        return int(self._call("POST", "sites/", body={"name": name, "path": path})["id"])

    def move_site(self, site_id: int, path: str) -> None:
        """Say that a site's folder is elsewhere now."""
        self._call("PUT", f"sites/{site_id}", body={"path": path})

    def delete_site(self, site_id: int) -> None:
        """Forget a site, with its applications and jobs."""
        self._call("DELETE", f"sites/{site_id}")

    def apps(self, site_id: int | None = None, name: str | None = None) -> list[Row]:
        """Return the applications at a site, or everywhere."""
        return list(self._pages("apps/", _given(site_id=site_id, name=name)))

    def create_app(self, app: Mapping[str, Any]) -> Row:
        """Register an application."""
        row: Row = self._call("POST", "apps/", body=app)
        return row

    def update_app(self, app_id: int, app: Mapping[str, Any]) -> None:
        """Replace an application's definition."""
        self._call("PUT", f"apps/{app_id}", body=app)

    # --- jobs ----------------------------------------------------------------------------------------------------

    def create_jobs(self, jobs: Sequence[Mapping[str, Any]]) -> list[int]:
        """Create the jobs in batches and return their ids, in the order given. Their workdirs must differ."""
        ids: list[int] = []
        for batch in _batches(jobs, _BULK_ROWS):
            rows = self._call("POST", "jobs/", body=batch)
            by_workdir = {row["workdir"]: row["id"] for row in rows}
            ids.extend(by_workdir[job["workdir"]] for job in batch)
        return ids

    def jobs(
        self,
        tags: Mapping[str, str],
        changed_since: str | None = None,
        states: Sequence[str] | None = None,
        ids: Sequence[int] | None = None,
        changed_until: str | None = None,
    ) -> Iterator[Row]:
        """Jobs that carry all `tags`, as raw rows, in the order of their ids.

        Parameters
        ----------
        changed_since, changed_until
            Only jobs whose `last_update` is not before this time, or not after it, in the server's own words.
        ids
            Only these, however many; each request takes some of them, and their order holds within it.
        """
        query = _job_query(tags, changed_since, changed_until, states)
        if ids is None:
            return self._pages("jobs/", query)
        return self._pages_of("jobs/", query, "id", ids)

    def count_jobs(
        self, tags: Mapping[str, str], states: Sequence[str] | None = None, changed_until: str | None = None
    ) -> int:
        """How many jobs there are; see `jobs`."""
        query = _job_query(tags, None, changed_until, states)
        return int(self._call("GET", "jobs/", {**query, "limit": 1})["count"])

    def write_data(self, data_by_id: Mapping[int, Mapping[str, Any]]) -> None:
        """Replace the `data` of jobs. One kind of change a call: Balsam applies the first row's columns to all."""
        changes = [{"id": job_id, "data": data} for job_id, data in data_by_id.items()]
        for batch in _batches(changes, _BULK_ROWS):
            self._call("PATCH", "jobs/", body=batch)

    def retag_jobs(self, changes: Mapping[int, tuple[Mapping[str, str], Mapping[str, Any]]]) -> None:
        """Replace the tags and the `data` of jobs: id -> (tags, data)."""
        rows = [{"id": job_id, "tags": tags, "data": data} for job_id, (tags, data) in changes.items()]
        for batch in _batches(rows, _BULK_ROWS):
            self._call("PATCH", "jobs/", body=batch)

    def restart_jobs(self, data_by_id: Mapping[int, Mapping[str, Any]], message: str) -> None:
        """Give jobs in a final state back to the launchers, with new `data` and without what Balsam kept of the run.

        In one request a batch: a driver that dies in between must not leave one without the other. Each row changes the
        same columns (see `write_data`), so none of the jobs may be RESTART_READY already.
        """
        changes = [
            {
                "id": job_id,
                "state": "RESTART_READY",
                "state_data": {"message": message},
                "data": data,
                "serialized_return_value": "",
                "serialized_exception": "",
            }
            for job_id, data in data_by_id.items()
        ]
        for batch in _batches(changes, _BULK_ROWS):
            self._call("PATCH", "jobs/", body=batch)

    def limit_jobs(self, ids: Sequence[int], wall_time_min: int) -> None:
        """Say how many minutes a launcher must have left to start these jobs."""
        changes = [{"id": job_id, "wall_time_min": wall_time_min} for job_id in ids]
        for batch in _batches(changes, _BULK_ROWS):
            self._call("PATCH", "jobs/", body=batch)

    def move_jobs(
        self, tags: Mapping[str, str], from_states: Sequence[str], to_state: str, message: str, ids: Sequence[int] = ()
    ) -> int:
        """Move the jobs that are in one of `from_states` to `to_state`, and no others; how many there were."""
        moved = 0
        for batch in _batches(ids, _IDS_A_CALL) if ids else [[]]:
            query = {"tags": [f"{key}:{value}" for key, value in tags.items()], "state": list(from_states)}
            change = {"state": to_state, "state_data": {"message": message}}
            moved += int(self._call("PUT", "jobs/", {**query, **_given(id=list(batch) or None)}, change))
        return moved

    def events(self, job_ids: Sequence[int] | None = None, **query: Any) -> Iterator[Row]:
        """Events of Balsam's log (`tags`, `to_state`, `timestamp_after` ...); those of one job oldest first.

        Parameters
        ----------
        job_ids
            Only of these jobs, however many.
        """
        query = {"ordering": "timestamp", **query}
        if job_ids is None:
            return self._pages("events/", query)
        return self._pages_of("events/", query, "job_id", job_ids)

    # --- allocations ---------------------------------------------------------------------------------------------

    def batch_jobs(self, site_ids: Iterable[int], states: Sequence[str] | None = None) -> list[Row]:
        """Return the BatchJobs of the sites."""
        return list(self._pages("batch-jobs/", {"site_id": list(site_ids), **_given(state=states)}))

    def create_batch_job(self, batch_job: Mapping[str, Any]) -> Row:
        """Ask a site for an allocation."""
        row: Row = self._call("POST", "batch-jobs/", body=batch_job)
        return row

    def adopt_batch_job(self, batch_job_id: int, scheduler_id: int, start_time: str) -> None:
        """Say that a BatchJob is the allocation with this scheduler's id, which runs already."""
        row = {"id": batch_job_id, "scheduler_id": scheduler_id, "state": "running", "start_time": start_time}
        self._call("PATCH", "batch-jobs/", body=[{**row, "status_info": {}}])

    def finish_batch_job(self, batch_job_id: int, end_time: str) -> None:
        """Say that an allocation is over, without waiting for its site's agent to notice."""
        self._call("PATCH", "batch-jobs/", body=[{"id": batch_job_id, "state": "finished", "end_time": end_time}])

    def end_batch_job(self, batch_job_id: int) -> None:
        """Ask a site to end an allocation."""
        self._call("PATCH", "batch-jobs/", body=[{"id": batch_job_id, "state": "pending_deletion"}])

    # --- launchers -----------------------------------------------------------------------------------------------

    def sessions(self) -> list[Row]:
        """Return the sessions of the launchers and agents that hold jobs: `id`, `batch_job_id`, `heartbeat`."""
        return list(self._call("GET", "sessions/")["results"])

    def end_session(self, session_id: int) -> None:
        """Take a session from a launcher that died; what it was running becomes RUN_TIMEOUT. One that is gone is gone.

        Raises
        ------
        BalsamError
            When Balsam refuses.
        """
        try:
            self._call("DELETE", f"sessions/{session_id}")
        except BalsamError:
            if any(session["id"] == session_id for session in self.sessions()):
                raise


def parse_time(text: str) -> float:
    """Seconds since the epoch of a time of the API; a time without zone is UTC."""
    from datetime import timezone

    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def iso(moment: float) -> str:
    """Return seconds since the epoch as the API takes a time."""
    from datetime import timezone

    return datetime.fromtimestamp(moment, timezone.utc).isoformat()


def pack(value: Any) -> str:
    """Encode a job's parameters as Balsam does: base64 of what dill writes, which for plain values is a pickle."""
    if type(value) is dict and all(type(one) in _PLAIN for pair in value.items() for one in pair):
        return base64.b64encode(pickle.dumps(value)).decode()
    from balsam.schemas import serialize

    return str(serialize(value))


def unpack(text: str) -> Any:
    """Decode what Balsam encoded: parameters or a return value.

    Raises
    ------
    BalsamError
        When the text cannot be decoded here, for example because it holds a class this environment lacks.
    """
    with contextlib.suppress(Exception):  # what only dill can read, and what nobody can
        return pickle.loads(base64.b64decode(text))

    from balsam.schemas import DeserializeError, deserialize

    try:
        return deserialize(text)
    except (DeserializeError, ValueError) as error:
        raise BalsamError(f"A value from Balsam cannot be decoded here: {error}") from error


def check_name(name: str) -> str:
    """Return `name` if it can name a search.

    Raises
    ------
    InputError
        The name becomes a tag and a folder, so it may hold letters, digits, ``.``, ``_`` and ``-``.
    """
    allowed = name.replace("-", "").replace("_", "").replace(".", "")
    if not (0 < len(name) <= 64 and allowed.isascii() and allowed.isalnum() and name[0].isalnum()):
        raise InputError(
            f"{name!r} cannot name a search: 1 to 64 letters, digits, '.', '_' and '-' are allowed, "
            "the first a letter or digit."
        )
    return name


def _json(body: Any) -> bytes:
    import orjson
    from balsam.client.encoders import jsonable_encoder

    try:
        return orjson.dumps(body)
    except TypeError:  # numbers beyond 64 bits, enumerations, text that is no Unicode
        return json.dumps(jsonable_encoder(body), allow_nan=False).encode()


def _job_query(
    tags: Mapping[str, str], changed_since: str | None, changed_until: str | None, states: Sequence[str] | None
) -> dict[str, Any]:
    params = _given(last_update_after=changed_since, last_update_before=changed_until, state=states)
    return {"tags": [f"{key}:{value}" for key, value in tags.items()], **params}


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _batches(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _cause(error: BaseException) -> str:
    """Return the innermost words of a chain of connection errors; the outer ones repeat addresses of objects."""
    within = [getattr(error, "reason", None), *reversed(error.args)]
    inner = next((one for one in within if isinstance(one, BaseException)), None)
    if inner is not None:
        return _cause(inner)
    text = str(error)
    return text.rsplit(": ", 1)[-1] if "Connection" in text or "timed out" in text else text
