"""Which address a server listens at for other hosts. Only what the system and the scheduler say is made up."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from deephyper_balsam.errors import InputError
from deephyper_balsam.server import addresses
from deephyper_balsam.server.addresses import find_address, listen, names_of

HOST = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5"], "hsn0": ["10.150.0.7"], "docker0": ["172.17.0.1"]}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[str]]:
    """A login node with several networks; its routes are in `routes`."""
    interfaces = {name: list(found) for name, found in HOST.items()}

    def address(text: str) -> Any:
        family = socket.AF_INET6 if ":" in text else socket.AF_INET
        return psutil._common.snicaddr(family, text, None, None, None)

    def found() -> dict[str, list[Any]]:
        return {name: [address(text) for text in texts] for name, texts in interfaces.items()}

    up = psutil._common.snicstats(True, 0, 0, 0, "")
    monkeypatch.setattr(psutil, "net_if_addrs", found)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: dict.fromkeys(interfaces, up))
    monkeypatch.setattr(addresses, "_source", lambda target: routes.get(target, ""))
    monkeypatch.setattr(addresses, "_resolve", lambda name: [known[name]] if name in known else [])
    monkeypatch.setattr(socket, "gethostname", lambda: "login1")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("SLURM_JOB_NODELIST", "PBS_NODEFILE", "COBALT_NODEFILE"):
        monkeypatch.delenv(name, raising=False)
    routes = {"192.0.2.1": "10.0.0.5", "10.150.3.1": "10.150.0.7", "10.0.0.77": "10.0.0.5"}
    known = {"nid000001": "10.150.3.1", "x1000c0": "10.0.0.77", "login1": "10.0.0.5", "10.0.0.5": "10.0.0.5"}
    return interfaces


def command(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_auto_takes_the_address_from_which_slurms_node_is_reached(host: Any, tmp_path: Path) -> None:
    command(tmp_path, "scontrol", "echo 'NodeName=nid000001 Arch=x86_64 NodeAddr=nid000001 NodeHostName=nid000001'")
    assert find_address("auto") == addresses.Address(
        "10.150.0.7", "from it this host reaches the compute node nid000001 (one of Slurm's)"
    )


def test_auto_within_an_allocation_asks_for_the_way_to_another_of_its_nodes(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("login1\nlogin1\nx1000c0\n")
    monkeypatch.setenv("PBS_NODEFILE", str(nodes))
    found = find_address("auto")
    assert found.address == "10.0.0.5"
    assert "x1000c0 (of this allocation)" in found.reason


@pytest.mark.parametrize("text", ["exit 1", "echo", "echo 'NodeName=gone NodeAddr=gone'", "echo garbage = = ="])
def test_a_scheduler_that_says_nothing_of_use_leaves_the_fast_network(host: Any, tmp_path: Path, text: str) -> None:
    command(tmp_path, "scontrol", text)
    assert find_address("auto") == addresses.Address("10.150.0.7", "the address of hsn0, a network between nodes")


def test_without_scheduler_and_fast_network_it_is_that_of_the_default_route(host: dict[str, list[str]]) -> None:
    del host["hsn0"]
    assert find_address("auto").address == "10.0.0.5"


def test_loopback_alone_is_refused(host: dict[str, list[str]]) -> None:
    for name in ("hsn0", "eth0", "docker0"):
        del host[name]
    with pytest.raises(InputError, match="no network address but the loopback"):
        find_address("auto")


@pytest.mark.parametrize(
    ("asked", "address"),
    [("hsn0", "10.150.0.7"), ("10.0.0.5", "10.0.0.5"), ("login1", "10.0.0.5"), ("lo", "127.0.0.1")],
)
def test_an_interface_an_address_or_a_name_of_this_host_is_taken(host: Any, asked: str, address: str) -> None:
    assert find_address(asked).address == address


@pytest.mark.parametrize("asked", ["10.0.0.6", "hsn9", "", "nid000001", "0.0.0.0"])
def test_what_is_not_of_this_host_is_refused_with_what_it_has(host: Any, asked: str) -> None:
    with pytest.raises(InputError, match=r"no such address or network interface. It has .*hsn0 \(10.150.0.7\)"):
        find_address(asked)


def test_an_interface_with_a_link_local_address_alone_is_no_way_for_others(host: dict[str, list[str]]) -> None:
    host["eth0"] = ["169.254.3.4"]
    with pytest.raises(InputError, match="no address that other hosts can reach"):
        find_address("eth0")


def test_the_certificate_is_for_every_name_and_address_of_the_host(host: Any) -> None:
    names = names_of("10.0.0.5")
    assert names[0] == "10.0.0.5"
    assert {"login1", "127.0.0.1", "10.150.0.7"} <= set(names)
    assert len(names) == len(set(names))


def test_a_port_that_is_taken_is_not_shared() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", first.getsockname()[1])


def test_the_real_system_is_read(tmp_path: Path) -> None:
    assert find_address("127.0.0.1").address == "127.0.0.1"
    assert os.path.exists("/proc") is False or "lo" in addresses._interfaces()
