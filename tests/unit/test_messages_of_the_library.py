"""What the library says is read from Python and from the command line: beside an option stands the argument's name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from deephyper_balsam.cli import main

PACKAGE = Path(__file__).parents[2] / "deephyper_balsam"
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.relative_to(PACKAGE).parts[0] not in ("cli",)]

# Where the argument in Python is called otherwise than the option
ARGUMENTS = {"--warm-start-direction": "direction", "--num-nodes-per-eval": "num_nodes"}
COMMAND = re.compile(r"`(deephyper-balsam|balsam|search|server|pip|balsam-\w+) [^`]*`")


@cache
def options() -> frozenset[str]:
    """Return every option of the command line that an argument in Python answers to."""

    def of(command: click.Command, context: click.Context) -> Iterator[str]:
        for parameter in command.params:
            yield from (word for word in (*parameter.opts, *parameter.secondary_opts) if word.startswith("--"))
        for name in command.list_commands(context) if isinstance(command, click.Group) else ():
            below = command.get_command(context, name)
            assert below is not None
            yield from of(below, click.Context(below, parent=context))

    return frozenset(of(main, click.Context(main)))


def sentences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the texts of a module that are no docstrings; what is filled in is left out."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    silent: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr):
            silent.add(id(node.body[0].value))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            silent.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            silent.update(id(part) for part in ast.walk(node) if part is not node)
    for node in ast.walk(tree):
        if id(node) in silent:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )


def lone_options(text: str) -> list[str]:
    """Return the options of ours that a sentence names without the argument in Python."""
    said = COMMAND.sub("", text)
    if len(said.split()) < 5 or "deephyper-balsam " in said:  # a word for a command, or a command as a whole
        return []
    found = dict.fromkeys(word for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", said) if word in options())
    named = {option: ARGUMENTS.get(option, option[2:].replace("-", "_")) for option in found}
    return [option for option, name in named.items() if not re.search(rf"`{name}\b", said)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_message_that_names_an_option_names_the_argument_too(file: Path) -> None:
    texts = sentences(ast.parse(file.read_text(encoding="utf-8")))
    found = [f"{line}: {', '.join(lone)} in {text!r}" for line, text in texts if (lone := lone_options(text))]
    assert not found


def test_the_scan_sees_what_it_is_for() -> None:
    assert lone_options("ask for a longer --wall-time-min, or give an --eval-timeout") == [
        "--wall-time-min",
        "--eval-timeout",
    ]
    assert lone_options("ask for a longer `wall_time_min`, --wall-time-min, and so on") == []
    assert lone_options("Start it again with `deephyper-balsam server up --takeover` when it is gone.") == []
    source = (
        'def f(n):\n    """Not --seed here, a docstring."""\n    raise E(f"{n} is too small, give a larger --seed")\n'
    )
    assert [lone_options(text) for _, text in sentences(ast.parse(source))] == [["--seed"]]
