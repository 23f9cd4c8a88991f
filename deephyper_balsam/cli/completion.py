"""`deephyper-balsam completion`: what a shell needs to complete the commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands and options; load it in its start file.

    \b
    Example:
      eval "$(deephyper-balsam completion bash)"                                             # ~/.bashrc; zsh: ~/.zshrc
      deephyper-balsam completion fish > ~/.config/fish/completions/deephyper-balsam.fish
    """
    from deephyper_balsam.cli import main

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "deephyper-balsam", "_DEEPHYPER_BALSAM_COMPLETE").source())
