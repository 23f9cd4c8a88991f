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

WORDS = {"errors", "common", "trial"}
"""What every room uses."""

USES = {
    "common": {"errors"},
    "problem": WORDS,
    "optimizers": {*WORDS, "problem"},
    "node": WORDS,
    "store": {*WORDS, "problem", "node"},
    "launcher": {*WORDS, "node", "store"},
    "sites": {*WORDS, "node", "store", "launcher"},
    "server": {*WORDS, "store", "launcher", "sites"},
    "monitor": {*WORDS, "problem", "node", "store", "sites"},
    "results": {*WORDS, "problem", "store", "monitor"},
    "driver": {*WORDS, "problem", "optimizers", "node", "store", "launcher", "sites", "monitor", "results"},
}
"""Which rooms each room may import; `cli` may import any, and no room imports it. docs/design.md has the picture."""

BALSAM = {
    "store.client": {"balsam.client.requests_client"},
    "store.gateway": {"balsam.config", "balsam.client"},
    "store.encoding": {"balsam.schemas"},
    "store.applications": {"balsam._api.app", "balsam.schemas"},
    "store.notes": {"balsam._api.app", "balsam.schemas"},
}
"""What of Balsam a module may import; sites, launcher and server take the place of its own parts and may import any."""
OF_BALSAM = ("sites", "launcher", "server")


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
    room = name_of(file).split(".")[0]
    if room in ("__init__", "__main__", "cli"):
        return
    allowed = USES.get(room, WORDS)  # a module of the top level is a word that all rooms use
    wrong = own(file) - {room} - allowed
    assert not wrong, f"{name_of(file)} imports {sorted(wrong)}, which {room} may not: see docs/design.md"


def test_the_design_shows_the_house_as_it_is() -> None:
    text = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text[text.index("## The house") :].splitlines() if line.startswith("| ")]
    shown = {room.strip(" `/"): {one.strip() for one in uses.split(",")} for room, _, uses in rows[1:]}
    assert shown.pop("cli") == {"all"}
    assert shown.pop("words") == {""}
    told = {room: {"words", *(uses - WORDS)} for room, uses in USES.items() if room != "common"}
    assert shown == told


def test_the_rooms_are_those_of_the_package_and_none_goes_in_a_circle() -> None:
    assert {file.parent.name for file in PACKAGE.glob("*/__init__.py")} == {*USES, "cli"}
    assert {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == WORDS - {"common"}
    seen = {*WORDS}
    for room, below in USES.items():  # in the order in which they stand on each other
        assert below <= seen, room
        seen.add(room)


def test_what_runs_on_a_node_stands_on_little() -> None:
    for file in (PACKAGE / "node").glob("*.py"):
        if file.stem not in ("preflight", "__init__"):
            assert own(file) <= {"errors", "common", "node"}, file.stem


@pytest.mark.parametrize("package", ["skopt", "sklearn"])
def test_scikit_optimize_and_scikit_learn_have_one_importer(package: str) -> None:
    importers = {name_of(file) for file in FILES if foreign(file, package)}
    surrogates = {f"optimizers.surrogates.{part}" for part in ("forest", "boosted", "gaussian_process", "export")}
    assert importers <= surrogates | {"results.analysis.importance"}


def test_what_a_search_found_is_looked_at_without_balsam() -> None:
    for file in (PACKAGE / "results" / "analysis").glob("*.py"):
        assert own(file) <= {*WORDS, "problem", "results", "monitor"}
        assert not foreign(file, "balsam")


def test_the_drawing_library_has_one_importer() -> None:
    assert {name_of(file) for file in FILES if foreign(file, "vl_convert")} == {"results.analysis.drawing"}


def test_pandas_has_one_importer() -> None:
    assert {name_of(file) for file in FILES if foreign(file, "pandas")} <= {"results.table"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_what_of_balsam_a_module_may_import(file: Path) -> None:
    found = foreign(file, "balsam")
    if name_of(file).split(".")[0] in OF_BALSAM:
        return
    allowed = BALSAM.get(name_of(file), set())
    wrong = {name for name in found if not any(name == one or name.startswith(f"{one}.") for one in allowed)}
    assert not wrong


def test_balsams_client_has_no_importer_but_the_gateway_and_the_sites() -> None:
    importers = {name_of(file) for file in FILES if any(name.startswith(CLIENT) for name in foreign(file, "balsam"))}
    assert {name for name in importers if not name.startswith(OF_BALSAM)} == {"store.gateway", "store.client"}
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


LIGHT = ("", ".node.worker", ".store.connection", ".store.gateway", ".cli", ".cli.search", ".driver.balsam_session")


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    assert not HEAVY & set(loaded_after(f"import deephyper_balsam{module}"))


def test_help_loads_nothing_of_what_its_commands_need() -> None:
    called = "import contextlib, io, deephyper_balsam.cli as cli\nwith contextlib.redirect_stdout(io.StringIO()):\n"
    called += "    cli.main.main(['--help'], standalone_mode=False)"
    assert not {*HEAVY, "psutil", "requests", "jinja2"} & set(loaded_after(called))


def test_making_an_optimizers_module_known_does_not_load_scikit_optimize() -> None:
    assert "skopt" not in loaded_after("import deephyper_balsam.optimizers, deephyper_balsam.optimizers.base")


def test_public_names_are_found_and_unknown_ones_are_not() -> None:
    import deephyper_balsam

    for name in deephyper_balsam.__all__:
        assert getattr(deephyper_balsam, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Hpproblem'"):
        deephyper_balsam.Hpproblem  # noqa: B018


def test_what_can_be_taken_from_the_package_is_listed() -> None:
    import deephyper_balsam

    assert set(deephyper_balsam.__all__) <= set(dir(deephyper_balsam))


def test_importing_touches_neither_signals_nor_logging_nor_the_environment(tmp_path: Path) -> None:
    code = """
import logging, os, signal, sys
before = (dict(os.environ), [signal.getsignal(n) for n in (2, 14, 15)], logging.root.handlers[:], sys.excepthook)
import deephyper_balsam.node.worker, deephyper_balsam.driver.search, deephyper_balsam.driver.balsam_session
after = (dict(os.environ), [signal.getsignal(n) for n in (2, 14, 15)], logging.root.handlers[:], sys.excepthook)
sys.exit(before != after)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, timeout=60, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_are_read_at_one_sitting(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno is not None
            assert node.end_lineno - first.lineno < 60, f"{node.name}: 60 lines below its docstring are the most"
