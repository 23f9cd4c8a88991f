"""The table of a search and the files written from it."""

from __future__ import annotations

import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import VirtualSite

from deephyper_balsam.errors import InputError
from deephyper_balsam.results import table as results
from deephyper_balsam.store import record, trial_rows
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.trial import Resources, Trial

pytest_plugins = ["balsam_fixtures"]

FIXED = [
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
]


def line(number: int, objective: float | None, end: float = 0.0, **more: Any) -> dict[str, Any]:
    status = "DONE" if objective is not None else "FAILED"
    return {"objective": objective, "job_id": number, "job_status": status, "m:timestamp_end": end, **more}


LINES = [
    line(0, 0.5, 20.0, **{"p:b": 2, "p:a": 1, "m:epochs": 3}),
    line(1, None, 5.0, **{"p:a": 3, "p:c": "x", "m:failure": "diverged"}),
    line(2, 0.7, 10.0, **{"p:a": 5, "p:b": 4, "m:loss": 0.1}),
]

# --- the table -------------------------------------------------------------------------------------------------------


def test_columns_are_the_problems_then_the_fixed_then_what_metadata_brought() -> None:
    assert results.columns(LINES, ["a", "b", "c", "unused"]) == [
        "p:a",
        "p:b",
        "p:c",
        "p:unused",
        "objective",
        "m:loss",
        *FIXED[1:],
        "m:epochs",
    ]


def test_without_a_problem_hyperparameters_come_as_they_are_met() -> None:
    assert results.columns(LINES)[:3] == ["p:b", "p:a", "p:c"]


def test_an_empty_search_has_a_table_with_columns_and_no_rows() -> None:
    frame = results.table([], ["a"])
    assert list(frame.columns) == ["p:a", *FIXED]
    assert len(frame) == 0


def test_what_a_trial_lacks_is_a_missing_value_and_an_empty_cell_in_the_file() -> None:
    frame = results.table(LINES, ["a", "b", "c"])
    assert math.isnan(frame.loc[1, "objective"])
    assert math.isnan(frame.loc[1, "p:b"])
    assert frame.to_csv(index=False).splitlines()[2] == "3,,x,,,1,FAILED,,,5.0,,,,,,diverged,"


def test_the_best_is_the_highest_and_the_earliest_of_equals() -> None:
    best = results.best(LINES)
    assert best is not None
    assert best["job_id"] == 2
    first = results.best([line(0, 1.0), line(1, 1.0), line(2, -1.0)])
    assert first is not None
    assert first["job_id"] == 0
    assert results.best([line(0, None), {"job_id": 1, "job_status": "READY"}]) is None
    assert results.best([]) is None


def test_a_line_gives_its_configuration_back_with_none_as_a_value_and_without_what_was_inactive() -> None:
    assert results.configuration(LINES[0]) == {"b": 2, "a": 1}
    assert results.configuration({**LINES[0], "p:none": None}) == {"b": 2, "a": 1, "none": None}


