"""One cluster for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .lab import ClusterLab, missing


@pytest.fixture(scope="module")
def lab() -> Iterator[ClusterLab]:
    reason = missing()
    if reason:
        pytest.skip(f"no cluster here: {reason}")
    with ClusterLab().running() as made:
        yield made
