"""Balsam's MPI mode that ends when it should, and polls more often than its settings can express.

After a run ends, the next one starts up to two polls later: at Balsam's one second that is longer than many local runs.
"""

from __future__ import annotations

import os
import sys

from deephyper_balsam.launcher import fork_server, script
from deephyper_balsam.launcher.applications import tolerate_applications
from deephyper_balsam.launcher.wall_time import keep_wall_time_in_mpi_mode

LOOPBACK_VARIABLE = "DEEPHYPER_BALSAM_LOOPBACK"
POLL_VARIABLE = "DEEPHYPER_BALSAM_POLL_S"


def main() -> None:
    """Run Balsam's MPI mode, polling each $DEEPHYPER_BALSAM_POLL_S seconds."""
    if os.environ.get(LOOPBACK_VARIABLE):  # elsewhere a program of the batch system starts the runs
        fork_server.start()
    from balsam.site.launcher import _mpi_mode

    keep_wall_time_in_mpi_mode(float(os.environ.get(POLL_VARIABLE, "1")))
    tolerate_applications()
    _mpi_mode.main()


if __name__ == "__main__":
    sys.exit(script.run(main))
