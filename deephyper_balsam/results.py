"""The table of a search: its columns, the best trial, and the files written from it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deephyper_balsam.errors import InputError
from deephyper_balsam.gateway import Gateway
from deephyper_balsam.jobs import table_row, trial_tags
from deephyper_balsam.record import SearchRecord

if TYPE_CHECKING:
    import pandas as pd

Line = dict[str, Any]

_FIXED = (
    "objective",
    "job_id",
    "job_status",
    "m:timestamp_submit",
    "m:timestamp_start",
    "m:timestamp_end",
    "m:timestamp_gather",
    "m:balsam_job_id",
    "m:site",
    "m:failure",
)


def read_lines(gateway: Gateway, record: SearchRecord) -> list[Line]:
    """Return the lines of a search's table, read from Balsam; ordered by trial number."""
    apps = {app["id"]: app["site_id"] for app in gateway.apps()}
    sites = {site["id"]: site["name"] for site in gateway.sites()}
    lines = [
        table_row(row, record.created_at, sites.get(apps.get(row["app_id"]), ""))
        for row in gateway.jobs(trial_tags(record.name))
    ]
    return sorted(lines, key=lambda line: int(line["job_id"]))


def columns(lines: Iterable[Mapping[str, Any]], hyperparameters: Iterable[str] = ()) -> list[str]:
    """Return the columns of the table: `p:` in the order of the problem, the fixed ones, then what metadata brought."""
    names: dict[str, None] = dict.fromkeys(f"p:{name}" for name in hyperparameters)
    extra: dict[str, None] = {}
    for line in lines:
        for key in line:
            if key.startswith("p:"):
                names.setdefault(key)
            elif key not in _FIXED:
                extra.setdefault(key)
    return [*names, *_FIXED, *extra]


def table(lines: list[Line], hyperparameters: Iterable[str] = ()) -> pd.DataFrame:
    """Return the table as a DataFrame: a row a trial, the columns of `results.csv`; empty cells are missing values."""
    import pandas as pd

    return pd.DataFrame(lines, columns=columns(lines, hyperparameters))


def legacy_table(lines: list[Line], hyperparameters: Iterable[str] = ()) -> pd.DataFrame:
    """Return the columns of the 2018 DeepHyper: bare names, `objective`, `elapsed_sec`; only trials that are done."""
    done = [line for line in lines if line["objective"] is not None]
    frame = table(done, hyperparameters)
    names = [name for name in frame.columns if name.startswith("p:")]
    legacy = frame[[*names, "objective", "m:timestamp_end"]].sort_values("m:timestamp_end")
    return legacy.rename(columns={**{name: name[2:] for name in names}, "m:timestamp_end": "elapsed_sec"})


def best(lines: Iterable[Line]) -> Line | None:
    """Return the line with the highest objective (the earliest of equals), or None if no trial has one."""
    done = [line for line in lines if line.get("objective") is not None]
    return max(done, key=lambda line: float(line["objective"]), default=None)


def configuration(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that a line stands for."""
    return {key[2:]: value for key, value in line.items() if key.startswith("p:") and value is not None}


def claim_folder(folder: Path) -> None:
    """Make the folder of a search and try to write into it, before anything is begun.

    Raises
    ------
    InputError
        When the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"The folder {folder} cannot be written: {error.strerror}. Choose another with --log-dir."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write `text` to a temporary file beside `path` and rename it, so that no reader ever sees half of it.

    Raises
    ------
    InputError
        When the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Choose a folder that you may write.") from error
