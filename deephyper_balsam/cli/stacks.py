"""The stack that a command of `deephyper-balsam server` is for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deephyper_balsam.errors import InputError

if TYPE_CHECKING:
    from deephyper_balsam.server.stack import LocalStack

directory = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default="balsam",
    show_default="./balsam",
    help="The folder that holds all of it.",
)


def stack_in(folder: Path) -> LocalStack:
    """Return the stack of a folder, whether it exists or not."""
    from deephyper_balsam.server.stack import LocalStack

    return LocalStack(folder, say=lambda line: click.echo(line, err=True))


def existing_stack(folder: Path) -> LocalStack:
    """Return the stack of a folder.

    Raises
    ------
    InputError
        When none was ever started there.
    """
    stack = stack_in(folder)
    if not stack.exists:
        raise InputError(
            f"There is no Balsam server in {stack.folder}. Start one with "
            f"`deephyper-balsam server up --dir {shlex.quote(str(folder))}`, or name its folder with --dir."
        )
    return stack
