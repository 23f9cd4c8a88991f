"""A whole search over two sites whose allocations come and go: nothing is lost and nothing is evaluated twice."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, PlayingSite, VirtualSite

from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import Search
from deephyper_balsam.problem.hp_problem import HpProblem

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.0)
"""The site of these tests is a fast one."""


def run(job: Any) -> float:
    """Stand in for the user's function; on the fake sites, `score` is called instead."""
    return float(job["x"])


@pytest.mark.parametrize("seed", range(3))
def test_while_allocations_come_and_go_at_two_sites_each_trial_is_evaluated_once(
    api: BalsamApi, client_yml: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    sites = [VirtualSite(api, "lab"), VirtualSite(api, "theta")]
    alive = {site.name: site.add_allocation(3) for site in sites}
    calls: Counter[float] = Counter()

    def score(config: dict[str, Any]) -> float:
        calls[config["x"]] += 1
        return float(config["x"])

    def chaos(progress: Progress) -> None:
        if rng.random() < 0.7:
            return
        has_moved = any("m:moved_from" in line for line in evaluator.lines)
        site = rng.choice(sites) if has_moved else sites[0]  # until then theta has room for what the lab leaves
        if site.name in alive:
            site.end_allocation(alive.pop(site.name))
        else:
            alive[site.name] = site.add_allocation(3)

    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    evaluator = BalsamEvaluator(run, "lab,theta", client_path=client_yml, timing=QUICK)
    search = Search(problem, evaluator, "s", "random", seed=seed, log_dir=tmp_path, poll_s=0.01)
    playing = [PlayingSite(site, score, step_s=0.03) for site in sites]
    for one in playing:
        one.start()
    try:
        frame = search.search(max_evals=60, timeout=60, on_progress=chaos)
    finally:
        for one in playing:
            one.close()
        evaluator.gateway._client.session.close()
    assert Counter(frame["job_status"]) == {"DONE": 60}
    assert set(calls.values()) == {1}
    assert len(calls) == 60
    assert frame["m:moved_from"].notna().any()
    assert sorted(api.trials("s")) == list(range(60))
