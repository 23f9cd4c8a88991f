"""Train a small network on scikit-learn's breast-cancer data: an ordinary script that knows nothing of any search."""

import argparse
import warnings

from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--hidden", type=int, default=4, help="units of the hidden layer (default: %(default)s)")
parser.add_argument("--alpha", type=float, default=1e-4, help="L2 penalty (default: %(default)s)")
parser.add_argument("--learning-rate", type=float, default=1e-3, help="Adam's step (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=100, help="passes over the data (default: %(default)s)")
args = parser.parse_args()

x, y = load_breast_cancer(return_X_y=True)
x_train, x_valid, y_train, y_valid = train_test_split(x, y, test_size=0.4, stratify=y, random_state=0)

network = MLPClassifier(
    [args.hidden], alpha=args.alpha, learning_rate_init=args.learning_rate, max_iter=args.epochs, random_state=0
)
model = make_pipeline(StandardScaler(), network)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)  # the epochs are meant to end before convergence
    model.fit(x_train, y_train)

print(f"validation accuracy: {model.score(x_valid, y_valid):.4f}")
