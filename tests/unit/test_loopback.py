"""A Balsam on this machine is reached directly, whatever proxy the environment names."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.common.loopback import is_loopback, no_proxy
from deephyper_balsam.launcher import inside
from deephyper_balsam.launcher import main as launcher
from deephyper_balsam.node import worker
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.gateway import Gateway

pytest_plugins = ["balsam_fixtures"]


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Name a proxy in the environment, and leave out who needs none; what reaches the proxy."""
    seen: list[str] = []

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_error(403, "Blocked by the facility")

        do_POST = do_PATCH = do_PUT = do_CONNECT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
    yield seen
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8000", "https://localhost/api", "http://[::1]:80", "http://127.0.1.1", "http://a.localhost"],
)
def test_this_machine_is_known_by_each_of_its_loopback_names(url: str) -> None:
    assert is_loopback(url)


@pytest.mark.parametrize(
    "url", ["http://balsam.alcf.anl.gov", "http://10.0.0.1", "http://127.0.0.1.evil.org", "", "x", "http://[z"]
)
def test_another_machine_is_not_taken_for_this_one(url: str) -> None:
    assert not is_loopback(url)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"no_proxy": "a, b"}, "a,b,127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "a"}, "a,127.0.0.1,localhost,::1"),
        ({"no_proxy": "a", "NO_PROXY": "b,a"}, "a,b,127.0.0.1,localhost,::1"),
        ({"no_proxy": "localhost"}, "localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "*"}, "*"),
    ],
)
def test_what_needs_no_proxy_already_stays_so_and_this_machine_comes_to_it(
    environment: dict[str, str], expected: str
) -> None:
    assert no_proxy(environment) == {"no_proxy": expected, "NO_PROXY": expected}
    assert no_proxy(no_proxy(environment)) == no_proxy(environment)


def test_the_gateway_passes_the_proxy_by(proxied: list[str], gateway: Gateway, site: VirtualSite) -> None:
    assert gateway.site("lab")["id"] == site.id
    gateway._client.close_session()
    assert [row["name"] for row in gateway.sites()] == ["lab"]
    assert proxied == []


def test_an_api_elsewhere_is_reached_by_the_proxy(proxied: list[str], gateway: Gateway) -> None:
    gateway._client.api_root = "http://balsam.example.org"
    with pytest.raises(Exception, match="Blocked by the facility"):
        gateway.sites()
    assert [path.partition("?")[0] for path in proxied] == ["http://balsam.example.org/sites/"]


def test_a_run_delivers_its_result_past_a_proxy_that_its_function_named(
    proxied: list[str], gateway: Gateway, site: VirtualSite
) -> None:
    app = {"site_id": site.id, "name": "train", "serialized_class": "", "source_code": "", "description": ""}
    made = gateway.create_app({**app, "parameters": {}, "transfers": {}})
    [job] = gateway.create_jobs([{"app_id": made["id"], "workdir": "w", "tags": {"search": "s"}, "data": {"n": 1}}])
    balsams_own = gateway._client
    balsams_own.close_session()
    worker.deliver(SimpleNamespace(_client=balsams_own, job=SimpleNamespace(id=job)), {"n": 1}, {"objective": 1.0})
    assert proxied == []
    assert [row["data"]["result"] for row in gateway.jobs({"search": "s"})] == [{"objective": 1.0}]


def test_what_server_env_says_leads_balsams_own_client_past_the_proxy(
    proxied: list[str], api: BalsamApi, site: VirtualSite, tmp_path: Path
) -> None:
    api.write_client_yml(tmp_path / "client.yml")
    client = "from balsam.config import ClientSettings; client = ClientSettings.load_from_file().build_client()"
    code = f"{client}; print(*(site.name for site in client.Site.objects.all()))"
    told = {**os.environ, **LocalStack(tmp_path).env}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout.split() == ["lab"]
    assert proxied == []


@pytest.mark.parametrize(
    ("program", "words"), [(launcher, ["-j", "mpi", "-t", "1"]), (inside, ["-j", "mpi", "-t", "1", "name"])]
)
def test_a_launcher_and_the_program_of_an_allocation_pass_proxies_by_with_all_that_they_start(
    proxied: list[str], monkeypatch: pytest.MonkeyPatch, program: Any, words: list[str]
) -> None:
    found: dict[str, str] = {}

    def site_config() -> None:
        found.update(os.environ)
        raise SystemExit(0)

    before = dict(os.environ)
    monkeypatch.setattr("balsam.config.SiteConfig", site_config)
    try:
        CliRunner().invoke(program.main, words, catch_exceptions=False)
    finally:
        for name in ("no_proxy", "NO_PROXY"):
            os.environ.pop(name, None)
        assert dict(os.environ) == before
    assert "127.0.0.1" in found["no_proxy"].split(",")
    assert found["no_proxy"] == found["NO_PROXY"]
