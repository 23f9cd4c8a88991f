"""Train a multi-layer perceptron with PyTorch on handwritten digits; the objective is its validation accuracy.

The environment says what is not searched, on each node that runs it:
DIGITS_TORCH_DATA     an MNIST .npz as Keras names its arrays (x_train, y_train, x_test, y_test); scikit-learn's digits
                      without it
DIGITS_TORCH_EPOCHS   passes over the training set (default 20)
DIGITS_TORCH_MAX_S    seconds after which training stops where it is (default 60)
DIGITS_TORCH_CHECKPOINT_S
                      seconds from one checkpoint to the next (default 10)

The run records its accuracy after each pass, ends where a stopper says so, and goes on from its checkpoint after a cut.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

SEED = 0  # of the split, the initial weights, the batches and the dropout

ACTIVATIONS = {"relu": nn.ReLU, "elu": nn.ELU, "selu": nn.SELU, "tanh": nn.Tanh}
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
}
INITIALIZERS = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "he_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "he_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "lecun_normal": partial(nn.init.kaiming_normal_, nonlinearity="linear"),
    "orthogonal": nn.init.orthogonal_,
}


def load_data(path, device):
    """Return (x, y) to train, to validate and to test, as tensors; pixels are scaled to 0..1.

    The validation set is a fixed fifth of the training images; the test set takes no part in the search.
    """
    if path:
        with np.load(path) as arrays:
            x_train, y_train, x_test, y_test = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    else:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        x, y = load_digits(return_X_y=True)
        x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=SEED)

    order = np.random.default_rng(SEED).permutation(len(x_train))
    valid, train = np.split(order, [len(order) // 5])
    brightest = float(x_train.max())

    def tensors(x, y):
        images = torch.as_tensor(x.reshape(len(x), -1) / brightest, dtype=torch.float32, device=device)
        return images, torch.as_tensor(y, dtype=torch.long, device=device)

    return tensors(x_train[train], y_train[train]), tensors(x_train[valid], y_train[valid]), tensors(x_test, y_test)


def build_model(job, num_inputs, num_classes):
    """Return `nhidden` layers of `nunits`, each followed by activation and dropout, and a linear read-out."""
    widths = [num_inputs] + [job["nunits"]] * job["nhidden"]
    layers = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), ACTIVATIONS[job["activation"]](), nn.Dropout(job["dropout"])]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
    for layer in model:
        if isinstance(layer, nn.Linear):
            INITIALIZERS[job["initialization"]](layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def train_epoch(model, optimizer, x, y, batch_size, deadline):
    """Train for one pass, or until `deadline` (monotonic seconds); return the share that was done, and the loss."""
    model.train()
    seen = 0
    for batch in torch.randperm(len(x), device=x.device).split(batch_size):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        seen += len(batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"training diverged: the loss is {loss.item()}")
        if time.monotonic() > deadline:
            break
    return seen / len(x), loss.item()


def save(job, model, optimizer, epoch):
    """Write a checkpoint into the trial's folder; a cut while it is written leaves the one before."""
    partial = job.folder / "checkpoint.partial"
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**states, "random": torch.get_rng_state(), "epoch": epoch}, partial)
    os.replace(partial, job.folder / "checkpoint.pt")


def load(job, model, optimizer, device):
    """Go on from the checkpoint of an earlier start of this run; return the epochs that were done by then, or 0."""
    checkpoint = job.folder / "checkpoint.pt"
    if not job.restarts or not checkpoint.exists():
        return 0
    kept = torch.load(checkpoint, map_location=device, weights_only=True)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    torch.set_rng_state(kept["random"].cpu())
    return kept["epoch"]


def accuracy(model, x, y):
    """Return the share of images that `model` names rightly."""
    model.eval()
    with torch.inference_mode():
        scores = model(x)
    if not torch.isfinite(scores).all():
        raise FloatingPointError("training diverged: the network's outputs are not finite")
    return (scores.argmax(dim=1) == y).sum().item() / len(y)


def run(job):
    """Evaluate one configuration: `job` maps each hyperparameter of problem.py to its value."""
    start = time.monotonic()
    max_epochs = int(os.environ.get("DIGITS_TORCH_EPOCHS", "20"))
    deadline = start + float(os.environ.get("DIGITS_TORCH_MAX_S", "60"))
    checkpoint_s = float(os.environ.get("DIGITS_TORCH_CHECKPOINT_S", "10"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)

    (x, y), valid, test = load_data(os.environ.get("DIGITS_TORCH_DATA"), device)
    model = build_model(job, num_inputs=x.shape[1], num_classes=int(y.max()) + 1).to(device)
    optimizer = OPTIMIZERS[job["optimizer"]](
        model.parameters(), lr=job["learning_rate"], weight_decay=job["weight_decay"]
    )
    done, loss, stopped_by, saved_at = load(job, model, optimizer, device), None, "epochs", start
    while done < max_epochs:
        share, loss = train_epoch(model, optimizer, x, y, job["batch_size"], deadline)
        done += share
        if share < 1:
            stopped_by = "time"
            break
        if time.monotonic() - saved_at > checkpoint_s:
            save(job, model, optimizer, done)
            saved_at = time.monotonic()
        job.record(done, accuracy(model, *valid))
        if job.stopped():
            stopped_by = "stopper"
            break
        if time.monotonic() > deadline and done < max_epochs:
            stopped_by = "time"
            break
    return {
        "objective": accuracy(model, *valid),
        "metadata": {
            "test_accuracy": accuracy(model, *test),
            "loss": loss,
            "epochs": round(done, 2),
            "stopped_by": stopped_by,
            "total_s": round(time.monotonic() - start, 3),
            "num_weights": sum(weights.numel() for weights in model.parameters()),
            "device": device,
        },
    }


def main():
    """Run one configuration by hand: ``python run.py --data mnist.npz --epochs 5 nhidden=2 learning_rate=0.01``."""
    parser = argparse.ArgumentParser(description="Run the default configuration of problem.py, changed as told.")
    parser.add_argument("--data", help="an MNIST .npz (default: scikit-learn's digits)")
    parser.add_argument("--epochs", help="passes over the training set")
    parser.add_argument("--max-s", help="seconds after which training stops")
    parser.add_argument("changes", nargs="*", metavar="name=value", help="hyperparameters other than the default")
    args = parser.parse_args()
    for name in ("data", "epochs", "max_s"):
        if getattr(args, name) is not None:
            os.environ[f"DIGITS_TORCH_{name.upper()}"] = getattr(args, name)

    from problem import problem  # beside this file; on a node it is not needed

    from deephyper_balsam.node.running_job import RunningJob

    job = problem.default_configuration
    changes = dict(change.partition("=")[::2] for change in args.changes)
    try:
        typed = {name: type(job.get(name, text))(text) for name, text in changes.items()}
        job = problem.check_configuration({**job, **typed})
    except ValueError as error:
        parser.error(str(error))
    print(job)
    with tempfile.TemporaryDirectory() as folder:
        print(run(RunningJob(0, job, folder=Path(folder))))


if __name__ == "__main__":
    main()
