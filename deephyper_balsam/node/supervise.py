"""A run in a process of its own, on the node: its time, its output and its descendants are minded from outside.

The process that Balsam's launcher started forks; the child calls the run function, the parent waits. So a child that is
killed, exits or hangs leaves a parent that can say so, and whatever the run started ends with it, daemons included.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import ctypes
import json
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deephyper_balsam.node.shell_command import adopt_orphans, end_children

MAX_OUTPUT_BYTES = 64 * 2**20
STOP_GRACE_S = 10.0
"""How long a run may go on after its time is over, or after it said how it ended, before it is killed."""

MARKERS = ("BALSAM-RETURN-VALUE", "BALSAM-EXCEPTION")
"""Balsam's agent takes the first line of `job.out` with one of these for the run's own result."""

_BEGAN = b"began\n"
_ENDED_FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SIGNAL_FOLLOWS_S = 1.0
_TERM_GRACE_S = 6.0  # Balsam's launchers kill what is left ten seconds after they asked it to end
_CHUNK = 1 << 16
_READ_BACK_BYTES = 1 << 18
_BASE64 = re.compile(r"[A-Za-z0-9+/=]{100,}")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RunEnd:
    """How a run's process ended.

    Attributes
    ----------
    said
        What the run said of its end, or None when it ended without a word.
    timed_out
        Whether it was ended because its time was over and it did not react.
    signal, status
        What killed it, or its exit status; both None when it said how it ended.
    """

    said: dict[str, Any] | None = None
    timed_out: bool = False
    signal: int | None = None
    status: int | None = None


def supervise(
    work: Callable[[Callable[[], None]], dict[str, Any]],
    limit_s: float | None,
    grace_s: float | None = None,
    *,
    beside: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
) -> RunEnd:
    """Call `work` in a child process and wait for its end; then end every process that descends from it.

    Parameters
    ----------
    work
        Gets a function to call when the time begins to count; returns JSON values.
    limit_s
        Seconds from then on; None: no limit.
    grace_s
        How much longer it may take to react.
    beside
        What this process does while it waits; entered when there is a child, left at its end.

    A SIGTERM, SIGINT or SIGHUP to this process ends the child and its descendants, then this process by that signal:
    the allocation is over, and nothing is said of the run.
    """
    grace_s = STOP_GRACE_S if grace_s is None else grace_s
    adopt_orphans()
    said_r, said_w = os.pipe()
    output_r, output_w = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(said_r)
        os.close(output_r)
        _be_the_child(work, parent, said_w, output_w)
    os.close(said_w)
    os.close(output_w)
    watch = _Watch(child, said_r, output_r, limit_s, grace_s)
    try:
        with _signals_raise(), contextlib.nullcontext() if beside is None else beside():
            return watch.until_the_end()
    except _EndedFromOutside as outside:
        for number in _ENDED_FROM_OUTSIDE:
            signal.signal(number, signal.SIG_IGN)
        end_children(parent, grace_s=_TERM_GRACE_S)
        signal.signal(outside.number, signal.SIG_DFL)
        os.kill(parent, outside.number)
        raise  # not reached, but where the signal is blocked
    finally:
        end_children(parent)
        watch.close()


# --- the child -------------------------------------------------------------------------------------------------------


def _be_the_child(
    work: Callable[[Callable[[], None]], dict[str, Any]], parent: int, said_fd: int, output_fd: int
) -> None:
    """Call `work`, say how it ended, and leave; never returns."""
    status = 1
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(status)
        _be_the_one_to_kill()
        _forget_exit_functions()
        for number in (1, 2):
            os.dup2(output_fd, number)
        os.close(output_fd)
        ended = work(lambda: _say(said_fd, _BEGAN))
        _say(said_fd, json.dumps(ended).encode() + b"\n")
        status = 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):  # the user's functions: the result is said already
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # it may be closed
                stream.flush()
        os._exit(status)


def _say(said_fd: int, message: bytes) -> None:
    view = memoryview(message)
    while view:
        view = view[os.write(said_fd, view) :]


def _forget_exit_functions() -> None:
    """Keep of the parent's exit functions only what ends a user's process pools."""
    atexit._clear()
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        atexit.register(util._exit_function)


def _be_the_one_to_kill() -> None:
    """Let the kernel kill the run rather than its supervisor or the launcher, when memory is short."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
        file.write("500")


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere what a run leaves behind is found only while its parents live."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# --- the parent ------------------------------------------------------------------------------------------------------


