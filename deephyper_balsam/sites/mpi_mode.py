"""Balsam's MPI mode that ends when it should, and polls more often than its settings can express.

After a run ends, the next one starts up to two polls later: at Balsam's one second that is longer than many local runs.
"""

from __future__ import annotations

import multiprocessing
import os

from deephyper_balsam.sites.ending import mend_mpi_mode

POLL_VARIABLE = "DEEPHYPER_BALSAM_POLL_S"


def main() -> None:
    """Run Balsam's MPI mode, polling each $DEEPHYPER_BALSAM_POLL_S seconds."""
    from balsam.site.launcher import _mpi_mode

    mend_mpi_mode(float(os.environ.get(POLL_VARIABLE, "1")))
    _mpi_mode.main()


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)
    main()
