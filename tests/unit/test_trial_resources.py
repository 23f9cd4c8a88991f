"""Resources as a function of the configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.trial_resources import TrialResources
from deephyper_balsam.errors import InputError, TargetError
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.trial import Resources, Trial, TrialState

pytest_plugins = ["balsam_fixtures"]

SETTINGS: dict[str, Any] = {"problem": {"name": "p"}, "method": "random", "options": {}, "seed": 1}
FILE = """
from deephyper_balsam import Resources
def resources(config):
    return Resources(num_nodes=config["nodes"])
def wrong(config):
    return 3
number = 5
def two(a, b):
    return None
"""


def run(job: Any) -> float:
    """Stand in for the user's function."""
    return float(job["nodes"])


def by_nodes(config: dict[str, Any]) -> Resources:
    if config["nodes"] < 0:
        raise ValueError("no machine has fewer than none")
    return Resources(num_nodes=config["nodes"] or 1, ranks_per_node=2, wall_time_min=config.get("minutes", 0))


class Rig:
    """A search whose configurations choose their nodes, at one site of the fake API."""

    def __init__(self, folder: Path) -> None:
        self.api = BalsamApi()
        self.site = VirtualSite(self.api)
        self.client_yml = self.api.write_client_yml(folder / "client.yml")
        self.evaluator = self.another()

    def another(self, resources: Any = by_nodes, **options: Any) -> BalsamEvaluator:
        self.evaluator = BalsamEvaluator(run, "lab", resources=resources, client_path=self.client_yml, **options)
        self.evaluator.open("s", dict(SETTINGS), max_evals=100)
        assert self.evaluator.sites is not None
        for site in self.evaluator.sites:
            site.allocations._look_s = 0
        return self.evaluator

    def submit(self, *nodes: int, **more: int) -> None:
        first = len(self.evaluator.lines)
        self.evaluator.submit([Trial(first + n, {"nodes": count, **more}) for n, count in enumerate(nodes)])

    def close(self) -> None:
        self.evaluator.gateway._client.session.close()
        self.api.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


# --- the function ----------------------------------------------------------------------------------------------------


def test_a_function_is_found_in_a_file_and_again_from_what_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "sizes.py").write_text(FILE)
    for target in (f"{tmp_path}/sizes.py", f"{tmp_path}/sizes.py:resources"):
        made = TrialResources(target)
        assert made.of({"nodes": 3}) == Resources(num_nodes=3)
        assert TrialResources(made.recorded).of({"nodes": 5}) == Resources(num_nodes=5)


def test_a_function_without_a_file_is_recorded_by_value() -> None:
    factor = 2
    made = TrialResources(lambda config: Resources(num_nodes=factor * config["nodes"]))
    assert TrialResources(made.recorded).of({"nodes": 3}) == Resources(num_nodes=6)


def test_fixed_resources_are_recorded_as_before() -> None:
    assert TrialResources(TrialResources(Resources(evals_per_node=3)).recorded).of({}) == Resources(evals_per_node=3)
    assert TrialResources(None).of({}) == Resources()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number", "is int; a function that takes a configuration is needed"),
        ("two", "must take one argument, the configuration"),
        ("absent", "has no 'absent'"),
    ],
)
def test_what_is_no_such_function_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "sizes.py").write_text(FILE)
    with pytest.raises(TargetError, match=words):
        TrialResources(f"{tmp_path}/sizes.py:{name}")


def test_what_it_raises_or_returns_wrongly_is_the_configurations_fault(tmp_path: Path) -> None:
    (tmp_path / "sizes.py").write_text(FILE)
    with pytest.raises(InputError, match=r"cannot be told: ValueError: no machine has fewer than none"):
        TrialResources(by_nodes).of({"nodes": -1})
    with pytest.raises(InputError, match=r"must be a Resources, but the function returned 3"):
        TrialResources(f"{tmp_path}/sizes.py:wrong").of({})


def test_how_many_fit_follows_from_what_the_last_trials_got() -> None:
    made = TrialResources(by_nodes)
    assert (made.slots(0), made.slots(8)) == (0, 1)  # nothing is known yet
    for nodes in (1, 1, 4):
        made.note(nodes, 1)
    assert (made.slots(8), made.slots(1)) == (4, 1)
    made.note(1, 4)
    assert made.slots(25) == 16


# --- in a search -----------------------------------------------------------------------------------------------------


def test_each_trial_gets_what_its_configuration_asks_for(rig: Rig) -> None:
    rig.site.add_allocation(8)
    rig.evaluator.collect()
    rig.submit(1, 4, 2)
    rows = rig.api.trials("s")
    assert [rows[n]["num_nodes"] for n in range(3)] == [1, 4, 2]
    assert {row["ranks_per_node"] for row in rows.values()} == {2}


def test_capacity_is_in_trials_of_the_size_that_waits(rig: Rig) -> None:
    rig.site.add_allocation(8)
    rig.evaluator.collect()
    assert rig.evaluator.capacity == 1
    rig.submit(4)
    assert rig.evaluator.capacity == 2
    rig.submit(1, 1, 1, 1, 1, 1)
    assert rig.evaluator.capacity == 5


