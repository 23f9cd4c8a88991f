"""The options of train.py that command.yaml leaves open; the objective, validation accuracy, is maximised."""

from deephyper_balsam import HpProblem

problem = HpProblem("shell_command")
problem.add_hyperparameter((2, 64, "log-uniform"), "hidden", default_value=4)
problem.add_hyperparameter((1e-5, 10.0, "log-uniform"), "alpha", default_value=1e-4)
problem.add_hyperparameter((1e-4, 1e-1, "log-uniform"), "learning_rate", default_value=1e-3)
