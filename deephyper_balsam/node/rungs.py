"""Whether a run goes on: asked at each rung of the search's stopper, and decided on the node from a note of the driver.

The run function is called in a child of the process that Balsam's launcher started (`node.supervise`). At a rung the
child tells its parent what was reached (`RungRecorder`). The parent reads the driver's note and the job in one request,
decides, and writes the decision and the curve into the job's own data in another (`RungKeeper`). Between two rungs
nothing is asked. The run waits a moment for the answer and goes on without: a driver that is dead, or an API that is
away, stops nobody.

Of several ranks the first decides, and the others read its decision in the trial's folder, so that all leave together.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deephyper_balsam.common.clock import moment
from deephyper_balsam.node.recording import FileRecorder, RecordFile
from deephyper_balsam.node.stoppers import Decision, Stopper

PATIENCE_S = 1.0
"""How long a run waits for a decision before it goes on."""
_OTHER_RANKS_WAIT_S = 60.0
_LOOK_S = 0.02
_LAST_ANSWER_S = 15.0
_CHUNK = 1 << 16


class Line:
    """Messages to and fro between a run and its parent: JSON, a line each.

    Parameters
    ----------
    connection
        One end of a pair of sockets.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._got = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; OSError when nobody is at the other end any more."""
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, patience_s: float | None) -> dict[str, Any] | None:
        """Return the next message; None: there was none in time, or there will be none.

        Parameters
        ----------
        patience_s
            How long to wait for it, seconds; None: until the other end is closed.
        """
        until = None if patience_s is None else time.monotonic() + patience_s
        while b"\n" not in self._got:
            left = None if until is None else max(0.0, until - time.monotonic())
            try:
                if not select.select([self._connection], [], [], left)[0]:
                    return None
                chunk = self._connection.recv(_CHUNK)
            except (OSError, ValueError):
                return None
            if not chunk:
                return None
            self._got += chunk
        line, _, self._got = self._got.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def drop(self) -> None:
        """Let go of this copy of an end that another process has, too."""
        self._connection.close()

    def close(self) -> None:
        """Let whoever waits at the other end know that nothing more comes."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


# --- the run's side --------------------------------------------------------------------------------------------------


class RungRecorder(FileRecorder):
    """A recorder that asks at each rung whether the run goes on.

    Parameters
    ----------
    file
        Where points and, for the other ranks, decisions are kept.
    stopper
        The search's.
    line
        At whose other end a `RungKeeper` answers; None: nobody does, and the run goes on.
    rank, ranks
        Of this process, and how many there are.
    told_to_stop
        Whether it was decided that the run ends, and a cut came before it did; where its records are not here any more,
        it begins anew, and goes on.
    minimize
        As of `Recorder`.
    """

    def __init__(
        self,
        file: RecordFile,
        stopper: Stopper,
        line: Line | None,
        *,
        rank: int = 0,
        ranks: int = 1,
        told_to_stop: bool = False,
        minimize: bool = False,
    ) -> None:
        super().__init__(file, rank=rank, minimize=minimize)
        self._stopper, self._line = stopper, line
        self._ranks = ranks
        if ranks > 1:
            self._begin()  # all of them now: they know a decision of this start by how often they began
        self._answers = True
        self._asked = self._heard = 0
        self._stop = told_to_stop and self.curve.last is not None

    def add(self, budget: float, objective: float) -> None:
        """Keep a point; at a rung, ask whether the run goes on."""
        before = None if self.curve.last is None else self.curve.last[0]
        super().add(budget, objective)
        rung = self._stopper.rung(before, budget)
        if rung is None or self._stop:
            return
        if self._rank:
            self._stop = self._as_the_first_rank(rung)
            return
        if not self._stopper.compares:
            self._stop = self._stopper.decide(rung, objective, None).stop
        elif self._line is not None:
            self._ask(rung, objective)
        if self._ranks > 1:
            self._file.append_decision(self.restarts, rung, stop=self._stop)

    def stopped(self) -> bool:
        """Return whether the run shall end; an answer that came late counts, but not for several ranks."""
        if self._rank == 0 and self._ranks == 1:
            self._hear(0.0)
        return self._stop

    def _ask(self, rung: float, objective: float) -> None:
        assert self._line is not None
        self._asked += 1
        points = [list(point) for point in self.curve.points]
        try:
            self._line.send({"ask": self._asked, "rung": rung, "value": objective, "curve": points})
        except OSError:
            self._line = None
            return
        # Where the last question was not answered in time, this one is not waited for: the API is away or slow
        self._answers = self._hear(PATIENCE_S if self._answers else 0.0)

    def _hear(self, patience_s: float) -> bool:
        """Take in answers until that to the last question; whether it came."""
        until = time.monotonic() + patience_s
        while self._line is not None and self._heard < self._asked:
            answer = self._line.receive(max(0.0, until - time.monotonic()))
            if answer is None:
                return False
            self._heard = answer["ask"]
            self._stop = self._stop or bool(answer["stop"])
        return True

    def _as_the_first_rank(self, rung: float) -> bool:
        until = time.monotonic() + _OTHER_RANKS_WAIT_S
        while time.monotonic() < until:
            stop = self._file.decision(self.restarts, rung)
            if stop is not None:
                return stop
            time.sleep(_LOOK_S)
        return False


# --- the parent's side -----------------------------------------------------------------------------------------------


class RungKeeper:
    """Answers what a run asks at its rungs, in a thread beside whoever waits for the run.

    Parameters
    ----------
    stopper
        The search's.
    read
        Returns the job's data as it is now, and what the driver's note says of the rungs (`Stopper.standing`).
    write
        Writes the job's data.
    """

    def __init__(
        self,
        stopper: Stopper,
        read: Callable[[], tuple[Mapping[str, Any], Mapping[str, Any]]],
        write: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._stopper, self._read, self._write = stopper, read, write
        ours, theirs = socket.socketpair()
        self._ours, self.line = Line(ours), Line(theirs)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Answer in the block; entered in the parent when the run's process has been made.

        At the end of the block an answer that is under way is waited for, so that it is written before the result; but
        not when the block ends by an error, which here is the end of the allocation.
        """
        self.line.drop()
        thread = threading.Thread(target=self._answer_all, name="rungs", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._ours.close()
            raise
        self._ours.close()
        thread.join(_LAST_ANSWER_S)

    def _answer_all(self) -> None:
        while (question := self._ours.receive(None)) is not None:
            decision = self._decide(question)
            with contextlib.suppress(OSError):
                self._ours.send({"ask": question["ask"], "stop": decision is not None and decision.stop})

    def _decide(self, question: Mapping[str, Any]) -> Decision | None:
        try:
            data, standing = self._read()
            decision = self._stopper.decide(question["rung"], question["value"], standing)
            if "result" not in data:
                rungs = [*data.get("rungs", ()), {**decision.to_dict(), "at": moment()}]
                self._write({**data, "rungs": rungs, "curve": question["curve"]})
        except Exception as error:
            print(f"At budget {question['rung']:g} Balsam was asked in vain whether to go on ({error}).")  # noqa: T201
            return None
        return decision
