"""Which host owns a stack's folder: numbered claims, each a file that its owner writes anew every few seconds.

Two PostgreSQL servers on one data folder would destroy it, and a lock does not reach from host to host on every file
system. So whoever wants to run the stack makes the claim with the next number, which only one can: a hard link to a
name that is taken fails everywhere. The highest number owns the folder, and an owner that finds a higher one stops at
once. A claim that does not change any more is one whose host is gone; that is measured by watching it, on one clock,
and never by comparing the clocks of two hosts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from deephyper_balsam.common.clock import steady
from deephyper_balsam.common.process_id import ProcessId
from deephyper_balsam.errors import InputError
from deephyper_balsam.server.stack_state import Waits

_LOOK_S = 0.2
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # a file system without hard links


@dataclass(frozen=True)
class Place:
    """Where a pid means something: a host since its last boot, and a name space of pids in it."""

    host: str
    boot: str = ""
    pids: str = ""

    @classmethod
    def here(cls) -> Place:
        """Return this one."""
        boot = pids = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
            pids = os.readlink("/proc/self/ns/pid")
        return cls(socket.gethostname(), boot, pids)


@dataclass(frozen=True)
class Claim:
    """One claim to a stack's folder.

    Attributes
    ----------
    number
        It stands in the file's name; the highest owns the folder.
    host, boot, pids
        The owner's `Place`.
    pid, started
        The process that gives the signs of life.
    began_at, at
        When the claim was made and its last sign of life, by its owner's clock (epoch): for people alone.
    left_at, why
        When and why its owner gave the folder back; None: it did not.
    """

    number: int
    host: str = "an unknown host"
    boot: str = ""
    pids: str = ""
    pid: int = 0
    started: str = ""
    began_at: float = 0.0
    at: float = 0.0
    left_at: float | None = None
    why: str | None = None

    @classmethod
    def read(cls, number: int, text: str) -> Claim:
        """Read a claim's file; of one that is broken only the number is known."""
        try:
            data = json.loads(text)
            known = {one.name for one in fields(cls)} - {"number"}
            return cls(number, **{name: value for name, value in data.items() if name in known})
        except (ValueError, TypeError, AttributeError):
            return cls(number)

    @property
    def where(self) -> str:
        """The process, for a message."""
        return f"{self.host} (process {self.pid})"

    @property
    def is_here(self) -> bool:
        """Whether it was made where this process runs."""
        return Place(self.host, self.boot, self.pids) == Place.here()

    @property
    def process(self) -> ProcessId:
        """The process that gives the signs of life."""
        return ProcessId(self.pid, self.started)


class LostError(Exception):
    """Another host has taken the folder over: nothing in it may be changed any more."""


class Claims:
    """The claims in a stack's folder.

    Parameters
    ----------
    folder
        The stack's folder; the claims are in ``alive/`` below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "alive"

    def latest(self) -> tuple[Claim, str] | None:
        """Return the claim that owns the folder, and its file's text, which changes with each sign of life.

        Raises
        ------
        OSError
            When the folder cannot be read.
        """
        while numbers := self._numbers():
            with contextlib.suppress(FileNotFoundError):  # a claim of before, removed at this moment
                text = self._path(numbers[-1]).read_text(encoding="utf-8", errors="replace")
                return Claim.read(numbers[-1], text), text
        return None

    def make(self, number: int) -> Claim | None:
        """Make a claim; None when somebody else made that one, or a higher one."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.folder.chmod(0o700)
        place, now = Place.here(), time.time()
        claim = _signed(Claim(number, place.host, place.boot, place.pids, began_at=now, at=now))
        temporary = self._write(claim)
        try:
            os.link(temporary, self._path(number))
        except FileExistsError:
            return None
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with contextlib.suppress(FileExistsError), open(self._path(number), "x", encoding="utf-8"):
                os.replace(temporary, self._path(number))
                return self._checked(claim)
            return None
        finally:
            temporary.unlink(missing_ok=True)
        return self._checked(claim)

    def _checked(self, claim: Claim) -> Claim | None:
        numbers = self._numbers()
        if numbers[-1] != claim.number:  # what we looked at was old
            return None
        for old in numbers[:-2]:  # the one before stays: its owner says there that it has stopped
            self._path(old).unlink(missing_ok=True)
        return claim

    def sign(self, claim: Claim) -> None:
        """Write a claim anew, and see that it still owns the folder.

        A network file system may keep what a folder held some seconds ago. Who writes into it sees what it holds.

        Raises
        ------
        LostError
            When there is a higher one.
        OSError
            When the file system does not take it.
        """
        os.replace(self._write(claim), self._path(claim.number))
        if self._numbers()[-1] != claim.number:
            raise LostError

    def _write(self, claim: Claim) -> Path:
        data = {name: value for name, value in asdict(claim).items() if name != "number"}
        path = self.folder / f".{claim.number}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(data, file)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal())

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.json"


def _signed(claim: Claim) -> Claim:
    me = ProcessId.of(os.getpid()) or ProcessId(os.getpid(), "")
    return replace(claim, pid=me.pid, started=me.started, at=time.time())


