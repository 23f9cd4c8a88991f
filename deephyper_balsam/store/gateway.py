"""The few calls of Balsam's API that a search needs, in our words and errors. The only importer of Balsam's client.

Balsam's own client retries a refused request for minutes and builds a model of every row. The gateway makes one
attempt, raises an error that says whether trying again can help, and hands out rows as plain dicts. Who must be patient
waits itself (`driver.patience`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from deephyper_balsam.common.loopback import go_direct
from deephyper_balsam.common.wording import storable
from deephyper_balsam.errors import (
    BalsamError,
    InputError,
    NotLoggedInError,
    UnknownSiteError,
    UnreachableError,
)

Row = dict[str, Any]
"""One row of Balsam's API as JSON gives it: a job, a site, an application, a BatchJob."""

WAITING_STATES = ("CREATED", "AWAITING_PARENTS", "READY", "STAGED_IN", "PREPROCESSED", "RESTART_READY")
"""Job states in which no node has begun."""

_OUR_CLIENT = "deephyper_balsam.store.client.StackClient"
_CONNECT_TIMEOUT_S = 6.0
_READ_TIMEOUT_S = 30.0
_HURRIED_TIMEOUT_S = 5.0
_JSON_HEADERS = {"Content-Type": "application/json"}
_NUL = b"\\u0000"  # PostgreSQL has no place for it in text
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
        self.clock_ahead_s: float | None = None
        self.reconnect()

    def now(self) -> float:
        """Seconds since the epoch by the server's clock, as far as its last answer told it; within a second or two."""
        return time.time() + (self.clock_ahead_s or 0.0)

    def hurry(self, on: bool = True) -> None:
        """Wait only a few seconds for each answer from now on, for somebody waits for the end; or, off, as usual."""
        self._read_timeout_s = _HURRIED_TIMEOUT_S if on else _READ_TIMEOUT_S

    def reconnect(self) -> None:
        """Read the credentials again, after a login."""
        import yaml

        try:
            settings = yaml.safe_load(self.client_path.read_text())
            self._client: Any = _connection(dict(settings), self.client_path)
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
        go_direct(self._client)
        try:
            response = self._client.session.request(
                method,
                f"{root}/{path}",
                params=None if params is None else _sendable(params),
                data=None if body is None else _json(body),
                headers=None if body is None else _JSON_HEADERS,
                timeout=(_CONNECT_TIMEOUT_S, self._read_timeout_s),
            )
        except requests.RequestException as error:
            raise UnreachableError(f"Balsam does not answer at {root}: {_cause(error)}") from error
        with contextlib.suppress(KeyError, TypeError, ValueError):  # a proxy may leave the date out
            self.clock_ahead_s = parsedate_to_datetime(response.headers["Date"]).timestamp() + 0.5 - time.time()
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
                f"Balsam does not accept the login in {self.client_path}. Run `balsam login`; for a server of your "
                f"own, `deephyper-balsam server up` writes that file anew. ({said})"
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
        site = {"name": name, "path": path}
        _check_text("a site", site)
        return int(self._call("POST", "sites/", body=site)["id"])

    def move_site(self, site_id: int, path: str) -> None:
        """Say that a site's folder is elsewhere now."""
        _check_text("a site", {"path": path})
        self._call("PUT", f"sites/{site_id}", body={"path": path})

    def delete_site(self, site_id: int) -> None:
        """Forget a site, with its applications and jobs."""
        self._call("DELETE", f"sites/{site_id}")

    def apps(self, site_id: int | None = None, name: str | None = None) -> list[Row]:
        """Return the applications at a site, or everywhere."""
        return list(self._pages("apps/", _given(site_id=site_id, name=name)))

    def create_app(self, app: Mapping[str, Any]) -> Row:
        """Register an application."""
        _check_text("an application", app)
        row: Row = self._call("POST", "apps/", body=app)
        return row

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
        tags
            All of these.
        changed_since, changed_until
            Only jobs whose `last_update` is not before this time, or not after it, in the server's own words.
        states
            Only jobs in one of these states; None: in any.
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

    def first_jobs(self, tags: Mapping[str, str], limit: int) -> list[Row]:
        """Return the first `limit` jobs that carry all `tags`, in the order of their ids."""
        rows: list[Row] = self._call("GET", "jobs/", {**_job_query(tags, None, None, None), "limit": limit})["results"]
        return rows

    def delete_jobs(self, tags: Mapping[str, str], ids: Sequence[int]) -> None:
        """Delete these jobs, if they carry all `tags`. Balsam leaves out what a launcher or an agent holds."""
        for batch in _batches(ids, _IDS_A_CALL):  # without ids Balsam would delete every job of the account
            self._call("DELETE", "jobs/", {**_job_query(tags, None, None, None), "id": list(batch)})

    def write_data(self, data_by_id: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Replace the `data` of jobs, and return the ids of those that are gone.

        One kind of change a call: Balsam applies the first row's columns to all.
        """
        changes = [{"id": job_id, "data": data} for job_id, data in data_by_id.items()]
        return self._patch_jobs(changes)

    def _patch_jobs(self, changes: Sequence[Row]) -> set[int]:
        """Change jobs, all in the same columns; the ids of those that are gone.

        Balsam refuses a whole batch of which one is gone: that one is left out.
        """
        gone: set[int] = set()
        for batch in _batches(changes, _BULK_ROWS):
            try:
                self._call("PATCH", "jobs/", body=batch)
            except (UnreachableError, NotLoggedInError):
                raise
            except BalsamError:
                there = {row["id"] for row in self.jobs({}, ids=[row["id"] for row in batch])}
                left = [row for row in batch if row["id"] in there]
                if len(left) == len(batch):
                    raise
                gone.update(row["id"] for row in batch if row["id"] not in there)
                if left:
                    self._call("PATCH", "jobs/", body=left)
        return gone

    def retag_jobs(self, changes: Mapping[int, tuple[Mapping[str, str], Mapping[str, Any]]]) -> None:
        """Replace the tags and the `data` of jobs: id -> (tags, data)."""
        rows = [{"id": job_id, "tags": tags, "data": data} for job_id, (tags, data) in changes.items()]
        self._patch_jobs(rows)

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
        self._patch_jobs(changes)

    def limit_jobs(self, ids: Sequence[int], wall_time_min: int) -> None:
        """Say how many minutes a launcher must have left to start these jobs."""
        changes = [{"id": job_id, "wall_time_min": wall_time_min} for job_id in ids]
        self._patch_jobs(changes)

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
        **query
            What else Balsam's API filters by.
        """
        query = {"ordering": "timestamp", **query}
        if job_ids is None:
            return self._pages("events/", query)
        return self._pages_of("events/", query, "job_id", job_ids)

    # --- allocations ---------------------------------------------------------------------------------------------

    def batch_jobs(
        self, site_ids: Iterable[int], states: Sequence[str] | None = None, ids: Sequence[int] | None = None
    ) -> list[Row]:
        """Return the BatchJobs of the sites."""
        return list(self._pages("batch-jobs/", {"site_id": list(site_ids), **_given(state=states, id=ids)}))

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

    def delete_batch_job(self, batch_job_id: int) -> None:
        """Delete a BatchJob that no scheduler knows yet."""
        self._call("DELETE", f"batch-jobs/{batch_job_id}")

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


def _json(body: Any) -> bytes:
    """Return a body as JSON that Balsam's database can keep and its API can say.

    One text that is no UTF-8 is stored, and from then on every list that has its row is answered with 500.
    """
    import orjson
    from balsam.client.encoders import jsonable_encoder

    try:
        text = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        if _NUL not in text:
            return text
    except TypeError:  # numbers beyond 64 bits, enumerations, text that is no UTF-8
        pass
    try:
        return orjson.dumps(_sendable(jsonable_encoder(_sendable(body))), option=orjson.OPT_SERIALIZE_NUMPY)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"What was to be sent to Balsam cannot be written as JSON: {storable(str(error))}") from error


