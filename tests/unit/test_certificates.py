"""A stack's certificate authority: made once, never replaced by itself; the server's certificate is renewed in time."""

from __future__ import annotations

import os
import ssl
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509

from deephyper_balsam.errors import ServerError
from deephyper_balsam.server.certificates import Certificates

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
NAMES = ["login1", "login1.example.org", "10.1.2.3", "fd00::1"]


@pytest.fixture
def made(tmp_path: Path) -> Certificates:
    found = Certificates(tmp_path / "tls")
    assert found.renew(NAMES, NOW)
    return found


def test_all_of_it_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        found = Certificates(tmp_path / "tls")
        found.renew(NAMES)
    finally:
        os.umask(before)
    assert stat.S_IMODE(found.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in found.folder.iterdir()} == {0o600}
    assert {path.name for path in found.folder.iterdir()} == {"ca.pem", "ca.key", "server.pem"}


def test_the_certificate_is_for_the_server_s_names_and_addresses_and_of_the_authority(made: Certificates) -> None:
    server = x509.load_pem_x509_certificate(made.chain.read_bytes())
    authority = x509.load_pem_x509_certificate(made.authority.read_bytes())
    server.verify_directly_issued_by(authority)
    named = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert named.get_values_for_type(x509.DNSName) == NAMES[:2]
    assert [str(one) for one in named.get_values_for_type(x509.IPAddress)] == NAMES[2:]
    ssl.create_default_context(cafile=str(made.authority))


@pytest.mark.parametrize(
    ("days", "names", "renewed"),
    [
        (0, NAMES, False),
        (19, NAMES, False),
        (21, NAMES, True),  # ten days before its end
        (400, NAMES, True),
        (-1, NAMES, True),  # made while the clock was ahead
        (0, [*NAMES, "10.9.9.9"], True),
        (0, list(reversed(NAMES)), False),
    ],
)
def test_it_is_renewed_when_it_nears_its_end_or_the_names_changed(
    made: Certificates, days: int, names: list[str], renewed: bool
) -> None:
    authority, chain = made.authority.read_bytes(), made.chain.read_bytes()
    assert made.renew(names, NOW + timedelta(days=days)) is renewed
    assert (made.chain.read_bytes() != chain) is renewed
    assert made.authority.read_bytes() == authority, "clients know the server by it"


@pytest.mark.parametrize("text", ["", "no certificate", None])
def test_a_damaged_server_certificate_is_made_anew(made: Certificates, text: str | None) -> None:
    made.chain.unlink() if text is None else made.chain.write_text(text)
    assert made.renew(NAMES, NOW)
    assert not made.renew(NAMES, NOW)


@pytest.mark.parametrize("name", ["ca.pem", "ca.key"])
@pytest.mark.parametrize("text", ["", "no key", None])
def test_a_damaged_authority_is_told_and_not_replaced(made: Certificates, name: str, text: str | None) -> None:
    path = made.folder / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ServerError, match=r"authority in .*tls is damaged.*Restore the folder from a backup"):
        made.renew(NAMES, NOW)


def test_the_authority_of_another_stack_does_not_fit(made: Certificates, tmp_path: Path) -> None:
    other = Certificates(tmp_path / "other")
    other.renew(NAMES, NOW)
    made.authority.write_bytes(other.authority.read_bytes())
    with pytest.raises(ServerError, match="do not belong together"):
        made.renew(NAMES, NOW)
