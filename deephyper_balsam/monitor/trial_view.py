"""Everything that is known of one trial: what `search show NAME TRIAL` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deephyper_balsam.common.objective import minimises, told
from deephyper_balsam.errors import InputError
from deephyper_balsam.node.supervise import readable_end
from deephyper_balsam.store import trial_data
from deephyper_balsam.store.cuts import read_cuts
from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.record import SearchRecord
from deephyper_balsam.store.trial_data import Outcome
from deephyper_balsam.store.trial_rows import (
    choose_one,
    read_config,
    read_outcome,
    read_state,
    read_trial,
    trial_tags,
)
from deephyper_balsam.trial import Origin, TrialState

_SHOWN_CHARS = 4000
_NEEDS = ("num_nodes", "ranks_per_node", "threads_per_rank", "threads_per_core", "gpus_per_rank")


def view_trial(gateway: Gateway, record: SearchRecord, number: int) -> dict[str, Any]:
    """Return one trial of a search, as JSON values; moments are seconds since the epoch.

    Raises
    ------
    InputError
        There is no such trial.
    """
    tags = {**trial_tags(record.name), "trial": str(number)}
    rows = list(gateway.jobs(tags))
    if not rows:
        count = gateway.count_jobs(trial_tags(record.name))
        raise InputError(
            f"The search {record.name!r} has no trial {number}; it has {count} so far, and their numbers begin with 0."
        )
    row = choose_one(rows)
    state = read_state(row)
    outcome = read_outcome(row) if state in (TrialState.DONE, TrialState.FAILED) else Outcome()
    asked = trial_data.asked(row)
    site, folder = _place(gateway, row)
    start, end = outcome.get("start"), outcome.get("end")
    output, source = _output(folder, outcome)
    return {
        "name": record.name,
        "trial": number,
        "state": state.value,
        "configuration": read_config(row),
        **told(outcome.get("objective"), minimises(record.settings)),
        "failure": outcome.get("failure"),
        "traceback": outcome.get("traceback"),
        "metadata": outcome.get("metadata") or {},
        "origin": {key: asked.get(key) for key in ("kind", "told", "model")},
        "asked_from": _said_of(read_trial(row).origin),
        "asked_at": asked.get("at"),
        "started_at": start,
        "ended_at": end,
        "gathered_at": trial_data.gathered_at(row),
        "waited_s": _between(asked.get("at"), start),
        "ran_s": _between(start, end),
        "eval_timeout_s": trial_data.eval_timeout_s(row),
        "curve": [list(point) for point in trial_data.curve(row)],
        "decisions": trial_data.rungs(row),
        "stopped": bool(outcome.get("stopped")),
        "site": site,
        "host": outcome.get("host"),
        "resources": {key: row.get(key) for key in _NEEDS},
        "balsam_job_id": row["id"],
        "batch_job_id": row.get("batch_job_id"),
        "balsam_state": row["state"],
        "tries": trial_data.earlier_tries(row),
        "cuts": _cuts(gateway, row),
        "moved_from": trial_data.moved_from(row),
        "other_jobs": [other["id"] for other in gateway.jobs({"set_aside": record.name, "trial": str(number)})],
        "folder": folder,
        "output": output,
        "output_from": source,
    }


def _said_of(origin: Origin) -> str:
    kinds = {
        "start": "a starting point of the problem",
        "initial": "the initial design",
        "random": "drawn at random",
        "genetic": "the genetic algorithm",
        "user": "added by hand",
    }
    if origin.kind == "model":
        return f"suggested by the model, which had learnt {origin.model} results of {origin.told} known"
    return f"{kinds.get(origin.kind, origin.kind)}, when {origin.told} results were known"


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else round(max(0.0, end - begin), 3)


def _place(gateway: Gateway, row: Row) -> tuple[str | None, str | None]:
    app = next((app for app in gateway.apps() if app["id"] == row["app_id"]), None)
    site = next((site for site in gateway.sites() if app is not None and site["id"] == app["site_id"]), None)
    return (None, None) if site is None else (site["name"], f"{site['path']}/data/{row['workdir']}")


def _cuts(gateway: Gateway, row: Row) -> list[dict[str, Any]]:
    """Return when and why runs of the trial were cut, by the end of an allocation or the death of a launcher."""
    return [
        {"at": parse_time(event["timestamp"]), "why": event["data"].get("message") or "the end of its allocation"}
        for event in read_cuts(gateway, [row["id"]])
    ]


def _output(folder: str | None, outcome: Outcome) -> tuple[str | None, str | None]:
    """Return the end of what the run printed: from its folder, else from what it left in Balsam."""
    text = None if folder is None else readable_end(Path(folder) / "job.out", _SHOWN_CHARS)
    if text is not None:
        return text, "folder"
    kept = outcome.get("output")
    return (kept, "balsam") if kept else (None, None)
