"""The secrets of a local stack, and the credentials with which Balsam's clients reach its API."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from deephyper_balsam.common.private import write_private
from deephyper_balsam.common.processes import tail
from deephyper_balsam.errors import ServerError
from deephyper_balsam.server import passwords
from deephyper_balsam.server.stack_folder import StackFolder
from deephyper_balsam.server.stack_state import State
from deephyper_balsam.store import sockets, tls
from deephyper_balsam.store.client_files import KEY_SUFFIX, turn

TOKEN_LIFE = timedelta(hours=8)
_TOKEN_RENEW = timedelta(hours=4)  # as the client does by itself
_TURN_S = 30.0  # how long a client that renews its token is waited for
_CLIENT_CLASS = "deephyper_balsam.store.client.StackClient"
_ROTATED = ("signing_key", "challenge_key")
_KEYS = (*_ROTATED, "database_password")
_USER = "local"


def key_json(username: str, password: str) -> str:
    """Return what the key file of an account holds."""
    return json.dumps({"username": username, "password": password})


def client_yaml(url: str, token: str | None = None, expiry: datetime | None = None) -> str:
    """Return what `client.yml` holds; without a token its first client logs in by the key file."""
    import yaml

    settings = {
        "api_root": url,
        "client_class": _CLIENT_CLASS,
        "token": token,
        "token_expiry": expiry,
        "connect_timeout": 6.2,
        "read_timeout": 120.0,
        "retry_count": 10,
    }
    return str(yaml.safe_dump(settings, sort_keys=False, indent=4))


class Credentials:
    """`secrets.json`, `client.key` and `client.yml` in a stack's folder; all are private.

    Parameters
    ----------
    files
        The stack's folder.
    """

    def __init__(self, files: StackFolder) -> None:
        self._files = files

    def secrets(self) -> dict[str, str]:
        """Return the account, the key that signs tokens, and the one that proves that the API is ours."""
        path = self._files.path / "secrets.json"
        data: dict[str, str] = {}
        if path.exists():
            try:
                found = json.loads(path.read_text())
                data = {name: str(found[name]) for name in ("username", "password")}
                data.update((name, str(found[name])) for name in _KEYS if name in found)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ServerError(
                    f"{path} is damaged, and the accounts in the database need it. Restore it from a backup."
                ) from error
        else:
            data = {"username": _USER, "password": passwords.draw()}
        missing = [name for name in _KEYS if name not in data]
        if missing:
            data.update((name, secrets.token_hex(32)) for name in missing)
            write_private(path, json.dumps(data, indent=1))
        return data

    def rotate(self) -> dict[str, str]:
        """Make new keys for an API that starts: every token of before is refused, and clients take a new one."""
        data = {**self.secrets(), **{name: secrets.token_hex(32) for name in _ROTATED}}
        write_private(self._files.path / "secrets.json", json.dumps(data, indent=1))
        return data

    def replace_password(self, password: str) -> None:
        """Keep another password for the stack's own account, where the next login of every client of it finds it.

        Parameters
        ----------
        password
            Which the database is about to get, too.
        """
        data = {**self.secrets(), "password": password}
        write_private(self._files.path / "secrets.json", json.dumps(data, indent=1))
        write_private(self._files.client_path.with_suffix(KEY_SUFFIX), key_json(data["username"], password))

    def write_client(self, state: State) -> None:
        """Write client.yml anew when the address changed, the token nears its end, or the server does not accept it.

        Parameters
        ----------
        state
            The record, which has the API's address.

        Raises
        ------
        ServerError
            When the API does not accept the account in `secrets.json`.
        """
        url, path = state.url, state.socket
        assert url is not None
        assert path is not None
        self._write_authority(state)
        known = self.secrets()
        user = {name: known[name] for name in ("username", "password")}
        key = self._files.client_path.with_suffix(KEY_SUFFIX)
        text = key_json(**user)
        if not key.is_file() or key.stat().st_mode & 0o777 != 0o600 or key.read_bytes() != text.encode():
            write_private(key, text)
        with turn(self._files.client_path, _TURN_S):  # a client that renews its token would write the old address back
            self._write_settings(url, path, user)

    def _write_settings(self, url: str, path: Path, user: Mapping[str, str]) -> None:
        data = self.client_settings()
        expiry = data.get("token_expiry")
        valid = (
            data.get("api_root") == url
            and data.get("client_class") == _CLIENT_CLASS
            and isinstance(expiry, datetime)
            and expiry.tzinfo is None
            and expiry - datetime.now(timezone.utc).replace(tzinfo=None) > _TOKEN_RENEW
            and self.ask(path, "GET", "/auth/password/me", token=data.get("token"))[0] == 200
            and self._files.client_path.stat().st_mode & 0o777 == 0o600
        )
        if valid:
            return
        token, expiry = self._login(path, user)
        write_private(self._files.client_path, client_yaml(url, token, expiry))

    def _write_authority(self, state: State) -> None:
        """Put the certificate by which clients know the server beside client.yml."""
        beside = tls.authority_of(self._files.client_path)
        if state.address is None:
            beside.unlink(missing_ok=True)
            return
        text = self._files.certificates.authority.read_text()
        if not beside.is_file() or beside.read_text() != text:
            write_private(beside, text)

    def client_settings(self) -> dict[str, Any]:
        """Return what `client.yml` holds: nothing, when it is damaged or not there, and so written anew."""
        import yaml

        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            data = yaml.safe_load(self._files.client_path.read_text())
            return data if isinstance(data, dict) else {}
        return {}

    def _login(self, path: Path, user: Mapping[str, str]) -> tuple[str, datetime]:
        form = urlencode(user).encode()
        code, answer = self.ask(path, "POST", "/auth/password/login", form, "application/x-www-form-urlencoded")
        if code != 200:
            raise ServerError(
                f"Balsam's API does not accept the account in {self._files.path / 'secrets.json'} (HTTP {code}): "
                f"was that file replaced? {tail(self._files.logs / 'api.log')}"
            )
        return answer["access_token"], datetime.fromisoformat(answer["expiration"])

    def ask(
        self,
        path: Path,
        method: str,
        url: str,
        body: bytes | None = None,
        content_type: str = "",
        token: str | None = None,
    ) -> tuple[int, Any]:
        """Make one request at the API's socket.

        Parameters
        ----------
        path
            The socket.
        method, url, body, content_type
            Of the request.
        token
            Of whoever asks; None: of nobody.

        Returns
        -------
        tuple
            The status, and the decoded JSON; None for what is none.

        Raises
        ------
        OSError
            When there is no answer; TimeoutError when there is none in time.
        """
        from http.client import HTTPException

        headers = {"Content-Type": content_type} if content_type else {}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection = sockets.Connection(path, timeout_s=self._files.waits.answer_s)
        try:
            connection.request(method, url, body, headers)
            answer = connection.getresponse()
            raw = answer.read()
            try:
                return answer.status, json.loads(raw) if raw else None
            except ValueError:
                return answer.status, None
        except HTTPException as error:
            raise OSError(str(error)) from error
        finally:
            connection.close()
