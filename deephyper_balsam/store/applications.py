"""Applications: a run function or a shell command as a Balsam ApplicationDefinition, registered at a site.

A spec is a JSON object, the same in the application, in the search's record and on the node:

- ``{"kind": "function", "name": ..., "target": "/path/file.py:run" | "package.module:run", "search_path": [...]}``
- the same with ``"payload"``: a function that no file defines (a notebook, a lambda), pickled by value;
- ``{"kind": "command", "name", "command", "objective", "maximize", "environment", "here"}`` for a shell command.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from deephyper_balsam.common import strict_yaml
from deephyper_balsam.common.bundled_files import folder
from deephyper_balsam.errors import BalsamError, TargetError
from deephyper_balsam.node.command_records import DEFAULT_SIGNAL
from deephyper_balsam.node.shell_command import check_template, template_names
from deephyper_balsam.node.targets import load_object, split_target
from deephyper_balsam.store.gateway import Gateway

if TYPE_CHECKING:
    from deephyper_balsam.problem.hp_problem import HpProblem

Spec = dict[str, Any]

_COMMAND_KEYS = {"name", "command", "objective", "maximize", "environment", "record"}
_MODULE = re.compile(r"\w+(\.\w+)*")
_DESCRIPTION = "deephyper_balsam"


# --- what the user names ---------------------------------------------------------------------------------------------


def bundled() -> dict[str, Path]:
    """Return the applications that come with the package: name -> folder."""
    return {place.parent.name: place.parent for place in sorted(folder("apps").glob("*/problem.py"))}


def resolve_problem(target: str) -> HpProblem:
    """Load the `HpProblem` that `target` names.

    Parameters
    ----------
    target
        ``file.py[:name]``, ``package.module[:name]``, a folder with a `problem.py`, or the name of a bundled
        application; the name inside is ``problem`` by default.

    Raises
    ------
    TargetError
        When nothing of that name is found, or what is found is no HpProblem.
    """
    from deephyper_balsam.problem.hp_problem import HpProblem

    full, _ = _locate(target, file="problem.py", attribute="problem")
    found = load_object(full)
    if not isinstance(found, HpProblem):
        raise TargetError(f"{full} is {type(found).__name__}; a search needs an HpProblem (`problem`, --problem).")
    return found


def resolve_run(target: str | Callable[..., Any]) -> Spec:
    """Return the spec of the run function or shell command that `target` names, after loading it once here.

    Parameters
    ----------
    target
        As in `resolve_problem`, with ``run`` as the name inside and `run.py` in a folder; a YAML file (or a folder
        with a `command.yaml`) of a shell command; or the function itself.
    """
    if callable(target):
        return _spec_of_callable(target)
    full, search_path = _locate(target, file="run.py", attribute="run")
    if full.endswith((".yaml", ".yml")):
        return _read_command(Path(full))
    found = load_object(full, search_path)
    if not callable(found):
        raise TargetError(f"{full} is {type(found).__name__}; a function that takes a job is needed (`run`, --run).")
    _check_signature(found, full)
    place, _, attribute = full.rpartition(":")
    stem = Path(place).parent.name if Path(place).name == "run.py" else Path(place).stem
    stem = stem if place.endswith(".py") else place.replace(".", "_")
    return {
        "kind": "function",
        "name": _identifier(f"{stem}_{attribute}"),
        "target": full,
        "search_path": search_path,
    }


def resolve_command(target: str) -> Spec | None:
    """Return the spec of the shell command that `target` names as in `resolve_run`; None: a function, not loaded."""
    full, _ = _locate(target, file="run.py", attribute="run")
    return _read_command(Path(full)) if full.endswith((".yaml", ".yml")) else None


def resolve_resources(target: str | Callable[..., Any]) -> Spec:
    """Return the spec of a function from configurations to `Resources`, after loading it once here.

    Parameters
    ----------
    target
        As in `resolve_problem`, with ``resources`` as the name inside and `resources.py` in a folder; or the function
        itself.
    """
    if callable(target):
        return _spec_of_callable(target, "the configuration")
    full, search_path = _locate(target, file="resources.py", attribute="resources")
    found = load_object(full, search_path)
    if not callable(found):
        raise TargetError(f"{full} is {type(found).__name__}; a function that takes a configuration is needed.")
    _check_signature(found, full, "the configuration")
    return {"kind": "function", "target": full, "search_path": search_path}


def _locate(target: str, file: str, attribute: str) -> tuple[str, list[str]]:
    """Return `target` in full, ``place:attribute``, and the folders its module was found through."""
    place, named = split_target(target)
    attribute = named or attribute
    path = Path(place).expanduser()
    if place in bundled() and not path.exists():
        path = bundled()[place]
    if path.is_dir():
        command = path / "command.yaml"
        path = command if file == "run.py" and command.is_file() else path / file
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise TargetError(f"{path} does not exist.")
        return str(path.resolve()), []
    if path.suffix == ".py" or path.is_file():
        if not path.is_file():
            raise TargetError(f"{path} does not exist; name a Python file, a module, or one of {', '.join(bundled())}.")
        return f"{path.resolve()}:{attribute}", []
    if path.name != place and module_lies_in(path.parent, path.name):  # a module, named with the folder to find it in
        root = str(path.parent.resolve())
        if root not in sys.path:
            sys.path.insert(0, root)
        return f"{path.name}:{attribute}", [root]
    if _MODULE.fullmatch(place):
        return f"{place}:{attribute}", _module_search_path(target, place)
    raise TargetError(
        f"{target!r} names nothing to load: give file.py:{attribute}, package.module:{attribute}, "
        f"a folder with a {file}, or one of {', '.join(bundled())}."
    )


def module_lies_in(folder: Path, module: str) -> bool:
    """Return whether the module or package that `module`, a dotted name, begins with lies in a folder."""
    top = module.partition(".")[0]
    return bool(_MODULE.fullmatch(module)) and ((folder / f"{top}.py").is_file() or (folder / top).is_dir())


def _module_search_path(target: str, module: str) -> list[str]:
    """Return the folder that the module is found through when Python's own path would not find it on a node."""
    top = module.partition(".")[0]
    here = Path.cwd()
    if module_lies_in(here, module):
        if str(here) not in sys.path:
            sys.path.insert(0, str(here))
        return [str(here)]
    from importlib.util import find_spec

    if find_spec(top) is None:
        raise TargetError(
            f"There is no module {top!r} here for {target!r}, and no bundled application of that name "
            f"({', '.join(bundled())})."
        )
    return []


