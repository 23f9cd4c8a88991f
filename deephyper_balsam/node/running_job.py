"""What a run function gets: its configuration, and DeepHyper's words for saying how it goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deephyper_balsam.node.recording import Recorder


class RunningJob(Mapping[str, Any]):
    """The mapping that a run function gets, with the face of DeepHyper's `RunningJob`.

    ``job["learning_rate"]``, ``job.get("dropout", 0.0)``, ``dict(job)``; `parameters` is the configuration as a dict,
    `id` the trial's number.

    Parameters
    ----------
    number
        The trial's number.
    parameters
        The configuration.
    recorder
        Takes what the run records; by default it is kept in memory.
    folder
        The trial's folder; by default the current one.

    Attributes
    ----------
    folder
        The trial's own folder, the same after every cut and retry at a site: the place for checkpoints.
    """

    def __init__(
        self,
        number: int,
        parameters: Mapping[str, Any],
        recorder: Recorder | None = None,
        folder: Path | None = None,
    ) -> None:
        self.id = number
        self.parameters: dict[str, Any] = dict(parameters)
        self.folder = Path.cwd() if folder is None else folder
        self.recorder = Recorder() if recorder is None else recorder
        self.was_stopped = False

    @property
    def restarts(self) -> int:
        """How often the run was begun before in its folder: 0 the first time. A run that never asks counts as none."""
        return self.recorder.restarts

    def record(self, budget: float, objective: float) -> None:
        """Say which objective the run has reached with what it has spent so far.

        Parameters
        ----------
        budget
            What it has spent since its very beginning, such as the number of epochs: a number of more than 0.
        objective
            What it would return if it ended now.

        Raises
        ------
        ValueError
            When one of them is no finite number.
        """
        self.recorder.record(budget, objective)

    def stopped(self) -> bool:
        """Return whether the run shall end now, for it has no prospect: it returns `objective`, or nothing."""
        self.was_stopped = self.was_stopped or self.recorder.stopped()
        return self.was_stopped

    @property
    def objective(self) -> float | None:
        """The objective that was recorded last, by this start of the run or an earlier one; None: none was."""
        last = self.last_record
        return None if last is None else last[1]

    @property
    def last_record(self) -> tuple[float, float] | None:
        """The budget and the objective that were recorded last, by this start of the run or an earlier one."""
        return self.recorder.last

    def __getitem__(self, name: str) -> Any:
        return self.parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __repr__(self) -> str:
        return f"RunningJob(id={self.id}, parameters={self.parameters})"
