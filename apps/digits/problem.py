"""The space that run.py is searched over; the objective, validation accuracy, is maximised."""

import ConfigSpace as cs

from deephyper_balsam import HpProblem

problem = HpProblem("digits")

# The network. The defaults are what one might try first by hand; there is better.
problem.add_hyperparameter((1, 4), "num_layers", default_value=1)
problem.add_hyperparameter((8, 128, "log-uniform"), "num_units", default_value=16)
problem.add_hyperparameter(["relu", "tanh", "logistic"], "activation", default_value="relu")
problem.add_hyperparameter((1e-6, 1.0, "log-uniform"), "alpha", default_value=1e-4)  # L2 penalty

# Its training.
solver = problem.add_hyperparameter(["adam", "sgd", "lbfgs"], "solver", default_value="adam")
batch_size = problem.add_hyperparameter((16, 256, "log-uniform"), "batch_size", default_value=64)
learning_rate = problem.add_hyperparameter((1e-4, 1e-1, "log-uniform"), "learning_rate", default_value=1e-3)
early_stopping = problem.add_hyperparameter([False, True], "early_stopping", default_value=False)
momentum = problem.add_hyperparameter((0.0, 0.99), "momentum", default_value=0.9)

# L-BFGS takes the whole set at once and finds its own step; only plain gradient descent has a momentum.
for stochastic in (batch_size, learning_rate, early_stopping):
    problem.add_condition(cs.InCondition(stochastic, solver, ["adam", "sgd"]))
problem.add_condition(cs.EqualsCondition(momentum, solver, "sgd"))
