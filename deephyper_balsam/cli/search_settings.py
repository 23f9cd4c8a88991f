"""The settings of a search, from options and a YAML file, and the search that is made of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from deephyper_balsam.cli.common import run_target
from deephyper_balsam.cli.methods import of_method
from deephyper_balsam.cli.paths import absolute, relative_to
from deephyper_balsam.cli.per_site import PerSite, requests
from deephyper_balsam.common import strict_yaml
from deephyper_balsam.errors import SettingsError

if TYPE_CHECKING:
    from deephyper_balsam.driver.balsam_session import BalsamEvaluator
    from deephyper_balsam.driver.search import Search
    from deephyper_balsam.problem.hp_problem import HpProblem
    from deephyper_balsam.trial import Result

_REQUIRED = ("problem", "site")


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}


def settings_of(file: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, over those of the file."""
    from_file = {} if file is None else read_file(file, given)
    settings = {**from_file, **{key: value for key, value in given.items() if value is not None}}
    missing = [key for key in _REQUIRED if not settings.get(key)]
    if missing:
        raise SettingsError(f"A search needs {' and '.join('--' + key for key in missing)} (as options or in --file).")
    if "max_evals" not in settings and "timeout" not in settings:
        raise SettingsError("A search needs an end: give --max-evals, --timeout or both.")
    return settings


def read_file(file: Path, known: Iterable[str]) -> dict[str, Any]:
    """Return the options in a file, each checked as on the command line; a relative path is relative to the file."""
    try:
        text = file.read_text(encoding="utf-8")
        # As written: 010 is no 8, and the queue called `on` is not true
        content, read = strict_yaml.as_written(text), strict_yaml.read(text)
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} must be a mapping of options to values, but is a {type(content).__name__}.")
    unknown = sorted(map(str, set(content) - set(known)))
    if unknown:
        raise SettingsError(f"{file} has unknown keys {unknown}; known are {', '.join(sorted(known))}.")
    options = {option.name: option for option in click.get_current_context().command.params}
    settings = {}
    for key, value in content.items():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if "" in parts:
            raise SettingsError(f"{file}: `{key}` is blank: give a value, or take the line out.")
        if key == "site" and isinstance(value, list):
            value = ",".join(map(str, value))
        may_differ = isinstance(options[key].type, PerSite) and isinstance(value, dict)
        if isinstance(value, (dict, list)) and not may_differ:
            raise SettingsError(f"{file}: `{key}` must be a single value, but got {value!r}.")
        try:
            if value is not None:  # null: not given
                settings[key] = options[key].type.convert(value, options[key], None)
                if isinstance(options[key].type, click.types.BoolParamType) and not isinstance(read[key], bool):
                    raise SettingsError(f"{file}: `{key}` must be true or false, without quotes, but got {value!r}.")
                _check_number(file, key, settings[key], read[key], value)
        except click.BadParameter as error:
            plain = isinstance(read[key], str) or str(read[key]) == value
            as_read = "" if plain or may_differ else f" (YAML reads {read[key]})"
            raise SettingsError(f"{file}: `{key}`: {error.message}{as_read}") from error
    return relative_to(file.parent, settings)


def _check_number(file: Path, key: str, taken: Any, read: Any, written: Any) -> None:
    """Refuse a number that YAML and the command line read differently, such as 010."""
    if isinstance(taken, dict) and isinstance(read, dict):
        for site, one in zip(taken, read, strict=True):
            _check_number(file, key, taken[site], read[one], written[site])
    elif isinstance(taken, (int, float)) and not isinstance(read, str) and taken != read:
        raise SettingsError(f"{file}: `{key}` is {written}, which YAML reads as {read}: write {read} or {taken}.")


def build_search(name: str, settings: dict[str, Any]) -> Search[BalsamEvaluator]:
    from deephyper_balsam.common.objective import command_minimises
    from deephyper_balsam.driver.balsam_session import BalsamEvaluator
    from deephyper_balsam.driver.search import Search
    from deephyper_balsam.store.applications import command_parameters, resolve_problem
    from deephyper_balsam.store.record import check_name, site_names

    check_name(name)
    problem = resolve_problem(settings["problem"])
    problem.check()
    if settings.get("minimize") and not problem.minimize:
        problem = problem.minimized()
    sites = site_names(settings["site"])
    evaluator = BalsamEvaluator(
        settings.get("run") or run_target(settings["problem"]),
        sites,
        resources=check_resources(settings),
        eval_timeout=settings.get("eval_timeout"),
        allocation=requests(settings, sites),
    )
    if settings.get("minimize") is False and (problem.minimize or command_minimises(evaluator.spec)):
        says = "the problem" if problem.minimize else "the shell command's YAML (`maximize: false`)"
        raise SettingsError(f"`minimize` is false, but {says} says that the objective is a loss: change one of them.")
    evaluator.needs.of(problem.default_configuration)  # what is wrong with a function is said before anything begins
    if evaluator.spec["kind"] == "command":
        unknown = sorted(command_parameters(evaluator.spec) - set(problem.hyperparameter_names))
        if unknown:
            raise SettingsError(
                f"The command names {unknown}, but the problem's hyperparameters are "
                f"{list(problem.hyperparameter_names)}."
            )
        _say_bare(evaluator.spec, problem)
    return Search(
        problem,
        evaluator,
        name,
        settings.get("method", "ambs"),
        warm_start=_warm_start(settings, problem),
        seed=settings.get("seed"),
        log_dir=settings.get("log_dir", "."),
        asked_for=absolute({"log_dir": ".", **plain_settings(settings)}),
        **{key: settings[key] for key in ("max_failures", "max_cuts", "stopper") if key in settings},
        **of_method(settings),
    )


def _say_bare(spec: dict[str, Any], problem: HpProblem) -> None:
    """Say which hyperparameters of a shell command become '' where they are inactive: most programs refuse that."""
    from deephyper_balsam.node.shell_command import bare_names

    conditional = {condition.child.name for condition in problem.space.conditions}
    bare = sorted(bare_names(spec["command"]) & conditional)
    if bare:
        click.echo(
            f"The command gets '' for {', '.join(bare)} where inactive. To leave it out, write "
            f'{{{{ flag("{bare[0]}") }}}} for --{bare[0]}=value, or {{% if {bare[0]} is defined %}}...{{% endif %}}.',
            err=True,
        )


def _warm_start(settings: dict[str, Any], problem: HpProblem) -> Sequence[Result]:
    from deephyper_balsam.problem.warm_start import read_warm_start

    if settings.get("warm_start") is None:
        return ()
    found = read_warm_start(Path(settings["warm_start"]), problem, settings.get("warm_start_direction"))
    click.echo(f"Warm start from {settings['warm_start']}: {found}.", err=True)
    return found.points


def check_resources(settings: dict[str, Any]) -> Any:
    from deephyper_balsam.trial import Resources

    known = inspect.signature(Resources).parameters
    given = {"num_nodes": settings.get("num_nodes_per_eval"), **settings, "wall_time_min": None}  # the allocation's
    fixed = {key: value for key, value in given.items() if key in known and value is not None}
    if settings.get("resources") is None:
        return Resources(**fixed)
    if fixed:
        options = ", ".join("--" + key.replace("_", "-").replace("num-nodes", "num-nodes-per-eval") for key in fixed)
        raise SettingsError(f"Give either --resources, which decides for each configuration, or {options}.")
    return settings["resources"]
