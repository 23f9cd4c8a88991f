"""The box that Ackley's function is usually searched in: `problem` has 5 dimensions, `make_problem` any number."""

from deephyper_balsam import HpProblem


def make_problem(dimension):
    """Return the problem with the real hyperparameters x0 ... x<dimension - 1>."""
    problem = HpProblem(f"ackley-{dimension}")
    for index in range(dimension):
        # The middle of the box, the usual default, is the very optimum.
        problem.add_hyperparameter((-32.768, 32.768), f"x{index}", default_value=16.384)
    return problem


problem = make_problem(5)
