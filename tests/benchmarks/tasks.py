"""What the optimizers are compared on: a search space and a loss, as plain data, so that every peer can build its own.

This file imports nothing of the package: it also runs in the peers' environment.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter: ``real`` or ``int`` with bounds, or ``cat`` with choices; active if `parent` in `values`."""

    name: str
    kind: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[Any, ...] = ()
    parent: str | None = None
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Task:
    """A loss over a space. `optimum` is the smallest known loss, 0 when it is not known."""

    name: str
    parameters: tuple[Parameter, ...]
    loss: Callable[[Mapping[str, Any]], float]
    optimum: float = 0.0
    real: bool = False


def _reals(n: int, low: float, high: float) -> tuple[Parameter, ...]:
    return tuple(Parameter(f"x{i}", "real", low, high) for i in range(n))


def _vector(config: Mapping[str, Any]) -> np.ndarray:
    return np.array([config[f"x{i}"] for i in range(len(config))])


def _ackley(config: Mapping[str, Any]) -> float:
    x = _vector(config)
    a = -20.0 * math.exp(-0.2 * math.sqrt(float((x**2).mean())))
    return a - math.exp(float(np.cos(2 * math.pi * x).mean())) + 20.0 + math.e


_H_ALPHA = np.array([1.0, 1.2, 3.0, 3.2])
_H_A = np.array(
    [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
)
_H_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def _hartmann(config: Mapping[str, Any]) -> float:
    x = _vector(config)
    return -float(_H_ALPHA @ np.exp(-(_H_A * (x - _H_P) ** 2).sum(axis=1)))


def _branin(config: Mapping[str, Any]) -> float:
    x, y = config["x0"], config["x1"]
    b, c, t = 5.1 / (4 * math.pi**2), 5 / math.pi, 1 / (8 * math.pi)
    return (y - b * x**2 + c * x - 6) ** 2 + 10 * (1 - t) * math.cos(x) + 10


def _levy(config: Mapping[str, Any]) -> float:
    w = 1 + (_vector(config) - 1) / 4
    inner = ((w[:-1] - 1) ** 2 * (1 + 10 * np.sin(math.pi * w[:-1] + 1) ** 2)).sum()
    last = (w[-1] - 1) ** 2 * (1 + math.sin(2 * math.pi * w[-1]) ** 2)
    return float(math.sin(math.pi * w[0]) ** 2 + inner + last)


def _rosenbrock(config: Mapping[str, Any]) -> float:
    x = _vector(config)
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


_KIND_SHIFT = {"a": 0.0, "b": 0.4, "c": 0.9, "d": 1.3}


def _mixed(config: Mapping[str, Any]) -> float:
    """Optimum 0 at rate 1e-3, width 96, depth 4, kind a, norm no, drop 0.2."""
    rate = math.log10(config["rate"]) + 3
    width = math.log2(config["width"] / 96)
    kind = _KIND_SHIFT[config["kind"]]
    shift = 0.5 if config["kind"] in "bd" else 0.0
    loss = (rate - shift) ** 2 + 0.3 * width**2 + 0.15 * (config["depth"] - 4) ** 2 + 4 * (config["drop"] - 0.2) ** 2
    loss += 0.5 * abs(rate * width) + 0.4 * (1 - math.cos(3 * rate))
    return float(loss + kind + (0.3 + 0.2 * abs(rate) if config["norm"] == "yes" else 0.0))


def _conditional(config: Mapping[str, Any]) -> float:
    """Optimum 0.1 with sgd, momentum 0.9, rate 0.03, nesterov no."""
    rate = math.log10(config["rate"])
    layer = 0.1 * (config["layers"] - 3) ** 2
    if config["method"] == "sgd":
        best = -1.52 - 1.0 * (config["momentum"] - 0.9)
        return 0.1 + (rate - best) ** 2 + 3 * (config["momentum"] - 0.9) ** 2 + layer
    if config["method"] == "adam":
        beta = math.log10(1 - config["beta"])
        return 0.3 + 0.6 * (rate + 3) ** 2 + 0.3 * (beta + 1.5) ** 2 + layer
    return 0.8 + 0.2 * (rate + 2) ** 2 + layer


@cache
def _data(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from sklearn import datasets
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    load = {
        "digits": datasets.load_digits,
        "cancer": datasets.load_breast_cancer,
        "wine": datasets.load_wine,
        "diabetes": datasets.load_diabetes,
    }[name]
    x, y = load(return_X_y=True)
    classes = name != "diabetes"
    if not classes:
        y = (y - y.mean()) / y.std()
    a, b, c, d = train_test_split(x, y, test_size=0.33, random_state=7, stratify=y if classes else None)
    scaler = StandardScaler().fit(a)
    return scaler.transform(a), scaler.transform(b), c, d


def _trained(name: str, model: Any) -> float:
    """Log loss of a classifier, mean squared error of a regressor, on the held-out third."""
    from sklearn.metrics import log_loss, mean_squared_error

    a, b, c, d = _data(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(a, c)
        if name == "diabetes":
            return float(min(mean_squared_error(d, model.predict(b)), 10.0))
        return float(log_loss(d, model.predict_proba(b), labels=np.unique(c)))


_MLP = (
    Parameter("layers", "int", 1, 3),
    Parameter("units", "int", 4, 128, log=True),
    Parameter("activation", "cat", choices=("relu", "tanh", "logistic")),
    Parameter("solver", "cat", choices=("adam", "sgd")),
    Parameter("rate", "real", 1e-5, 1e-1, log=True),
    Parameter("alpha", "real", 1e-6, 1e1, log=True),
    Parameter("batch", "int", 16, 256, log=True),
    Parameter("momentum", "real", 0.0, 0.99, parent="solver", values=("sgd",)),
)
_GBM = (
    Parameter("rate", "real", 1e-3, 1.0, log=True),
    Parameter("trees", "int", 5, 120, log=True),
    Parameter("depth", "int", 1, 8),
    Parameter("subsample", "real", 0.3, 1.0),
    Parameter("leaf", "int", 1, 40, log=True),
    Parameter("features", "real", 0.1, 1.0),
)
_SVM = (
    Parameter("kernel", "cat", choices=("rbf", "poly", "sigmoid", "linear")),
    Parameter("c", "real", 1e-3, 1e3, log=True),
    Parameter("gamma", "real", 1e-5, 1e1, log=True, parent="kernel", values=("rbf", "poly", "sigmoid")),
    Parameter("degree", "int", 2, 5, parent="kernel", values=("poly",)),
    Parameter("coef0", "real", -1.0, 1.0, parent="kernel", values=("poly", "sigmoid")),
    Parameter("shrinking", "cat", choices=("yes", "no")),
)


def _mlp(name: str) -> Callable[[Mapping[str, Any]], float]:
    def loss(config: Mapping[str, Any]) -> float:
        from sklearn.neural_network import MLPClassifier, MLPRegressor

        make = MLPRegressor if name == "diabetes" else MLPClassifier
        model = make(
            hidden_layer_sizes=(config["units"],) * config["layers"],
            activation=config["activation"],
            solver=config["solver"],
            learning_rate_init=config["rate"],
            alpha=config["alpha"],
            batch_size=config["batch"],
            momentum=config.get("momentum", 0.9),
            max_iter=12,
            random_state=1,
        )
        try:
            value = _trained(name, model)
        except ValueError:  # diverged: scikit-learn refuses weights that are not finite
            return 10.0
        return min(value, 10.0) if math.isfinite(value) else 10.0

    return loss


def _gbm(name: str) -> Callable[[Mapping[str, Any]], float]:
    def loss(config: Mapping[str, Any]) -> float:
        from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor

        make = GradientBoostingRegressor if name == "diabetes" else GradientBoostingClassifier
        model = make(
            learning_rate=config["rate"],
            n_estimators=config["trees"],
            max_depth=config["depth"],
            subsample=config["subsample"],
            min_samples_leaf=config["leaf"],
            max_features=config["features"],
            random_state=1,
        )
        value = _trained(name, model)
        return min(value, 10.0) if math.isfinite(value) else 10.0

    return loss


def _svm(name: str) -> Callable[[Mapping[str, Any]], float]:
    def loss(config: Mapping[str, Any]) -> float:
        from sklearn.svm import SVR

        a, b, c, d = _data(name)
        model = SVR(
            kernel=config["kernel"],
            C=config["c"],
            gamma=config.get("gamma", 0.1),
            degree=config.get("degree", 3),
            coef0=config.get("coef0", 0.0),
            shrinking=config["shrinking"] == "yes",
            max_iter=20000,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(a, c.astype(float))
            value = float(((model.predict(b) - d) ** 2).mean())
        return min(value, 100.0) if math.isfinite(value) else 100.0

    return loss


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("ackley5", _reals(5, -32.768, 32.768), _ackley),
        Task("hartmann6", _reals(6, 0.0, 1.0), _hartmann, -3.322368011415515),
        Task(
            "branin",
            (Parameter("x0", "real", -5.0, 10.0), Parameter("x1", "real", 0.0, 15.0)),
            _branin,
            0.39788735772973816,
        ),
        Task("levy5", _reals(5, -10.0, 10.0), _levy),
        Task("rosenbrock4", _reals(4, -5.0, 10.0), _rosenbrock),
        Task(
            "mixed",
            (
                Parameter("rate", "real", 1e-6, 1.0, log=True),
                Parameter("width", "int", 8, 1024, log=True),
                Parameter("depth", "int", 1, 12),
                Parameter("kind", "cat", choices=("d", "c", "b", "a")),
                Parameter("norm", "cat", choices=("yes", "no")),
                Parameter("drop", "real", 0.0, 0.8),
            ),
            _mixed,
        ),
        Task(
            "conditional",
            (
                Parameter("method", "cat", choices=("rms", "adam", "sgd")),
                Parameter("rate", "real", 1e-6, 1.0, log=True),
                Parameter("layers", "int", 1, 10),
                Parameter("momentum", "real", 0.0, 0.99, parent="method", values=("sgd",)),
                Parameter("beta", "real", 0.5, 0.999, parent="method", values=("adam",)),
            ),
            _conditional,
            0.1,
        ),
        Task("digits_mlp", _MLP, _mlp("digits"), real=True),
        Task("cancer_gbm", _GBM, _gbm("cancer"), real=True),
        Task("wine_mlp", _MLP, _mlp("wine"), real=True),
        Task("diabetes_gbm", _GBM, _gbm("diabetes"), real=True),
        Task("cancer_mlp", _MLP, _mlp("cancer"), real=True),
        Task("diabetes_svm", _SVM, _svm("diabetes"), real=True),
        Task("wine_gbm", _GBM, _gbm("wine"), real=True),
    )
}