def _sendable(value: Any) -> Any:
    """Return a value with text escaped that Balsam cannot hold (see `targets.storable`), in lists and dicts too."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, Mapping):
        return {_sendable(key): _sendable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_sendable(one) for one in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"Balsam keeps whole numbers of 64 bits, but got {value}.")
    return value


def _check_text(what: str, row: Mapping[str, Any]) -> None:
    """Refuse text by which a site or a node finds something, and that would have to be escaped.

    Raises
    ------
    InputError
        It says which, escaped.
    """
    for field, value in row.items():
        if isinstance(value, str) and storable(value) != value:
            raise InputError(
                f"The {field} of {what} is no valid UTF-8: {storable(value)!r}. Balsam cannot keep it: rename the "
                "file or folder, or use a locale in UTF-8 (such as LC_ALL=C.UTF-8)."
            )


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
    told = getattr(error, "told", None)  # by a connection of ours
    if told is not None:
        return str(told)
    within = [getattr(error, "reason", None), *reversed(error.args)]
    inner = next((one for one in within if isinstance(one, BaseException)), None)
    if inner is not None:
        return _cause(inner)
    text = str(error)
    return text.rsplit(": ", 1)[-1] if "Connection" in text or "timed out" in text else text


def _connection(settings: dict[str, Any], path: Path) -> Any:
    """Return what speaks to the server of a credentials file; for a stack of ours nothing of Balsam is imported."""
    if settings.get("client_class") != _OUR_CLIENT:
        from balsam.config import ClientSettings

        return ClientSettings(**settings).build_client()
    from deephyper_balsam.store.connection import StackConnection

    del settings["client_class"]
    made = StackConnection(**settings)
    made.credentials_path = path  # where it saves a token that it renewed
    return made