def _check_signature(function: Callable[..., Any], target: str, what: str = "the job") -> None:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise TargetError(
            f"{target} must take one argument, {what}, but its signature is {inspect.signature(function)}."
        ) from None
    except ValueError:  # a built-in without a signature: the first call will tell
        return


def _spec_of_callable(function: Callable[..., Any], what: str = "the job") -> Spec:
    name = getattr(function, "__qualname__", type(function).__name__)
    module = inspect.getmodule(function)
    file = getattr(module, "__file__", None)
    _check_signature(function, name, what)
    # Only what the module itself calls so: a partial, or an object that can be called, goes by value
    if module is not None and module.__name__ != "__main__" and file and getattr(module, name, None) is function:
        root = Path(file).resolve().parents[module.__name__.count(".") + (Path(file).name == "__init__.py")]
        return {
            "kind": "function",
            "name": _identifier(f"{module.__name__}_{name}"),
            "target": f"{module.__name__}:{name}",
            "search_path": [str(root)],
        }
    import dill

    try:
        pickled = dill.dumps(function, recurse=True)
    except Exception as error:
        raise TargetError(
            f"{name} cannot be sent to a node ({error}); put it into a file and give file.py:{name}."
        ) from error
    digest = hashlib.sha256(pickled).hexdigest()[:8]
    label = "function" if name == "<lambda>" else name.rpartition(".")[2]
    return {
        "kind": "function",
        "name": _identifier(f"{label}_{digest}"),
        "target": name,
        "payload": base64.b64encode(pickled).decode(),
    }


