"""Notice that the run function was changed while its search goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import PlayingSite, VirtualSite

from deephyper_balsam.cli import main
from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.search import RandomSearch, Search
from deephyper_balsam.node.targets import code_version
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.allocation_request import AllocationRequest

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.02)
"""The site of these tests is a fast one."""


def test_the_version_is_that_of_the_file_function_module_or_command(tmp_path: Path) -> None:
    file = tmp_path / "mine_of_versions.py"
    file.write_text("def run(job): return 1.0")
    spec = {"kind": "function", "target": f"{file}:run", "search_path": []}
    module = {"kind": "function", "target": "mine_of_versions:run", "search_path": [str(tmp_path)]}
    command = {"kind": "command", "target": str(tmp_path / "command.yaml")}
    (tmp_path / "command.yaml").write_text("command: train")
    first = [code_version(one) for one in (spec, module, command)]
    assert first[0] == first[1] is not None
    file.write_text("def run(job): return 2.0")
    (tmp_path / "command.yaml").write_text("command: train --faster")
    second = [code_version(one) for one in (spec, module, command)]
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert code_version({"target": "run", "payload": "AAAA"}) != code_version({"target": "run", "payload": "BBBB"})
    assert "mine_of_versions" not in sys.modules
    file.unlink()
    assert code_version(spec) is None
    assert code_version({"target": "no_such_module_here:run"}) is None


@pytest.fixture
def make(site: VirtualSite, client_yml: Path, tmp_path: Path) -> Callable[[], Search]:
    (tmp_path / "mine.py").write_text("def run(job): return job['x']")

    def search() -> Search:
        problem = HpProblem("line")
        problem.add_hyperparameter((0.0, 1.0), "x")
        target = f"{tmp_path / 'mine.py'}:run"
        evaluator = BalsamEvaluator(
            target, "lab", allocation=AllocationRequest(2), client_path=client_yml, timing=QUICK
        )
        return RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.01)

    return search


def test_a_function_that_was_edited_is_warned_of_and_each_trial_keeps_its_version(
    make: Callable[[], Search],
    site: VirtualSite,
    play: Callable[..., PlayingSite],
    client_yml: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = site.outcome
    spec = {"target": f"{tmp_path / 'mine.py'}:run"}

    def outcome(*words: Any, **more: Any) -> Any:  # as `worker.run_trial` makes it
        return real(*words, **{**more, "code": code_version(spec)})

    monkeypatch.setattr(site, "outcome", outcome)
    play(lambda config: float(config["x"]))
    old = code_version(spec)
    make().search(max_evals=3)
    assert "changed" not in caplog.text
    (tmp_path / "mine.py").write_text("def run(job): return 100 * job['x']")
    new = code_version(spec)
    search = make()
    frame = search.search(max_evals=6)
    assert frame["m:code"].tolist() == [old] * 3 + [new] * 3
    assert f"The run function was changed ({new}) since trials were evaluated with it ({old})" in caplog.text
    assert "the run function was changed during the search" in (search.evaluator.notice or "")
    said = CliRunner().invoke(main, ["search", "status", "s"], env={"BALSAM_CLIENT_PATH": str(client_yml)}).output
    assert f"Note: the run function was changed during the search: {old} (3 trials), {new} (3 trials)" in said


def test_a_run_leaves_the_version_of_its_function_with_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from deephyper_balsam.node import worker

    delivered: list[Any] = []
    monkeypatch.setattr(worker, "deliver", lambda app, data, outcome: delivered.append(outcome))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text("def run(job): return job['x']")
    spec = {"kind": "function", "name": "f", "target": f"{file}:run", "search_path": []}
    job = SimpleNamespace(data={}, tags={"trial": "0"}, num_nodes=1, ranks_per_node=1)
    outcome = worker.run_trial(SimpleNamespace(job=job, _client=None), spec, {"x": 2.0})
    assert (outcome["objective"], outcome["code"]) == (2.0, code_version(spec))
    assert delivered == [outcome]
