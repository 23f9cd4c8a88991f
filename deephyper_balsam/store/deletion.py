"""Deletion of a search from Balsam: its trials first and its record last, so that one that was cut can be run again.

Whoever deletes holds the search as its driver (`store.lease`): nobody can begin to drive it meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import InputError
from deephyper_balsam.store import allocation_chain
from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.lease import LeaseKeeper
from deephyper_balsam.store.notes import read_notes
from deephyper_balsam.store.record import SearchRecord
from deephyper_balsam.store.snapshots import KIND
from deephyper_balsam.store.trial_rows import NOT_FINAL_STATES, trial_tags

_FIRST_CHUNK = 20
_LARGEST_CHUNK = 200
_QUICK_S, _SLOW_S = 0.5, 3.0
_SESSION_LIFE_S = 300.0  # balsam/server/models/crud/sessions.py, SESSION_EXPIRE_PERIOD
_SETTLE_S = 5.0  # an agent holds a job for a moment while it prepares it
_LOOK_S = 0.5
_NOT_SUBMITTED = "pending_submission"


@dataclass(frozen=True)
class Contents:
    """What Balsam holds of a search.

    Attributes
    ----------
    trials, set_aside, snapshots, notes
        How many jobs of each kind.
    unsubmitted, submitted
        Its BatchJobs that no scheduler knows yet, and those that wait or run.
    folders
        Where the files of its trials are: (site, folder).
    """

    trials: int
    set_aside: int
    snapshots: int
    notes: int
    unsubmitted: tuple[int, ...]
    submitted: tuple[int, ...]
    folders: tuple[tuple[str, str], ...]

    @property
    def jobs(self) -> int:
        """All jobs that are to be deleted."""
        return self.trials + self.set_aside + self.snapshots + self.notes


def contents(gateway: Gateway, record: SearchRecord) -> Contents:
    """Return what Balsam holds of a search.

    Raises
    ------
    InputError
        An allocation that runs carries its driver, which would begin the search anew.
    """
    name = record.name
    sites = gateway.sites()
    rows = [
        row
        for row in gateway.batch_jobs([site["id"] for site in sites], allocation_chain.ALIVE)
        if row["filter_tags"] == trial_tags(name) or row["optional_params"].get(allocation_chain.SEARCH) == name
    ]
    for row in rows:
        if row["state"] == "running" and row["optional_params"].get(allocation_chain.SEARCH) == name:
            raise InputError(
                f"BatchJob {row['id']} runs and carries the driver of {name!r}: stop the search first, with "
                f"`deephyper-balsam search stop {name}`."
            )
    return Contents(
        trials=gateway.count_jobs(trial_tags(name)),
        set_aside=gateway.count_jobs({"set_aside": name}),
        snapshots=gateway.count_jobs({KIND: name}),
        notes=gateway.count_jobs({"record": name}),
        unsubmitted=tuple(int(row["id"]) for row in rows if row["state"] == _NOT_SUBMITTED),
        submitted=tuple(int(row["id"]) for row in rows if row["state"] != _NOT_SUBMITTED),
        folders=tuple((site["name"], f"{site['path']}/data/{name}") for site in sites if site["name"] in record.sites),
    )


def delete_search(
    gateway: Gateway,
    record: SearchRecord,
    on_progress: Callable[[int], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Contents:
    """Delete a search; what there was of it.

    Parameters
    ----------
    gateway
        Balsam's API.
    record
        The record of the search.
    on_progress
        Called with how many jobs are gone so far.
    sleep
        Waits so many seconds.

    Raises
    ------
    SearchRunningError
        Somebody drives it.
    InputError
        Nodes work on its trials, or an allocation that runs carries its driver.
    BalsamError
        Balsam does not answer, or refuses: what is left can be deleted by another call.
    """
    found = contents(gateway, record)
    site_ids = {site["name"]: int(site["id"]) for site in gateway.sites()}
    home = next(site_ids[site] for site in record.sites if site in site_ids)
    keeper = LeaseKeeper.claim(gateway, record.name, home)
    try:
        _free(gateway, record.name, sleep)
        for batch_job_id in found.unsubmitted:
            gateway.delete_batch_job(batch_job_id)
        for batch_job_id in found.submitted:
            gateway.end_batch_job(batch_job_id)
        gone = 0
        for tags in (trial_tags(record.name), {"set_aside": record.name}, {KIND: record.name}):
            for count in _delete(gateway, tags, sleep):
                gone += count
                on_progress(gone)
                keeper.beat()
        notes = list(read_notes(gateway, record.name))
        first = [row["id"] for row in notes if row["tags"]["kind"] != "search" and row["id"] != keeper.lease.id]
        last = [row["id"] for row in notes if row["tags"]["kind"] == "search"]
        for ids in (first, last, [keeper.lease.id]):
            if ids:
                gateway.delete_jobs({"record": record.name}, ids)
                gone += len(ids)
        on_progress(gone)
    except BaseException:
        keeper.leave("deleted a part of the search")
        raise
    return found


def _free(gateway: Gateway, name: str, sleep: Callable[[float], None]) -> None:
    """Take the jobs of launchers that died from them; refuse to delete what a node works on."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        held = [
            row
            for tags in (trial_tags(name), {"set_aside": name})
            for row in gateway.jobs(tags, states=NOT_FINAL_STATES)
            if row.get("session_id")
        ]
        beats = {row["id"]: parse_time(str(row["heartbeat"])) for row in gateway.sessions()}
        live = [row for row in held if gateway.now() - beats.get(row["session_id"], 0.0) < _SESSION_LIFE_S]
        for session_id in sorted({row["session_id"] for row in held} - {row["session_id"] for row in live}):
            gateway.end_session(session_id)
        if not live:
            return
        if time.monotonic() > deadline:
            raise InputError(
                f"Launchers hold {counted(len(live), 'trial')} of {name!r} ({_some(live)}), and work on "
                "them: end them first with "
                f"`deephyper-balsam search stop {name} --now`, wait until they have ended, or end their allocation."
            )
        sleep(_LOOK_S)


def _some(rows: list[Row]) -> str:
    numbers = sorted(int(row["tags"]["trial"]) for row in rows)
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def _delete(gateway: Gateway, tags: Mapping[str, str], sleep: Callable[[float], None]) -> Iterator[int]:
    """Delete all jobs with these tags, so many at a time as the server does quickly; yield how many each time."""
    size = _FIRST_CHUNK
    while ids := [int(row["id"]) for row in gateway.first_jobs(tags, size)]:
        began = time.monotonic()
        gateway.delete_jobs(tags, ids)
        left = sum(1 for _ in gateway.jobs(tags, ids=ids))
        if left == len(ids):  # something took hold of them meanwhile
            _free(gateway, next(iter(tags.values())), sleep)
        yield len(ids) - left
        took_s = time.monotonic() - began
        size = min(2 * size, _LARGEST_CHUNK) if took_s < _QUICK_S else max(1, size // 2) if took_s > _SLOW_S else size


def said(found: Contents) -> str:
    """Return what there is of a search as a person reads it."""
    parts: list[tuple[int, Any]] = [
        (found.trials, "trials"),
        (found.set_aside, "jobs set aside"),
        (found.snapshots, "snapshots"),
        (found.notes, "notes"),
        (len(found.unsubmitted), "BatchJobs that were not submitted yet"),
    ]
    return ", ".join(f"{count} {what}" for count, what in parts if count) or "nothing"
