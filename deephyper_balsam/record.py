"""The record of a search in Balsam: what it is, written once, when it begins.

It is a note (`deephyper_balsam.notes`) of the kind ``search``; its `data` holds ``settings`` and ``created_at``
(seconds since the epoch, the zero of the timestamps of the search). Who drives it, and what people ask of it meanwhile,
has notes of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deephyper_balsam.errors import InputError, SearchExistsError, UnknownSearchError
from deephyper_balsam.gateway import Gateway
from deephyper_balsam.notes import read_notes, write_note


@dataclass(frozen=True)
class SearchRecord:
    """The settings of a search as Balsam keeps them; `created_at` is the zero of its timestamps."""

    name: str
    job_id: int
    created_at: float
    settings: dict[str, Any]

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
        data = row["data"]
        record = SearchRecord(row["tags"]["record"], row["id"], data["created_at"], data["settings"])
        found.setdefault(record.name, record)
    return list(found.values())


def create_record(
    gateway: Gateway, name: str, settings: dict[str, Any], site_id: int, created_at: float
) -> SearchRecord:
    """Write down the settings of a new search."""
    job_id = write_note(gateway, site_id, name, "search", {"settings": settings, "created_at": created_at})
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
        was = {key: record.settings.get(key) for key in differing if key not in ("problem", "warm_start")}
        raise SearchExistsError(
            f"The name {record.name!r} belongs to another search of this Balsam, with another {', '.join(differing)}"
            + (f" (there: {json.dumps(was)})" if was else "")
            + ". Choose another name, or use the settings of that search to go on with it."
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
