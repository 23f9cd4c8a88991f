"""The address at which a server listens for other hosts: as asked for, or the one that compute nodes would use."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deephyper_balsam.errors import InputError

_FAST = ("hsn", "ipogif", "ib", "bond")  # Slingshot, Aries, InfiniBand, several cables as one
_NOT_FOR_NODES = ("lo", "docker", "podman", "virbr", "veth", "cni", "tun", "tap", "wg", "tailscale")
_NODES_OF_AN_ALLOCATION = ("PBS_NODEFILE", "COBALT_NODEFILE")
_ASK_S = 10.0


@dataclass(frozen=True)
class Address:
    """Where to listen.

    Attributes
    ----------
    address
        An IP address of this host.
    reason
        How it was chosen, as half a sentence.
    """

    address: str
    reason: str


def find_address(listen: str) -> Address:
    """Return the address to listen at.

    Parameters
    ----------
    listen
        ``auto``, an address or a name of this host, or the name of a network interface.

    Raises
    ------
    InputError
        When it is none of these.
    """
    interfaces = _interfaces()
    if listen == "auto":
        return _auto(interfaces)
    if listen in interfaces:
        return Address(_usable(interfaces[listen], listen), f"the address of the interface {listen}")
    mine = {address for found in interfaces.values() for address in found}
    for address in _resolve(listen):
        if address in mine:
            return Address(address, "as asked for" if address == listen else f"the address of {listen}")
    known = ", ".join(f"{name} ({', '.join(found)})" for name, found in interfaces.items())
    raise InputError(
        f"Cannot listen at {listen!r}: this host has no such address or network interface. It has {known}. Name one of "
        "these, or auto."
    )


def names_of(address: str) -> list[str]:
    """Return the names and addresses for which the server's certificate holds.

    Parameters
    ----------
    address
        Where it listens.
    """
    host = socket.gethostname()
    names = [address, host, socket.getfqdn(), *(one for found in _interfaces().values() for one in found)]
    return [name for name in dict.fromkeys(names) if name and len(name) <= 253 and name.isascii()]


def listen(address: str, port: int, backlog: int = 2048) -> socket.socket:
    """Return a socket that listens at an address; port 0 takes one that is free."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before may still be closing
        listener.bind((address, port))
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _auto(interfaces: Mapping[str, list[str]]) -> Address:
    mine = {address for found in interfaces.values() for address in found}
    here = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    for node, source in _compute_nodes():
        if node in here or node.partition(".")[0] in here:
            continue
        for target in _resolve(node):
            address = _source(target)
            if address in mine and not ipaddress.ip_address(address).is_loopback:
                return Address(address, f"from it this host reaches the compute node {node} ({source})")
            break
    for kind in _FAST:
        for name in sorted(interfaces):
            if name.startswith(kind):
                return Address(_usable(interfaces[name], name), f"the address of {name}, a network between nodes")
    for target in ("192.0.2.1", "2001:db8::1"):  # reserved for documentation: nothing is sent to find the way there
        address = _source(target)
        if address in mine and not ipaddress.ip_address(address).is_loopback:
            return Address(address, "the address of the default route; no compute node is known here")
    for name in sorted(interfaces):
        if not name.startswith(_NOT_FOR_NODES):
            return Address(_usable(interfaces[name], name), f"the address of {name}, the only network of this host")
    raise InputError(
        "There is nothing to listen at for others: this host has no network address but the loopback, so other hosts "
        "cannot reach it."
    )


def _interfaces() -> dict[str, list[str]]:
    """Return the addresses of each interface that is up, IPv4 first."""
    import psutil

    up = {name for name, found in psutil.net_if_stats().items() if found.isup}
    interfaces = {}
    for name, found in psutil.net_if_addrs().items():
        kinds = (socket.AF_INET, socket.AF_INET6)
        addresses = [one.address for kind in kinds for one in found if one.family == kind and "%" not in one.address]
        if name in up and addresses:
            interfaces[name] = addresses
    return interfaces


def _usable(addresses: list[str], name: str) -> str:
    """Return the first address that other hosts can use."""
    for address in addresses:
        found = ipaddress.ip_address(address)
        if not found.is_link_local:
            return address
    raise InputError(f"The interface {name} has no address that other hosts can reach. It has {', '.join(addresses)}.")


def _resolve(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def _source(target: str) -> str:
    """Return from which address this host would reach another; the system looks it up and sends nothing."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def _compute_nodes() -> Iterable[tuple[str, str]]:
    """Yield names of compute nodes, and who named them: the allocation that we are in, then the scheduler."""
    for variable in _NODES_OF_AN_ALLOCATION:
        path = os.environ.get(variable)
        if path:
            yield from ((node, "of this allocation") for node in _lines_of(path))
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes:
        yield from ((node, "of this allocation") for node in _ask("scontrol", "show", "hostnames", nodes)[:2])
    for line in _ask("scontrol", "show", "nodes", "--oneliner")[:200]:
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        node = words.get("NodeAddr") or words.get("NodeHostName")
        if node:
            yield node, "one of Slurm's"
            break
    for line in _ask("pbsnodes", "-a", "-S")[2:3]:
        yield line.split()[0], "one of PBS's"


def _lines_of(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return list(dict.fromkeys(line.strip() for line in file if line.strip()))
    except (OSError, UnicodeDecodeError):
        return []


def _ask(*command: str) -> list[str]:
    """Return what a command of a scheduler prints; nothing where there is none."""
    if shutil.which(command[0]) is None:
        return []
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=_ASK_S, check=False, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []
