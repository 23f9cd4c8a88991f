"""A launcher and its site's agent for thousands of virtual nodes, against a real Balsam server.

    python -m tests.benchmarks.virtual_launcher --client client.yml --site 1 --batch-job 1 --nodes 1024 ...

It speaks the session API as Balsam's own launcher and agent do: acquire jobs, report RUNNING, RUN_DONE and what comes
after it in bulk; and each run writes its result into its own job as the worker does, one request to read, one to write.
Only the runs are not real: a node is busy for a drawn time, and the objective is computed when it ends. In a search
with a stopper each run asks at its rungs as a real one does, one request to read and one to write, and goes on
whatever is decided; the time in which it waits for the answer is not counted as busy. At the end it prints what its
nodes did, as JSON.
"""

from __future__ import annotations

import argparse
import heapq
import http.client
import json
import queue
import random
import signal
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from deephyper_balsam.node.rungs import PATIENCE_S
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.stoppers import Stopper
from deephyper_balsam.node.targets import load_object
from deephyper_balsam.node.worker import evaluate
from deephyper_balsam.store import sockets, tls
from deephyper_balsam.store.applications import resolve_run
from deephyper_balsam.store.encoding import unpack

_BUDGETS = (1.0, 3.0, 9.0, 27.0)
_TICK_S = 0.01
_SESSION_TICK_S = 60.0
_AT_ONCE = 1000


class Api:
    """Balsam's API over one kept connection; one a thread, and cheap, for the machine is shared with the server."""

    def __init__(self, client_path: str) -> None:
        with open(client_path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
        root = str(settings["api_root"])
        self._socket = sockets.path_of(root)
        address = urlsplit(root)
        self._host, self._root = address.netloc, address.path.rstrip("/")
        self._trust = None
        if tls.is_tls(root):
            self._trust = ssl.create_default_context(cafile=str(tls.authority_of(Path(client_path))))
        self._headers = {"Authorization": f"Bearer {settings['token']}", "Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None

    def _connect(self) -> http.client.HTTPConnection:
        if self._socket is not None:
            return sockets.Connection(self._socket)
        if self._trust is not None:
            return http.client.HTTPSConnection(self._host, timeout=60, context=self._trust)
        return http.client.HTTPConnection(self._host, timeout=60)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Make one request; a refused one raises."""
        for attempt in (1, 2):
            try:
                if self._connection is None:
                    self._connection = self._connect()
                self._connection.request(method, f"{self._root}/{path}", json.dumps(body), self._headers)
                response = self._connection.getresponse()
                content = response.read()
                break
            except (http.client.HTTPException, ConnectionError):  # the server closes idle connections
                self._connection = None
                if attempt == 2:
                    raise
        if response.status >= 400:
            raise RuntimeError(f"{method} {path} answered {response.status}: {content[:300]!r}")
        return json.loads(content) if content else None


@dataclass
class Nodes:
    """What the virtual nodes did: seconds busy, and the pauses between two runs on a node."""

    count: int
    began: float
    busy_s: float = 0.0
    runs: int = 0
    asked_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    first_starts_s: list[float] = field(default_factory=list)
    idle: deque[tuple[int, float | None]] = field(default_factory=deque)  # (node, end of its last run)

    def __post_init__(self) -> None:
        self.idle.extend((node, None) for node in range(self.count))


@dataclass(order=True)
class _Ask:
    """A rung of a run, and when it is reached."""

    at: float
    budget: float
    run: _Run = field(compare=False)


@dataclass(order=True)
class _Run:
    """A run on a virtual node; the one that ends first comes first."""

    end: float
    start: float
    node: int
    job: dict[str, Any] = field(compare=False)


class VirtualLauncher:
    """One launcher of `nodes` nodes, with an agent of its own for the steps before and after a run."""

    def __init__(
        self,
        api: Callable[[], Api],
        site_id: int,
        batch_job_id: int,
        nodes: int,
        duration_s: Callable[[], float],
        run: Callable[[RunningJob], Any],
        *,
        prefetch: int,
        poll_s: float,
        turnaround_s: float,
        deliverers: int,
    ) -> None:
        self._make_api = api
        self._site_id = site_id
        self._batch_job_id = batch_job_id
        self._duration_s = duration_s
        self._run = run
        self._prefetch = prefetch
        self._poll_s = poll_s
        self._turnaround_s = turnaround_s
        self._waiting: deque[dict[str, Any]] = deque()
        self._states: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[_Run | _Ask] = queue.SimpleQueue()
        self._rungs: list[_Ask] = []
        self._delivered: queue.SimpleQueue[_Run] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._broken: list[BaseException] = []
        self.nodes = Nodes(nodes, time.time())
        loops: list[tuple[Callable[[Api], None], float]] = [(self._report, poll_s), (self._move_on, poll_s)]
        self._threads = [threading.Thread(target=self._repeat, args=loop, daemon=True) for loop in loops]
        self._threads += [threading.Thread(target=self._acquire, daemon=True)]
        self._threads += [threading.Thread(target=self._deliver, daemon=True) for _ in range(deliverers)]

    def stop(self, *_signal: Any) -> None:
        """End at the next tick."""
        self._stop.set()

    def drive(self) -> dict[str, Any]:
        """Run until `stop`; return what the nodes did."""
        for thread in self._threads:
            thread.start()
        running: list[_Run] = []
        while not self._stop.wait(_TICK_S) and not self._broken:
            now = time.time()
            while self._rungs and self._rungs[0].at <= now:
                self._ended.put(heapq.heappop(self._rungs))
            while running and running[0].end <= now:
                self._ended.put(heapq.heappop(running))
            while not self._delivered.empty():  # the run's process ends, and its node is free, when its result is in
                run = self._delivered.get()
                self.nodes.busy_s += run.end - run.start
                self.nodes.runs += 1
                self.nodes.idle.append((run.node, run.end))
                self._say(run.job["id"], "RUN_DONE", run.end)
            while self.nodes.idle and self._waiting:
                heapq.heappush(running, self._start(*self.nodes.idle.popleft(), self._waiting.popleft(), now))
        ended_at = time.time()
        self.nodes.busy_s += sum(min(run.end, ended_at) - min(run.start, ended_at) for run in running)
        left = [self._ended.get() for _ in range(self._ended.qsize())]
        late = [run for run in left if isinstance(run, _Run)]
        self.nodes.busy_s += sum(run.end - run.start for run in late) - sum(self.nodes.asked_s)
        if self._broken:
            raise self._broken[0]
        return {
            "nodes": self.nodes.count,
            "seconds": ended_at - self.nodes.began,
            "busy_s": self.nodes.busy_s,
            "runs": self.nodes.runs,
            "asked_s": self.nodes.asked_s,
            "gaps_s": self.nodes.gaps_s,
            "first_starts_s": self.nodes.first_starts_s,
            "undelivered": len(late),
        }

    def _start(self, node: int, ended: float | None, job: dict[str, Any], now: float) -> _Run:
        start = max(now, (ended or 0.0) + self._turnaround_s)
        if ended is None:
            self.nodes.first_starts_s.append(start - self.nodes.began)
        else:
            self.nodes.gaps_s.append(start - ended)
        self._say(job["id"], "RUNNING", start)
        run = _Run(start + self._duration_s(), start, node, job)
        stopping = job["data"].get("stopper")
        if stopping is not None:
            stopper = Stopper.from_dict(stopping["settings"])
            for budget in _BUDGETS:
                if stopper.rung(None, budget) == budget:
                    at = start + budget / _BUDGETS[-1] * (run.end - start)
                    heapq.heappush(self._rungs, _Ask(at, budget, run))
        return run

    def _say(self, job_id: int, state: str, moment: float) -> None:
        stamp = datetime.fromtimestamp(moment, timezone.utc).replace(tzinfo=None).isoformat()
        self._states.put({"id": job_id, "state": state, "state_timestamp": stamp, "state_data": {}})

    # --- threads: each with a connection of its own ---------------------------------------------------------------

    def _repeat(self, step: Callable[[Api], None], period_s: float) -> None:
        api = self._make_api()
        try:
            while not self._stop.wait(period_s):
                step(api)
        except Exception as error:
            self._broken.append(error)

    def _report(self, api: Api) -> None:
        """Send the states that gathered, two of one job in two requests, as Balsam's updater does."""
        updates: list[dict[int, dict[str, Any]]] = []
        seen: dict[int, int] = {}
        while not self._states.empty():
            update = self._states.get()
            turn = seen.get(update["id"], 0)
            seen[update["id"]] = turn + 1
            while len(updates) <= turn:
                updates.append({})
            updates[turn][update["id"]] = update
        for batch in updates:
            _in_parts(api, list(batch.values()))

    def _move_on(self, api: Api) -> None:
        """Do the agent's part: what was created may run, what has run is finished."""
        if not hasattr(self, "_agent_session"):
            self._agent_session = api.call("POST", "sessions/", {"site_id": self._site_id})["id"]
        spec = {"max_num_jobs": 2048, "filter_tags": {}, "states": ["STAGED_IN", "RUN_DONE"]}
        jobs = api.call("POST", f"sessions/{self._agent_session}", spec)
        moved = {"STAGED_IN": "PREPROCESSED", "RUN_DONE": "POSTPROCESSED"}
        stamp = datetime.now(timezone.utc).replace(tzinfo=None).isoformat()
        updates = [
            {
                "id": job["id"],
                "state": moved[job["state"]],
                "state_timestamp": stamp,
                "state_data": {},
                "serialized_return_value": "",
                "serialized_exception": "",
            }
            for job in jobs
        ]
        _in_parts(api, updates)

    def _acquire(self) -> None:
        api = self._make_api()
        try:
            session = api.call("POST", "sessions/", {"site_id": self._site_id, "batch_job_id": self._batch_job_id})[
                "id"
            ]
            ticked = time.monotonic()
            while not self._stop.wait(self._poll_s):
                wanted = self._prefetch + len(self.nodes.idle) - len(self._waiting)
                if wanted > 0:
                    spec = {
                        "max_num_jobs": min(wanted, 2048),
                        "max_wall_time_min": 600,
                        "max_nodes_per_job": self.nodes.count,
                        "serial_only": True,
                        "filter_tags": {},
                        "states": ["PREPROCESSED", "RESTART_READY"],
                    }
                    self._waiting.extend(api.call("POST", f"sessions/{session}", spec))
                if time.monotonic() - ticked > _SESSION_TICK_S:
                    api.call("PUT", f"sessions/{session}")
                    ticked = time.monotonic()
        except Exception as error:
            self._broken.append(error)

    def _deliver(self) -> None:
        api = self._make_api()
        try:
            while not self._stop.is_set():
                try:
                    run = self._ended.get(timeout=0.2)
                except queue.Empty:
                    continue
                if isinstance(run, _Ask):
                    self._answer(api, run)
                    continue
                job = RunningJob(int(run.job["tags"]["trial"]), unpack(run.job["serialized_parameters"]))
                outcome = evaluate(self._run, job)
                outcome.update(start=run.start, end=run.end, host=f"virtual-{self._batch_job_id}-{run.node}")
                data = api.call("GET", f"jobs/{run.job['id']}")["data"]
                api.call("PATCH", "jobs/", [{"id": run.job["id"], "data": {**data, "result": outcome}}])
                self._delivered.put(run)
        except Exception as error:
            self._broken.append(error)

    def _answer(self, api: Api, ask: _Ask) -> None:
        """Decide at a rung as the parent of a real run does."""
        job, stopping = ask.run.job, ask.run.job["data"]["stopper"]
        rows = api.call("GET", f"jobs/?id={job['id']}&id={stopping['note']}")["results"]
        data = {row["id"]: row["data"] for row in rows}
        standing = data[stopping["note"]].get("standing", {"rungs": {}})
        value = float(self._run(RunningJob(0, unpack(job["serialized_parameters"]))))
        decision = Stopper.from_dict(stopping["settings"]).decide(ask.budget, value, standing)
        own = data[job["id"]]
        rungs = [*own.get("rungs", ()), {**decision.to_dict(), "at": time.time()}]
        changed = {**own, "rungs": rungs, "curve": [[one["rung"], one["value"]] for one in rungs]}
        api.call("PATCH", "jobs/", [{"id": job["id"], "data": changed}])
        self.nodes.asked_s.append(min(PATIENCE_S, time.time() - ask.at))


def _in_parts(api: Api, updates: Sequence[dict[str, Any]]) -> None:
    for start in range(0, len(updates), _AT_ONCE):
        api.call("PATCH", "jobs/", updates[start : start + _AT_ONCE])


def main() -> None:
    """Run until SIGTERM and print what the nodes did."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--client", required=True)
    parser.add_argument("--site", type=int, required=True)
    parser.add_argument("--batch-job", type=int, required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--run", default="ackley")
    parser.add_argument("--mean", type=float, default=60.0)
    parser.add_argument("--std", type=float, default=20.0)
    parser.add_argument("--prefetch", type=int, required=True)
    parser.add_argument("--poll", type=float, default=1.0)
    parser.add_argument("--turnaround", type=float, default=0.1)
    parser.add_argument("--deliverers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    launcher = VirtualLauncher(
        lambda: Api(given.client),
        given.site,
        given.batch_job,
        given.nodes,
        lambda: max(0.05 * given.mean, draw.gauss(given.mean, given.std)),
        load_object(resolve_run(given.run)["target"]),
        prefetch=given.prefetch,
        poll_s=given.poll,
        turnaround_s=given.turnaround,
        deliverers=given.deliverers,
    )
    signal.signal(signal.SIGTERM, launcher.stop)
    print(json.dumps(launcher.drive()), flush=True)


if __name__ == "__main__":
    main()
