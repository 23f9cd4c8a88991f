"""What a driver says of a site whose agent is silent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.monitor.liveness import AgentLiveness
from deephyper_balsam.store.gateway import Gateway

pytest_plugins = ["balsam_fixtures"]


@pytest.fixture
def watch(gateway: Gateway, site: VirtualSite) -> AgentLiveness:
    return AgentLiveness(gateway, {site.id: gateway.site("lab")})


def look(watch: AgentLiveness, api: BalsamApi, seconds: float) -> str | None:
    api.let_pass(seconds)
    watch.look(api.now().timestamp())
    return watch.notice


def test_an_agent_that_refreshes_its_site_is_no_news(watch: AgentLiveness, api: BalsamApi) -> None:
    assert [look(watch, api, 6) for _ in range(20)] == [None] * 20


def test_an_agent_that_falls_silent_is_named_within_a_minute_and_forgotten_when_it_is_back(
    watch: AgentLiveness, site: VirtualSite, api: BalsamApi
) -> None:
    look(watch, api, 6)
    look(watch, api, 6)
    api.silent_sites.add(site.id)
    said = [look(watch, api, 6) for _ in range(10)]
    assert said[:3] == [None] * 3
    assert said[-1] is not None
    assert "the agent of site lab has given no sign for" in said[-1]
    assert "server up" in said[-1]
    api.silent_sites.clear()
    assert look(watch, api, 6) is None


def test_an_agent_of_slow_habits_gets_more_time(watch: AgentLiveness, site: VirtualSite, api: BalsamApi) -> None:
    api.silent_sites.add(site.id)
    for _ in range(3):  # it refreshes its site once a minute
        api.sites[site.id]["last_refresh"] = api.now()
        assert [look(watch, api, 6) for _ in range(10)] == [None] * 10
    assert [look(watch, api, 6) for _ in range(20)] == [None] * 20
    assert look(watch, api, 120) is not None


def test_an_agent_that_was_dead_before_is_named_when_that_is_sure(
    watch: AgentLiveness, site: VirtualSite, api: BalsamApi
) -> None:
    api.silent_sites.add(site.id)
    assert look(watch, api, 140) is None
    assert look(watch, api, 20) is not None


def test_looks_are_rare(watch: AgentLiveness, api: BalsamApi) -> None:
    api.requests.clear()
    for _ in range(50):
        look(watch, api, 0.5)
    assert len(api.asked("GET", "sites/")) <= 6


def test_each_site_whose_agent_is_silent_is_named(gateway: Gateway, site: VirtualSite, api: BalsamApi) -> None:
    theta = VirtualSite(api, "theta")
    watch = AgentLiveness(gateway, {one.id: gateway.site(one.name) for one in (site, theta)})
    for silent in ({theta.id}, {site.id, theta.id}):
        look(watch, api, 6)
        look(watch, api, 6)
        api.silent_sites.update(silent)
        for _ in range(8):
            look(watch, api, 6)
        assert set(watch.silent) == silent
    assert watch.notice is not None
    assert "site lab has" in watch.notice
    assert "site theta has" in watch.notice
