"""`deephyper-balsam standalone`: what a batch script calls for a search with all that it needs in its allocation."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from deephyper_balsam.errors import InputError
from deephyper_balsam.launcher.main import launcher_arguments, signals_received


def default_folder(name: str) -> Path:
    """Return the stack's folder of a search that is not told where."""
    return Path(f"{name}.balsam")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Balsam's folder. [default: ./NAME.balsam]")
@click.option(
    "--config", default="slurm", show_default=True, help="The machine: a name from `site configs`, or a folder."
)
@click.option("-A", "--project", help="What the site charges, where its config says YOUR_PROJECT.")
@click.option("-q", "--queue", help="Where it submits, where its config says YOUR_PARTITION or YOUR_QUEUE.")
@click.option("--chain", type=click.IntRange(min=0), default=0, help="So many batch jobs follow this one. [default: 0]")
@click.option("-t", "--wall-time-min", type=click.IntRange(min=1), help="Its minutes. [default: the scheduler says]")
@click.option(
    "-j",
    "--job-mode",
    type=click.Choice(["mpi", "serial"]),
    default="mpi",
    show_default=True,
    help="Balsam's launcher mode.",
)
@click.option(
    "--poll-s", type=click.FloatRange(min=0.05), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--spare-first-node", is_flag=True, help="Run no evaluation on the first node, where all else runs.")
@click.option("--tag", "tags", multiple=True, hidden=True)
@click.argument("name")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def standalone(
    name: str,
    options: Sequence[str],
    folder: Path | None,
    config: str,
    project: str | None,
    queue: str | None,
    chain: int,
    wall_time_min: int | None,
    **launcher: Any,
) -> None:
    """Run the search NAME in this allocation, with a Balsam server, site and agent of its own: nothing runs outside.

    A batch script calls it on the first node. OPTIONS are those of `search run`, but for the site and its allocation.
    Before the wall time all ends in order, and the next batch job with the same folder goes on.

    \b
    Example:
      deephyper-balsam standalone --config slurm -j mpi digits-1 --problem digits --max-evals 500
    """
    began = time.monotonic()
    asked = signals_received()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("deephyper_balsam").setLevel(logging.INFO)

    from deephyper_balsam.server.stack import LocalStack
    from deephyper_balsam.server.standalone import SEARCH_FILE, Allocation, Standalone, exit_code

    where = (folder or default_folder(name)).absolute()
    given = list(options)
    if not given and (where / SEARCH_FILE).is_file():
        given = ["--file", str(where / SEARCH_FILE)]
    if not given and not (where / "stack.json").exists():
        raise InputError(f"A new search needs the options of `search run` after its name, such as {name} --problem P.")
    allocation = Allocation.here(config)
    ends_at = began + allocation.left_s(wall_time_min)
    stack = LocalStack(where, say=lambda line: click.echo(line, err=True))
    click.echo(f"Batch job {allocation.id}: the search {name} on {allocation.nodes} nodes, with Balsam in {where}")

    def command(minutes: int) -> list[str]:
        return [*launcher_arguments(wall_time_min=minutes, parts=(), loopback=False, **launcher), name, *given]

    whole = Standalone(stack, name, allocation, lambda: bool(asked))
    code = whole.run(command, ends_at, config=config, project=project, queue=queue)
    raise click.exceptions.Exit(exit_code(code, chain))
