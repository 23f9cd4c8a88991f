"""`results.csv` as it grows with a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from deephyper_balsam.driver.live_table import LiveTable
from deephyper_balsam.results.table import ResultsFile


def line(number: int, **more: Any) -> dict[str, Any]:
    return {"job_id": number, "job_status": "DONE", "m:site": "lab", "objective": 0.5 * number, "p:x": number, **more}


def read(path: Path) -> list[dict[str, Any]]:
    frame = pd.read_csv(path)
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def unasked() -> list[dict[str, Any]]:
    raise AssertionError("all lines were asked for")


def test_lines_that_changed_replace_what_they_were(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "results.csv", ["x"])
    file.write([line(0), line(1, objective=None)], unasked)
    file.write([line(1), line(2)], unasked)
    assert [(row["job_id"], row["objective"]) for row in read(tmp_path / "results.csv")] == [(0, 0.0), (1, 0.5), (2, 1)]


def test_lines_stand_by_trial_number_whatever_the_order_of_results(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "results.csv", ["x"])
    file.write([line(5), line(3)], unasked)
    file.write([line(4)], unasked)
    assert [row["job_id"] for row in read(tmp_path / "results.csv")] == [3, 4, 5]


def test_a_new_column_is_in_all_lines(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "results.csv", ["x"])
    file.write([line(0)], unasked)
    late = line(1, **{"m:epochs": 7})
    file.write([late], lambda: [line(0), late])
    assert [row["m:epochs"] for row in read(tmp_path / "results.csv")] == [None, 7]


@pytest.mark.parametrize("text", ["a, b", 'say "no"', "two\nlines", "", "Größe"])
def test_any_text_is_read_back(tmp_path: Path, text: str) -> None:
    file = ResultsFile(tmp_path / "results.csv", ["x"])
    file.write([line(0, **{"m:failure": text})], unasked)
    assert (read(tmp_path / "results.csv")[0]["m:failure"] or "") == text


def test_numbers_are_read_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, 123456789.123456789, -1.7976931348623157e308]
    file = ResultsFile(tmp_path / "results.csv", ["x"])
    file.write([line(number, objective=value) for number, value in enumerate(values)], unasked)
    found = pd.read_csv(tmp_path / "results.csv", float_precision="round_trip")["objective"]
    assert found.tolist() == values


def test_a_table_gives_each_change_once() -> None:
    table = LiveTable()
    table.put(line(0, job_status="RUNNING"))
    table.put(line(0))
    assert table.take_changed() == [line(0)]
    assert table.take_changed() == []
