"""Write docs/cli.md from the commands' own help: ``python docs/make_cli.py``.

It reads click's parameters rather than what click prints, which changes between its versions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from deephyper_balsam.cli import main

PAGE = Path(__file__).with_name("cli.md")
PROGRAM = "deephyper-balsam"
_INTRO = """\
# Commands

Made from the commands' own `--help` by `python docs/make_cli.py`.

Exit codes: 0 done; 1 the search ended without one good result; 2 bad input, nothing was changed; 3 Balsam unreachable
or not logged in; 130 interrupted. Commands find Balsam by `BALSAM_CLIENT_PATH`, else by `~/.balsam/client.yml`.
"""


def walk(command: click.Command = main, path: tuple[str, ...] = (PROGRAM,)) -> Iterator[tuple[str, click.Command]]:
    """Return the command and all below it, each with the words that call it."""
    yield " ".join(path), command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from walk(below, (*path, name))


def section(path: str, command: click.Command) -> str:
    """Return the section of one command."""
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    usage = [path, *([] if isinstance(command, click.Group) else ["[OPTIONS]"])]
    usage += [f"[{p.human_readable_name}]" if not p.required else p.human_readable_name for p in arguments]
    if isinstance(command, click.Group):
        usage.append("COMMAND")
    text, _, example = inspect.cleandoc(command.help or "").replace("\b\n", "").partition("Example:")
    parts = [f"## {path}\n", f"`{' '.join(usage)}`\n", text.strip() + "\n"]
    rows = [_row(p) for p in command.params if isinstance(p, click.Option)]
    if rows:
        parts.append("\n".join(["| option | values | |", "|---|---|---|", *rows]) + "\n")
    if example.strip():
        parts.append(f"```sh\n{inspect.cleandoc(example)}\n```\n")
    return "\n".join(parts)


def _row(option: click.Option) -> str:
    said = option.help or ""
    if option.required:
        said += " Required."
    if option.show_default and not option.is_flag:
        shown = option.show_default if isinstance(option.show_default, str) else option.default
        said += f" [default: {shown}]"
    cells = (", ".join(f"`{name}`" for name in option.opts), "" if option.is_flag else _values(option.type), said)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(kind: click.ParamType) -> str:
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    whole = isinstance(kind, (click.IntRange, type(click.INT)))
    number = "whole number" if whole else "number"
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        return f"{number} {'>' if kind.min_open else '>='} {kind.min}"
    if whole or isinstance(kind, type(click.FLOAT)):
        return number
    return "path" if isinstance(kind, click.Path) else "text"


def render() -> str:
    """Return the text of docs/cli.md."""
    commands = [(path, command) for path, command in walk() if path != PROGRAM]
    contents = "".join(f"- [{path}](#{path.replace(' ', '-')})\n" for path, _ in commands)
    return "\n".join([_INTRO, contents, *(section(path, command) for path, command in commands)])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