def _read_command(path: Path) -> Spec:
    """Read and check the YAML of a shell command."""
    try:
        text = path.read_text(encoding="utf-8")
        raw, written = strict_yaml.read(text), strict_yaml.as_written(text)
    except OSError as error:
        raise TargetError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TargetError(
            f"{path} is no YAML: {' '.join(str(error).split())} (a command that begins with {{{{ must stand in quotes)"
        ) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("command"), str):
        raise TargetError(
            f"{path} must be a mapping with a `command`; its keys may be {', '.join(sorted(_COMMAND_KEYS))}."
        )
    try:
        check_template(raw["command"])
    except ValueError as error:
        raise TargetError(
            f"{path}: `command` cannot be filled in: {error}. Between {{{{ }}}} and {{% %}} stands Jinja; put "
            "braces of the command's own between {% raw %} and {% endraw %}."
        ) from error
    unknown = sorted(set(map(str, raw)) - _COMMAND_KEYS)
    if unknown:
        raise TargetError(f"{path} has unknown keys {unknown}; known are {', '.join(sorted(_COMMAND_KEYS))}.")
    objective = _read_objective(path, raw.get("objective"))
    name = path.parent.name
    if "name" in raw:
        name = strict_yaml.as_text(raw["name"], written["name"]) or ""
        if not name:
            raise TargetError(f"{path}: `name` {strict_yaml.misread(written['name'])}.")
    maximize = raw.get("maximize", True)
    if not isinstance(maximize, bool):
        raise TargetError(
            f"{path}: `maximize` must be true or false, without quotes (false for a loss), but got "
            f"{written['maximize']!r}."
        )
    environment = _read_environment(path, raw.get("environment"), written.get("environment"))
    return {
        "kind": "command",
        "name": _identifier(name),
        "target": str(path),
        "command": raw["command"],
        "objective": objective,
        "maximize": maximize,
        "environment": environment,
        "here": str(path.parent),
        **({} if raw.get("record") is None else {"record": _read_record(path, raw["record"])}),
    }


def _read_record(path: Path, record: Any) -> dict[str, str]:
    """Check how a shell command tells how it goes."""
    forms = "{regex: 'epoch (number), accuracy (number)'} or {json: progress.json, budget: epoch, objective: accuracy}"
    if not isinstance(record, dict) or ("regex" in record) == ("json" in record):
        raise TargetError(f"{path}: `record` must be either {forms}, but got {record!r}.")
    allowed = {"regex", "signal"} if "regex" in record else {"json", "budget", "objective", "signal"}
    unknown = sorted(set(map(str, record)) - allowed)
    if unknown:
        raise TargetError(f"{path}: `record` has unknown keys {unknown}; known are {', '.join(sorted(allowed))}.")
    if not all(isinstance(value, str) for value in record.values()):
        raise TargetError(f"{path}: the values of `record` must be text, but got {record!r}.")
    if "regex" in record:
        try:
            pattern = re.compile(record["regex"])
        except re.error as error:
            raise TargetError(f"{path}: the regex of `record` is wrong: {error}.") from error
        if pattern.groups != 2 or (pattern.groupindex and set(pattern.groupindex) != {"budget", "objective"}):
            raise TargetError(
                f"{path}: the regex of `record` must have two groups, the budget and the objective, in this order or "
                f"named so, but got {record['regex']!r}."
            )
    name = record.get("signal", DEFAULT_SIGNAL)
    if name not in signal.Signals.__members__:
        raise TargetError(f"{path}: `record`: signal must be the name of one, such as SIGTERM, but got {name!r}.")
    return record


def _read_objective(path: Path, objective: Any) -> dict[str, str]:
    """Check how a shell command tells its objective."""
    if not isinstance(objective, dict) or ("regex" in objective) == ("json" in objective):
        raise TargetError(
            f"{path}: `objective` must be either {{regex: '...(number)...'}} or {{json: result.json, key: name}}, "
            f"but got {objective!r}."
        )
    unknown = sorted(set(map(str, objective)) - {"regex", "json", "key"})
    if unknown:
        raise TargetError(f"{path}: `objective` has unknown keys {unknown}; known are json, key, regex.")
    if not all(isinstance(value, str) for value in objective.values()):
        raise TargetError(f"{path}: the values of `objective` must be text, but got {objective!r}.")
    for key, rule in objective.items():
        if any(ord(sign) < 32 and sign not in "\n\t" for sign in rule):
            raise TargetError(
                f"{path}: `objective`: {key} is {rule!r}: in double quotes YAML turns \\b and the like into one "
                "character. Write it in single quotes."
            )
    if "regex" in objective:
        try:
            groups = re.compile(objective["regex"]).groups
        except re.error as error:
            raise TargetError(f"{path}: the objective's regex is wrong: {error}.") from error
        if groups != 1:
            raise TargetError(f"{path}: the objective's regex must have one group, the number, but has {groups}.")
    return objective


def _read_environment(path: Path, environment: Any, written: Any) -> dict[str, Any]:
    """Check the variables for a shell command; each is handed on as it was written."""
    if environment is None:  # the key with nothing under it
        return {}
    if not isinstance(environment, dict):
        raise TargetError(f"{path}: `environment` must be a mapping of names to values, but got {written!r}.")
    for (name, value), (as_named, as_written) in zip(environment.items(), written.items(), strict=True):
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise TargetError(
                f"{path}: `environment` has {as_named!r} for a name. Letters, digits and _ are allowed, the first no "
                "digit; names that YAML takes for its own, such as NO or on, need quotes."
            )
        if isinstance(value, (dict, list)):
            raise TargetError(f"{path}: `environment`: {name} must be a text or a number, but got {as_written!r}.")
        if strict_yaml.as_text(value, as_written) is None:
            raise TargetError(f"{path}: `environment`: {name} {strict_yaml.misread(as_written)}.")
        if "\0" in str(value):
            raise TargetError(f"{path}: `environment`: {name} holds a NUL, which no variable can.")
    return environment


