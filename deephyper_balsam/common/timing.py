"""How often a driver looks and speaks, and how long it waits before it draws a conclusion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """The intervals of a driver, in seconds. What drivers must agree on among themselves is not here (`store.lease`).

    Attributes
    ----------
    heartbeat_s
        Between two signs of life; one that is taken over gets twice as long to notice.
    allocations_s
        Between two looks at the allocations of a site.
    deleted_jobs_s
        Between two looks for jobs that were deleted in Balsam.
    lost_answer_s
        So long after the answer to a request was lost, what was asked for may still be done.
    orphan_s
        A job that is RUNNING and that no launcher holds goes back to the queue after so long.
    stands_s
        A site where no trial begins for so long, though one could, is spoken of.
    """

    heartbeat_s: float = 5.0
    allocations_s: float = 3.0
    deleted_jobs_s: float = 20.0
    lost_answer_s: float = 90.0
    orphan_s: float = 30.0
    stands_s: float = 60.0


USUAL = Timing()
"""The intervals of a driver unless it is told others."""
