"""Fixtures on the fake of Balsam's API; a test module loads them with ``pytest_plugins = ["balsam_fixtures"]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from balsam_api import BalsamApi, PlayingSite, VirtualSite

from deephyper_balsam.store.gateway import Gateway


@pytest.fixture
def api() -> Iterator[BalsamApi]:
    made = BalsamApi()
    yield made
    made.close()


@pytest.fixture
def client_yml(api: BalsamApi, tmp_path: Path) -> Path:
    return api.write_client_yml(tmp_path / "client.yml")


@pytest.fixture
def gateway(client_yml: Path) -> Iterator[Gateway]:
    made = Gateway(client_yml)
    yield made
    made._client.session.close()


@pytest.fixture
def site(api: BalsamApi) -> VirtualSite:
    return VirtualSite(api, "lab")


@pytest.fixture
def play(site: VirtualSite) -> Iterator[Callable[..., PlayingSite]]:
    """Let the site work by itself, in a thread that ends with the test."""
    playing: list[PlayingSite] = []

    def start(run: Callable[[dict[str, Any]], float], **options: Any) -> PlayingSite:
        playing.append(PlayingSite(site, run, **options))
        playing[-1].start()
        return playing[-1]

    yield start
    for one in playing:
        one.close()
