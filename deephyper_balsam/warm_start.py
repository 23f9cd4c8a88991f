"""Points from elsewhere: a table of ours, DeepHyper's, Optuna's or scikit-optimize's, read as warm starts."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deephyper_balsam.columns import Column
from deephyper_balsam.errors import InputError, ProblemError
from deephyper_balsam.problem import HpProblem
from deephyper_balsam.trial import Config, Result

MAX_POINTS = 1000
"""So many a search keeps in its record in Balsam: half of them the best, the others spread evenly by rank."""

DIRECTIONS = ("maximize", "minimize")
_EMPTY = ("", "nan", "NaN", "None")
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
        parts = [f"{len(self.points)} points taken"]
        if self.unfinished:
            parts.append(f"{self.unfinished} without a result")
        if self.left_out:
            parts.append(f"{self.left_out} left out, since a search keeps {MAX_POINTS} at most")
        if self.refused:
            line, why = next(iter(self.refused.items()))
            lines = ", ".join(map(str, list(self.refused)[:10])) + (", …" if len(self.refused) > 10 else "")
            parts.append(f"{len(self.refused)} do not fit the space (lines {lines}; line {line}: {why})")
        return "; ".join(parts)


def read_warm_start(file: Path, problem: HpProblem, direction: str | None = None) -> WarmStart:
    """Read the points of a CSV that fit a problem.

    Parameters
    ----------
    file
        With columns ``p:NAME`` and ``objective`` (ours, DeepHyper's: maximised, a failure is ``F_reason`` or empty);
        ``params_NAME`` and ``value`` (Optuna's `trials_dataframe`); or ``NAME`` and ``objective`` (maximised), ``fun``
        or ``y`` (minimised, as scikit-optimize does).
    direction
        Whether the objective was maximised or minimised. Optuna's table does not say, so there it must be given.

    Raises
    ------
    InputError
        The file cannot be read or is none of these, or no line of it fits.
    """
    header, rows = _read(file)
    prefix, objective, usual = _layout(file, header, problem)
    direction = direction or usual
    if direction not in DIRECTIONS:
        raise InputError(
            f"{file} does not say whether its `{objective}` was maximised or minimised: "
            "give --warm-start-direction maximize or minimize."
        )
    sign = 1.0 if direction == "maximize" else -1.0
    columns = {column.name: column for column in problem.encoder.columns}
    points, refused, unfinished = [], {}, 0
    for line, row in enumerate(rows, start=2):
        value, state = row.get(objective) or "", (row.get("job_status") or row.get("state") or "").rpartition(".")[2]
        if state in _UNFINISHED:
            unfinished += 1
            continue
        given = {name[len(prefix) :]: text for name, text in row.items() if name and name.startswith(prefix)}
        if not prefix:
            given = {name: text for name, text in given.items() if name in columns}
        try:
            config = problem.check_configuration(_configuration(given, columns))
            points.append(_result(config, value, state, sign))
        except (ProblemError, InputError) as error:
            refused[line] = str(error)
    if not points:
        why = str(WarmStart([], refused, unfinished)) if rows else "it has no line"
        raise InputError(f"No point of {file} can be used as a warm start: {why}.")
    kept = _fewer(points)
    return WarmStart(kept, refused, unfinished, len(points) - len(kept))


def _read(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            header, rows = list(reader.fieldnames or []), list(reader)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no CSV: {error}.") from error
    return header, rows


def _layout(file: Path, header: list[str], problem: HpProblem) -> tuple[str, str, str | None]:
    """Return the prefix of the hyperparameters' columns, the column of the objective, and its usual direction."""
    if "objective" in header and any(name.startswith("p:") for name in header):
        return "p:", "objective", "maximize"
    if "value" in header and any(name.startswith("params_") for name in header):
        return "params_", "value", None
    if set(problem.hyperparameter_names) & set(header):
        for name, usual in (("objective", "maximize"), ("fun", "minimize"), ("y", "minimize")):
            if name in header and name not in problem:
                return "", name, usual
    raise InputError(
        f"{file} is no table of points: it needs columns `p:NAME` and `objective` (ours, DeepHyper's), `params_NAME` "
        f"and `value` (Optuna's), or `NAME` and `objective`, `fun` or `y`; it has {', '.join(header) or 'none'}."
    )


def _configuration(given: Mapping[str, str], columns: Mapping[str, Column]) -> Config:
    return {
        name: value_of(columns[name], text) if name in columns else text
        for name, text in given.items()
        if text not in _EMPTY or (name in columns and text in map(str, columns[name].choices))
    }


def value_of(column: Column, text: str) -> Any:
    """Return the choice whose text it is; else the number, or the text itself."""
    for choice in column.choices:
        if text in (str(choice), json.dumps(choice)):
            return choice
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _result(config: Config, text: str, state: str, sign: float) -> Result:
    if text in _EMPTY or text.startswith("F") or state in ("FAILED", "FAIL"):
        return Result(None, None, failure="it failed elsewhere", config=config)
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{text!r} is no objective.") from None
    if not math.isfinite(value):
        return Result(None, None, failure="it failed elsewhere", config=config)
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
