"""The start of the two scripts that are a launcher's modes, `mpi_mode.py` and `serial_mode.py`."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from deephyper_balsam.errors import BalsamChangedError


def run(main: Callable[[], None]) -> str | None:
    """Be a mode: call `main` in a process as Balsam's modes need it.

    Parameters
    ----------
    main
        Makes the patches and calls Balsam's mode.

    Returns
    -------
    str or None
        What to leave with: the error when Balsam is not the one that the patches fit, else None.
    """
    forget_own_folder()
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the launcher hears it, and ends this mode in order
    try:
        main()
    except BalsamChangedError as error:
        return f"Error: {error}"
    return None


def forget_own_folder() -> None:
    """Take the script's folder from where modules are looked for: a user's ``main`` or ``applications`` is not ours."""
    own = str(Path(__file__).parent)
    sys.path[:] = [folder for folder in sys.path if folder != own]