def command_parameters(spec: Mapping[str, Any]) -> set[str]:
    """Return the hyperparameters that a shell command names."""
    return template_names(spec["command"])


def _identifier(text: str) -> str:
    cleaned = re.sub(r"\W+", "_", text).strip("_") or "run"
    return cleaned if not cleaned[0].isdigit() else f"run_{cleaned}"


# --- what Balsam gets -----------------------------------------------------------------------------------------------


def make_application(spec: Spec, site_id: int, name: str | None = None) -> Any:
    """Return the ApplicationDefinition class that evaluates `spec` at a site."""
    from balsam._api.app import ApplicationDefinition

    class Evaluation(ApplicationDefinition):  # type: ignore[misc]
        """One evaluation of a hyperparameter configuration."""

        site = site_id
        trial_spec = spec

        def run(self, /, **configuration: Any) -> Any:
            # Imported here: the class travels pickled, and what it needs must be found where it arrives
            from deephyper_balsam.node.worker import run_trial

            return run_trial(self, self.trial_spec, configuration)

        # The site's agent calls these; each must leave the same columns (see `worker.even_update`)
        def preprocess(self) -> None:
            from deephyper_balsam.node.worker import even_update

            even_update(self.job, "PREPROCESSED")

        def postprocess(self) -> None:
            from deephyper_balsam.node.worker import even_update

            even_update(self.job, "POSTPROCESSED")

        def handle_timeout(self) -> None:
            from deephyper_balsam.node.worker import even_update

            even_update(self.job, "RESTART_READY")

        def handle_error(self) -> None:
            from deephyper_balsam.node.worker import even_update

            even_update(self.job, "FAILED")

    Evaluation.__name__ = name or spec["name"]
    Evaluation.__doc__ = describe(spec)
    return Evaluation


def describe(spec: Mapping[str, Any]) -> str:
    """Return the application's description in Balsam: what it runs, for people, and a digest of the spec, for us."""
    what = "shell command" if spec["kind"] == "command" else "run function"
    return f"{_DESCRIPTION} {what} {spec['target']} [{_digest(spec)}]"


def _digest(spec: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


def register(gateway: Gateway, spec: Spec, site: str) -> tuple[int, str]:
    """Register the application of `spec` at a site, or find it there; its id and name in Balsam.

    An application with the same name but another spec is left as it is: a running agent has it loaded, and jobs of
    another search may need it. Ours then gets a name with a number.

    Parameters
    ----------
    gateway
        Balsam's API.
    spec
        What is run.
    site
        The site's name.
    """
    site_id = int(gateway.site(site)["id"])
    app_id, name = _find_place(gateway, spec, site_id)
    if app_id is not None:
        return app_id, name
    definition = make_application(spec, site_id, name)
    content = {
        "site_id": site_id,
        "name": name,
        "serialized_class": _serialize(definition),
        "source_code": _source(spec),
        "description": describe(spec),
        "parameters": {},
        "transfers": {},
    }
    try:
        return int(gateway.create_app(content)["id"]), name
    except BalsamError:
        app_id, taken = _find_place(gateway, spec, site_id)
        if app_id is not None:  # another search registered the same at the same moment
            return app_id, taken
        if taken == name:
            raise
        return register(gateway, spec, site)  # it registered another of this name


def _find_place(gateway: Gateway, spec: Spec, site_id: int) -> tuple[int | None, str]:
    """Return the id of the application of `spec` at a site, or None, and its name there."""
    taken = {row["name"]: row for row in gateway.apps(site_id)}
    name, count = spec["name"], 1
    while name in taken and taken[name]["description"] != describe(spec):
        count += 1
        name = f"{spec['name']}_{count}"
    return (int(taken[name]["id"]) if name in taken else None), name


def _serialize(definition: Any) -> str:
    from balsam.schemas import serialize

    return str(serialize(definition))


def _source(spec: Spec) -> str:
    """Return what `balsam app` shows as source: the user's function where it can be read, else the spec."""
    return json.dumps({key: value for key, value in spec.items() if key != "payload"}, indent=2)
