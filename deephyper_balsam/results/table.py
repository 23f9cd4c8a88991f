"""The table of a search: its columns, the best trial, and the files written from it."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deephyper_balsam.common.objective import LOSS
from deephyper_balsam.errors import InputError
from deephyper_balsam.problem.cells import INACTIVE, write_cell
from deephyper_balsam.store import trial_data
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.record import SearchRecord
from deephyper_balsam.store.snapshots import many_made, read_rows
from deephyper_balsam.store.trial_rows import CURVE, table_row, trial_number

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
    "m:duration",
    "m:balsam_job_id",
    "m:site",
    "m:node",
    "m:failure",
)


def read_lines(gateway: Gateway, record: SearchRecord) -> list[Line]:
    """Return the lines of a search's table, read from Balsam; ordered by trial number."""
    return read_table(gateway, record)[0]


def read_table(gateway: Gateway, record: SearchRecord) -> tuple[list[Line], dict[int, str]]:
    """Return the lines of a search's table as `read_lines` does, and the traceback of each trial that left one."""
    rows = read_rows(gateway, record.name)
    lines = lines_of(gateway, record, rows)
    traces = {trial_number(row): (trial_data.result(row) or {}).get("traceback") for row in rows}
    return lines, {number: str(text) for number, text in traces.items() if text}


def lines_of(gateway: Gateway, record: SearchRecord, rows: Iterable[Row]) -> list[Line]:
    """Return the lines of a search's table for the jobs of its trials; ordered by trial number."""
    apps = {app["id"]: app["site_id"] for app in gateway.apps()}
    sites = {site["id"]: site["name"] for site in gateway.sites()}
    with many_made():
        lines = (table_row(row, record.created_at, sites.get(apps.get(row["app_id"]), "")) for row in rows)
        return sorted(lines, key=lambda line: int(line["job_id"]))


def columns(lines: Iterable[Mapping[str, Any]], hyperparameters: Iterable[str] = ()) -> list[str]:
    """Return the columns of the table: `p:` in the order of the problem, the fixed ones, then what metadata brought.

    A loss stands beside the objective. The curves of runs that record are a column of a DataFrame, of Parquet and of
    JSON; a cell of a CSV file would be too large for them.
    """
    names: dict[str, None] = dict.fromkeys(f"p:{name}" for name in hyperparameters)
    extra: dict[str, None] = {}
    for line in lines:
        for key in line:
            if key.startswith("p:"):
                names.setdefault(key)
            elif key not in _FIXED:
                extra.setdefault(key)
    objective, *others = _FIXED
    loss = [LOSS] if extra.pop(LOSS, LOSS) is None else []
    return [*names, objective, *loss, *others, *extra]


def csv_columns(lines: Iterable[Mapping[str, Any]], hyperparameters: Iterable[str] = ()) -> list[str]:
    """Return the columns of the table in a CSV file: all of `columns` but the curves."""
    return [name for name in columns(lines, hyperparameters) if name != CURVE]


def table(lines: list[Line], hyperparameters: Iterable[str] = ()) -> pd.DataFrame:
    """Return the table as a DataFrame: a row a trial, the columns of `results.csv`; empty cells are missing values.

    A hyperparameter that is inactive is NaN; one that is None is None, in a column of objects.
    """
    import pandas as pd

    names = columns(lines, hyperparameters)
    return pd.DataFrame({name: _series(lines, name) for name in names}, columns=names)


def _series(lines: Sequence[Line], name: str) -> pd.Series[Any]:
    """Return one column; the values of a hyperparameter keep their types, which pandas would make one of."""
    import pandas as pd

    if not name.startswith("p:"):
        return pd.Series([line.get(name) for line in lines])
    values = [line.get(name, math.nan) for line in lines]
    kinds = set(map(type, values))
    return pd.Series(values, dtype=None if kinds in ({float}, {int}, {bool}) else object)


def legacy_table(lines: list[Line], hyperparameters: Iterable[str] = ()) -> pd.DataFrame:
    """Return the columns of the 2018 DeepHyper: bare names, `objective`, `elapsed_sec`; only trials that are done.

    A hyperparameter that has the name of a column of ours (`objective`) keeps its ``p:``.
    """
    done = [line for line in lines if line["objective"] is not None]
    frame = table(done, hyperparameters)
    names = [name for name in frame.columns if name.startswith("p:")]
    legacy = frame[[*names, "objective", "m:timestamp_end"]].sort_values("m:timestamp_end")
    bare = {name: name[2:] for name in names if holds_hyperparameter(name[2:])}
    return legacy.rename(columns={**bare, "m:timestamp_end": "elapsed_sec"})


