"""The rules of the house (docs/design.md), read from the source: which way imports point, and what an import costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "deephyper_balsam"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up; a part imports what stands below it, and within itself. A new module takes its place here.
FLOORS = (
    {"errors", "resources", "process_id", "faults"},
    {"trial", "targets", "command"},
    {"columns", "gateway", "supervise"},
    {"space", "shorthands", "jobs", "worker", "watch"},
    {"problem", "notes", "allocations"},
    {"record", "drivers", "picture", "archive"},
    {"orders", "ledger"},
    {"apps", "results", "traces", "optimizers", "sites", "rehearsal", "warm_start"},
    {"evaluators"},
    {"search", "simulation", "following"},
    {"analysis"},
    {"cli"},
    {"__main__"},
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}

BALSAM = {
    "gateway": {"balsam.config", "balsam.client", "balsam.schemas"},
    "apps": {"balsam._api.app", "balsam.schemas"},
    "notes": {"balsam._api.app", "balsam.schemas"},
}
"""What of Balsam a module may import; sites/ takes the place of Balsam's own parts and may import any."""


def name_of(file: Path) -> str:
    """Return a module's dotted name within the package; the package itself is ``__init__``."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def imports(file: Path) -> frozenset[str]:
    """Return the dotted names that a file imports anywhere; without those that only a type checker sees."""
    return frozenset(_imports(file))


def _imports(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(inner for child in node.body for inner in ast.walk(child))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            below = PACKAGE.parent.joinpath(*node.module.split("."))
            for alias in node.names:
                is_module = (below / f"{alias.name}.py").is_file() or (below / alias.name).is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def own(file: Path) -> set[str]:
    """Return the parts of this package that a file imports: top-level modules and folders."""
    found = {name.split(".")[1] for name in imports(file) if name.startswith("deephyper_balsam.")}
    if name_of(file) != "__init__":
        assert "deephyper_balsam" not in imports(file) or name_of(file).startswith("cli"), f"{file}: imports itself"
    return found


def foreign(file: Path, package: str) -> set[str]:
    return {name for name in imports(file) if name.split(".")[0] == package}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_one_way(file: Path) -> None:
    part = name_of(file).split(".")[0]
    if part == "__init__":
        pytest.skip("names the public modules, and loads them when they are used")
    assert part in FLOOR, f"{part} has no place in the house: add it to FLOORS"
    wrong = {other for other in own(file) - {part} if FLOOR.get(other, 99) >= FLOOR[part]}
    assert not wrong, f"{name_of(file)} imports {sorted(wrong)}, which do not stand below it"


def test_every_part_of_the_house_exists() -> None:
    there = {name_of(file).split(".")[0] for file in FILES}
    assert set(FLOOR) <= there


@pytest.mark.parametrize("file", sorted((PACKAGE / "optimizers").glob("*.py")), ids=name_of)
def test_optimizers_know_neither_balsam_nor_where_trials_run(file: Path) -> None:
    assert own(file) <= {"errors", "trial", "columns", "space", "shorthands", "problem", "optimizers"}
    assert not foreign(file, "balsam")


def test_the_driver_knows_two_seams_and_not_what_is_behind_them() -> None:
    assert own(PACKAGE / "search.py") <= {
        "errors",
        "faults",
        "trial",
        "problem",
        "optimizers",
        "evaluators",
        "results",
    }


@pytest.mark.parametrize("name", ["base", "simulated"])
def test_evaluators_other_than_balsams_do_not_know_balsam(name: str) -> None:
    assert own(PACKAGE / "evaluators" / f"{name}.py") <= {"errors", "trial", "worker"}


def test_what_runs_on_a_node_stands_on_little() -> None:
    assert own(PACKAGE / "worker.py") <= {"errors", "faults", "targets", "command", "supervise"}
    assert own(PACKAGE / "supervise.py") == {"command"}
    assert own(PACKAGE / "faults.py") == set()
    assert own(PACKAGE / "targets.py") == {"errors"}
    assert own(PACKAGE / "command.py") == set()


@pytest.mark.parametrize("package", ["skopt", "sklearn"])
def test_scikit_optimize_and_scikit_learn_have_one_importer(package: str) -> None:
    importers = {name_of(file) for file in FILES if foreign(file, package)}
    surrogates = {f"optimizers.surrogates.{part}" for part in ("forest", "boosted", "gaussian_process", "export")}
    assert importers <= surrogates | {"analysis.importance"}


def test_what_a_search_found_is_looked_at_without_balsam() -> None:
    for file in (PACKAGE / "analysis").glob("*.py"):
        assert own(file) <= {"errors", "trial", "columns", "problem", "results", "ledger", "analysis"}
        assert not foreign(file, "balsam")


def test_the_drawing_library_has_one_importer() -> None:
    assert {name_of(file) for file in FILES if foreign(file, "vl_convert")} == {"analysis.drawing"}


def test_pandas_has_one_importer() -> None:
    assert {name_of(file) for file in FILES if foreign(file, "pandas")} <= {"results"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_what_of_balsam_a_module_may_import(file: Path) -> None:
    found = foreign(file, "balsam")
    if name_of(file).split(".")[0] == "sites":
        return
    allowed = BALSAM.get(name_of(file), set())
    wrong = {name for name in found if not any(name == one or name.startswith(f"{one}.") for one in allowed)}
    assert not wrong


def test_balsams_client_has_no_importer_but_the_gateway_and_the_sites() -> None:
    importers = {name_of(file) for file in FILES if any(name.startswith(CLIENT) for name in foreign(file, "balsam"))}
    assert {name for name in importers if not name.startswith("sites.")} == {"gateway"}
    assert not {name_of(file) for file in FILES if "balsam.api" in foreign(file, "balsam")}  # it logs in when imported


CLIENT = ("balsam.client", "balsam.config", "balsam.api", "balsam._api.models")


def calls(file: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_the_command_line_prompts_and_exits(file: Path) -> None:
    is_program = 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")  # started by Balsam or by us
    if is_program or name_of(file).split(".")[0] in ("cli", "__main__"):
        return
    named = {ast.unparse(call.func) for call in calls(file)}
    assert not named & {"input", "sys.exit", "exit", "quit", "click.echo", "click.prompt"}


def loaded_after(statement: str) -> list[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    found: list[str] = json.loads(ended.stdout)
    return found


HEAVY = {"pandas", "skopt", "ConfigSpace", "sklearn", "balsam", "scipy", "numpy", "matplotlib", "torch", "rich"}


@pytest.mark.parametrize(
    "module",
    ["deephyper_balsam", "deephyper_balsam.worker", "deephyper_balsam.gateway", "deephyper_balsam.cli", "balsam_free"],
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    if module == "balsam_free":  # what the evaluator needs, until it is made
        module = "deephyper_balsam.evaluators.balsam"
    assert not HEAVY & set(loaded_after(f"import {module}"))


def test_making_an_optimizers_module_known_does_not_load_scikit_optimize() -> None:
    assert "skopt" not in loaded_after("import deephyper_balsam.optimizers, deephyper_balsam.optimizers.base")


def test_public_names_are_found_and_unknown_ones_are_not() -> None:
    import deephyper_balsam

    for name in deephyper_balsam.__all__:
        assert getattr(deephyper_balsam, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Hpproblem'"):
        deephyper_balsam.Hpproblem  # noqa: B018


def test_importing_touches_neither_signals_nor_logging_nor_the_environment(tmp_path: Path) -> None:
    code = """
import logging, os, signal, sys
before = (dict(os.environ), [signal.getsignal(n) for n in (2, 14, 15)], logging.root.handlers[:], sys.excepthook)
import deephyper_balsam, deephyper_balsam.worker, deephyper_balsam.search, deephyper_balsam.evaluators.balsam
after = (dict(os.environ), [signal.getsignal(n) for n in (2, 14, 15)], logging.root.handlers[:], sys.excepthook)
sys.exit(before != after)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, timeout=60, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == []
