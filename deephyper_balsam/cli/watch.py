"""`deephyper-balsam search watch`: a search that somebody else drives, live."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.cli.common import Finite
from deephyper_balsam.errors import NotLoggedInError, UnreachableError

if TYPE_CHECKING:
    from deephyper_balsam.cli.progress import LiveView
    from deephyper_balsam.monitor.follower import Follower
    from deephyper_balsam.monitor.search_snapshot import SearchSnapshot
    from deephyper_balsam.store.gateway import Gateway

_LONGEST_PAUSE_S = 30.0


@click.command()
@click.argument("name")
@click.option(
    "--every",
    "every_s",
    type=Finite(min=0.2, max=3600),
    default=2.0,
    show_default=True,
    help="Seconds from one look to the next.",
)
@click.option("--follow", is_flag=True, help="Stay when the search is complete: it may be extended.")
def watch(name: str, every_s: float, follow: bool) -> None:
    """Show the search NAME live, from any machine with the login. It changes nothing; Ctrl-C leaves it.

    A screen with the best objective over time, running trials, last results, failures and allocations; lines where the
    output is no terminal. It ends by itself when the search is complete and nobody drives it.

    \b
    Example:
      deephyper-balsam search watch digits-1
    """
    from deephyper_balsam.cli.progress import LiveView, live_console
    from deephyper_balsam.cli.screen import one_line
    from deephyper_balsam.monitor.follower import Follower
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.record import find_record

    def end(_signum: int, _frame: Any) -> None:
        raise KeyboardInterrupt  # as Ctrl-C: the terminal gets its own screen back

    logging.getLogger("deephyper_balsam").addHandler(logging.NullHandler())  # the screen says it
    gateway = Gateway()
    follower = Follower(gateway, find_record(gateway, name))
    console = live_console()
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with LiveView(console) as view:
            snapshot = _patiently(gateway, follower, view)
            while True:
                view.show(snapshot)
                if snapshot.complete and not follow:
                    break
                time.sleep(every_s)
                snapshot = _patiently(gateway, follower, view)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if console.is_terminal:
        click.echo(one_line(snapshot))
    click.echo(f"The search {name} is complete: deephyper-balsam search best {name}")


def _patiently(gateway: Gateway, follower: Follower, view: LiveView) -> SearchSnapshot:
    """Look until Balsam answers, with pauses that grow; what was shown last stays meanwhile."""
    pause_s = 1.0
    while True:
        try:
            snapshot = follower.look()
        except (UnreachableError, NotLoggedInError) as error:
            view.note(f"{error} Trying again.")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            with contextlib.suppress(NotLoggedInError):  # still not: the next look says so
                gateway.reconnect()
        else:
            view.note(None)
            return snapshot
