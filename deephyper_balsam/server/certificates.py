"""The certificate authority of a stack, and the server's certificate: made, checked and renewed without a person.

Whoever reaches the API over a network must know that it is ours before a token is sent. A stack is its own authority:
the key that signs stays in its folder, and its clients trust that authority alone (`client.ca.pem` beside
``client.yml``). Keys are ECDSA on P-256. An authority lives for ten years, a server's certificate for 30 days; it is
renewed ten days before.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from deephyper_balsam.common.private import write_private
from deephyper_balsam.errors import ServerError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

_AUTHORITY_LIFE = timedelta(days=3650)
_SERVER_LIFE = timedelta(days=30)
_RENEW_BEFORE = timedelta(days=10)
_CLOCKS_DIFFER_BY = timedelta(hours=1)


class Certificates:
    """The folder with the authority and the server's certificate.

    Parameters
    ----------
    folder
        Where they are; it is made with mode 0700, the files in it with mode 0600.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def authority(self) -> Path:
        """The authority's certificate, which every client has: it is no secret, but must be the right one."""
        return self.folder / "ca.pem"

    @property
    def chain(self) -> Path:
        """The server's certificate and its key, as `ssl.SSLContext.load_cert_chain` reads them."""
        return self.folder / "server.pem"

    def renew(self, names: Sequence[str], now: datetime | None = None) -> bool:
        """Make what is missing, what nears its end, and what is not for these names.

        Parameters
        ----------
        names
            Host names and addresses by which clients may reach the server.
        now
            The moment, by default that of the clock.

        Returns
        -------
        bool
            Whether the server's certificate is a new one.

        Raises
        ------
        ServerError
            When a file is damaged. An authority is not replaced by itself: every client would refuse the server.
        """
        now = now or datetime.now(timezone.utc)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.folder.chmod(0o700)
        signer, key = self._authority(now)
        if self._is_good(signer, names, now):
            return False
        write_private(self.chain, _server(signer, key, names, now))
        return True

    def _authority(self, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        key_path = self.folder / "ca.key"
        if not key_path.exists() and not self.authority.exists():
            made, made_key = _new_authority(now)
            write_private(key_path, _pem(made_key))
            write_private(self.authority, _pem(made))
        try:
            signer = x509.load_pem_x509_certificate(self.authority.read_bytes())
            key = load_pem_private_key(key_path.read_bytes(), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != signer.public_key():
                raise ValueError("key and certificate do not belong together")
        except (OSError, ValueError) as error:
            raise ServerError(
                f"The server's certificate authority in {self.folder} is damaged ({error}). Restore the folder from a "
                "backup; or remove it, and `server up` makes another. Every client then needs its new files: give "
                "each user theirs again with `server token renew`."
            ) from error
        return signer, key

    def _is_good(self, signer: x509.Certificate, names: Sequence[str], now: datetime) -> bool:
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature

        try:
            found = x509.load_pem_x509_certificate(self.chain.read_bytes())
            found.verify_directly_issued_by(signer)
            named = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return False
        lasts = found.not_valid_before_utc <= now and found.not_valid_after_utc - now > _RENEW_BEFORE
        return lasts and set(named) == set(_names(names))


def _new_authority(now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    number = x509.random_serial_number()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"deephyper-balsam stack {number & 0xFFFFFFFF:08x}")])
    signs_only = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), number)
        .not_valid_before(now - _CLOCKS_DIFFER_BY)
        .not_valid_after(now + _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs_only, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256()), key


def _server(
    signer: x509.Certificate, signing_key: ec.EllipticCurvePrivateKey, names: Sequence[str], now: datetime
) -> str:
    """Return a new certificate for the server, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "deephyper-balsam server")])
    builder = (
        x509.CertificateBuilder(signer.subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER_BY)
        .not_valid_after(min(now + _SERVER_LIFE, signer.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName(_names(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
    )
    return _pem(builder.sign(signing_key, hashes.SHA256())) + _pem(key)


def _names(names: Sequence[str]) -> list[x509.GeneralName]:
    from cryptography import x509

    found: list[x509.GeneralName] = []
    for name in dict.fromkeys(names):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def _pem(made: x509.Certificate | ec.EllipticCurvePrivateKey) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    if isinstance(made, x509.Certificate):
        return made.public_bytes(Encoding.PEM).decode()
    return made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
