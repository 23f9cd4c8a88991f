"""Points from elsewhere: a table of ours, DeepHyper's, Optuna's or scikit-optimize's, read as warm starts."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deephyper_balsam.common.objective import LOSS
from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import InputError, ProblemError
from deephyper_balsam.problem.cells import INACTIVE, is_blank, read_cell, read_choice, write_cell
from deephyper_balsam.problem.columns import INTEGER, Column
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Config, Result

MAX_POINTS = 1000
"""So many a search keeps in its record in Balsam: half of them the best, the others spread evenly by rank."""

DIRECTIONS = ("maximize", "minimize")
_FAILED = ("FAILED", "FAIL")
_UNFINISHED = ("READY", "RUNNING", "CANCELLED", "WAITING", "PRUNED")


@dataclass(frozen=True)
class WarmStart:
    """What a table gave.

    Attributes
    ----------
    points
        To be told before the first trial; failures among them have no objective.
    refused
        Line of the file -> why it does not fit the space.
    unfinished
        How many lines have no result.
    left_out
        How many points were too many.
    """

    points: list[Result]
    refused: dict[int, str]
    unfinished: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        parts = [f"{counted(len(self.points), 'point')} taken"]
        if self.unfinished:
            parts.append(f"{self.unfinished} without a result")
        if self.left_out:
            parts.append(f"{self.left_out} left out, since a search keeps {MAX_POINTS} at most")
        if self.refused:
            line, why = next(iter(self.refused.items()))
            lines = ", ".join(map(str, list(self.refused)[:10])) + (", …" if len(self.refused) > 10 else "")
            one = len(self.refused) == 1
            refused = f"{len(self.refused)} {'does' if one else 'do'} not fit the space"
            parts.append(f"{refused} (line{'s' * (not one)} {lines}; line {line}: {why})")
        return "; ".join(parts)


def read_warm_start(file: Path, problem: HpProblem, direction: str | None = None) -> WarmStart:
    """Read the points of a table (CSV, JSON or Parquet, whatever its name) that fit a problem.

    Parameters
    ----------
    file
        With columns ``p:NAME`` and ``objective`` (ours, DeepHyper's: maximised, a failure is ``F_reason`` or empty) or,
        without it, ``m:loss`` (ours: minimised);
        ``params_NAME`` and ``value`` (Optuna's `trials_dataframe`); or ``NAME`` and ``objective`` (maximised), ``fun``
        or ``y`` (minimised, as scikit-optimize does).
    problem
        Whose hyperparameters the points must have.
    direction
        Whether the objective was maximised or minimised. Optuna's table does not say, so there it must be given.

    Raises
    ------
    InputError
        The file cannot be read or is none of these, or no line of it fits.
    """
    header, rows = _read(file, problem)
    names, objective, usual = _layout(file, header, problem)
    direction = direction or usual
    if direction not in DIRECTIONS:
        raise InputError(
            f"{file} does not say whether its `{objective}` was maximised or minimised: "
            "say which (`direction`, --warm-start-direction): maximize or minimize."
        )
    if direction != usual and objective in ("objective", LOSS) and "m:balsam_job_id" in header:
        raise InputError(
            f"{file} is a table of ours, and says itself that it was {str(usual)[:-2]}sed. "
            "Leave the direction out (`direction`, --warm-start-direction)."
        )
    sign = 1.0 if direction == "maximize" else -1.0
    columns = {column.name: column for column in problem.encoder.columns}
    points, refused, unfinished = [], {}, 0
    for line, row in rows:
        if len(row) != len(header):
            refused[line] = f"it has {len(row)} cells under {len(header)} headings: is the file cut?"
            continue
        cells = dict(zip(header, row, strict=True))
        state = (cells.get("job_status") or cells.get("state") or "").rpartition(".")[2]
        if state in _UNFINISHED:
            unfinished += 1
            continue
        try:
            config = _configuration({name: cells[column] for column, name in names.items()}, problem, columns)
            points.append(_result(config, cells[objective], state, sign))
        except (ProblemError, InputError) as error:
            refused[line] = str(error)
    if not points:
        why = str(WarmStart([], refused, unfinished)) if rows else "it has no line"
        raise InputError(f"No point of {file} can be used as a warm start: {why}.")
    kept = _fewer(points)
    return WarmStart(kept, refused, unfinished, len(points) - len(kept))


def _read(file: Path, problem: HpProblem) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the headings, and each row that is not empty with the number of the line on which it ends.

    Rows of JSON and of Parquet become the cells that they would have in a CSV, and are numbered as its lines would be.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    if content.startswith(b"PAR1"):
        return _as_cells(_parquet_rows(file, content), problem, texts_are_cells=True)
    if content.lstrip()[:1] in (b"[", b"{"):
        return _as_cells(_json_rows(file, content), problem, texts_are_cells=False)
    if b"\0" in content:
        raise InputError(f"{file} is no CSV: it has NUL bytes. It is damaged, or of another kind.")
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        header = next(reader, [])
        rows = [(reader.line_num, row) for row in reader if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no CSV: {error}.") from error
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if twice:
        raise InputError(f"{file} has several columns {', '.join(map(repr, twice))}; remove all but one.")
    return header, rows


def _json_rows(file: Path, content: bytes) -> list[dict[str, Any]]:
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{file} must be a JSON list of rows, each an object, as `search results -o FILE.json` writes."
        )
    return rows


def _parquet_rows(file: Path, content: bytes) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            "Parquet files need the package pyarrow, which is not installed here. "
            "Install it with `pip install 'deephyper-balsam[parquet]'`."
        ) from error
    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"{file} is no Parquet file: {error}.") from error
    return [{str(name): value for name, value in row.items() if not _is_missing(value)} for row in rows]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _as_cells(
    rows: Sequence[Mapping[str, Any]], problem: HpProblem, *, texts_are_cells: bool
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return rows of values as headings and numbered rows of cells.

    A hyperparameter that a row does not have is inactive. Our Parquet files hold cells where a column has texts.
    """
    whole = {column.name for column in problem.encoder.columns if column.kind == INTEGER}

    def cell(row: Mapping[str, Any], heading: str) -> str:
        name = heading.removeprefix("params_").removeprefix("p:")
        if heading not in row:
            return INACTIVE
        value = row[heading]
        if name in problem and (heading != name or name not in ("objective", "value", "fun", "y")):
            if isinstance(value, str) and texts_are_cells:
                return value
            if name in whole and isinstance(value, float) and value.is_integer():
                value = int(value)  # where a cell is missing, pandas makes the others real numbers
            return write_cell(value)
        return "" if _is_missing(value) else str(value)

    header = list(dict.fromkeys(name for row in rows for name in row))
    return header, [(line, [cell(row, name) for name in header]) for line, row in enumerate(rows, start=2)]


def _layout(file: Path, header: list[str], problem: HpProblem) -> tuple[dict[str, str], str, str | None]:
    """Return the columns of hyperparameters with their names, the column of the objective, and its usual direction."""
    ours = {column: column[2:] for column in header if column.startswith("p:")}
    if ours and not set(problem.hyperparameter_names) - set(ours.values()) & set(header):
        for name, usual in (("objective", "maximize"), (LOSS, "minimize")):
            if name in header:
                return ours, name, usual
    optunas = {column: column[len("params_") :] for column in header if column.startswith("params_")}
    if "value" in header and optunas:
        return optunas, "value", None
    # A hyperparameter with the name of the objective's column keeps its p: (see `results.legacy_table`)
    bare = {column: column for column in header if column in problem and f"p:{column}" not in header}
    bare |= {column: name for column, name in ours.items() if name in problem}
    if bare:
        for name, usual in (("objective", "maximize"), ("fun", "minimize"), ("y", "minimize")):
            if name in header and name not in bare:
                return bare, name, usual
    raise InputError(
        f"{file} is no table of points: it needs columns `p:NAME` and `objective` (ours, DeepHyper's) or `m:loss`, "
        f"`params_NAME` and `value` (Optuna's), or `NAME` and `objective`, `fun` or `y`; "
        f"it has {', '.join(header) or 'none'}."
    )


def _configuration(cells: Mapping[str, str], problem: HpProblem, columns: Mapping[str, Column]) -> Config:
    """Return the configuration of a row; an empty cell is inactive, or what other programs write so."""
    given: dict[str, Any] = {}
    empty: dict[str, list[Any]] = {}
    for name, text in cells.items():
        column = columns.get(name)
        if is_blank(text) and not (column and text and text in map(write_cell, column.choices)):
            blank = [one for one in column.choices if is_blank(str(one))] if column else []
            if len(blank) > 1 and None in blank:
                blank = [None]  # text that is written so is in quotes
            empty[name] = blank
        else:
            given[name] = value_of(column, text) if column else text
    if not any(empty.values()):
        return problem.check_configuration(given)
    # Empty where the hyperparameter can be None, and is active: other programs write None so
    unsure = {name: blank[0] for name, blank in empty.items() if len(blank) == 1}
    inactive = problem.inactive({**given, **unsure})
    return problem.check_configuration({**given, **{n: v for n, v in unsure.items() if n not in inactive}})


def value_of(column: Column, text: str) -> Any:
    """Return the value of a hyperparameter that a cell, or a word of the command line, stands for.

    Raises
    ------
    InputError
        It is none of the choices, or could be several.
    """
    if not column.choices:
        return read_cell(text)
    try:
        return read_choice(column.choices, text)
    except InputError as error:
        raise InputError(f"`{column.name}`: {error}") from error


def _result(config: Config, text: str, state: str, sign: float) -> Result:
    failed = Result(None, None, failure="it failed elsewhere", config=config)
    if text.startswith("F") or state in _FAILED:
        return failed
    if is_blank(text):
        if state:
            raise InputError(f"it is {state}, but has no objective.")
        return failed
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{text!r} is no objective.") from None
    if not math.isfinite(value):
        return failed
    return Result(None, sign * value, config=config)


def _fewer(points: list[Result]) -> list[Result]:
    """Return at most `MAX_POINTS`, in their order: the best, and of the others a part that is evenly spread by rank."""
    if len(points) <= MAX_POINTS:
        return points
    score = np.array([-math.inf if point.objective is None else point.objective for point in points])
    ranked = np.argsort(-score, kind="stable")
    best = MAX_POINTS // 2
    spread = np.linspace(best, len(points) - 1, MAX_POINTS - best).round().astype(int)
    kept = sorted(int(index) for index in ranked[[*range(best), *spread.tolist()]])
    return [points[index] for index in kept]