class Owner:
    """The hold of this host on a stack's folder.

    Parameters
    ----------
    claims
        Of the folder.
    claim
        The one that owns it.
    is_new
        Whether it was made just now: whatever ran for an earlier one must not be taken for ours.
    """

    def __init__(self, claims: Claims, claim: Claim, *, is_new: bool = False) -> None:
        self.claims, self.claim, self.is_new = claims, claim, is_new

    @property
    def number(self) -> int:
        """The claim's number."""
        return self.claim.number

    def beat(self) -> None:
        """Give a sign of life, and see that the folder is still ours.

        Raises
        ------
        LostError
            When it is not.
        OSError
            When the file system does not answer as it should.
        """
        self.claim = _signed(self.claim)
        self.claims.sign(self.claim)

    def leave(self, why: str) -> None:
        """Give the folder back, and say why."""
        self.claim = replace(_signed(self.claim), left_at=time.time(), why=why)
        with contextlib.suppress(LostError):
            self.claims.sign(self.claim)

    @contextlib.contextmanager
    def kept(self, every_s: float) -> Iterator[None]:
        """Give signs of life from a thread, until another process does (the one that keeps PostgreSQL)."""
        over = threading.Event()

        def keep() -> None:
            while not over.wait(every_s):
                with contextlib.suppress(OSError, LostError):
                    found = self.claims.latest()
                    if found is not None and (found[0].pid == os.getpid() or not found[0].process.alive):
                        self.beat()

        thread = threading.Thread(target=keep, name="sign of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(every_s)


def take(folder: Path, waits: Waits, say: Callable[[str], None], *, takeover: bool = False) -> Owner:
    """Become the owner of a stack's folder, or find that this host is.

    Parameters
    ----------
    folder
        The stack's folder.
    waits
        How long a claim must have given no sign of life, and how long one that is taken over may take to stop.
    say
        Takes a line for whoever waits.
    takeover
        Take it from another host without waiting.

    Returns
    -------
    Owner
        The hold on the folder.

    Raises
    ------
    InputError
        When another host owns the folder and is alive.
    """
    claims = Claims(folder)
    while True:
        found = claims.latest()
        before = None if found is None else found[0]
        if found is not None and before is not None and before.left_at is None:
            if before.is_here and before.process.alive:
                return Owner(claims, before)
            if not before.is_here and not takeover:
                _watch(claims, *found, waits, say, folder)
        made = claims.make(1 if before is None else before.number + 1)
        if made is None:
            continue  # another was quicker, and is looked at
        owner = Owner(claims, made, is_new=True)
        if before is not None and before.left_at is None and not before.is_here:
            if takeover:
                with owner.kept(waits.sign_s):
                    _let_go(claims, before, waits.let_go_s)
            say(f"Took the stack in {folder} over from {before.where}.")
        return owner


def require(folder: Path) -> Owner:
    """Return the hold of this host on a stack's folder.

    Raises
    ------
    InputError
        When it has none.
    """
    claims = Claims(folder)
    found = claims.latest()
    if found is None or found[0].left_at is not None or not found[0].is_here:
        who = "no host" if found is None or found[0].left_at is not None else found[0].where
        raise InputError(
            f"The stack in {folder} is run by {who}, and this is {socket.gethostname()}. Nothing was changed."
        )
    return Owner(claims, found[0])


def _watch(claims: Claims, before: Claim, text: str, waits: Waits, say: Callable[[str], None], folder: Path) -> None:
    """Return when a claim has not changed for so long that its host counts as gone.

    Raises
    ------
    InputError
        As soon as it changes.
    """
    # The host's own name and another boot: most likely it was started anew, and a process of before is none any more
    gone_s = waits.gone_s if before.host != socket.gethostname() else min(waits.gone_s, 5 * waits.sign_s)
    since, said = steady(), False
    while (watched_s := steady() - since) < gone_s:
        time.sleep(_LOOK_S)
        found = claims.latest()
        if found is None or found[0].left_at is not None:
            return
        if found[1] != text:
            up_s = max(0.0, found[0].at - found[0].began_at)
            raise InputError(
                f"The stack in {folder} runs on {found[0].where}, which has had it for {up_s:.0f} s and gave a sign of "
                f"life just now; this is {socket.gethostname()}. Use it there, or stop it: there with "
                "`deephyper-balsam server down`, or from here with `deephyper-balsam server down --on-other-host`."
            )
        if watched_s > 2 * waits.sign_s and not said:
            say(
                f"Waiting: the stack in {folder} was last run on {before.where}. If no sign of life comes from there, "
                f"it is taken over after {gone_s:.0f} s. If that host is gone for good, "
                "`deephyper-balsam server up --takeover` does not wait."
            )
            said = True


def _let_go(claims: Claims, before: Claim, let_go_s: float) -> None:
    """Give a host that was taken over, and may be alive all the same, the time to notice it and to stop."""
    path = claims.folder / f"{before.number}.json"
    until = steady() + let_go_s
    while steady() < until:
        with contextlib.suppress(OSError):
            if Claim.read(before.number, path.read_text(encoding="utf-8")).left_at is not None:
                return
        time.sleep(_LOOK_S)