def test_a_configuration_that_is_too_large_fails_at_once_with_the_reason_and_others_go_on(rig: Rig) -> None:
    rig.site.add_allocation(4)
    rig.evaluator.collect()
    rig.submit(2, 9, -1)
    results = {result.number: result for result in rig.evaluator.collect()}
    assert results[1].failure == "it asks for 9 nodes, and no allocation gives an evaluation more than 4"
    assert results[2].failure == "its resources cannot be told: ValueError: no machine has fewer than none"
    rows = rig.api.trials("s")
    assert [rows[n]["state"] for n in (1, 2)] == ["JOB_FINISHED"] * 2  # no launcher ever gets them
    assert rig.site.acquire(9) == [rows[0]["id"]]
    assert rig.evaluator.counts[TrialState.FAILED] == 2
    assert rig.evaluator.collect() == []


def test_a_driver_that_dies_before_such_a_failure_is_taken_in_leaves_it_to_the_next(rig: Rig) -> None:
    rig.site.add_allocation(4)
    rig.evaluator.collect()
    rig.submit(9)
    rig.evaluator.abandon("killed")
    rig.another()
    assert [result.failure for result in rig.evaluator.collect()] == [
        "it asks for 9 nodes, and no allocation gives an evaluation more than 4"
    ]
    assert rig.api.trials("s")[0]["state"] == "JOB_FINISHED"


def test_serial_allocations_run_nothing_that_spans_nodes(rig: Rig) -> None:
    rig.evaluator.close()
    rig.api.jobs.clear()
    rig.another(allocation=AllocationRequest(64, job_mode="serial"))
    rig.submit(2, 1)
    [result] = rig.evaluator.collect()
    assert result.number == 0
    assert result.failure is not None
    assert "2 nodes" in result.failure


def test_while_no_allocation_is_known_a_large_one_waits(rig: Rig) -> None:
    rig.submit(500)
    assert rig.evaluator.collect() == []
    assert rig.evaluator.counts[TrialState.READY] == 1


def test_minutes_that_a_configuration_asks_for_stay_and_must_fit(rig: Rig) -> None:
    rig.evaluator.close()
    rig.api.jobs.clear()
    rig.another(allocation=AllocationRequest(4, wall_time_min=60))
    rig.submit(1, minutes=30)
    rig.submit(1, minutes=90)
    rig.submit(1, 1)
    [job_id, *_] = rig.site.acquire(1)
    rig.site.finish(job_id, 1.0, start=1000.0, end=1600.0)
    results = {result.number: result.failure for result in rig.evaluator.collect()}
    assert results[0] is None
    assert "may take 90 min" in str(results[1])
    rig.submit(1, minutes=20)
    rig.evaluator.collect()
    assert {n: row["wall_time_min"] for n, row in rig.api.trials("s").items() if n > 1} == {2: 14, 3: 14, 4: 20}


def test_the_function_survives_in_balsam_alone(rig: Rig) -> None:
    rig.evaluator.close()
    rig.api.jobs.clear()
    size = 3
    rig.another(resources=lambda config: Resources(num_nodes=size), allocation=AllocationRequest(4))
    rig.evaluator.close()
    made, _ = BalsamEvaluator.recorded("s", client_path=rig.client_yml)
    assert made.needs.of({}) == Resources(num_nodes=3)
    assert made.workers == 4


def test_room_is_made_for_a_large_one_that_waits_behind_small_ones_but_not_for_ever(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.site.add_allocation(4)
    rig.evaluator.collect()
    rig.submit(4, 1, 1, 1)
    rig.evaluator.collect()
    assert rig.evaluator.sites is not None
    [site] = rig.evaluator.sites
    site.durations_s.append(60.0)
    began = rig.evaluator._clock()
    rooms = []
    for minutes in (1, 4, 6, 7, 9):
        monkeypatch.setattr(rig.evaluator, "_clock", lambda minutes=minutes: began + 60 * minutes)
        rig.evaluator._table._counts.clear()  # as if there were room
        rooms.append(rig.evaluator.room > 0)
    assert rooms == [True, True, False, False, True]


def test_where_all_get_the_same_nobody_makes_room(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.evaluator.close()
    rig.another(resources=None)
    rig.site.add_allocation(4)
    rig.evaluator.collect()
    rig.submit(1)
    rig.evaluator.collect()
    assert rig.evaluator.sites is not None
    [site] = rig.evaluator.sites
    site.durations_s.append(60.0)
    began = rig.evaluator._clock()
    monkeypatch.setattr(rig.evaluator, "_clock", lambda: began + 400)
    assert rig.evaluator.room > 0


def test_fixed_resources_that_the_allocation_cannot_give_are_refused_and_an_alien_one_is_no_failure(rig: Rig) -> None:
    for request in (AllocationRequest(1), AllocationRequest(8, job_mode="serial")):
        with pytest.raises(InputError, match=r"takes 2 nodes, and the allocation .* at most 1: .* --nodes 2 or more"):
            BalsamEvaluator(
                run, "lab", resources=Resources(num_nodes=2), allocation=request, client_path=rig.client_yml
            )
    with pytest.raises(InputError, match=r"takes 4 ranks on a node, and job mode serial gives it 1: .* job mode mpi"):
        BalsamEvaluator(
            run, "lab", resources=Resources(ranks_per_node=4),
            allocation=AllocationRequest(8, job_mode="serial"), client_path=rig.client_yml,
        )  # fmt: skip
    rig.evaluator.close()
    rig.another(resources=Resources(num_nodes=2))
    rig.site.add_allocation(1)
    rig.evaluator.collect()
    rig.submit(2)
    assert rig.evaluator.collect() == []
    assert rig.evaluator.counts[TrialState.READY] == 1
