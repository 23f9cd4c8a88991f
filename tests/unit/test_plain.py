"""Settings that come from numpy, as in a loop over an array: kept as plain values, and found to be the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import PlayingSite, VirtualSite

from deephyper_balsam.common.plain import plain
from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.search import AMBS, GA, RandomSearch
from deephyper_balsam.errors import SearchExistsError
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.record import SearchRecord, check_same
from deephyper_balsam.trial import Resources, Result

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.02)
"""The site of these tests is a fast one."""


class Kind(Enum):
    GOOD = "good"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.int64(3), 3),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array(3), 3),
        (np.array([1, 2]), [1, 2]),
        ((1, np.int8(2)), [1, 2]),
        ({np.str_("a"): [np.float64(1.0)]}, {"a": [1.0]}),
        ({2, 1}, [1, 2]),
        (Path("/a"), "/a"),
        (Kind.GOOD, "good"),
        (None, None),
        ("text", "text"),
    ],
)
def test_a_value_becomes_plain(given: Any, expected: Any) -> None:
    found = plain(given)
    assert found == expected
    assert json.loads(json.dumps(found)) == expected
    assert yaml.safe_load(yaml.safe_dump(found)) == expected


def searches(
    folder: Path, client_yml: Path, number: Callable[[Any], Any]
) -> dict[str, Callable[[], AMBS | GA | RandomSearch]]:
    """Return searches whose every number went through `number`."""

    def evaluator() -> BalsamEvaluator:
        return BalsamEvaluator(
            "ackley",
            "lab",
            resources=Resources(num_nodes=number(1), ranks_per_node=number(1)),
            eval_timeout=number(60),
            allocation=AllocationRequest(number(2), wall_time_min=number(60)),
            client_path=client_yml,
            timing=QUICK,
        )

    problem = HpProblem("line")
    problem.add_hyperparameter((number(0.0), number(1.0)), "x")
    rest: dict[str, Any] = {"log_dir": folder, "poll_s": 0.01, "max_failures": number(10), "max_cuts": number(3)}
    seed, known = number(3), [Result(None, number(0.5), config={"x": number(0.25)})]
    return {
        "ambs": lambda: AMBS(problem, evaluator(), "s", seed=seed, kappa=number(1.5), xi=number(0.02), **rest),
        "ga": lambda: GA(problem, evaluator(), "s", seed=seed, population=number(4), **rest),
        "random": lambda: RandomSearch(problem, evaluator(), "s", seed=seed, warm_start=known, **rest),
    }


@pytest.mark.parametrize("method", ["ambs", "ga", "random"])
def test_a_search_with_numpys_numbers_goes_on_under_them_and_under_pythons(
    method: str,
    site: VirtualSite,
    client_yml: Path,
    tmp_path: Path,
    play: Callable[..., PlayingSite],
) -> None:
    play(lambda config: float(config["x"]))

    def numpys(value: Any) -> Any:
        return np.asarray(value)[()]

    first = searches(tmp_path, client_yml, numpys)[method]()
    assert len(first.search(max_evals=np.int64(4), show=False)) >= 4
    written = yaml.safe_load((tmp_path / "s" / "search.yaml").read_text())
    assert written["seed"] == 3
    for number, max_evals in ((numpys, 6), (lambda value: value, 8)):
        again = searches(tmp_path, client_yml, number)[method]()
        frame = again.search(max_evals=max_evals, show=False)
        assert (frame["job_status"] == "DONE").sum() == max_evals


def test_another_number_of_numpys_is_another_search() -> None:
    record = SearchRecord("s", 1, 0.0, {"seed": 3, "options": {"kappa": 1.5}})
    check_same(record, {"seed": np.int64(3), "options": {"kappa": np.float64(1.5)}})
    with pytest.raises(SearchExistsError, match="another seed"):
        check_same(record, {"seed": np.int64(4), "options": {"kappa": 1.5}})
