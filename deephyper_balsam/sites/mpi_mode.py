"""Balsam's MPI mode with a polling interval below one second, which its settings cannot express.

After a run ends, the next one starts up to two polls later: at Balsam's one second that is longer than many local runs.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator

POLL_VARIABLE = "DEEPHYPER_BALSAM_POLL_S"


def main() -> None:
    """Run Balsam's MPI mode, polling each $DEEPHYPER_BALSAM_POLL_S seconds."""
    from balsam.site.launcher import _mpi_mode
    from balsam.site.launcher.util import countdown_timer_min

    poll_s = float(os.environ.get(POLL_VARIABLE, "1"))

    def timer(time_limit_min: int, delay_sec: int) -> Iterator[float]:
        return countdown_timer_min(time_limit_min, min(poll_s, delay_sec))  # type: ignore[no-any-return]

    _mpi_mode.countdown_timer_min = timer
    _mpi_mode.main()


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)
    main()
