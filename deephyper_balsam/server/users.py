"""The accounts of a server of one's own: made, listed, removed, and given other passwords, by its owner alone.

All of it is done in the database, over PostgreSQL's private socket: no route of the API makes or changes an account.
The API is told by the database (`guard.Users`), so what is taken away is refused at once.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deephyper_balsam.errors import InputError, ServerError
from deephyper_balsam.server import passwords
from deephyper_balsam.server.handover import Handover
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.server.stack_state import State

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LIST = """
SELECT users.username, users.hashed_password IS NOT NULL,
    (SELECT count(*) FROM sites WHERE sites.owner_id = users.id),
    (SELECT count(*) FROM jobs JOIN apps ON jobs.app_id = apps.id JOIN sites ON apps.site_id = sites.id
     WHERE sites.owner_id = users.id),
    (SELECT count(*) FROM sessions JOIN sites ON sessions.site_id = sites.id
     WHERE sites.owner_id = users.id AND sessions.heartbeat > now() AT TIME ZONE 'utc' - interval '5 minutes')
FROM users ORDER BY users.username
"""


@dataclass(frozen=True)
class User:
    """An account of a stack, and what belongs to it.

    Attributes
    ----------
    name
        By which it logs in.
    owner
        Whether it is the stack's own, which drivers, agent and launchers of the stack's owner use.
    enabled
        Whether any password is good for it: not after `Users.revoke`.
    sites, jobs
        How many it has.
    sessions
        How many of its launchers and agents gave a sign of life within five minutes.
    """

    name: str
    owner: bool
    enabled: bool
    sites: int
    jobs: int
    sessions: int


class Users:
    """The accounts of a stack that runs.

    Parameters
    ----------
    stack
        Which stack.
    """

    def __init__(self, stack: LocalStack) -> None:
        self._stack = stack

    @property
    def own(self) -> str:
        """The name of the stack's own account."""
        return self._stack.credentials.secrets()["username"]

    def add(self, name: str, to: Handover) -> None:
        """Make an account and write what its user needs.

        Parameters
        ----------
        name
            Its name.
        to
            Where the files are written.

        Raises
        ------
        InputError
            When the name is bad or taken, nobody else can reach the stack, or the files cannot be written.
        ServerError
            When the database does not run.
        """
        if not _NAME.fullmatch(name):
            raise InputError(
                f"The user name {name!r} cannot be used: take 1 to 64 letters, digits and the signs . _ @ -, of which "
                "the first is a letter or a digit."
            )
        state = self._state_for_others()
        password = passwords.draw()
        with self._database(state) as cursor:
            cursor.execute(
                "INSERT INTO users (username, hashed_password) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                (name, passwords.hashed(password)),
            )
            if cursor.rowcount == 0:
                raise InputError(
                    f"There is a user {name!r} already. Take another name, or give that user new files with "
                    f"`deephyper-balsam server token renew {name}`."
                )
            self._hand_over(state, to, name, password)

    def all(self) -> list[User]:
        """Return every account, by name.

        Raises
        ------
        ServerError
            When the database does not run.
        """
        own = self.own
        with self._database(self._state()) as cursor:
            cursor.execute(_LIST)
            return [User(name, name == own, *rest) for name, *rest in cursor.fetchall()]

    def get(self, name: str) -> User:
        """Return one account.

        Raises
        ------
        InputError
            When there is none of that name; the message has those that there are.
        ServerError
            When the database does not run.
        """
        found = self.all()
        for user in found:
            if user.name == name:
                return user
        raise _unknown(name, [user.name for user in found])

    def remove(self, name: str) -> None:
        """Remove an account with its sites, applications, jobs and batch jobs; its tokens are refused before that.

        Raises
        ------
        InputError
            When there is none of that name, or it is the stack's own.
        ServerError
            When the database does not run.
        """
        if name == self.own:
            raise InputError(
                f"{name!r} is the stack's own user: its site, agent and launchers could do nothing without it. "
                "`deephyper-balsam server token renew` gives it another password."
            )
        self._set_password(self._state(), name, None)
        with self._database(self._state()) as cursor:
            cursor.execute("DELETE FROM users WHERE username = %s", (name,))

    def revoke(self, name: str) -> None:
        """Let nothing in that was given to a user until now: no token, and no password.

        The account and what belongs to it stays. `renew` lets its user in again.

        Raises
        ------
        InputError
            When there is none of that name, or it is the stack's own, which `renew_own` is for.
        ServerError
            When the database does not run.
        """
        if name == self.own:
            raise InputError(f"{name!r} is the stack's own user, which cannot be locked out: renew its password.")
        self._set_password(self._state(), name, None)

    def renew(self, name: str, to: Handover) -> None:
        """Give a user another password and new files; all that was given before is refused.

        Parameters
        ----------
        name
            Not the stack's own.
        to
            Where the files are written.

        Raises
        ------
        InputError
            When there is none of that name, nobody else can reach the stack, or the files cannot be written.
        ServerError
            When the database does not run.
        """
        state = self._state_for_others()
        password = passwords.draw()
        with self._password(state, name, passwords.hashed(password)):
            self._hand_over(state, to, name, password)

    def renew_own(self) -> None:
        """Give the stack's own user another password and token. Its drivers, agent and launchers go on with them.

        Raises
        ------
        ServerError
            When the stack does not run.
        """
        with self._stack.files.lock():
            state = self._state()
            before, password = self._stack.credentials.secrets()["password"], passwords.draw()
            try:
                with self._password(state, self.own, passwords.hashed(password)):
                    # Whoever is refused once the database has it finds it there
                    self._stack.credentials.replace_password(password)
            except BaseException:
                self._stack.credentials.replace_password(before)
                raise
            self._stack.credentials.write_client(state)

    def _state(self) -> State:
        self._stack.files.require_not_elsewhere()
        return self._stack.files.state()

    def _state_for_others(self) -> State:
        state = self._state()
        if state.address is None:
            raise InputError(
                f"The server in {self._stack.folder} listens on its private socket alone, which no other account can "
                "reach. Let it listen for others first, over TLS: `deephyper-balsam server up --dir "
                f"{shlex.quote(str(self._stack.folder))} --listen auto`."
            )
        return state

    def _hand_over(self, state: State, to: Handover, name: str, password: str) -> None:
        assert state.url is not None
        to.write(state.url, self._stack.files.certificates.authority.read_text(), name, password)

    def _set_password(self, state: State, name: str, kept: str | None) -> None:
        with self._password(state, name, kept):
            pass

    @contextlib.contextmanager
    def _password(self, state: State, name: str, kept: str | None) -> Iterator[None]:
        """Change what is kept of a password once what is done within has come to its end."""
        with self._database(state) as cursor:
            cursor.execute("UPDATE users SET hashed_password = %s WHERE username = %s", (kept, name))
            if cursor.rowcount == 0:
                cursor.execute("SELECT username FROM users ORDER BY username")
                raise _unknown(name, [row[0] for row in cursor.fetchall()])
            yield

    @contextlib.contextmanager
    def _database(self, state: State) -> Iterator[Any]:
        """Yield a cursor of one transaction."""
        import psycopg2

        try:
            connection = psycopg2.connect(self._stack.database(state).url)
        except psycopg2.OperationalError as error:
            raise ServerError(
                f"The server in {self._stack.folder} does not run: `deephyper-balsam server up --dir "
                f"{shlex.quote(str(self._stack.folder))}` starts it."
            ) from error
        try:
            with contextlib.closing(connection), connection, connection.cursor() as cursor:
                yield cursor
        except psycopg2.Error as error:
            raise ServerError(f"The database did not do it, and nothing was changed: {error}Try again.") from error


def _unknown(name: str, known: list[str]) -> InputError:
    return InputError(f"There is no user {name!r}. There are: {', '.join(known)}.")
