"""The applications of apps/, run as a node runs them but without Balsam."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from deephyper_balsam.common.bundled_files import folder
from deephyper_balsam.node.recording import FileRecorder, Recorder
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.shell_command import run_command
from deephyper_balsam.node.targets import load_object
from deephyper_balsam.node.worker import evaluate, job_here
from deephyper_balsam.store.applications import bundled, command_parameters, resolve_problem, resolve_run

APPS = folder("apps")
torch_only = pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra: pip install '.[torch]'")
FUNCTIONS = ["ackley", "digits", pytest.param("digits_torch", marks=torch_only)]


def load(name, attribute="run"):
    return load_object(f"{APPS / name / 'run.py'}:{attribute}")


def outcome_of(run, config):
    return evaluate(run, RunningJob(0, config))


def sample(problem, n, seed=0):
    encoder = problem.encoder
    return encoder.decode(encoder.sample(n, np.random.default_rng(seed)))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, as Balsam does, with torch's budget cut short and one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DIGITS_TORCH_EPOCHS", "2")
    monkeypatch.setenv("DIGITS_TORCH_MAX_S", "2")
    monkeypatch.delenv("DIGITS_TORCH_DATA", raising=False)
    monkeypatch.delenv("ACKLEY_SLEEP_S", raising=False)


def test_every_folder_is_a_bundled_application_with_a_readme_that_the_table_names():
    folders = {place.name for place in APPS.iterdir() if place.is_dir() and place.name != "__pycache__"}
    table = (APPS / "README.md").read_text()

    assert set(bundled()) == folders == {"ackley", "digits", "digits_torch", "shell_command"}
    for name in folders:
        assert (APPS / name / "README.md").is_file()
        assert f"[{name}]({name})" in table


@pytest.mark.parametrize("name", sorted(bundled()))
def test_a_problem_loads_is_sound_and_allows_its_default(name):
    problem = resolve_problem(str(APPS / name))

    problem.check()
    assert problem.check_configuration(problem.default_configuration) == problem.default_configuration


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_default_configuration_has_an_objective_and_json_metadata(name):
    problem = resolve_problem(str(APPS / name))

    outcome = outcome_of(load(name), problem.default_configuration)

    assert outcome["failure"] is None
    assert math.isfinite(outcome["objective"])
    json.dumps(outcome["metadata"])


@pytest.mark.parametrize("name", ["ackley", "digits"])
def test_sampled_configurations_have_objectives(name):
    run = load(name)

    for config in sample(resolve_problem(str(APPS / name)), 6):
        outcome = outcome_of(run, config)
        assert outcome["failure"] is None, config
        assert math.isfinite(outcome["objective"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_run_function_loads_without_the_parts_that_only_a_driver_needs(name):
    code = f"""
import sys
from deephyper_balsam.node.targets import load_object
load_object({str(APPS / name / "run.py") + ":run"!r})
print(sorted({{"ConfigSpace", "skopt", "balsam", "deephyper_balsam.problem.hp_problem"}} & set(sys.modules)))
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert finished.stdout.strip() == "[]"


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_has_a_configuration_well_above_both_its_default_and_95_percent():
    problem, run = resolve_problem(str(APPS / "digits")), load("digits")
    good = {"num_layers": 1, "num_units": 41, "activation": "tanh", "alpha": 0.0166, "solver": "lbfgs"}

    default = outcome_of(run, problem.default_configuration)["objective"]
    best = outcome_of(run, problem.check_configuration(good))["objective"]

    assert 0.90 < default < 0.95
    assert best > 0.965


def test_digits_gives_the_same_accuracy_to_the_same_configuration():
    run = load("digits")
    config = resolve_problem(str(APPS / "digits")).default_configuration

    assert outcome_of(run, config)["objective"] == outcome_of(run, config)["objective"]


def test_digits_splits_every_image_into_exactly_one_part_with_all_classes_in_each():
    parts = load("digits", "load_data")()

    assert [len(images) for images, _ in parts] == [898, 539, 360]
    assert len(np.unique(np.vstack([images for images, _ in parts]), axis=0)) == 1797
    for _, labels in parts:
        assert set(labels) == set(range(10))


# --- digits_torch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_default():
    return resolve_problem(str(APPS / "digits_torch")).default_configuration


