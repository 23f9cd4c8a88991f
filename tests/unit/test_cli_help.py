"""Every command explains itself: what it does, its options with their defaults, and one example."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import click
import pytest
from click.testing import CliRunner

from deephyper_balsam.cli import Group, main


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, (*path, name))


ALL = dict(commands(main))
# Without these there is nothing: no default could be named
WITHOUT_DEFAULT = {
    ("search", "run"): {"file", "problem", "site"},
    ("search", "submit"): {"file", "problem", "site", "nodes", "wall_time_min"},
    ("search", "results"): {"output"},
    ("search", "plot"): {"output"},
}


def test_the_groups_hold_the_commands_of_the_design() -> None:
    names = {" ".join(path) for path in ALL}
    assert names >= {
        "quickstart",
        "app register",
        "app ls",
        "problem show",
        "problem check",
        "search run",
        "search ls",
        "search status",
        "search best",
        "search results",
        "search stop",
        "search watch",
    }


def test_the_first_help_says_of_each_command_what_its_own_does_without_importing_any() -> None:
    context = click.Context(main)
    assert isinstance(main, Group)
    assert main.summaries(context) == Group.summaries(main, context)
    code = "import sys; from click.testing import CliRunner; from deephyper_balsam.cli import main; "
    code += "done = CliRunner().invoke(main, ['--help']); assert done.exit_code == 0, done; "
    code += "print([name for name in sys.modules if name.startswith('deephyper_balsam.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "deephyper_balsam.cli" in loaded
    for room in ("driver", "node", "store", "server", "sites", "monitor", "results", "cli.search", "cli.common"):
        assert f"deephyper_balsam.{room}" not in loaded, loaded


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_shows_an_example_that_begins_with_the_command(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, [*path, "--help"], prog_name="deephyper-balsam")
    assert done.exit_code == 0, done.output
    assert "Example:" in done.output
    example = done.output.partition("Example:")[2]
    assert " ".join(["deephyper-balsam", *path]) in example
    assert CliRunner().invoke(main, [*path, "-h"], prog_name="deephyper-balsam").output == done.output


@pytest.mark.parametrize(
    "path", [path for path in ALL if path[:1] in {("quickstart",), ("app",), ("problem",), ("search",)}], ids=" ".join
)
def test_help_says_what_holds_without_an_option(path: tuple[str, ...]) -> None:
    for option in ALL[path].params:
        if not isinstance(option, click.Option) or option.is_flag or option.required:
            continue
        assert option.help, f"{path} {option.name} has no help"
        if option.name not in WITHOUT_DEFAULT.get(path, ()):
            assert option.show_default or "[default: " in option.help, f"{path} {option.name} shows no default"


def test_the_defaults_in_the_help_of_search_run_are_those_of_the_code() -> None:
    from deephyper_balsam.optimizers import optimizer_options
    from deephyper_balsam.store.allocation_request import AllocationRequest
    from deephyper_balsam.trial import Resources

    said = {
        option.name: option.help.partition("[default: ")[2].rstrip("]")
        for option in ALL["search", "run"].params
        if isinstance(option, click.Option) and option.help and "[default: " in option.help
    }
    resources, request = Resources(), AllocationRequest(nodes=1)
    expected = {name: str(value) for name, value in optimizer_options("ambs").items() if name in said}
    expected.update({name: str(value) for name, value in vars(resources).items() if name in said})
    expected.update({name: str(value) for name, value in vars(request).items() if name in said and name != "nodes"})
    expected["num_nodes_per_eval"] = str(resources.num_nodes)
    for name in ("max_evals", "num_initial"):  # in words: they depend on what is searched
        expected.pop(name, None)
    assert {"surrogate", "kappa", "evals_per_node", "wall_time_min", "queue", "job_mode"} <= set(expected)
    assert {name: said[name] for name in expected} == expected


def test_every_choice_of_a_method_option_is_one_that_the_optimizer_knows() -> None:
    from deephyper_balsam import HpProblem
    from deephyper_balsam.optimizers import METHODS, make_optimizer

    problem = HpProblem("p")
    problem.add_hyperparameter((0.0, 1.0), "x")
    options = {option.name: option for option in ALL["search", "run"].params}
    assert set(options["method"].type.choices) == set(METHODS)  # type: ignore[attr-defined]
    for name in ("surrogate", "acq_func", "liar_strategy", "initial_design"):
        for choice in options[name].type.choices:  # type: ignore[attr-defined]
            make_optimizer("ambs", problem, seed=1, **{name: choice}).close()


@pytest.mark.parametrize("start", [["-m", "deephyper_balsam"], ["-c", "from deephyper_balsam.cli import main; main()"]])
def test_version_is_that_of_the_package(start: list[str]) -> None:
    done = subprocess.run([sys.executable, *start, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.split()[-1] == version("deephyper-balsam")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from deephyper_balsam.cli import main\n"
        "assert CliRunner().invoke(main, ['search', 'run', '--help']).exit_code == 0\n"
        "print([name for name in ('pandas', 'sklearn', 'skopt', 'ConfigSpace', 'balsam') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