def test_none_and_inactive_stay_apart_in_every_table(tmp_path: Path) -> None:
    lines = [line(0, 0.1, **{"p:a": None}), line(1, 0.2), line(2, 0.3, **{"p:a": "None"})]
    cells = [text.split(",")[0] for text in results.csv_text(lines, ["a"]).splitlines()[1:]]
    assert cells == ["None", "", '"""None"""']
    frame = results.table(lines, ["a"])
    assert results.frame_csv(frame) == results.csv_text(lines, ["a"])
    assert frame["p:a"].tolist()[0] is None
    assert [row.get("p:a", "inactive") for row in results.rows_of(frame)] == [None, "inactive", "None"]
    assert [row.get("a", "inactive") for row in results.rows_of(results.legacy_table(lines, ["a"]))] == [
        None,
        "inactive",
        "None",
    ]
    results.export(frame, tmp_path / "t.parquet")
    assert pd.read_parquet(tmp_path / "t.parquet")["p:a"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize("values", [[3, 4], [True, False], ["2", "3"], ["a", "b"], [2.0, 3.0], [1, 2.5, "x", True]])
def test_values_beside_an_inactive_one_keep_their_types(tmp_path: Path, values: list[Any]) -> None:
    lines = [line(n, 0.5, **{"p:a": value}) for n, value in enumerate(values)] + [line(99, 0.5)]
    frame = results.table(lines, ["a"])
    assert list(map(repr, frame["p:a"].tolist()[:-1])) == list(map(repr, values))
    assert results.frame_csv(frame) == results.csv_text(lines, ["a"])
    results.export(frame, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == results.csv_text(lines, ["a"])


def test_the_legacy_table_never_has_two_columns_of_one_name() -> None:
    taken = ["objective", "elapsed_sec", "job_id", "m:site", "x"]
    frame = results.legacy_table([line(0, 0.5, **{f"p:{name}": 1 for name in taken})], taken)
    names = ["p:objective", "p:elapsed_sec", "p:job_id", "p:m:site", "x", "objective", "elapsed_sec"]
    assert list(frame.columns) == names
    assert results.rows_of(frame)[0]["objective"] == 0.5


def test_the_legacy_table_has_bare_names_and_only_trials_that_are_done_in_the_order_of_their_end() -> None:
    frame = results.legacy_table(LINES, ["a", "b"])
    assert list(frame.columns) == ["a", "b", "objective", "elapsed_sec"]
    assert frame["elapsed_sec"].tolist() == [10.0, 20.0]
    assert frame["objective"].tolist() == [0.7, 0.5]
    assert list(results.legacy_table([line(0, None)], ["a"]).columns) == ["a", "objective", "elapsed_sec"]


def test_deephypers_table_has_what_ended_as_it_was_gathered_with_failures_named() -> None:
    lines = [{**one, "m:timestamp_gather": one["m:timestamp_end"]} for one in LINES]
    waits = {"job_id": 3, "objective": None, "job_status": "READY", "m:timestamp_gather": None}
    frame = results.table(results.deephyper_lines([*lines, waits, {**line(4, 0.1), "m:timestamp_gather": None}]))
    assert frame["job_id"].tolist() == [1, 2, 0, 4]
    assert frame["objective"].tolist() == ["F_diverged", 0.7, 0.5, 0.1]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_an_export_is_read_back_to_the_same_table(tmp_path: Path, suffix: str) -> None:
    frame = results.table(LINES, ["a", "b", "c"])
    path = tmp_path / f"t{suffix}"
    results.export(frame, path)
    read = {".csv": pd.read_csv, ".json": partial(pd.read_json, precise_float=True), ".parquet": pd.read_parquet}
    found = read[suffix](path)[list(frame.columns)]
    pd.testing.assert_frame_equal(found.astype(frame.dtypes), frame, check_exact=True)


def test_choices_of_several_types_are_text_in_parquet_and_themselves_in_json(tmp_path: Path) -> None:
    frame = results.table([line(0, 1.0, **{"p:a": "auto"}), line(1, 1.0, **{"p:a": 3}), line(2, 1.0, **{"p:a": True})])
    results.export(frame, tmp_path / "t.parquet")
    results.export(frame, tmp_path / "t.json")
    assert pd.read_parquet(tmp_path / "t.parquet")["p:a"].tolist() == ["auto", "3", "True"]
    assert [row["p:a"] for row in json.loads((tmp_path / "t.json").read_text())] == ["auto", 3, True]


def test_lines_are_read_from_balsam_by_number_with_their_site(gateway: Gateway, site: VirtualSite) -> None:
    made = record.create_record(gateway, "s", {}, site.id, 1000.0)
    app = gateway.create_app({"site_id": site.id, "name": "a", "serialized_class": "", "source_code": ""})
    gateway.create_jobs(
        [trial_rows.trial_job(Trial(n, {"x": n}), "s", app["id"], Resources(), 1000.0 + n, None) for n in (2, 0, 1)]
    )
    first, *_ = site.acquire(2)
    site.finish(first, 0.5)
    lines = results.read_lines(gateway, made)
    assert [(row["job_id"], row["p:x"], row["job_status"], row["m:site"]) for row in lines] == [
        (0, 0, "RUNNING", "lab"),
        (1, 1, "READY", "lab"),
        (2, 2, "DONE", "lab"),
    ]
    assert [row["m:timestamp_submit"] for row in lines] == [0.0, 1.0, 2.0]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_with_its_folders_and_can_be_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "c" / "results.csv"
    results.write_whole(path, "ünï\n")
    assert path.read_text(encoding="utf-8") == "ünï\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["results.csv"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.csv"
    results.write_whole(path, "old")

    def full(source: str, target: Path) -> None:
        assert Path(source).read_text(encoding="utf-8") == "new"  # whole before it takes the name
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"results\.csv cannot be written: No space left on device"):
        results.write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.csv"]


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"results\.csv cannot be written: File exists"):
        results.write_whole(tmp_path / "file" / "results.csv", "x")
    with pytest.raises(InputError, match=r"The folder .*file/s cannot be written: Not a directory.*--log-dir"):
        results.claim_folder(tmp_path / "file" / "s")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_folder_that_even_root_cannot_write_is_refused() -> None:
    with pytest.raises(InputError, match="The folder /proc/self/s cannot be written"):
        results.claim_folder(Path("/proc/self/s"))


def test_claiming_a_folder_leaves_nothing_in_it(tmp_path: Path) -> None:
    for _ in range(2):
        results.claim_folder(tmp_path / "s" / "deep")
    assert os.listdir(tmp_path / "s" / "deep") == []
