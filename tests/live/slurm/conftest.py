"""One Slurm with virtual nodes for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .lab import SlurmLab, missing


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    reason = missing()
    if reason:
        pytest.skip(f"no Slurm here: {reason}")
    made = SlurmLab()
    try:
        made.up()
        yield made
    finally:
        made.down()