def holds_hyperparameter(column: str) -> bool:
    """Return whether a column of a table, of today's or of the legacy one, holds the values of a hyperparameter."""
    return not (column in (*_FIXED, "elapsed_sec") or column.startswith("m:"))


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
        self._columns: list[str] = csv_columns((), self._hyperparameters)
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
        new = [name for name in csv_columns(changed) if name not in self._columns]
        if new:
            changed = list(every())
            self._columns = csv_columns(changed, self._hyperparameters)
        for line in changed:
            self._texts[line["job_id"]] = _csv_line(_cells(line, self._columns))
        texts = (self._texts[number] for number in sorted(self._texts))
        write_whole(self._path, _csv_line(self._columns) + "".join(texts))


def csv_text(lines: Iterable[Line], hyperparameters: Iterable[str] = ()) -> str:
    """Return the table as CSV, as `results.csv` has it."""
    lines = list(lines)
    names = csv_columns(lines, hyperparameters)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(_cells(line, names) for line in lines)
    return text.getvalue()


def frame_csv(frame: pd.DataFrame) -> str:
    """Return a table that is a DataFrame as CSV, with the same cells as `csv_text`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    frame = frame.drop(columns=CURVE, errors="ignore")
    writer.writerow(frame.columns)
    filled: list[list[Any]] = []
    for name in frame.columns:
        values = frame[name].tolist()
        if holds_hyperparameter(str(name)):
            filled.append([INACTIVE if _is_missing(value) else write_cell(value) for value in values])
        else:
            filled.append([None if _is_missing(value) else value for value in values])
    writer.writerows(zip(*filled, strict=True))
    return text.getvalue()


def _is_missing(value: Any) -> bool:
    """Return whether a cell of a DataFrame is empty; None as the value of a hyperparameter is not."""
    return isinstance(value, float) and math.isnan(value)


def _cells(line: Line, names: Iterable[str]) -> list[Any]:
    return [
        (write_cell(line[name]) if name in line else INACTIVE) if name.startswith("p:") else line.get(name)
        for name in names
    ]


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

    Parquet has one type a column: one that holds several (choices such as 1 and "auto") is written as text, that of a
    hyperparameter as the cells of a CSV. In JSON a hyperparameter that is inactive has no key.
    """
    check_export(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        write_whole(path, frame_csv(frame))
    elif suffix == ".json":
        write_whole(path, json.dumps(rows_of(frame), indent=1, default=str))
    else:
        texts = {name: column for name in frame.columns if (column := _as_text(frame[name], str(name))) is not None}
        write_whole(path, frame.assign(**texts).to_parquet(index=False, engine="pyarrow"))


def _as_text(values: pd.Series[Any], name: str) -> pd.Series[Any] | None:
    """Return a column as text if Parquet cannot hold it, or if it is one of text and a hyperparameter's."""
    import pandas as pd

    held = [value for value in values.tolist() if not _is_missing(value)]
    kinds = set(map(type, held))
    if holds_hyperparameter(name):
        if len(kinds) < 2 and not kinds & {str, type(None)}:
            return None
        return pd.Series([None if _is_missing(v) else write_cell(v) for v in values.tolist()], values.index, object)
    if len(kinds - {type(None)}) < 2 and not kinds & {list, dict}:
        return None
    return values.map(lambda value: value if value is None else str(value))


def rows_of(frame: pd.DataFrame) -> list[Line]:
    """Return the rows of a table as JSON can hold them.

    A missing value is None, but a hyperparameter that is inactive has no key in its row: None is a value of its own.
    """
    names = [str(name) for name in frame.columns]
    ours = [holds_hyperparameter(name) for name in names]
    rows: list[Line] = []
    for values in zip(*(frame[name].tolist() for name in frame.columns), strict=True):
        row = {}
        for name, value, is_ours in zip(names, values, ours, strict=True):
            if not _is_missing(value):
                row[name] = value
            elif not is_ours:
                row[name] = None
        rows.append(row)
    return rows


def best(lines: Iterable[Line]) -> Line | None:
    """Return the line with the highest objective (the earliest of equals), or None if no trial has one."""
    done = [line for line in lines if line.get("objective") is not None]
    return max(done, key=lambda line: float(line["objective"]), default=None)


def configuration(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that a line stands for. What is inactive has no key in a line; None is a value."""
    return {key[2:]: value for key, value in line.items() if key.startswith("p:")}


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
            f"The folder {folder} cannot be written: {error.strerror}. Choose another (`log_dir`, --log-dir)."
        ) from error


def _umask() -> int:
    """Return the user's umask, which the kernel tells only to who sets it; /proc does without a moment of another."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


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
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Choose a folder that you may write.") from error
