"""What a user of somebody else's server needs: `client.yml`, its key file and the server's authority, to take over.

The files are hers alone, and mode 0600 lets her not even read them while they are the giver's. So by default all of
them are in one archive: she gets it by whatever way keeps it secret, and what she unpacks is her own.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path

from deephyper_balsam.common.private import write_private
from deephyper_balsam.errors import InputError
from deephyper_balsam.server.credentials import client_yaml, key_json
from deephyper_balsam.store import tls
from deephyper_balsam.store.client_files import KEY_SUFFIX

ARCHIVE = ".tar"
_CREDENTIALS = (".yml", ".yaml")
_NAME = Path("client.yml")


class Handover:
    """Where the files of one account are written.

    Parameters
    ----------
    path
        An archive (``.tar``), a credentials file (``.yml``), beside which the others are put, or a folder for them.
    replace
        Whether files that are there may be replaced.

    Raises
    ------
    InputError
        When they cannot be written there, or are there already.
    """

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        self.path = path
        if path.is_dir() or path.suffix not in (ARCHIVE, *_CREDENTIALS):
            self.credentials: Path | None = path / _NAME
            above = path.parent
        else:
            self.credentials = None if path.suffix == ARCHIVE else path
            above = path.parent
        if not above.is_dir():
            raise InputError(f"{path} cannot be written: there is no folder {above}.")
        found = self.credentials or path
        if found.exists() and not replace:
            raise InputError(f"{found} is there already. Name another file with -o.")

    def write(self, url: str, authority: str, username: str, password: str) -> None:
        """Write the files, for nobody but their owner.

        Parameters
        ----------
        url
            Where the server is reached.
        authority
            Its certificate authority, in PEM.
        username, password
            Of the account.

        Raises
        ------
        InputError
            When they cannot be written.
        """
        beside = self.credentials or _NAME
        files = {
            beside: client_yaml(url),
            beside.with_suffix(KEY_SUFFIX): key_json(username, password),
            tls.authority_of(beside): authority,
        }
        try:
            if self.credentials is None:
                write_private(self.path, _archive(files))
                return
            if beside.parent == self.path:
                self.path.mkdir(mode=0o700, exist_ok=True)
            for path, text in files.items():
                write_private(path, text)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}.") from error


def _archive(files: Mapping[Path, str]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(path.name)
            member.mode, member.mtime, member.size = 0o600, int(time.time()), len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return made.getvalue()
