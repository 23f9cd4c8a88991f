"""The command line `deephyper-balsam`: one file a group of commands.

It parses, builds, calls, and maps errors to exit codes. Only here the package prints, prompts and exits.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any

import click

from deephyper_balsam.errors import BalsamError, DeepHyperBalsamError, InputError, TakenOverError

EXIT_NO_RESULT = 1
EXIT_BAD_INPUT = 2
EXIT_NO_BALSAM = 3
EXIT_INTERRUPTED = 130

# command -> the module under deephyper_balsam.cli whose function of the same name it is; imported only when called
_COMMANDS = {
    "quickstart": "quickstart",
    "server": "server",
    "site": "site",
    "app": "app",
    "problem": "problem",
    "search": "search",
    "simulate": "simulate",
    "modulefile": "modulefile",
    "completion": "completion",
}


class _LazyGroup(click.Group):
    """Imports a command's module when it is called, so that `--help` is quick; turns our errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"deephyper_balsam.cli.{_COMMANDS[cmd_name]}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        logging.getLogger("balsam.client").setLevel(logging.ERROR)  # its warnings say again what our errors say
        try:
            return super().invoke(ctx)
        except InputError as error:
            _say(error)
            ctx.exit(EXIT_BAD_INPUT)
        except BalsamError as error:
            _say(error)
            ctx.exit(EXIT_NO_BALSAM)
        except TakenOverError as error:
            _say(error)
            ctx.exit(EXIT_INTERRUPTED)
        except DeepHyperBalsamError as error:
            _say(error)
            ctx.exit(EXIT_NO_RESULT)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def _say(error: Exception) -> None:
    from deephyper_balsam.cli.faq import pointer

    click.echo(f"Error: {error}", err=True)
    where = pointer(str(error))
    if where is not None:
        click.echo(f"See {where}", err=True)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="deephyper-balsam", prog_name="deephyper-balsam")
def main() -> None:
    """Search the hyperparameters of deep networks asynchronously, through Balsam, from laptop to supercomputer.

    \b
    Example:
      deephyper-balsam quickstart
    """


if __name__ == "__main__":
    sys.exit(main())
