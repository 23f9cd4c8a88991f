"""The command line `deephyper-balsam`: one file a group of commands.

It parses, builds, calls, and maps errors to exit codes. Only here the package prints, prompts and exits.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import click

from deephyper_balsam.cli.streams import printable_streams
from deephyper_balsam.errors import BalsamError, DeepHyperBalsamError, InputError, TakenOverError

EXIT_NO_RESULT = 1
EXIT_BAD_INPUT = 2
EXIT_NO_BALSAM = 3
EXIT_INTERRUPTED = 130

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# What `--help` says of each command, so that it imports none of them; each has a module of its name in this folder
_COMMANDS = {
    "quickstart": "Start a Balsam server, site and launcher in one folder, search a network on real data, stop what "
    "was started.",
    "server": "Run a Balsam server of your own on this machine: PostgreSQL, Balsam's API, a site and its agent.",
    "site": "Set up Balsam sites: the place on a machine where jobs run.",
    "app": "Register run functions and shell commands as Balsam applications.",
    "problem": "Begin a problem, look at it, and try it before it costs node-hours.",
    "search": "Run searches and look at them.",
    "standalone": "Run the search NAME in this allocation, with a Balsam server, site and agent of its own: nothing "
    "runs outside.",
    "simulate": "Search on a virtual clock: how busy would N workers be, and what would be found? Nothing is sent "
    "anywhere.",
    "modulefile": "Print a module file for this installation: put it where `module` looks, and `module load deephyper` "
    "finds it.",
    "completion": "Print what makes SHELL complete commands and options; load it in its start file.",
}


class Group(click.Group):
    """Lists its commands with their whole first sentence, over as many lines as that takes."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = list(self.summaries(ctx).items())
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def summaries(self, ctx: click.Context) -> dict[str, str]:
        """Return what is said of each command."""
        found = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        return {name: one.get_short_help_str(1000) for name, one in found.items() if one is not None and not one.hidden}


class _LazyGroup(Group):
    """Imports a command's module when it is called, so that `--help` is quick; turns our errors into exit codes."""

    def summaries(self, ctx: click.Context) -> dict[str, str]:
        """Return what is said of each command, without importing it."""
        return dict(_COMMANDS)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"deephyper_balsam.cli.{cmd_name}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def main(self, *arguments: Any, **more: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal in Latin-1 shows what it lacks as \u5149
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*arguments, **more)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            give_up_the_output()
            with contextlib.suppress(OSError):  # it may be the one that is full
                click.echo(f"Error: {error.filename or 'The output'} cannot be written: {error.strerror}.", err=True)
            sys.exit(EXIT_BAD_INPUT)
        finally:
            give_up_the_output()

    def invoke(self, ctx: click.Context) -> Any:
        ctx.with_resource(printable_streams())
        logging.getLogger("balsam.client").setLevel(logging.ERROR)  # its warnings say again what our errors say
        try:
            with _signals_interrupt():
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
            try:
                click.echo("Interrupted.", err=True)
            except OSError:  # the terminal has gone
                give_up_the_output()
            ctx.exit(EXIT_INTERRUPTED)


def ends_by() -> list[signal.Signals]:
    """Return the signals that end a command in order: SIGHUP too, which a terminal that closes sends, if not ignored.

    Under `nohup` it is ignored, and stays so.
    """
    heard = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, *heard]


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: what it started is stopped, the terminal is as it was."""

    def ring(number: int, _frame: Any) -> None:
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)  # kernel and shell may both say it: it must not cut the tidying
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in ends_by()}
    for number in [number for number, handler in before.items() if handler is signal.SIG_DFL]:
        signal.signal(number, ring)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def give_up_the_output() -> None:
    """Lead nowhere what cannot be written: Python would fail at it once more when it ends, and exit with 120."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None:
            continue
        try:
            stream.flush()
        except ValueError:  # closed: nothing is held
            continue
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


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
