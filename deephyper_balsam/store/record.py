"""The record of a search in Balsam: what it is, written once, when it begins.

It is a note (`store.notes`) of the kind ``search``; its `data` holds ``settings`` and ``created_at``
(seconds since the epoch, the zero of the timestamps of the search). Who drives it, and what people ask of it meanwhile,
has notes of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from deephyper_balsam.common.objective import minimises
from deephyper_balsam.common.plain import plain
from deephyper_balsam.errors import InputError, SearchExistsError, UnknownSearchError
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.notes import read_notes, write_note


class Settings(TypedDict, total=False):
    """What a search is. Fields of a later program, which are not named here, are kept as they are.

    `problem` is `HpProblem.to_dict`, `run` the spec of `store.applications`, `site` the names of the sites with commas
    between them, `resources` what `TrialResources.recorded` says, `eval_timeout` and `timeout` seconds, `max_evals`
    and `timeout` the budget as first planned, `allocation` what `allocation_request.to_record` says, `asked_for` the
    words in which the search was asked for, `stopper` what `node.stoppers.parse_stopper` reads.
    """

    problem: dict[str, Any]
    method: str
    options: dict[str, Any]
    seed: int | None
    warm_start: list[Any]
    stopper: str
    run: dict[str, Any]
    site: str
    resources: dict[str, Any]
    eval_timeout: float | None
    num_workers: int
    max_evals: int | None
    timeout: float | None
    allocation: dict[str, Any] | None
    asked_for: dict[str, Any]


class RecordData(TypedDict):
    """The `data` of a search's record, beside what `store.schema` stamps on it."""

    settings: Settings
    created_at: float


@dataclass(frozen=True)
class SearchRecord:
    """The settings of a search as Balsam keeps them; `created_at` is the zero of its timestamps."""

    name: str
    job_id: int
    created_at: float
    settings: Settings

    @property
    def sites(self) -> list[str]:
        """The names of its sites."""
        return site_names(self.settings["site"])


def site_names(sites: str | Sequence[str]) -> list[str]:
    """Return the names of sites that are given as one name, several with commas between them, or a list.

    Raises
    ------
    InputError
        There is none, or one is named twice.
    """
    names = [name.strip() for name in (sites.split(",") if isinstance(sites, str) else sites)]
    if not names or not all(names) or len(set(names)) < len(names):
        raise InputError(f"Sites are one name, or several different ones with commas between them, but got {sites!r}.")
    return names


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


def find_record(gateway: Gateway, name: str) -> SearchRecord:
    """Return the record of a search; UnknownSearchError names those there are."""
    for record in find_records(gateway, name):
        return record
    known = ", ".join(record.name for record in find_records(gateway)) or "none"
    raise UnknownSearchError(f"There is no search {name!r} in this Balsam; there are: {known}.")


def find_records(gateway: Gateway, name: str | None = None) -> list[SearchRecord]:
    """Return the records of all searches, or of the one called `name`; the oldest first, one a name."""
    found: dict[str, SearchRecord] = {}
    for row in read_notes(gateway, name, "search"):
        data = cast(RecordData, row["data"])
        record = SearchRecord(row["tags"]["record"], row["id"], data["created_at"], data["settings"])
        found.setdefault(record.name, record)
    return list(found.values())


def create_record(
    gateway: Gateway, name: str, settings: dict[str, Any], site_id: int, created_at: float
) -> SearchRecord:
    """Write down the settings of a new search."""
    data: RecordData = {"settings": plain(settings), "created_at": created_at}
    job_id = write_note(gateway, site_id, name, "search", data)
    return SearchRecord(name, job_id, created_at, data["settings"])


def check_same(record: SearchRecord, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a search under other settings than it was begun with.

    Raises
    ------
    SearchExistsError
        The message names each setting that differs, or says which way the search was begun.
    """
    begun, now = minimises(record.settings), minimises({**record.settings, **settings})
    if begun != now:
        ways = {True: "minimise its objective", False: "maximise its objective"}
        raise SearchExistsError(
            f"The search {record.name!r} was begun to {ways[begun]}, and would now {ways[now]}: its trials do not fit. "
            f"To go on with it, {'minimise as before' if begun else 'leave out what makes it minimise'} "
            "(--minimize, `minimize` of the problem, `maximize: false` of a shell command); or choose another name."
        )
    recorded: Mapping[str, Any] = record.settings
    differing = [key for key, value in settings.items() if _plain(recorded.get(key)) != _plain(value)]
    if differing:
        was = {key: recorded.get(key) for key in differing if key not in ("problem", "warm_start")}
        raise SearchExistsError(
            f"The name {record.name!r} belongs to another search of this Balsam, with another {', '.join(differing)}"
            + (f" (there: {json.dumps(was)})" if was else "")
            + ". Choose another name, or use the settings of that search to go on with it."
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(plain(value)))
