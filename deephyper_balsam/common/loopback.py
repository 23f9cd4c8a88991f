"""A Balsam on this machine is reached directly, whatever proxy the environment names.

A facility's shell often sets ``http_proxy`` and leaves out ``no_proxy``. Every client would then ask the proxy for
127.0.0.1, which is another machine there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

HOSTS = ("127.0.0.1", "localhost", "::1")
_NAMES = ("no_proxy", "NO_PROXY")


def is_loopback(url: str) -> bool:
    """Return whether `url` leads to this machine by its loopback."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # no address at all: its client says so
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def no_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that lead every program past the proxies to this machine.

    Programs read one or the other of the two names, so both get what either holds.
    """
    hosts = [host.strip() for name in _NAMES for host in environment.get(name, "").split(",")]
    found = list(dict.fromkeys(filter(None, [*hosts, *HOSTS])))
    # "*" means every host only where it stands alone
    return dict.fromkeys(_NAMES, "*" if "*" in found else ",".join(found))


def pass_proxies_by(environment: MutableMapping[str, str]) -> None:
    """Let this process, and those that it starts with `environment`, reach this machine directly."""
    environment.update(no_proxy(environment))


def go_direct(client: Any) -> None:
    """Let a client of Balsam's API use no proxy when the API is on this machine.

    The client makes a new session after a fork, so this is called before each use.
    """
    if is_loopback(str(getattr(client, "api_root", ""))):  # one that speaks over a socket of its own has none
        client.session.trust_env = False
