"""What runs have recorded at their rungs, and the note from which the nodes decide."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import RandomSearch, Search
from deephyper_balsam.driver.standing import RungValues
from deephyper_balsam.errors import SearchExistsError
from deephyper_balsam.node.stoppers import parse_stopper
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.notes import read_notes

pytest_plugins = ["balsam_fixtures"]

TEXT = "sha:max=27,min=1,factor=3,competing=2,recent=4"
SHA = parse_stopper(TEXT)


def decision(rung: float, value: float, at: float) -> dict[str, Any]:
    return {"stop": False, "rung": rung, "value": value, "n": 0, "cutoff": None, "at": at}


def test_values_stand_in_the_order_in_which_they_were_recorded_whatever_order_they_come_in() -> None:
    recorded = [(number, random.Random(number).random(), 100.0 + number) for number in range(20)]
    inorder, shuffled = RungValues(SHA), RungValues(SHA)
    for number, value, at in recorded:
        inorder.take_in(number, (), [decision(1.0, value, at)])
    for number, value, at in random.Random(1).sample(recorded, len(recorded)):
        shuffled.take_in(number, (), [decision(1.0, value, at)])
    assert shuffled.standing == inorder.standing == SHA.standing({1.0: [value for _, value, _ in recorded]})


def test_what_nobody_could_be_asked_about_counts_too_and_once() -> None:
    values = RungValues(SHA)
    values.take_in(0, [(1, 0.5), (2, 0.6), (3, 0.7)])
    assert values.is_new
    assert {rung: count for rung, (count, _) in values.standing["rungs"].items()} == {"1": 1, "3": 1}
    values.is_new = False
    values.take_in(0, [(1, 0.5), (2, 0.6), (3, 0.7)])
    assert not values.is_new
    values.take_in(0, [(1, 0.5), (2, 0.6), (3, 0.7)], [decision(1.0, 0.5, 9.0)])
    assert values.standing["rungs"]["1"][0] == 1


def test_the_longest_whole_run_is_known_to_a_stopper_without_max() -> None:
    values = RungValues(parse_stopper("sha:min=1,factor=3"))
    values.take_in(0, [(1, 0.5), (9, 0.7)])
    assert "max" not in values.standing
    values.take_in(1, [(1, 0.5), (9, 0.7)], whole_budget=9.0)
    assert values.standing["max"] == 9.0


# --- in Balsam --------------------------------------------------------------------------------------------------------


def play(site: VirtualSite, api: BalsamApi, stopped: set[int]) -> Any:
    """Runs that record 0.1 times their number at epochs 1 to 3, and at once write what a real run would."""

    def look(_progress: Progress) -> None:
        for job_id in site.acquire(2):
            data = api.jobs[job_id]["data"]
            number = int(api.jobs[job_id]["tags"]["trial"])
            assert data["stopper"]["settings"] == SHA.to_dict()
            note = api.jobs[data["stopper"]["note"]]["data"]
            verdict = SHA.decide(1.0, number / 10, note.get("standing", {"rungs": {}}))
            if verdict.stop:
                stopped.add(number)
            curve = [[1.0, number / 10]] if verdict.stop else [[epoch, number / 10 + epoch - 1] for epoch in (1.0, 2.0)]
            api.jobs[job_id]["data"] = {**data, "rungs": [{**verdict.to_dict(), "at": time.time()}], "curve": curve}
            site.finish(job_id, curve[-1][1], curve=curve, **({"stopped": True} if verdict.stop else {}))

    return look


def make(client_yml: Path, folder: Path, stopper: str = TEXT) -> Search:
    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    evaluator = BalsamEvaluator("ackley", "lab", client_path=client_yml)
    return RandomSearch(problem, evaluator, "s", seed=1, log_dir=folder, poll_s=0.001, stopper=stopper)


def test_there_is_one_note_and_the_jobs_name_it(
    site: VirtualSite, api: BalsamApi, client_yml: Path, tmp_path: Path
) -> None:
    site.add_allocation(1)
    frame = make(client_yml, tmp_path / "a").search(max_evals=6, on_progress=play(site, api, set()))
    assert set(frame["job_status"]) == {"DONE"}
    gateway = Gateway(client_yml)
    [note] = list(read_notes(gateway, "s", "standing"))
    assert note["data"]["standing"]["rungs"]["1"][0] >= 1
    resumed = Search.resume("s", log_dir=tmp_path / "b", client_path=client_yml, poll_s=0.001)
    frame = resumed.search(max_evals=9, on_progress=play(site, api, set()))
    assert len(frame) == 9
    assert [row["id"] for row in read_notes(gateway, "s", "standing")] == [note["id"]]
    with pytest.raises(SearchExistsError, match="stopper"):
        make(client_yml, tmp_path / "c", "epoch:2").search(max_evals=12)


@pytest.mark.parametrize("key", ["rungs", "curve", "progress"])
@pytest.mark.parametrize("junk", [[None], [{"rung": "x"}], [[1]], [["a", 2]], [True]], ids=str)
def test_what_somebody_wrote_into_a_job_ends_no_driver(
    site: VirtualSite, api: BalsamApi, client_yml: Path, tmp_path: Path, key: str, junk: list[Any]
) -> None:
    site.add_allocation(1)

    def look(_progress: Progress) -> None:
        for job_id in site.acquire(2):
            api.jobs[job_id]["data"] = {**api.jobs[job_id]["data"], key: junk}
            site.finish(job_id, 1.0)

    frame = make(client_yml, tmp_path).search(max_evals=2, on_progress=look)
    assert set(frame["job_status"]) == {"DONE"}


def test_a_search_without_a_stopper_has_no_note(
    site: VirtualSite, api: BalsamApi, client_yml: Path, tmp_path: Path
) -> None:
    site.add_allocation(1)

    def look(_progress: Progress) -> None:
        for job_id in site.acquire(2):
            assert "stopper" not in api.jobs[job_id]["data"]
            site.finish(job_id, 1.0)

    make(client_yml, tmp_path, "none").search(max_evals=3, on_progress=look)
    assert list(read_notes(Gateway(client_yml), "s", "standing")) == []
