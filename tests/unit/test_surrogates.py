from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad

from deephyper_balsam.errors import InputError, SettingsError
from deephyper_balsam.optimizers.surrogates import (
    FOREST_ROWS,
    GP_ROWS,
    SURROGATES,
    DistancePool,
    Features,
    GPSurrogate,
    kept_rows,
    make_surrogate,
    to_optimize_result,
    warp,
)
from deephyper_balsam.optimizers.surrogates.gaussian_process import fit_hyperparameters
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.problem.space import FloatArray

FEATURES = Features((0, 0, 0, 3))


def data(n: int, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(seed)
    unit = rng.random((n, 4))
    unit[:, 3] = rng.integers(0, 3, n)
    unit[unit[:, 3] == 2, 1] = np.nan
    loss = (unit[:, 0] - 0.4) ** 2 * 4 + np.where(np.isnan(unit[:, 1]), 0.3, unit[:, 1]) + 0.5 * unit[:, 3]
    return unit, loss


@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_predicts_what_it_has_not_seen(name: str) -> None:
    agreement = []
    for seed in range(3):
        unit, loss = data(150, seed)
        model = make_surrogate(name, FEATURES)
        model.fit(unit, warp(loss), seed)
        there, truth = data(80, seed + 100)
        mean, std = model.predict(there)
        agreement.append(np.corrcoef(mean, truth)[0, 1])
        assert mean.shape == std.shape == (80,)
        assert (std > 0).all()
    assert np.median(agreement) > 0.9


@pytest.mark.parametrize("name", SURROGATES)
def test_a_fit_depends_on_its_arguments_alone(name: str) -> None:
    unit, loss = data(40)
    means = []
    for _ in range(2):
        model = make_surrogate(name, FEATURES)
        model.fit(unit, warp(loss), 7)
        means.append(model.predict(unit)[0])
    assert (means[0] == means[1]).all()


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("n", [2, 3])
def test_two_or_three_rows_are_enough(name: str, n: int) -> None:
    unit, loss = data(n)
    model = make_surrogate(name, FEATURES)
    model.fit(unit, warp(loss), 0)
    assert np.isfinite(model.predict(unit)).all()


@pytest.mark.parametrize("name", SURROGATES)
def test_constant_features_and_repeated_rows_are_harmless(name: str) -> None:
    unit = np.tile([[0.5, np.nan, 0.0, 1.0]], (12, 1))
    model = make_surrogate(name, FEATURES)
    model.fit(unit, warp(np.arange(12.0)), 0)
    assert np.isfinite(model.predict(unit)).all()


@pytest.mark.parametrize("name", SURROGATES)
def test_a_lie_moves_the_pool_towards_it_and_leaves_the_model_alone(name: str) -> None:
    unit, loss = data(60)
    model = make_surrogate(name, FEATURES)
    model.fit(unit, warp(loss), 0)
    there, _ = data(50, 2)
    pool = model.pool(there)
    before = pool.mean.copy()
    pool.lie([3], 5.0)
    assert pool.mean[3] > before[3]
    assert np.allclose(model.predict(there)[0], before)


@pytest.mark.parametrize("name", ["GBRT", "GP"])
def test_a_believed_point_is_no_longer_uncertain(name: str) -> None:
    left = []
    for seed in range(3):
        unit, loss = data(30, seed)
        model = make_surrogate(name, FEATURES)
        model.fit(unit, warp(loss), seed)
        pool = model.pool(data(40, seed + 100)[0])
        index = int(np.argmax(pool.std))
        before = float(pool.std[index])
        pool.lie([index], None)
        left.append(pool.std[index] / before)
    assert np.median(left) < 0.5


@pytest.mark.parametrize("name", SURROGATES)
def test_a_point_added_later_sees_the_lies_told_before(name: str) -> None:
    unit, loss = data(60)
    model = make_surrogate(name, FEATURES)
    model.fit(unit, warp(loss), 0)
    there, _ = data(30, 4)
    whole, grown = model.pool(there), model.pool(there[:20])
    for pool in (whole, grown):
        for index, value in ((2, 1.0), (7, None), (11, -1.0)):
            pool.lie([index], value)
    grown.extend(there[20:])
    assert np.allclose(whole.mean, grown.mean, atol=1e-6)
    assert np.allclose(whole.std, grown.std, atol=1e-5)


def test_a_lie_to_a_gaussian_process_is_what_a_fit_with_that_point_would_say() -> None:
    unit, loss = data(25)
    z = warp(loss)
    first = GPSurrogate(FEATURES)
    first.fit(unit, z, 0)
    there, _ = data(10, 5)
    pool = first.pool(there)
    pool.lie([4], 0.7)
    second = GPSurrogate(FEATURES, first.fitted)
    second.fit(np.vstack([unit, there[4:5]]), np.append(z, 0.7), 0)
    mean, std = second.predict(there)
    assert np.allclose(pool.mean, mean, atol=1e-4)
    assert np.allclose(pool.std, std, atol=1e-3)


@pytest.mark.parametrize("value", [None, 0.5])
def test_lies_told_at_once_are_lies_told_one_after_another(value: float | None) -> None:
    unit, loss = data(25)
    model = GPSurrogate(FEATURES)
    model.fit(unit, warp(loss), 0)
    there, _ = data(30, 6)
    at_once, in_turn = model.pool(there[:25]), model.pool(there[:25])
    at_once.lie([2, 5, 9, 14], value)
    for index in (2, 5, 9, 14):
        in_turn.lie([index], value)
    for pool in (at_once, in_turn):
        pool.lie([20], 1.0)
        pool.extend(there[25:])
    assert np.allclose(at_once.mean, in_turn.mean, atol=1e-5)
    assert np.allclose(at_once.std, in_turn.std, atol=1e-4)


def test_the_gradient_of_the_confidence_bound_is_that_of_its_value() -> None:
    unit, loss = data(30)
    model = GPSurrogate(FEATURES)
    model.fit(unit, warp(loss), 0)
    row = np.array([0.3, 0.6, 0.2, 1.0])
    for kappa in (0.0, 1.5):
        bound = model.lcb_gradient(row, np.array([0, 1, 2]), kappa)
        at = np.array([0.31, 0.58, 0.77])
        mean, std = model.predict(np.append(at, 1.0)[None, :])
        assert bound(at)[0] == pytest.approx(float((mean - kappa * std)[0]), rel=1e-6)
        assert check_grad(lambda x, f=bound: f(x)[0], lambda x, f=bound: f(x)[1], at) < 1e-4


def test_an_irrelevant_column_gets_a_long_length() -> None:
    ratios, noises = [], []
    for seed in range(5):
        shown = np.random.default_rng(seed).random((60, 3))
        found = fit_hyperparameters(shown, np.arange(3), warp(np.sin(6 * shown[:, 0])))
        ratios.append(found.lengths[0] / min(found.lengths[1:]))
        noises.append(found.noise)
    assert np.median(ratios) < 1
    assert np.median(noises) < 1e-2


@pytest.mark.parametrize(
    "losses",
    [
        np.array([3.0]),
        np.zeros(5),
        np.array([1e-300, 1e-150, 1.0, 1e150, 1e300]),
        np.array([-1.7e308, 1.7e308, 0.0]),
        np.array([5e-324, 1e-323, 2e-323]),
        np.append(np.random.default_rng(0).random(50), 1e200),
    ],
)
def test_warped_losses_are_finite_moderate_and_keep_their_order(losses: FloatArray) -> None:
    z = warp(losses)
    assert np.isfinite(z).all()
    assert np.abs(z).max() < 10
    assert (np.diff(z[np.argsort(losses)]) >= 0).all()
    if np.ptp(losses):
        assert z.std() == pytest.approx(1.0)
        assert np.argmin(z) == np.argmin(losses)


def test_bounded_models_keep_the_best_and_the_latest_rows() -> None:
    z = np.random.default_rng(0).standard_normal(1000)
    kept = kept_rows(z, 100)
    assert len(kept) <= 100
    assert set(np.argsort(z)[:50]) <= set(kept)
    assert set(range(975, 1000)) <= set(kept)
    assert (np.diff(kept) > 0).all()
    assert (kept_rows(z, 1000) == np.arange(1000)).all()


def test_a_long_history_costs_a_bounded_model() -> None:
    unit, loss = data(FOREST_ROWS + 500)
    forest = make_surrogate("RF", FEATURES)
    forest.fit(unit, warp(loss), 0)
    gp = GPSurrogate(FEATURES)
    gp.fit(unit, warp(loss), 0)
    assert gp._factor.shape[0] <= GP_ROWS


def test_categories_are_equally_far_apart_for_a_gaussian_process() -> None:
    shown = Features((3,)).for_gp(np.array([[0.0], [1.0], [2.0], [np.nan]]))
    apart = np.linalg.norm(shown[:, None] - shown[None, :], axis=-1)
    assert np.allclose(apart[:3, :3], 1 - np.eye(3))
    assert (apart[3, :3] < 1).all()


def test_many_choices_are_one_column_for_trees() -> None:
    unit = np.array([[4.0, np.nan], [1.0, 2.0]])
    assert Features((20, 3)).for_trees(unit).tolist() == [[4, 0, 0, 0], [1, 0, 0, 1]]


def test_without_a_model_the_farthest_point_is_the_most_uncertain() -> None:
    pool = DistancePool(Features((0,)), np.array([[0.0]]), np.array([[0.1], [0.9], [0.5]]))
    assert np.argmax(pool.std) == 1
    pool.lie([1], None)
    assert np.argmax(pool.std) == 2
    pool.extend(np.array([[0.95]]))
    assert pool.std[3] == pytest.approx(0.05)


def test_an_unknown_surrogate_is_refused() -> None:
    with pytest.raises(SettingsError, match="SVM"):
        make_surrogate("SVM", FEATURES)


def test_an_empty_history_is_no_result_for_scikit_optimize() -> None:
    problem = HpProblem()
    problem.add_hyperparameter((0.0, 1.0), "x")
    with pytest.raises(InputError, match="at least one"):
        to_optimize_result(problem, [], [])
