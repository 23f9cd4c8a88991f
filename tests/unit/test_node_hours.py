"""Where node-hours went, in prepared timelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deephyper_balsam.monitor.node_hours import CAUSES, KINDS, Allocation, Run, Timeline, count_node_hours

HOUR = 3600.0


def allocation(start: float = 0.0, end: float = HOUR, nodes: int = 1, slots: int = 1, **more: Any) -> Allocation:
    return Allocation(1, "lab", nodes, slots, start, end, **more)


def timeline(runs: list[Run], **more: Any) -> Timeline:
    """A search whose trials are submitted as they begin, and whose results are taken in as they end."""
    given = {
        "allocations": [allocation()],
        "submitted": np.asarray([run.start for run in runs], dtype=float),
        "left_queue": np.asarray([run.start for run in runs], dtype=float),
        "ended": np.asarray([run.end for run in runs], dtype=float),
        "gathered": np.asarray([run.end for run in runs], dtype=float),
        "driven": [(0.0, HOUR)],
        "complete": False,
    }
    return Timeline(runs=runs, **{**given, **more})  # type: ignore[arg-type]


def hours(found: dict[str, float]) -> dict[str, float]:
    return {kind: round(value, 6) for kind, value in found.items() if round(value, 6)}


def test_runs_are_useful_failed_or_repeated() -> None:
    runs = [Run(1, 0, 900, "useful"), Run(1, 900, 1800, "failed"), Run(1, 1800, 3600, "repeated")]
    counted = count_node_hours(timeline(runs))
    assert hours(counted.by_kind) == {"useful": 0.25, "failed": 0.25, "repeated": 0.5}
    assert counted.utilization == 0.25


def test_a_run_is_worth_the_nodes_that_it_has() -> None:
    runs = [Run(1, 0, HOUR, "useful")]
    assert hours(count_node_hours(timeline(runs, allocations=[allocation(nodes=8, slots=2)])).by_kind) == {
        "useful": 4.0,
        "no configuration": 4.0,
    }


def test_before_the_first_run_it_is_start_up() -> None:
    runs = [Run(1, 360, HOUR, "useful")]
    assert hours(count_node_hours(timeline(runs)).by_kind) == {"start-up": 0.1, "useful": 0.9}


def test_an_allocation_in_which_nothing_ran_is_all_start_up() -> None:
    assert hours(count_node_hours(timeline([])).by_kind) == {"start-up": 1.0}


def test_a_slow_optimizer_is_named() -> None:
    """The result was taken in at once, and the next trial submitted 600 s later."""
    runs = [Run(1, 0, 1200, "useful"), Run(1, 1800, HOUR, "useful")]
    assert hours(count_node_hours(timeline(runs)).by_kind) == {
        "useful": pytest.approx(5 / 6, abs=1e-6),
        "no configuration": 0.166667,
    }


def test_a_result_on_its_way_and_a_trial_on_its_way_lie_between_runs() -> None:
    runs = [Run(1, 0, 1200, "useful"), Run(1, 1800, HOUR, "useful")]
    late = count_node_hours(timeline(runs, gathered=np.asarray([1500.0, HOUR]), submitted=np.asarray([0.0, 1500.0])))
    assert hours(late.by_kind) == {"useful": pytest.approx(5 / 6, abs=1e-6), "between runs": 0.166667}


def test_an_empty_queue_without_a_driver_is_named() -> None:
    runs = [Run(1, 0, 1200, "useful"), Run(1, 1800, HOUR, "useful")]
    found = count_node_hours(timeline(runs, driven=[(0.0, 1200.0), (1500.0, HOUR)]))
    assert hours(found.by_kind) == {
        "useful": pytest.approx(5 / 6, abs=1e-6),
        "no driver": 0.083333,
        "no configuration": 0.083333,
    }


def test_stragglers_are_named() -> None:
    runs = [Run(1, 0, 1800, "useful"), Run(1, 0, HOUR, "useful")]
    found = count_node_hours(timeline(runs, allocations=[allocation(nodes=2, slots=2)], complete=True))
    assert hours(found.by_kind) == {"useful": 1.5, "drained": 0.5}


def test_trials_that_no_longer_fit_are_the_end_of_the_allocation() -> None:
    runs = [Run(1, 0, 2700, "useful")]
    found = count_node_hours(timeline(runs, submitted=np.asarray([0.0, 10.0])))
    assert hours(found.by_kind) == {"useful": 0.75, "end of allocation": 0.25}


def test_in_an_allocation_that_runs_on_what_waits_may_still_begin() -> None:
    runs = [Run(1, 0, 2700, "useful")]
    found = count_node_hours(
        timeline(runs, allocations=[allocation(runs_still=True)], submitted=np.asarray([0.0, 10.0]))
    )
    assert hours(found.by_kind) == {"useful": 0.75, "between runs": 0.25}


def test_hours_in_which_a_driver_had_no_allocation_are_told_apart() -> None:
    found = count_node_hours(timeline([], allocations=[allocation(start=900.0)]))
    assert found.waited == pytest.approx(0.25)
    assert count_node_hours(timeline([], allocations=[])).waited == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_always_add_up_to_the_whole(seed: int) -> None:
    draw = np.random.default_rng(seed)
    allocations = [Allocation(1, "a", 4, 4, 0.0, 5000.0), Allocation(2, "b", 6, 3, 2000.0, 9000.0, runs_still=True)]
    runs = []
    for one in allocations:
        for _ in range(one.slots):
            at = one.start + draw.exponential(100)
            while at < one.end:
                end = min(one.end, at + draw.exponential(300))
                runs.append(Run(one.id, at, end, draw.choice(["useful", "failed", "repeated"])))
                at = end + draw.exponential(60)
    starts = np.asarray([run.start for run in runs], dtype=float)
    ends = np.asarray([run.end for run in runs], dtype=float)
    found = count_node_hours(
        Timeline(
            allocations, runs, starts - draw.exponential(30, len(runs)), starts, ends, ends + 5, [(0, 7000)], False
        )
    )
    assert found.total == pytest.approx((4 * 5000 + 6 * 7000) / HOUR)
    assert sum(found.by_kind.values()) == pytest.approx(found.total)
    assert sum(sum(values) for values in found.over_time.values()) == pytest.approx(found.total)
    busy = sum((run.end - run.start) * (1 if run.allocation == 1 else 2) for run in runs) / HOUR
    assert sum(found.by_kind[kind] for kind in KINDS if kind not in CAUSES) == pytest.approx(busy)


def test_a_report_shows_where_the_nodes_were() -> None:
    from deephyper_balsam.results.analysis.node_hours import node_hours

    runs = [Run(1, 0, 1800, "useful"), Run(1, 2700, HOUR, "failed")]
    counted = count_node_hours(timeline(runs))
    drawn = node_hours(counted)
    kinds = {value["k"] for value in drawn["data"]["values"]}
    assert kinds == {"useful", "failed", "no configuration"}
    total = sum(value["n"] * (value["e"] - value["t"]) for value in drawn["data"]["values"])
    assert total == pytest.approx(60.0, rel=1e-3)  # one node for sixty minutes, in minutes
