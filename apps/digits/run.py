"""Train a multi-layer perceptron on scikit-learn's handwritten digits; the objective is its validation accuracy."""

import time
import warnings

from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

MAX_EPOCHS = 60  # bounds the time of any configuration; the search may well prefer one that learns fast
SEED = 0  # the same configuration gives the same accuracy, on any node


def load_data():
    """Split the 1797 images, stratified by class: half to train, 30 % to validate, 20 % kept apart as a test."""
    images, labels = load_digits(return_X_y=True)
    images = images / 16.0  # pixels are 0..16
    rest, x_test, y_rest, y_test = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=SEED)
    x_train, x_valid, y_train, y_valid = train_test_split(
        rest, y_rest, test_size=0.375, stratify=y_rest, random_state=SEED
    )
    return (x_train, y_train), (x_valid, y_valid), (x_test, y_test)


def run(job):
    """Evaluate one configuration: `job` maps each active hyperparameter of problem.py to its value."""
    train, valid, test = load_data()
    model = MLPClassifier(
        hidden_layer_sizes=[job["num_units"]] * job["num_layers"],
        activation=job["activation"],
        solver=job["solver"],
        alpha=job["alpha"],
        # Absent where the solver does not use them.
        batch_size=job.get("batch_size", "auto"),
        learning_rate_init=job.get("learning_rate", 1e-3),
        early_stopping=job.get("early_stopping", False),
        momentum=job.get("momentum", 0.9),
        max_iter=MAX_EPOCHS,
        random_state=SEED,
    )
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # to stop at MAX_EPOCHS is what we want
        model.fit(*train)
    return {
        "objective": model.score(*valid),
        "metadata": {
            "epochs": model.n_iter_,
            "train_s": round(time.perf_counter() - start, 3),
            "num_weights": sum(weights.size for weights in model.coefs_ + model.intercepts_),
            "test_accuracy": model.score(*test),
        },
    }
