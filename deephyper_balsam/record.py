"""The record of a search in Balsam: its settings, and who drives it.

It is a job of the application ``deephyper_search`` that never runs, tagged ``kind=search`` and ``record=<name>``;
its `data` holds ``settings``, ``created_at`` (seconds since the epoch, the zero of the search's timestamps), ``driver``
(host, process and last sign of life) and ``stop_at`` (someone asked the driver to stop).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from deephyper_balsam.errors import SearchExistsError, SearchRunningError, UnknownSearchError
from deephyper_balsam.gateway import Gateway, pack

RECORD_APP = "deephyper_search"
HEARTBEAT_S = 5.0
GONE_AFTER_S = 60.0


@dataclass(frozen=True)
class SearchRecord:
    """The settings of a search as Balsam keeps them; `created_at` is the zero of its timestamps."""

    name: str
    job_id: int
    created_at: float
    settings: dict[str, Any]


def find_record(gateway: Gateway, name: str) -> SearchRecord:
    """Return the record of a search; UnknownSearchError names those there are."""
    for record in find_records(gateway, name):
        return record
    known = ", ".join(record.name for record in find_records(gateway)) or "none"
    raise UnknownSearchError(f"There is no search {name!r} in this Balsam; there are: {known}.")


def find_records(gateway: Gateway, name: str | None = None) -> list[SearchRecord]:
    """Return the records of all searches, or of the one called `name`; the oldest first."""
    tags = {"kind": "search"} if name is None else {"kind": "search", "record": name}
    return [
        SearchRecord(row["tags"]["record"], row["id"], row["data"]["created_at"], row["data"]["settings"])
        for row in gateway.jobs(tags)
    ]


def create_record(
    gateway: Gateway, name: str, settings: dict[str, Any], site_id: int, created_at: float
) -> SearchRecord:
    """Write down the settings of a new search."""
    data = {"settings": settings, "created_at": created_at}
    job = {
        "app_id": _record_app(gateway, site_id),
        "workdir": f"{name}/record",
        "tags": {"kind": "search", "record": name},
        "serialized_parameters": pack({}),
        "data": data,
    }
    [job_id] = gateway.create_jobs([job])
    # Not left to the site's agent: a site whose agent is down must not hold a job that looks like work
    gateway.move_jobs({"record": name}, ("STAGED_IN",), "JOB_FINISHED", "the record of a search", [job_id])
    return SearchRecord(name, job_id, created_at, settings)


def check_same(record: SearchRecord, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a search under other settings than it was begun with.

    Raises
    ------
    SearchExistsError
        The message names each setting that differs.
    """
    differing = [key for key, value in settings.items() if _plain(record.settings.get(key)) != _plain(value)]
    if differing:
        was = {key: record.settings.get(key) for key in differing if key != "problem"}
        raise SearchExistsError(
            f"The name {record.name!r} belongs to another search of this Balsam, with another {', '.join(differing)}"
            + (f" (there: {json.dumps(was)})" if was else "")
            + ". Choose another name, or use the settings of that search to go on with it."
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _record_app(gateway: Gateway, site_id: int) -> int:
    from balsam._api.app import ApplicationDefinition
    from balsam.schemas import serialize

    for row in gateway.apps(site_id, name=RECORD_APP):
        return int(row["id"])

    class Record(ApplicationDefinition):  # type: ignore[misc]
        site = site_id

        def preprocess(self) -> None:
            from deephyper_balsam.worker import even_update

            # Balsam makes JOB_FINISHED of it. Said outright it would be no change where `create_record` was first, and
            # an update without a new state takes the state from all the others in its request.
            even_update(self.job, "POSTPROCESSED")

        def run(self) -> None:
            return None

    Record.__name__ = RECORD_APP
    row = gateway.create_app(
        {
            "site_id": site_id,
            "name": RECORD_APP,
            "serialized_class": serialize(Record),
            "source_code": "",
            "description": "The settings of searches; its jobs never run.",
            "parameters": {},
            "transfers": {},
        }
    )
    return int(row["id"])


# --- who drives -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Driver:
    """The process that drives a search, as its record names it; `at` is its last sign of life."""

    host: str
    pid: int
    at: float

    @classmethod
    def here(cls, now: float) -> Driver:
        """Return this process."""
        return cls(socket.gethostname(), os.getpid(), now)

    def is_alive(self, now: float) -> bool:
        """Return whether it may still drive: it gave a sign lately, and is no process of this host that has ended."""
        if self.host == socket.gethostname() and not psutil.pid_exists(self.pid):
            return False
        return now - self.at < GONE_AFTER_S

    def is_same(self, other: Driver) -> bool:
        """Return whether both are one process."""
        return (self.host, self.pid) == (other.host, other.pid)


def _read_wheel(gateway: Gateway, name: str) -> tuple[int, dict[str, Any], Driver | None]:
    for row in gateway.jobs({"kind": "search", "record": name}):
        driver = row["data"].get("driver")
        return row["id"], row["data"], Driver(**driver) if driver else None
    raise UnknownSearchError(f"There is no search {name!r} in this Balsam any more.")


def read_driver(gateway: Gateway, name: str) -> Driver | None:
    """Return who drives the search, by its record."""
    return _read_wheel(gateway, name)[2]


def take_the_wheel(gateway: Gateway, name: str, driver: Driver) -> None:
    """Become the driver of a search.

    Raises
    ------
    SearchRunningError
        When another driver is at work.
    """
    job_id, data, other = _read_wheel(gateway, name)
    if other is not None and not other.is_same(driver) and other.is_alive(driver.at):
        raise SearchRunningError(
            f"The search {name!r} is being driven by process {other.pid} on {other.host} "
            f"(last sign of life {driver.at - other.at:.0f} s ago). "
            f"Stop it with `deephyper-balsam search stop {name}`, or wait {GONE_AFTER_S:.0f} s if it is dead."
        )
    data = {key: value for key, value in data.items() if key != "stop_at"}
    gateway.write_data({job_id: {**data, "driver": asdict(driver)}})


def beat(gateway: Gateway, name: str, driver: Driver, now: float) -> tuple[Driver, bool]:
    """Give a sign of life; the driver with its new time, and whether someone asked it to stop."""
    job_id, data, _ = _read_wheel(gateway, name)
    driver = Driver(driver.host, driver.pid, now)
    gateway.write_data({job_id: {**data, "driver": asdict(driver)}})
    return driver, "stop_at" in data


def leave_the_wheel(gateway: Gateway, name: str, driver: Driver) -> None:
    """Say that nobody drives the search any more."""
    job_id, data, other = _read_wheel(gateway, name)
    if other is not None and other.is_same(driver):
        gateway.write_data({job_id: {key: value for key, value in data.items() if key not in ("driver", "stop_at")}})


def ask_to_stop(gateway: Gateway, name: str, now: float) -> Driver | None:
    """Ask whoever drives the search to stop; who that is, or None if nobody does."""
    job_id, data, driver = _read_wheel(gateway, name)
    if driver is None or not driver.is_alive(now):
        return None
    if "stop_at" not in data:
        gateway.write_data({job_id: {**data, "stop_at": now}})
    return driver
