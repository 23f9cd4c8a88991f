"""The client with which all programs of Balsam reach a stack of ours; `client.yml` names it as its `client_class`.

Balsam's command line, its agent, launchers and runs build their client from that file.
"""

from __future__ import annotations

from typing import Any

from balsam.client.requests_client import RequestsClient

from deephyper_balsam.store.connection import StackConnection


class StackClient(StackConnection, RequestsClient):  # type: ignore[misc]
    """A client of Balsam's API for a stack of one's own: its parameters are those of `StackConnection`."""

    def interactive_login(self) -> dict[str, Any]:
        """Log in with what the key file holds; nobody is asked."""
        self.refresh_auth()
        return {"token": self.token, "token_expiry": self.token_expiry}

    def refresh_auth(self) -> None:
        """Take a token that lives: the file's when another process renewed it, else a new one.

        Raises
        ------
        requests.ConnectionError
            When the server does not answer, or is not ours.
        PermissionError
            When the server does not accept the account.
        """
        self.renew(self.token, wait=True)
