"""The table of a search: its columns, the best trial, and the files written from it."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deephyper_balsam.archive import many_made, read_rows
from deephyper_balsam.errors import InputError
from deephyper_balsam.gateway import Gateway, Row
from deephyper_balsam.jobs import table_row, trial_number
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
    return read_table(gateway, record)[0]


def read_table(gateway: Gateway, record: SearchRecord) -> tuple[list[Line], dict[int, str]]:
    """Return the lines of a search's table as `read_lines` does, and the traceback of each trial that left one."""
    rows = read_rows(gateway, record.name)
    lines = lines_of(gateway, record, rows)
    traces = {trial_number(row): row["data"].get("result", {}).get("traceback") for row in rows}
    return lines, {number: str(text) for number, text in traces.items() if text}


def lines_of(gateway: Gateway, record: SearchRecord, rows: Iterable[Row]) -> list[Line]:
    """Return the lines of a search's table for the jobs of its trials; ordered by trial number."""
    apps = {app["id"]: app["site_id"] for app in gateway.apps()}
    sites = {site["id"]: site["name"] for site in gateway.sites()}
    with many_made():
        lines = (table_row(row, record.created_at, sites.get(apps.get(row["app_id"]), "")) for row in rows)
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


def deephyper_lines(lines: Iterable[Line]) -> list[Line]:
    """Return the lines as DeepHyper reads them: what ended, as gathered; a failure's objective is ``F_`` and why.

    The order matters: DeepHyper 0.13's `plot_search_trajectory_single_objective_hpo` takes a row's label for its place.
    """
    ended = [line for line in lines if line["job_status"] in ("DONE", "FAILED")]
    ended.sort(key=lambda line: (line["m:timestamp_gather"] is None, line["m:timestamp_gather"], line["job_id"]))
    for place, line in enumerate(ended):
        if line["objective"] is None:
            ended[place] = {**line, "objective": f"F_{line.get('m:failure')}"}
    return ended


class ResultsFile:
    """`results.csv`, which grows with the search: whole at each writing, but only lines that changed are made anew.

    Parameters
    ----------
    path
        Of the file.
    hyperparameters
        Their columns come first.
    """

    def __init__(self, path: Path, hyperparameters: Iterable[str] = ()) -> None:
        self._path, self._hyperparameters = path, list(hyperparameters)
        self._columns: list[str] = columns((), self._hyperparameters)
        self._texts: dict[int, str] = {}

    def write(self, changed: Iterable[Line], every: Callable[[], Iterable[Line]]) -> None:
        """Write the file anew.

        Parameters
        ----------
        changed
            The lines that are new or other than at the last writing.
        every
            Gives all lines; asked only when there are new columns.
        """
        changed = list(changed)
        new = [name for name in columns(changed) if name not in self._columns]
        if new:
            changed = list(every())
            self._columns = columns(changed, self._hyperparameters)
        for line in changed:
            self._texts[line["job_id"]] = _csv_line(line.get(name) for name in self._columns)
        texts = (self._texts[number] for number in sorted(self._texts))
        write_whole(self._path, _csv_line(self._columns) + "".join(texts))


def csv_text(lines: Iterable[Line], hyperparameters: Iterable[str] = ()) -> str:
    """Return the table as CSV, as `results.csv` has it."""
    lines = list(lines)
    names = columns(lines, hyperparameters)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([line.get(name) for name in names] for line in lines)
    return text.getvalue()


def _csv_line(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


EXPORTS = (".csv", ".json", ".parquet")
"""Files that `export` writes, by suffix."""


def check_export(path: Path) -> None:
    """Refuse a file that `export` does not write, or a Parquet file where pandas cannot write one.

    Raises
    ------
    InputError
        It names the suffixes, or the package that is missing.
    """
    if path.suffix.lower() not in EXPORTS:
        raise InputError(f"A table's file must end in one of {', '.join(EXPORTS)}, but got {path.name!r}.")
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            "Parquet files need the package pyarrow, which is not installed here. "
            "Install it with `pip install 'deephyper-balsam[parquet]'`."
        )


def export(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV, JSON (a list of rows) or Parquet, by the suffix of `path`.

    Parquet has one type a column: one that holds several (choices such as 1 and "auto") is written as text.
    """
    check_export(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        write_whole(path, frame.to_csv(index=False))
    elif suffix == ".json":
        write_whole(path, json.dumps(rows_of(frame), indent=1, default=str))
    else:
        mixed = [name for name in frame.columns if frame[name].dropna().map(type).nunique() > 1]
        nested = [
            name for name in frame.columns if frame[name].map(lambda value: isinstance(value, (list, dict))).any()
        ]
        texts = {
            name: frame[name].map(lambda value: value if value is None else str(value)) for name in {*mixed, *nested}
        }
        write_whole(path, frame.assign(**texts).to_parquet(index=False, engine="pyarrow"))


def rows_of(frame: pd.DataFrame) -> list[Line]:
    """Return the rows of a table as JSON can hold them; a missing value is None."""
    whole = frame.astype(object)
    return [
        {str(key): value for key, value in row.items()} for row in whole.where(frame.notna(), None).to_dict("records")
    ]


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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file beside `path` and rename it, so that no reader ever sees half of it.

    Raises
    ------
    InputError
        When the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Choose a folder that you may write.") from error
