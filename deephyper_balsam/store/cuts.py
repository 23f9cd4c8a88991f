"""Runs that were cut, by the end of their allocation or the death of their launcher: read from Balsam's event log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deephyper_balsam.node.failure_policy import GIVEN_BACK
from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Gateway, Row

# Balsam's own launcher gives its session back before it says which runs it cut: the log then has each twice, the second
# time from another state
_CUT: dict[str, Any] = {"from_state": "RUNNING", "to_state": "RUN_TIMEOUT"}


def is_cut(event: Mapping[str, Any]) -> bool:
    """Return whether an event is the cut of a run; one that was given back for nobody's fault was not cut."""
    return all(event[key] == state for key, state in _CUT.items()) and event["data"].get("message") != GIVEN_BACK


def read_cuts(gateway: Gateway, job_ids: Sequence[int] | None = None, **query: Any) -> list[Row]:
    """Return the events in which runs were cut, of these jobs or as `Gateway.events` is asked."""
    return list(filter(is_cut, gateway.events(job_ids=job_ids, **query, **_CUT)))


def cut_after_s(events: Iterable[Row]) -> list[float]:
    """Return how long each run of one job had lasted when it was cut, by the job's events, oldest first."""
    began: float | None = None
    lasted = []
    for event in events:
        if event["to_state"] == "RUNNING":
            began = parse_time(event["timestamp"])
        elif began is not None:
            if is_cut(event):
                lasted.append(parse_time(event["timestamp"]) - began)
            began = None
    return lasted
