"""The process from which runs are forked (`forking.py`), and its start: before Balsam is loaded, to do both at once."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.util
import os
import shutil
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

from deephyper_balsam.common import scratch

FORK_VARIABLE = "DEEPHYPER_BALSAM_FORK"
PRELOADED = ["deephyper_balsam.launcher.preloaded"]


def start() -> None:
    """Let the fork server begin to load what runs need, unless runs are not to be forked; it returns at once."""
    if os.environ.get(FORK_VARIABLE, "1") != "0":
        context()
        forkserver.ensure_running()


def context() -> ForkServerContext:
    """Return the context of `multiprocessing` whose processes are forked from the server."""
    _keep_private()
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)
    return made


@functools.cache
def _keep_private() -> None:
    """Let the fork server's socket lie in a folder that only this user may enter, and that is removed in any case.

    Whoever reaches the socket makes the server run his code. Python 3.10.0 to 3.10.8 and 3.11.0 take an abstract
    socket, which every account of the machine reaches (CVE-2022-42919).
    """
    multiprocessing.util.abstract_sockets_supported = False  # type: ignore[misc]
    usual, folder = tempfile.tempdir, scratch.make()
    # After multiprocessing has removed its own in there
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-200)
    tempfile.tempdir = str(folder)
    try:
        multiprocessing.util.get_temp_dir()  # kept for as long as this process lives
    finally:
        tempfile.tempdir = usual