class _EndedFromOutside(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, _frame: Any) -> None:
        raise _EndedFromOutside(number)

    previous = {number: signal.signal(number, ring) for number in _ENDED_FROM_OUTSIDE}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Watch:
    """Reads what the child says and prints until it ends, or its time is over."""

    def __init__(self, child: int, said_fd: int, output_fd: int, limit_s: float | None, grace_s: float) -> None:
        self._child, self._limit_s, self._grace_s = child, limit_s, grace_s
        self._said_fd, self._output_fd = said_fd, output_fd
        self._open = {said_fd, output_fd}
        self._filter = OutputFilter()
        self._words = b""
        self._deadline: float | None = None
        self._said: dict[str, Any] | None = None
        try:
            self._pid_fd = os.pidfd_open(child)
        except (AttributeError, OSError):  # not Linux, or an old one: look often
            self._pid_fd = -1

    def until_the_end(self) -> RunEnd:
        while True:
            self._read()
            waited, status = os.waitpid(self._child, os.WNOHANG)
            if waited:
                return self._ended(status)
            if self._deadline is not None and time.monotonic() > self._deadline:
                os.kill(self._child, signal.SIGKILL)
                os.waitpid(self._child, 0)
                self._drain()
                return RunEnd(self._said, timed_out=self._said is None)

    def _ended(self, status: int) -> RunEnd:
        self._drain()
        if self._said is not None:
            return RunEnd(self._said)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number in _ENDED_FROM_OUTSIDE:  # whoever ends an allocation tells all its processes, in any order
                time.sleep(_SIGNAL_FOLLOWS_S)
            return RunEnd(signal=number)
        return RunEnd(status=os.WEXITSTATUS(status))

    def _read(self) -> None:
        wait_s = 0.05 if self._pid_fd < 0 else 1.0
        if self._deadline is not None:
            wait_s = min(wait_s, max(0.0, self._deadline - time.monotonic()) + 0.001)
        watched = [*self._open, *([self._pid_fd] if self._pid_fd >= 0 else [])]
        ready, _, _ = select.select(watched, [], [], wait_s)
        self._take(ready)

    def _drain(self) -> None:
        """Take what is in the pipes now; descendants that live may hold them open."""
        while True:
            ready, _, _ = select.select(list(self._open), [], [], 0)
            if not ready:
                break
            self._take(ready)
        _print(self._filter.end())

    def _take(self, ready: Sequence[int]) -> None:
        for number in self._open & set(ready):
            chunk = os.read(number, _CHUNK)
            if not chunk:
                self._open.discard(number)
            elif number == self._output_fd:
                _print(self._filter.feed(chunk))
            else:
                self._hear(chunk)

    def _hear(self, chunk: bytes) -> None:
        self._words += chunk
        if self._words.startswith(_BEGAN):
            self._words = self._words.removeprefix(_BEGAN)
            if self._limit_s is not None:
                self._deadline = time.monotonic() + self._limit_s + self._grace_s
        if self._said is None and self._words.endswith(b"\n"):
            with contextlib.suppress(ValueError):  # the run wrote into a pipe that is not its own
                self._said = json.loads(self._words)
                self._deadline = time.monotonic() + self._grace_s

    def close(self) -> None:
        for number in (self._said_fd, self._output_fd, self._pid_fd):
            if number >= 0:
                os.close(number)


def _print(text: bytes) -> None:
    """Write to where this process's output goes; a full disk must not cost the result."""
    view = memoryview(text)
    with contextlib.suppress(OSError):
        while view:
            view = view[os.write(1, view) :]


class OutputFilter:
    """Makes what a run prints harmless to Balsam's agent, which reads all of it, as UTF-8, line by line.

    Bytes that are no UTF-8 would end the agent's worker; Balsam's own markers would be taken for the run's result. What
    exceeds `limit_bytes` is left out.
    """

    def __init__(self, limit_bytes: int = MAX_OUTPUT_BYTES) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._left = limit_bytes
        self._limit = limit_bytes

    def feed(self, chunk: bytes) -> bytes:
        """Return what may be printed of the output so far."""
        return self._clean(self._decoder.decode(chunk))

    def end(self) -> bytes:
        """Return what was held back."""
        text = self._clean(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held.encode()

    def _clean(self, text: str) -> bytes:
        if self._left <= 0:
            return b""
        text = self._held + text
        for marker in MARKERS:
            text = text.replace(marker, marker.replace("-", " "))
        held = max(
            (n for marker in MARKERS for n in range(1, len(marker)) if text.endswith(marker[:n])),
            default=0,
        )
        self._held = text[len(text) - held :]
        clean = text[: len(text) - held].encode()
        self._left -= len(clean)
        if self._left > 0:
            return clean
        self._held = ""
        words = f"\n(what the run printed beyond {self._limit / 2**20:g} MiB is left out)\n"
        kept = clean[: len(clean) + self._left].decode(errors="ignore")
        return (kept + words).encode()


def clean_file(path: Path) -> None:
    """Make a `job.out` harmless into which the run wrote itself; every byte stays where it is, as others write on."""
    codecs.register_error(_BYTE_BY_BYTE, _question_marks)
    try:
        if not path.is_file() or path.stat().st_size > 2 * MAX_OUTPUT_BYTES:
            return
        content = path.read_bytes()
        text = content.decode(errors=_BYTE_BY_BYTE)
        for marker in MARKERS:
            text = text.replace(marker, marker.replace("-", " "))
        if text.encode() != content:
            with path.open("r+b") as file:
                file.write(text.encode())
    except OSError:  # the run took the file or the right to it away: then the agent reads nothing either
        return


_BYTE_BY_BYTE = "deephyper_balsam.byte_by_byte"


def _question_marks(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "?" * (error.end - error.start), error.end


def readable_end(path: Path, limit_chars: int) -> str | None:
    """Return the end of what a run printed into `job.out`; None: the file cannot be read from here.

    Balsam writes what a run returned into the same file, as one line of base64: that is left out.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - _READ_BACK_BYTES)
            file.seek(begin)
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    lines = text.splitlines()
    if begin and lines and _BASE64.fullmatch(lines[0]):  # the rest of what Balsam wrote
        del lines[0]
    said = "\n".join(line for line in lines if not line.startswith(MARKERS)).strip("\n")
    return said if len(said) <= limit_chars else "…" + said[1 - limit_chars :]
