"""The space of the MNIST multi-layer perceptron in DeepHyper's paper, with regularisation and initialisation.

P. Balaprakash, M. Salim, T. D. Uram, V. Vishwanath, S. M. Wild, DeepHyper: Asynchronous Hyperparameter Search for Deep
Neural Networks, HiPC 2018. The ranges are the paper's, wide on purpose: much of the space trains badly, and some of it
not at all. Sizes are drawn on a log scale here, or nearly all networks would be too deep to train.
"""

from deephyper_balsam import HpProblem

problem = HpProblem("digits_torch")
problem.add_hyperparameter((1, 100, "log-uniform"), "nhidden", default_value=1)
problem.add_hyperparameter((1, 1000, "log-uniform"), "nunits", default_value=32)
problem.add_hyperparameter(["relu", "elu", "selu", "tanh"], "activation", default_value="relu")
problem.add_hyperparameter((8, 1024, "log-uniform"), "batch_size", default_value=128)
problem.add_hyperparameter((0.0, 1.0), "dropout", default_value=0.2)
problem.add_hyperparameter(
    ["sgd", "rmsprop", "adagrad", "adadelta", "adam", "adamax", "nadam"], "optimizer", default_value="adam"
)
problem.add_hyperparameter((1e-4, 10.0, "log-uniform"), "learning_rate", default_value=1e-3)
problem.add_hyperparameter((1e-8, 1e-1, "log-uniform"), "weight_decay", default_value=1e-6)  # L2 penalty
problem.add_hyperparameter(
    ["xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "lecun_normal", "orthogonal"],
    "initialization",
    default_value="xavier_uniform",
)
