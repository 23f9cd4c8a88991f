"""The files of a search are copies: whatever befalls them, the search goes on, and they come back."""

from __future__ import annotations

import errno
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import PlayingSite, VirtualSite

from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver import exports
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import RandomSearch, Search
from deephyper_balsam.driver.search_log import log_to
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.results import table as results
from deephyper_balsam.store.allocation_request import AllocationRequest

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.02)
"""The site of these tests is a fast one."""

Play = Callable[..., PlayingSite]


@pytest.fixture
def made(site: VirtualSite, client_yml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    monkeypatch.setattr(exports, "LOOK_S", 0.05)
    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    evaluator = BalsamEvaluator("ackley", "lab", allocation=AllocationRequest(2), client_path=client_yml, timing=QUICK)
    return RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.01)


def at(evaluated: int, do: Callable[[], None]) -> Callable[[Progress], None]:
    """Call `do` once, when so many trials have ended."""
    done: list[bool] = []

    def look(progress: Progress) -> None:
        if progress.evaluated >= evaluated and not done:
            done.append(True)
            do()

    return look


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_disk_that_takes_nothing_ends_no_search_and_what_it_missed_is_written_later(
    code: int, made: Search, play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    play(lambda config: float(config["x"]))
    real, notices = results.os.replace, []

    def full(*_: Any) -> None:
        raise OSError(code, "the disk takes nothing")

    def look(progress: Progress) -> None:
        notices.append(progress.notice or "")
        if progress.evaluated >= 8:
            monkeypatch.setattr(results.os, "replace", real)

    monkeypatch.setattr(results.os, "replace", full)
    frame = made.search(max_evals=14, on_progress=look)
    assert any("cannot be written now" in notice for notice in notices)
    assert len(frame) == 14
    assert len(pd.read_csv(made.folder / "results.csv")) == 14
    assert (made.folder / "search.yaml").exists()


def test_a_search_whose_disk_stays_full_ends_in_order_and_says_where_the_results_are(
    made: Search, play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    play(lambda config: float(config["x"]))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "replace", full)
    frame = made.search(max_evals=5)
    assert len(frame) == 5
    assert frame["objective"].notna().all()
    said = [record.getMessage() for record in caplog.records if "cannot be written now" in record.getMessage()]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert "search results s -o" in said[0]


def test_a_folder_that_is_deleted_comes_back_with_all_that_was_in_it(made: Search, play: Play) -> None:
    play(lambda config: float(config["x"]), step_s=0.03)
    frame = made.search(max_evals=20, on_progress=at(5, lambda: shutil.rmtree(made.folder)))
    assert len(frame) == 20
    assert len(pd.read_csv(made.folder / "results.csv")) == 20
    assert (made.folder / "search.yaml").exists()
    assert (
        "written again" in (made.folder / "search.log").read_text()
        or "Complete" in (made.folder / "search.log").read_text()
    )


@pytest.mark.parametrize("name", ["results.csv", "search.yaml", "search.log"])
def test_a_file_that_is_deleted_comes_back(made: Search, play: Play, name: str) -> None:
    play(lambda config: float(config["x"]), step_s=0.03)
    made.search(max_evals=20, on_progress=at(5, (made.folder / name).unlink))
    assert (made.folder / name).stat().st_size > 0


def test_a_log_that_cannot_be_written_loses_its_lines_says_how_many_and_goes_on(tmp_path: Path) -> None:
    logger = logging.getLogger("deephyper_balsam.test")
    path = tmp_path / "s" / "search.log"
    with log_to(path):
        logger.info("first")
        shutil.rmtree(path.parent)
        path.parent.write_text("a file stands where the folder was")
        logger.info("second")
        logger.info("third")
        path.parent.unlink()
        logger.info("fourth")
    text = path.read_text()
    assert "fourth" in text
    assert "(2 lines before the last one could not be written)" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_log_on_a_full_disk_raises_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "search.log"
    path.symlink_to("/dev/full")
    with log_to(path):
        logging.getLogger("deephyper_balsam.test").info("never seen")
    assert "Traceback" not in capfd.readouterr().err
