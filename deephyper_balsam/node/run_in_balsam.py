"""What a run says in its own job, and reads there, before it ends: how far it has come, and whether it goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from deephyper_balsam.common.loopback import go_direct
from deephyper_balsam.node.rungs import RungKeeper
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.stoppers import NEVER, Stopper


def stopping(app: Any, data: Mapping[str, Any]) -> tuple[Stopper, RungKeeper | None]:
    """Return the stopper of a trial's search, and who asks Balsam at its rungs.

    Parameters
    ----------
    app
        The ApplicationDefinition instance.
    data
        The job's data.
    """
    told = data.get("stopper")
    if told is None:
        return NEVER, None
    stopper, note = Stopper.from_dict(told["settings"]), told.get("note")
    if note is None:
        return stopper, None
    client = _quick_client(app)

    def read() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        go_direct(client)
        found = client.request("jobs/", "GET", params={"id": [app.job.id, note]})
        rows = {row["id"]: row["data"] for row in found["results"]}
        return rows[app.job.id], rows.get(note, {}).get("standing", {"rungs": {}})

    def write(changed: Mapping[str, Any]) -> None:
        client.request("jobs/", "PATCH", json=[{"id": app.job.id, "data": changed}])

    return stopper, RungKeeper(stopper, read, write)


def tell_progress(app: Any, data: dict[str, Any], job: RunningJob) -> dict[str, Any]:
    """Say in the job of a run that begins again how far it had come: one that gets on is not called too long.

    Parameters
    ----------
    app
        The ApplicationDefinition instance.
    data
        The job's data.
    job
        What the run function gets.

    Returns
    -------
    dict
        The job's data from now on.
    """
    last = job.recorder.curve.last
    if last is None:
        return data
    try:
        client = _quick_client(app)
        now = dict(data_now(client, app.job.id, data))
        now.update(progress=[*now.get("progress", ()), last[0]], curve=[list(one) for one in job.recorder.curve.points])
        client.request("jobs/", "PATCH", json=[{"id": app.job.id, "data": now}])
    except Exception as error:
        print(f"Balsam could not be told how far the run had come ({error}).")  # noqa: T201
        return data
    return now


def data_now(client: Any, job_id: int, before: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a job's data as Balsam has it, or as it was `before` where the answer is empty.

    Parameters
    ----------
    client
        Of Balsam's API.
    job_id
        The job.
    before
        Its data when it was read last.
    """
    row = client.get(f"jobs/{job_id}")
    data: Mapping[str, Any] = before if row is None else row["data"]
    return data


def _quick_client(app: Any) -> Any:
    """Return a client of Balsam's API of its own that tries once and waits for seconds: the run waits meanwhile."""
    client = copy.copy(app._client)
    client.close_session()
    client.retry_count, client.connect_timeout, client.read_timeout = -1, 2.0, 5.0
    go_direct(client)
    return client
