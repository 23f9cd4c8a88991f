"""What a search keeps in Balsam beside its trials: notes, jobs of the application ``deephyper_search`` that never run.

A note carries the tags ``kind`` and ``record`` (the search's name), and says the rest in its `data`:

- ``kind=search``: the record, written once (`store.record`);
- ``kind=driver``: the lease of one driver, written by that driver alone (`store.lease`);
- ``kind=request``: what a person asked of the search, answered by whoever drives it (`store.driver_requests`);
- ``kind=standing``: how its runs stand at the rungs of its stopper (`driver.standing`);
- ``kind=snapshot``: copies of finished trials (`store.snapshots`). They are large, and few ask for them: the
  search's name stands in the tag ``snapshot`` instead.

Balsam replaces the `data` of a job whole and has no compare-and-swap, so that two writers of one job would lose each
other's words: hence one note for each thing that is said, and one writer for each note.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from deephyper_balsam.errors import BalsamError, NewerVersionError
from deephyper_balsam.store.encoding import pack
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.schema import STAMP, check_schema

logger = logging.getLogger(__name__)

APP = "deephyper_search"


def write_note(
    gateway: Gateway, site_id: int, search: str, kind: str, data: Mapping[str, Any], *, tag: str = "record"
) -> int:
    """Write a note of a search; its id. It is there, for every reader, when this returns."""
    job = {
        "app_id": _app(gateway, site_id),
        "workdir": f"{search}/{kind}-{secrets.token_hex(4)}" if kind != "search" else f"{search}/record",
        "tags": {"kind": kind, tag: search},
        "serialized_parameters": pack({}),
        "data": {**STAMP, **data},
    }
    [job_id] = gateway.create_jobs([job])
    # Not left to the site's agent: a site whose agent is down must not hold a job that looks like work
    gateway.move_jobs({tag: search}, ("STAGED_IN",), "JOB_FINISHED", f"a note of the search: {kind}", [job_id])
    return job_id


def read_notes(
    gateway: Gateway, search: str | None = None, kind: str | None = None, changed_since: str | None = None
) -> Iterator[Row]:
    """Return the notes of a search, the oldest first.

    Parameters
    ----------
    gateway
        Balsam's API.
    search
        Its name; None: of all searches. Those of a later program are left out then, with a warning: what one search
        has is no reason to refuse the others.
    kind
        Only notes of this kind.
    changed_since
        Only notes that changed since this time, in the server's own words.

    Raises
    ------
    NewerVersionError
        A later program wrote a note of the search.
    """
    tags = {key: value for key, value in (("kind", kind), ("record", search)) if value is not None}
    for row in gateway.jobs(tags, changed_since=changed_since):
        try:
            check_schema(row)
        except NewerVersionError as error:
            if search is not None:
                raise
            logger.warning("%s", error)
        else:
            yield row


def _app(gateway: Gateway, site_id: int) -> int:
    from balsam._api.app import ApplicationDefinition
    from balsam.schemas import serialize

    for row in gateway.apps(site_id, name=APP):
        return int(row["id"])

    class Note(ApplicationDefinition):  # type: ignore[misc]
        site = site_id

        def preprocess(self) -> None:
            from deephyper_balsam.node.worker import even_update

            # Balsam makes JOB_FINISHED of it. Said outright it would be no change where `write_note` was first, and
            # an update without a new state takes the state from all the others in its request.
            even_update(self.job, "POSTPROCESSED")

        def run(self) -> None:
            return None

    Note.__name__ = APP
    definition = {
        "site_id": site_id,
        "name": APP,
        "serialized_class": serialize(Note),
        "source_code": "",
        "description": "What searches keep beside their trials; its jobs never run.",
        "parameters": {},
        "transfers": {},
    }
    try:
        return int(gateway.create_app(definition)["id"])
    except BalsamError:  # another process made it in the same moment
        for row in gateway.apps(site_id, name=APP):
            return int(row["id"])
        raise