@torch_only
@pytest.mark.parametrize("hyperparameter", ["activation", "optimizer", "initialization"])
def test_digits_torch_knows_every_choice_of_its_problem(hyperparameter, torch_default):
    problem, run = resolve_problem(str(APPS / "digits_torch")), load("digits_torch")

    for choice in problem[hyperparameter].choices:
        outcome = outcome_of(run, {**torch_default, hyperparameter: choice})
        assert outcome["failure"] is None, choice


@torch_only
def test_digits_torch_learns(torch_default, monkeypatch):
    monkeypatch.setenv("DIGITS_TORCH_EPOCHS", "10")
    monkeypatch.setenv("DIGITS_TORCH_MAX_S", "60")

    outcome = outcome_of(load("digits_torch"), {**torch_default, "nunits": 200, "batch_size": 32})

    assert outcome["objective"] > 0.93
    assert outcome["metadata"]["stopped_by"] == "epochs"
    assert outcome["metadata"]["epochs"] == 10


class EndsAt(Recorder):
    """Tells a run to stop once it has recorded at a budget."""

    def __init__(self, stop=math.inf):
        super().__init__()
        self.stop = stop

    def stopped(self):
        return self.curve.last[0] >= self.stop


@torch_only
def test_digits_torch_records_stops_and_goes_on_from_its_checkpoint(torch_default, monkeypatch, tmp_path):
    monkeypatch.setenv("DIGITS_TORCH_EPOCHS", "6")
    monkeypatch.setenv("DIGITS_TORCH_CHECKPOINT_S", "0")
    run, config = load("digits_torch"), {**torch_default, "dropout": 0.3}
    whole = evaluate(run, RunningJob(0, config, EndsAt(), tmp_path))
    assert [budget for budget, _ in whole["curve"]] == [1, 2, 3, 4, 5, 6]
    stopped = evaluate(run, RunningJob(0, config, EndsAt(stop=2), tmp_path))
    assert (stopped["stopped"], stopped["metadata"]["stopped_by"]) == (True, "stopper")
    assert stopped["curve"] == whole["curve"][:2]
    assert stopped["objective"] == whole["curve"][1][1]

    folder = tmp_path / "cut"
    folder.mkdir()
    cut = job_here(0, config, folder)
    cut.recorder.add = lambda budget, objective: _cut_at(cut.recorder, 3, budget, objective)
    assert "the allocation ends" in evaluate(run, cut)["failure"]
    again = evaluate(run, job_here(0, config, folder))
    assert again["curve"] == whole["curve"]  # every epoch once, each as in a run that was never cut
    assert again["metadata"]["epochs"] == 6


def _cut_at(recorder, last, budget, objective):
    FileRecorder.add(recorder, budget, objective)
    if budget >= last:
        raise RuntimeError("the allocation ends here")


@torch_only
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_digits_torch_takes_the_ends_of_dropout(dropout, torch_default):
    assert outcome_of(load("digits_torch"), {**torch_default, "dropout": dropout})["failure"] is None


@torch_only
def test_digits_torch_that_diverges_is_a_failure_with_its_reason(torch_default):
    wild = {"nhidden": 10, "activation": "elu", "optimizer": "sgd", "learning_rate": 10.0, "dropout": 0.0}

    outcome = outcome_of(load("digits_torch"), {**torch_default, **wild})

    assert outcome["objective"] is None
    assert "diverged" in outcome["failure"]


@torch_only
def test_digits_torch_stops_a_large_network_by_the_clock(torch_default, monkeypatch):
    monkeypatch.setenv("DIGITS_TORCH_EPOCHS", "1000")
    monkeypatch.setenv("DIGITS_TORCH_MAX_S", "1")

    outcome = outcome_of(load("digits_torch"), {**torch_default, "nhidden": 10, "nunits": 200})

    assert outcome["failure"] is None
    assert outcome["metadata"]["stopped_by"] == "time"
    assert outcome["metadata"]["epochs"] < 1000


