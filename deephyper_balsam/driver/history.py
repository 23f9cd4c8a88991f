"""What Balsam holds of a search that was begun before, read when a driver picks it up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deephyper_balsam.driver.driven_search import DrivenSearch
from deephyper_balsam.driver.session import SearchHistory
from deephyper_balsam.driver.trial_resources import TrialResources
from deephyper_balsam.errors import SearchExistsError
from deephyper_balsam.node.targets import code_version
from deephyper_balsam.store import trial_data, trial_rows
from deephyper_balsam.store.driver_requests import DriverRequest, effective_budget
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.lease import Lease
from deephyper_balsam.store.record import SearchRecord, check_same, find_records
from deephyper_balsam.trial import TrialState


def find_begun(gateway: Gateway, name: str, settings: Mapping[str, Any]) -> SearchRecord | None:
    """Return the record of a search that may go on with these settings; None if there is none of that name.

    Raises
    ------
    SearchExistsError
        The name belongs to a search with other settings, or to jobs that no search made.
    """
    for record in find_records(gateway, name):
        check_same(record, {key: value for key, value in settings.items() if (key, value) != ("seed", None)})
        return record
    if any(True for _ in gateway.jobs(trial_rows.trial_tags(name))):
        raise SearchExistsError(
            f"Jobs tagged search={name} are in this Balsam already, but were made by something else. "
            "Choose another name."
        )
    return None


def take_up(search: DrivenSearch, rows: Iterable[Row], needs: TrialResources, spec: Mapping[str, Any]) -> list[Row]:
    """Let all parts of a search know the jobs that there are.

    Parameters
    ----------
    search
        The search, opened just now.
    rows
        The jobs of its trials.
    needs
        What each evaluation gets.
    spec
        Of the run function as it is now.

    Returns
    -------
    list[Row]
        One job a trial.
    """
    rows = search.jobs.without_twins(list(rows))
    trial_rows.mend(search.gateway, search.name, rows)
    search.health.restore(rows)
    for row in rows:
        search.note(row)
        if not trial_rows.read_state(row).is_final:
            needs.note(row["num_nodes"], row["node_packing_count"])
            search.unended[trial_rows.trial_number(row)] = trial_rows.read_trial(row)
    gathered = trial_data.collected(rows)
    for row in gathered:
        search.versions.note(trial_rows.trial_number(row), trial_rows.read_outcome(row).get("code"))
    search.versions.note_now(code_version(spec))
    search.gathered.update(trial_rows.trial_number(row) for row in gathered)
    search.next_place = trial_data.position(gathered[-1]) + 1 if gathered else 0
    # What ended while no driver looked is collected like any other result
    search.changes.offer_again(row for row in rows if not trial_data.is_gathered(row))
    return rows


def make_history(
    record: SearchRecord, rows: Iterable[Row], leases: Iterable[Lease], requests: list[DriverRequest], own: int
) -> SearchHistory:
    """Return what the optimizer and the loop need to know of a search.

    Parameters
    ----------
    record
        Its settings.
    rows
        One job a trial.
    leases
        Its drivers, this one too.
    requests
        What people asked of it.
    own
        The id of this driver's lease.
    """
    rows = list(rows)
    drove = [lease for lease in leases if lease.driving_since is not None]
    max_evals, timeout_s = effective_budget(record.settings, drove, requests)
    return SearchHistory(
        settings=record.settings,
        trials=sorted((trial_rows.read_trial(row) for row in rows), key=lambda trial: trial.number),
        results=[
            trial_rows.read_result(trial_rows.trial_number(row), trial_rows.read_outcome(row))
            for row in trial_data.collected(rows)
        ],
        withdrawn=[trial_rows.trial_number(row) for row in rows if trial_rows.read_state(row) is TrialState.CANCELLED],
        requests=requests,
        max_evals=max_evals,
        timeout_s=timeout_s,
        drove_s=sum(lease.drove_s for lease in drove if lease.id != own),
    )
