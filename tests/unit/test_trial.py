"""The values that travel between the seams: what they accept, and what they say when they do not."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from deephyper_balsam.errors import InputError
from deephyper_balsam.trial import Origin, Result, Trial, TrialState


def test_a_state_knows_if_it_is_final() -> None:
    assert {state.value for state in TrialState if state.is_final} == {"DONE", "FAILED", "CANCELLED"}
    assert TrialState("READY").value == "READY"


def test_a_trial_number_counts_from_0() -> None:
    assert Trial(0, {}).origin == Origin("random")
    with pytest.raises(InputError, match=r"`number >= 0` must hold, but got \(number=-1\)"):
        Trial(-1, {})


@pytest.mark.parametrize(("told", "model"), [(0, 1), (3, 4), (3, -1)])
def test_a_model_cannot_have_learnt_more_than_was_told(told: int, model: int) -> None:
    with pytest.raises(InputError, match=rf"`0 <= model <= told` must hold, but got \(model={model}, told={told}\)"):
        Origin("model", told, model)


def test_a_result_has_an_objective_or_a_reason() -> None:
    assert Result(1, 0.5).state is TrialState.DONE
    assert Result(1, None, failure="why").state is TrialState.FAILED
    assert type(Result(1, 3).objective) is float


@pytest.mark.parametrize(
    ("objective", "failure"), [(None, None), (0.5, "why"), (math.nan, None), (math.inf, None), (True, None)]
)
def test_any_other_pair_is_refused(objective: Any, failure: str | None) -> None:
    with pytest.raises(InputError, match=r"Exactly one of|must be a finite number"):
        Result(1, objective, failure=failure)


def test_a_point_from_elsewhere_brings_its_configuration() -> None:
    assert Result(None, 0.5, config={"x": 1}).config == {"x": 1}
    with pytest.raises(InputError, match="must bring its configuration"):
        Result(None, 0.5)


def test_values_cannot_be_changed() -> None:
    for value, name in ((Trial(0, {}), "number"), (Result(0, 1.0), "objective"), (Origin("start"), "kind")):
        with pytest.raises(AttributeError):
            setattr(value, name, 3)


@pytest.mark.parametrize(
    "objective", [0.5, np.float32(0.5), np.array([0.5]), np.array(0.5), Decimal("0.5"), Fraction(1, 2)]
)
def test_a_number_of_any_type_is_an_objective(objective: Any) -> None:
    found = Result(np.int64(3), objective)  # type: ignore[arg-type]
    assert (found.objective, type(found.objective), type(found.number)) == (0.5, float, int)


@pytest.mark.parametrize("objective", ["0.5", 10**400, np.array([0.1, 0.2]), [0.5], True, np.True_, 1j, Decimal("nan")])
def test_what_is_no_finite_number_is_refused_in_words(objective: Any) -> None:
    with pytest.raises(InputError, match="`objective` must be a finite number, but got"):
        Result(0, objective)


@pytest.mark.parametrize("number", ["0", 0.5, True, [1]])
def test_a_number_that_is_not_whole_is_refused(number: Any) -> None:
    with pytest.raises(InputError, match="number"):
        Result(number, 0.5)
    with pytest.raises(InputError, match=r"`number >= 0` must hold"):
        Trial(number, {})