@pytest.fixture
def mnist_file(tmp_path):
    """Return an .npz as Keras distributes MNIST: real digits, enlarged from 8 x 8 to 28 x 28."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    enlarged = np.kron(digits.images * (255 / 16), np.ones((1, 3, 3)))
    images = np.pad(enlarged, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    path = tmp_path / "mnist like.npz"
    np.savez(path, x_train=images[:1500], y_train=labels[:1500], x_test=images[1500:], y_test=labels[1500:])
    return path


@torch_only
def test_digits_torch_reads_an_mnist_file_that_the_environment_names(mnist_file, torch_default, monkeypatch):
    monkeypatch.setenv("DIGITS_TORCH_DATA", str(mnist_file))
    monkeypatch.setenv("DIGITS_TORCH_EPOCHS", "5")
    monkeypatch.setenv("DIGITS_TORCH_MAX_S", "60")

    outcome = outcome_of(load("digits_torch"), {**torch_default, "nunits": 100, "batch_size": 32})

    assert outcome["objective"] > 0.8
    assert outcome["metadata"]["num_weights"] == (784 + 1) * 100 + (100 + 1) * 10


def test_digits_torch_searches_the_ranges_of_the_paper():
    problem = resolve_problem(str(APPS / "digits_torch"))
    ranges = {name: (problem[name].lower, problem[name].upper) for name in ("nhidden", "nunits", "batch_size")}

    assert ranges == {"nhidden": (1, 100), "nunits": (1, 1000), "batch_size": (8, 1024)}
    assert (problem["dropout"].lower, problem["dropout"].upper) == (0, 1)
    assert (problem["learning_rate"].lower, problem["learning_rate"].upper) == pytest.approx((1e-4, 10))
    assert set(problem["activation"].choices) == {"relu", "elu", "selu", "tanh"}
    assert set(problem["optimizer"].choices) == {"sgd", "rmsprop", "adagrad", "adadelta", "adam", "adamax", "nadam"}


@torch_only
def test_digits_torch_runs_one_configuration_by_hand(mnist_file):
    finished = subprocess.run(
        [sys.executable, str(APPS / "digits_torch" / "run.py"), "--data", str(mnist_file), "--epochs", "1", "nunits=7"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert "'nunits': 7" in finished.stdout
    assert "'num_weights': 5575" in finished.stdout  # (784 + 1) * 7 + (7 + 1) * 10


# --- ackley ----------------------------------------------------------------------------------------------------------


def test_ackley_is_highest_at_the_origin_whatever_the_dimension():
    make_problem = load_object(f"{APPS / 'ackley' / 'problem.py'}:make_problem")
    run = load("ackley")

    for dimension in (1, 5, 20):
        problem = make_problem(dimension)
        assert len(problem) == dimension
        assert run(dict.fromkeys(problem, 0.0)) == pytest.approx(0, abs=1e-12)
        assert run(problem.default_configuration) < -15


def test_ackley_agrees_with_the_formula_at_a_point_worked_by_hand():
    # At (1, 1) both cosines are 1, so the second exponential is e and the first e^-0.2.
    assert load("ackley")({"x0": 1.0, "x1": 1.0}) == pytest.approx(-20 + 20 * math.exp(-0.2))


def test_slow_ackley_takes_its_own_time_for_each_configuration(monkeypatch):
    duration_s = load("ackley", "duration_s")
    configs = sample(resolve_problem(str(APPS / "ackley")), 4000)
    durations = [duration_s(config, mean_s=10, std_s=3) for config in configs]

    assert duration_s(configs[0], 10, 3) == durations[0]
    assert np.mean(durations) == pytest.approx(10, rel=0.05)
    assert np.std(durations) == pytest.approx(3, rel=0.1)

    monkeypatch.setenv("ACKLEY_SLEEP_S", "0.02,0.01")
    outcome = outcome_of(load("ackley", "run_slow"), configs[0])
    assert outcome["objective"] == load("ackley")(configs[0])
    assert outcome["end"] - outcome["start"] >= 0.9 * outcome["metadata"]["sleep_s"]


# --- shell_command ---------------------------------------------------------------------------------------------------


def test_the_shell_command_takes_every_hyperparameter_and_gives_the_accuracy_that_it_prints(tmp_path, capfd):
    spec = resolve_run(str(APPS / "shell_command"))
    problem = resolve_problem(str(APPS / "shell_command"))
    assert command_parameters(spec) == set(problem)

    objective = run_command(spec, problem.default_configuration, tmp_path)
    better = run_command(spec, {"hidden": 32, "alpha": 0.1, "learning_rate": 0.01}, tmp_path)

    assert f"validation accuracy: {objective:.4f}" in capfd.readouterr().out
    assert 0.8 < objective < better <= 1


def test_the_script_of_the_shell_command_says_what_is_wrong_with_an_option():
    script = str(APPS / "shell_command" / "train.py")
    finished = subprocess.run([sys.executable, script, "--hidden", "many"], capture_output=True, text=True)

    assert finished.returncode == 2
    assert "invalid int value: 'many'" in finished.stderr
