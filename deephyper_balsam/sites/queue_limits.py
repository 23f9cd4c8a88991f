"""What a queue of a site allows, also where it depends on the number of nodes: wall times, fewest and most nodes.

Balsam knows of each queue the most nodes, minutes and jobs. Many machines allow small jobs less time than large ones.
A site says so in its `settings.yml`, beside what Balsam reads there::

    prod:
        max_nodes: 496
        max_queued_jobs: 100
        max_walltime: 1440
        min_nodes: 10
        max_walltime_from_nodes: {10: 180, 25: 360, 100: 1440}  # minutes, from so many nodes on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import InputError, SettingsError
from deephyper_balsam.store.gateway import Row

_SITE_ID_FILE, _SETTINGS_FILE = ".balsam-site", "settings.yml"
_STEPS, _FEWEST = "max_walltime_from_nodes", "min_nodes"


@dataclass(frozen=True)
class QueueLimits:
    """What one queue allows a job.

    Attributes
    ----------
    queue
        Its name.
    min_nodes, max_nodes
        The fewest and the most nodes.
    max_wall_time_min
        The longest wall time of any job.
    steps
        ``(nodes, minutes)`` in rising order of nodes: a job of so many nodes or more, up to the next step, gets at most
        so many minutes.
    """

    queue: str
    max_nodes: int
    max_wall_time_min: int
    min_nodes: int = 1
    steps: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise SettingsError(
                f"Queue {self.queue}: `1 <= min_nodes <= max_nodes` must hold, but got (min_nodes={self.min_nodes}, "
                f"max_nodes={self.max_nodes})."
            )
        beyond = [step for step in self.steps if step[0] > self.max_nodes or not 1 <= step[1] <= self.max_wall_time_min]
        if beyond:
            raise SettingsError(
                f"Queue {self.queue}: each step of {_STEPS} must have at most max_nodes ({self.max_nodes}) and 1 to "
                f"max_walltime ({self.max_wall_time_min}) minutes, but got {dict(beyond)}."
            )

    def wall_time_min(self, nodes: int) -> int:
        """Return the longest wall time of a job of so many nodes."""
        reached = [minutes for from_nodes, minutes in self.steps if from_nodes <= nodes]
        return reached[-1] if reached else self.max_wall_time_min

    def complaint(self, nodes: int, wall_time_min: int) -> str | None:
        """Return what is wrong with a job of this shape, and what is allowed; None: nothing."""
        if not self.min_nodes <= nodes <= self.max_nodes:
            return f"the queue {self.queue} takes {self.min_nodes} to {self.max_nodes} nodes, but got {nodes}"
        most = self.wall_time_min(nodes)
        if wall_time_min > most:
            by_nodes = f" for {counted(nodes, 'node')} ({self.in_words})" if self.steps else ""
            return f"the queue {self.queue} allows at most {most} minutes{by_nodes}, but got {wall_time_min}"
        return None

    @property
    def in_words(self) -> str:
        """The limits in one line."""
        nodes = f"at most {self.max_nodes} node{'s' * (self.max_nodes > 1)}"
        if self.min_nodes > 1:
            nodes = f"{self.min_nodes} to {self.max_nodes} nodes"
        if not self.steps:
            return f"{nodes} and {self.max_wall_time_min} min"
        ends = [step[0] - 1 for step in self.steps[1:]] + [self.max_nodes]
        first = [(1, self.steps[0][0] - 1, self.max_wall_time_min)] if self.steps[0][0] > self.min_nodes else []
        spans = first + [(start, end, minutes) for (start, minutes), end in zip(self.steps, ends, strict=True)]
        return f"{nodes}; " + ", ".join(f"{start}-{end} nodes {minutes} min" for start, end, minutes in spans)


def from_settings(queue: str, settings: Mapping[str, Any]) -> QueueLimits:
    """Return the limits of a queue from its block under `allowed_queues`.

    Raises
    ------
    SettingsError
        When the block is not as this module's docstring shows.
    """
    steps = settings.get(_STEPS) or {}
    numbers: dict[str, Any] = {name: settings.get(name) for name in ("max_nodes", "max_walltime")}
    numbers[_FEWEST] = settings.get(_FEWEST, 1)
    if not isinstance(steps, Mapping):
        raise SettingsError(f"Queue {queue}: {_STEPS} must be like {{10: 180, 25: 360}}, but got {steps!r}.")
    for name, value in [*numbers.items(), *((_STEPS, number) for step in steps.items() for number in step)]:
        if not isinstance(value, int) or isinstance(value, bool):
            raise SettingsError(f"Queue {queue}: {name} must hold whole numbers, but got {value!r}.")
    return QueueLimits(
        queue, numbers["max_nodes"], numbers["max_walltime"], numbers[_FEWEST], tuple(sorted(steps.items()))
    )


def read_blocks(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return the blocks under `allowed_queues` in the settings file of a site's folder; none: Balsam's defaults hold.

    Raises
    ------
    OSError, ValueError
        When the file cannot be read.
    """
    import yaml

    try:
        data = yaml.safe_load((folder / _SETTINGS_FILE).read_text(encoding="utf-8"))
        blocks = (data.get("scheduler") or {}).get("allowed_queues") or {}
        return {str(queue): dict(block) for queue, block in blocks.items()}
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / _SETTINGS_FILE} is not as Balsam's settings are: {error}") from error


def of_site(site: Row, queue: str) -> QueueLimits | None:
    """Return the limits of a queue at a site, from what its agent reports and, if its folder is here, its settings.

    None: the agent has not reported any yet, or not this queue.

    Raises
    ------
    SettingsError
        When the settings are not as they should be.
    """
    reported = (site.get("allowed_queues") or {}).get(queue)
    if reported is None:
        return None
    return from_settings(queue, {**_here(site).get(queue, {}), **reported})


def _here(site: Row) -> dict[str, Mapping[str, Any]]:
    folder = Path(str(site.get("path", "")))
    try:
        if int((folder / _SITE_ID_FILE).read_text()) != site["id"]:  # another machine's path, by chance
            return {}
        return read_blocks(folder)
    except (OSError, ValueError):  # the site is on another machine
        return {}


def check(site: Row, queue: str, nodes: int, wall_time_min: int) -> None:
    """Refuse a job that the queue of the site does not take, as far as that is known here.

    Raises
    ------
    InputError
        The message says what was got and what is allowed.
    """
    allowed = list(site.get("allowed_queues") or {})
    if allowed and queue not in allowed:
        raise InputError(
            f"The queues that the site {site['name']!r} allows are {', '.join(allowed)}, but got {queue!r}."
        )
    limits = of_site(site, queue)
    complaint = limits and limits.complaint(nodes, wall_time_min)
    if complaint:
        raise InputError(f"At the site {site['name']!r} {complaint}.")
