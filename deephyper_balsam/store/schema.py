"""The version of what a search keeps in Balsam, written into the `data` of each of its jobs and notes.

A later program may keep more, or mean something else by it. Fields that are only added need no new version: whoever
writes keeps the fields that it does not know. Rows without a version were made before there was one, and count as 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deephyper_balsam.common.version import __version__
from deephyper_balsam.errors import NewerVersionError
from deephyper_balsam.store.gateway import Row

SCHEMA = 1
STAMP: Mapping[str, Any] = {"schema": SCHEMA, "program": __version__}
"""What says in which version a job or a note was written, and by which program."""


def check_schema(row: Row) -> None:
    """Refuse a job or a note of a version that this program does not know.

    Parameters
    ----------
    row
        The job of a trial or of a note.

    Raises
    ------
    NewerVersionError
        The message says which program wrote it, and which one is needed.
    """
    written = row["data"].get("schema", SCHEMA)
    if written != SCHEMA:
        tags, program = row["tags"], row["data"].get("program")
        search = tags.get("search") or tags.get("record") or "?"
        by = f"deephyper-balsam {program}" if program else "a later deephyper-balsam"
        raise NewerVersionError(
            f"Job {row['id']} of the search {search!r} was written by {by}, in version {written} of its data; this is "
            f"deephyper-balsam {__version__}, which reads version {SCHEMA}. Nothing was changed: use that program, or "
            "a later one (pip install --upgrade deephyper-balsam)."
        )
