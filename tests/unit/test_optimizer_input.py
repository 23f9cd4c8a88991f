"""What ask, tell and the making of an optimizer take: numbers of every type, and nothing else without a word."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "contract"))

from optimizer_contract import ALL, mixed_problem

from deephyper_balsam.errors import SettingsError, TellError
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.trial import Result

every_method = pytest.mark.parametrize("method", ALL)


@every_method
def test_numpys_numbers_are_numbers_and_one_result_is_a_result(method: str) -> None:
    problem = mixed_problem()
    optimizer = make_optimizer(method, problem, seed=np.int64(3), num_workers=np.int64(2))
    assert json.dumps([optimizer.seed, optimizer.num_workers]) == "[3, 2]"
    [trial, *_] = optimizer.ask(np.int64(2))
    optimizer.tell(Result(np.int64(trial.number), np.float32(0.5)))
    assert optimizer.num_told == 1
    optimizer.close()


@every_method
@pytest.mark.parametrize("told", [[0.5], [(0, 0.5)], [{"objective": 0.5}]])
def test_what_is_no_result_is_refused_in_words(method: str, told: Any) -> None:
    optimizer = make_optimizer(method, mixed_problem(), seed=1)
    optimizer.ask(1)
    with pytest.raises(TellError, match="tell takes Results"):
        optimizer.tell(told)
    assert optimizer.num_told == 0
    optimizer.close()


@pytest.mark.parametrize("wrong", [True, 2.0, "2", 0, None])
def test_workers_that_are_no_whole_number_are_refused(wrong: Any) -> None:
    with pytest.raises(SettingsError, match="`num_workers >= 1` must hold"):
        make_optimizer("random", mixed_problem(), num_workers=wrong)
