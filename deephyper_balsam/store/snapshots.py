"""The finished trials of a long search, copied into a few notes, so that reading all of them takes seconds.

Balsam hands out jobs one by one, with all their columns: a hundred thousand take ten seconds and more. The driver
copies those that will not change any more, some thousand a note (`store.notes`, kind ``snapshot``):

- ``rows``: the jobs as JSON, compressed, in base64, without the columns that nobody needs of a finished trial;
- ``until``: every finished trial that was changed last before this moment, by the server's clock, is in this note or an
  earlier one.

The jobs stay what counts. Whoever reads asks for those that changed since, and for how many finished before: when the
notes hold another number, or cannot be read, they are ignored and all jobs are read.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import logging
import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypedDict, cast

from deephyper_balsam.store import trial_data
from deephyper_balsam.store.encoding import iso, parse_time
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.notes import write_note
from deephyper_balsam.store.schema import check_schema
from deephyper_balsam.store.trial_rows import FINAL_STATES, NOT_FINAL_STATES, is_trial, trial_tags, updated_at

logger = logging.getLogger(__name__)

KIND = "snapshot"
_ROWS_A_NOTE = 2000
_EVERY_ROWS = 1000
_INSTANT_S = 1e-6  # the server keeps no shorter time
_SETTLED_S = 60.0  # a commit may land so much later than the time that it carries
_LEFT_OUT = ("serialized_return_value", "serialized_exception", "launch_params", "parent_ids", "return_code")


class SnapshotData(TypedDict):
    """The `data` of a snapshot note, beside what `store.schema` stamps on it."""

    rows: str
    until: str


@dataclass(frozen=True)
class TrialSnapshot:
    """All jobs of a search's trials at one moment.

    Attributes
    ----------
    rows
        In the order of their ids.
    until
        Finished trials that were changed last before this moment came from the notes; None: there are none.
    sound
        Whether the notes, if there are any, hold what Balsam does.
    """

    rows: list[Row]
    until: str | None = None
    sound: bool = True


@contextlib.contextmanager
def many_made() -> Iterator[None]:
    """Let Python's garbage collector rest: the block makes hundreds of thousands of objects, and all of them stay.

    Looking for those that do not would take a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def read_rows(gateway: Gateway, search: str) -> list[Row]:
    """Return all jobs of a search's trials, in the order of their ids."""
    return read_snapshot(gateway, search).rows


def read_snapshot(gateway: Gateway, search: str) -> TrialSnapshot:
    """Read all jobs of a search's trials, those that finished long ago from the snapshot notes."""
    with many_made():
        found = _read_snapshot(gateway, search)
        if not all(map(is_trial, found.rows)):
            found = replace(found, rows=list(filter(is_trial, found.rows)))
        for row in found.rows:
            check_schema(row)
        return found


def _read_snapshot(gateway: Gateway, search: str) -> TrialSnapshot:
    tags = trial_tags(search)
    try:
        rows, until = _read_notes(gateway, search)
    except (KeyError, ValueError, zlib.error) as error:
        logger.warning("The snapshot of %s cannot be read (%s): all jobs are", search, error)
        return TrialSnapshot(list(gateway.jobs(tags)), sound=False)
    if until is None:
        return TrialSnapshot(list(gateway.jobs(tags)))
    for found in (gateway.jobs(tags, states=NOT_FINAL_STATES), gateway.jobs(tags, changed_since=until)):
        rows.update((row["id"], row) for row in found)
    limit = parse_time(until)
    finished = sum(row["state"] in FINAL_STATES and updated_at(row) <= limit for row in rows.values())
    if finished != gateway.count_jobs(tags, states=FINAL_STATES, changed_until=until):
        logger.warning("The snapshot of %s in its notes does not hold what Balsam does: all jobs are read", search)
        return TrialSnapshot(list(gateway.jobs(tags)), sound=False)
    return TrialSnapshot([rows[job_id] for job_id in sorted(rows)], until)


def _read_notes(gateway: Gateway, search: str) -> tuple[dict[int, Row], str | None]:
    """Return the copied jobs by id, and until when they are complete; None: there are no notes."""
    import orjson

    rows: dict[int, Row] = {}
    until = None
    for note in gateway.jobs({"kind": KIND, KIND: search}):
        check_schema(note)
        data = cast(SnapshotData, note["data"])
        found = orjson.loads(zlib.decompress(base64.b64decode(data["rows"])))
        rows.update((row["id"], row) for row in found)
        until = max(until or "", data["until"])
    return rows, until


class SnapshotWriter:
    """Writes the snapshot notes of a search while it is driven, one at a time, when there is enough for one.

    Parameters
    ----------
    site_id
        Where the notes are kept.
    snapshot
        The search as it is taken up.

    Attributes
    ----------
    site_id
        As given.
    """

    def __init__(self, gateway: Gateway, search: str, site_id: int, snapshot: TrialSnapshot) -> None:
        self._gateway, self._search, self.site_id = gateway, search, site_id
        self._until = snapshot.until
        self._notes: deque[tuple[str, str]] = deque()  # what is to be written: jobs, packed, and until when it is all
        self._due_at: float = _EVERY_ROWS
        if not snapshot.sound:
            self._due_at = math.inf
        else:
            since = -math.inf if self._until is None else parse_time(self._until)
            self._plan([row for row in snapshot.rows if row["state"] in FINAL_STATES and updated_at(row) >= since])

    @property
    def busy(self) -> bool:
        """Whether notes are to be written."""
        return bool(self._notes)

    def look(self, gathered: int) -> None:
        """Write a note, if there is something for one; the search has taken in so many results by now."""
        if not self._notes and gathered >= self._due_at:
            tags, settled = trial_tags(self._search), iso(self._settled_at)
            found = self._gateway.jobs(tags, states=FINAL_STATES, changed_since=self._until, changed_until=settled)
            self._plan(list(found))
            self._due_at = gathered + _EVERY_ROWS
        if self._notes:
            packed, until = self._notes[0]
            data: SnapshotData = {"rows": packed, "until": until}
            write_note(self._gateway, self.site_id, self._search, KIND, data, tag=KIND)
            self._until = until
            self._notes.popleft()

    @property
    def _settled_at(self) -> float:
        return self._gateway.now() - _SETTLED_S

    def _plan(self, finished: list[Row]) -> None:
        """Share what will not change any more among notes, the oldest first."""
        open_at = min((updated_at(row) for row in finished if not _is_over(row)), default=math.inf)
        until = min(self._settled_at, open_at - _INSTANT_S)  # what is open is final to Balsam, and not yet to us
        rows = sorted((row for row in finished if updated_at(row) <= until), key=updated_at)
        if len(rows) < _EVERY_ROWS:
            return
        for start in range(0, len(rows), _ROWS_A_NOTE):
            part, rest = rows[start : start + _ROWS_A_NOTE], rows[start + _ROWS_A_NOTE :]
            all_until = min(updated_at(part[-1]), updated_at(rest[0]) - _INSTANT_S) if rest else until
            self._notes.append((_packed(part), iso(all_until)))


def _is_over(row: Row) -> bool:
    return trial_data.is_settled(row)


def _packed(rows: Iterable[Row]) -> str:
    import orjson

    kept: list[dict[str, Any]] = [{key: value for key, value in row.items() if key not in _LEFT_OUT} for row in rows]
    return base64.b64encode(zlib.compress(orjson.dumps(kept))).decode()
