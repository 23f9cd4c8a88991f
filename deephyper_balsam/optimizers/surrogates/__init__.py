"""Surrogate models of the loss over the unit matrix of a problem; the only importer of scikit-optimize.

Losses are minimised here, as in scikit-optimize. A row of a unit matrix is one configuration: numeric columns lie in
[0, 1], a categorical column holds the index of the choice, and an inactive hyperparameter is NaN.

Each model is fitted by ``skopt.learning`` and evaluated here from its arrays, because a pool of candidates has to be
scored, and scored again under every lie, within milliseconds.
"""

from __future__ import annotations

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.optimizers.surrogates.base import (
    ONE_HOT_CHOICES,
    Features,
    Pool,
    Surrogate,
    kept_rows,
    warp,
)
from deephyper_balsam.optimizers.surrogates.boosted import BoostedSurrogate
from deephyper_balsam.optimizers.surrogates.distance import DistancePool
from deephyper_balsam.optimizers.surrogates.export import to_optimize_result
from deephyper_balsam.optimizers.surrogates.forest import FOREST_ROWS, ForestSurrogate
from deephyper_balsam.optimizers.surrogates.gaussian_process import (
    GP_ROWS,
    GPSurrogate,
    Hyperparameters,
    fit_gp_hyperparameters,
)

__all__ = [
    "FOREST_ROWS",
    "GP_ROWS",
    "ONE_HOT_CHOICES",
    "SURROGATES",
    "BoostedSurrogate",
    "DistancePool",
    "Features",
    "ForestSurrogate",
    "GPSurrogate",
    "Hyperparameters",
    "Pool",
    "Surrogate",
    "fit_gp_hyperparameters",
    "kept_rows",
    "make_surrogate",
    "to_optimize_result",
    "warp",
]

SURROGATES = ("RF", "ET", "GBRT", "GP")


def make_surrogate(name: str, features: Features, hyperparameters: Hyperparameters | None = None) -> Surrogate:
    """A surrogate by its name, one of `SURROGATES`.

    Raises
    ------
    SettingsError
        If there is no surrogate of that name.
    """
    if name in ("RF", "ET"):
        return ForestSurrogate(features, name)
    if name == "GBRT":
        return BoostedSurrogate(features)
    if name == "GP":
        return GPSurrogate(features, hyperparameters)
    raise SettingsError(f"`surrogate` must be one of {', '.join(SURROGATES)}, but got {name!r}.")
