"""One driver against a real Balsam server and virtual launchers with thousands of nodes: how busy are they?

    python -m tests.benchmarks.load --nodes 1024 --mean 6 --std 2 --minutes 10

Driver, optimizer, API and PostgreSQL are real; the launchers are virtual (`virtual_launcher.py`): they speak Balsam's
session API, and their runs only take time. `--history N` begins with N trials that ended before. `--tls` measures what
TLS costs the server. `--rungs` measures without and with a stopper of three rungs, at each of which every run asks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from deephyper_balsam.common.processes import tail
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import Search
from deephyper_balsam.node.targets import load_object
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store import trial_rows
from deephyper_balsam.store.applications import resolve_problem
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.trial import Resources

NAME = "load"
_SETTLES_S = 62.0  # what changed within a minute is read once more by each who looks


class CountingGateway(Gateway):
    """A gateway that counts its requests and the rows that it read."""

    requests = 0
    rows = 0

    def _call(self, method: str, path: str, params: Any = None, body: Any = None) -> Any:
        answer = super()._call(method, path, params, body)
        type(self).requests += 1
        if method == "GET" and isinstance(answer, dict):
            type(self).rows += len(answer.get("results", ()))
        return answer


@dataclass
class Sample:
    """What had been used and done by one moment."""

    at: float
    evaluated: int
    driver_cpu_s: float
    server_cpu_s: float
    requests: int
    rows: int
    memory_mb: float


@dataclass
class Watch:
    """Takes a sample every few seconds, and times the driver's loop."""

    servers: list[psutil.Process]
    samples: list[Sample] = field(default_factory=list)
    loops_s: list[float] = field(default_factory=list)
    _last: float | None = None

    def look(self, progress: Progress) -> None:
        """Be called once a loop."""
        now = time.monotonic()
        if self._last is not None:
            self.loops_s.append(now - self._last)
        self._last = now
        if not self.samples or now - self.samples[-1].at >= 5:
            me = psutil.Process()
            times = me.cpu_times()
            self.samples.append(
                Sample(
                    now,
                    progress.evaluated,
                    times.user + times.system,
                    sum(_cpu_s(process) for process in self.servers),
                    CountingGateway.requests,
                    CountingGateway.rows,
                    me.memory_info().rss / 1e6,
                )
            )


def _cpu_s(process: psutil.Process) -> float:
    """Return the processor seconds of a process and its children, those that ended too."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
            total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


def make_site(stack: LocalStack) -> tuple[Gateway, int]:
    """Make a site without an agent: the virtual launcher does the agent's part."""
    gateway = Gateway(stack.client_path)
    return gateway, gateway.create_site("virtual", str(stack.folder / "virtual"))


def make_allocation(gateway: Gateway, site_id: int, nodes: int, minutes: int, scheduler_id: int) -> int:
    """Make a BatchJob of that many nodes that runs; its id."""
    row = gateway.create_batch_job(
        {
            "site_id": site_id,
            "num_nodes": nodes,
            "wall_time_min": minutes,
            "queue": "virtual",
            "project": "virtual",
            "job_mode": "serial",
            "optional_params": {},
            "filter_tags": {},
        }
    )
    gateway.adopt_batch_job(row["id"], scheduler_id, datetime.now(timezone.utc).replace(tzinfo=None).isoformat())
    return int(row["id"])


def launchers(stack: LocalStack, site_id: int, batch_job_id: int, given: argparse.Namespace) -> subprocess.Popen[str]:
    """Start the virtual launcher."""
    command = [sys.executable, "-m", "tests.benchmarks.virtual_launcher", "--client", str(stack.client_path)]
    options = {
        "site": site_id,
        "batch-job": batch_job_id,
        "nodes": given.nodes,
        "mean": given.mean,
        "std": given.std,
        "prefetch": given.prefetch if given.prefetch is not None else given.nodes,
        "turnaround": given.turnaround,
        "seed": given.seed,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def prepare(search: Search, gateway: Gateway, count: int, mean_s: float) -> None:
    """Leave `count` trials of the search in Balsam as if earlier drivers had evaluated them."""
    evaluator = search.evaluator
    evaluator.open(search.name, search.settings, timeout_s=3600.0 * 24)
    evaluator.abandon("the history was prepared")
    app_id = gateway.apps(name=gateway.apps()[0]["name"])[0]["id"]
    run = load_object(evaluator.spec["target"])
    trials = make_optimizer("random", search.problem, seed=1).ask(count)
    now = time.time()
    for start in range(0, count, 1000):
        rows = []
        for trial in trials[start : start + 1000]:
            row = trial_rows.trial_job(trial, search.name, app_id, Resources(), now, None)
            outcome = {"objective": run(trial.config), "failure": None, "metadata": {}, "host": "before"}
            outcome.update(start=now - mean_s, end=now)
            rows.append(
                {**row, "data": {**row["data"], "result": outcome, "gathered": {"order": trial.number, "at": now}}}
            )
        ids = gateway.create_jobs(rows)
        gateway._call("PATCH", "jobs/", body=[{"id": one, "state": "JOB_FINISHED", "state_data": {}} for one in ids])
    time.sleep(_SETTLES_S)


def quantiles(values: list[float], *shares: float) -> list[float]:
    """Return the quantiles; NaN for none."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan") for share in shares]


def report(launched: dict[str, Any], watch: Watch, parts: int = 5) -> str:
    """Return what was measured, as lines."""
    window_s = launched["seconds"]
    utilization = launched["busy_s"] / (launched["nodes"] * window_s)
    gaps = quantiles(launched["gaps_s"], 0.5, 0.99)
    loops = quantiles(watch.loops_s, 0.5, 0.99, 1.0)
    first, last = watch.samples[0], watch.samples[-1]
    began = max(launched["first_starts_s"], default=float("nan"))
    lines = [
        f"{launched['nodes']} nodes, {window_s:.0f} s: utilization {utilization:.4f}, {launched['runs']} runs, "
        f"{launched['runs'] / window_s:.1f}/s; the last node began after {began:.1f} s",
        f"from a result to the next start on its node: median {gaps[0]:.2f} s, 99th percentile {gaps[1]:.2f} s; "
        f"results not delivered at the end: {launched['undelivered']}",
        f"driver: {last.driver_cpu_s - first.driver_cpu_s:.0f} s of processor, {last.memory_mb:.0f} MB, loop median "
        f"{loops[0]:.2f} s, 99th {loops[1]:.2f} s, longest {loops[2]:.2f} s; "
        f"server: {last.server_cpu_s - first.server_cpu_s:.0f} s of processor",
        "evaluated      /s   driver ms   server ms   requests   rows read   (each per evaluation)",
    ]
    if launched["asked_s"]:
        asked = quantiles(launched["asked_s"], 0.5, 0.99)
        lines[2:2] = [
            f"{len(launched['asked_s'])} decisions at rungs, each waited for {asked[0]:.3f} s in the median, 99th "
            f"percentile {asked[1]:.3f} s (not counted as busy)"
        ]
    step = max(1, (len(watch.samples) - 1) // parts)
    marks = watch.samples[::step]
    for before, after in itertools.pairwise(marks):
        count = max(1, after.evaluated - before.evaluated)
        lines.append(
            f"{after.evaluated:9d} {count / (after.at - before.at):7.1f} "
            f"{1e3 * (after.driver_cpu_s - before.driver_cpu_s) / count:11.2f} "
            f"{1e3 * (after.server_cpu_s - before.server_cpu_s) / count:11.2f} "
            f"{(after.requests - before.requests) / count:10.3f} {(after.rows - before.rows) / count:11.2f}"
        )
    return "\n".join(lines)


def measure(
    given: argparse.Namespace, folder: Path, *, tls: bool = False, stopper: str = "none"
) -> tuple[str, float, float]:
    """Run one search; return what was measured, the server's processor time in ms per evaluation, the utilization."""
    stack = LocalStack(folder / "balsam")
    stack.up(site=False, listen="127.0.0.1" if tls else None)
    for name in [name for name in os.environ if name.startswith("BALSAM_")]:
        del os.environ[name]
    os.environ["BALSAM_CLIENT_PATH"] = str(stack.client_path)
    virtual = None
    try:
        gateway, site_id = make_site(stack)
        batch_job_id = make_allocation(gateway, site_id, given.nodes, 600, 1)
        evaluator = BalsamEvaluator("ackley", "virtual")
        evaluator.gateway = CountingGateway(stack.client_path)
        problem = resolve_problem("ackley")
        if given.history:
            first = Search(problem, evaluator, NAME, given.method, seed=given.seed, log_dir=folder, max_failures=0)
            prepare(first, gateway, given.history, given.mean)
            evaluator = BalsamEvaluator("ackley", "virtual")
            evaluator.gateway = CountingGateway(stack.client_path)
        search = Search(
            problem, evaluator, NAME, given.method, seed=given.seed, log_dir=folder, max_failures=0, stopper=stopper
        )
        servers = [psutil.Process(part.pid) for part in stack.status().processes if part.pid is not None]
        watch = Watch(servers)
        virtual = launchers(stack, site_id, batch_job_id, given)
        asked_at = time.monotonic()

        def look(progress: Progress) -> None:
            if not watch.samples:
                print(f"the driver's first loop came {time.monotonic() - asked_at:.1f} s after the start", flush=True)
                threading.Timer(60 * given.minutes, search.stop).start()
                threading.Timer(60 * given.minutes, lambda: virtual.send_signal(signal.SIGTERM)).start()
            watch.look(progress)

        search.search(timeout=3600 * 24, on_progress=look)
        said = virtual.communicate(timeout=120)[0]
        if virtual.returncode:
            raise SystemExit(f"The virtual launcher failed, and the server said:\n{tail(stack.logs / 'api.log', 60)}")
        first, last = watch.samples[0], watch.samples[-1]
        server_ms = 1e3 * (last.server_cpu_s - first.server_cpu_s) / max(1, last.evaluated - first.evaluated)
        launched = json.loads(said)
        return report(launched, watch), server_ms, launched["busy_s"] / (launched["nodes"] * launched["seconds"])
    finally:
        if virtual is not None and virtual.poll() is None:
            virtual.kill()
        stack.down()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1024)
    parser.add_argument("--mean", type=float, default=6.0, help="seconds of a run")
    parser.add_argument("--std", type=float, default=2.0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--method", default="ambs")
    parser.add_argument("--prefetch", type=int, help="jobs that a launcher holds ahead [default: one a node]")
    parser.add_argument("--turnaround", type=float, default=0.1, help="seconds between two runs on a node, at least")
    parser.add_argument("--history", type=int, default=0, help="trials that ended before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tls", action="store_true", help="measure four times: Unix socket, TLS, TLS, Unix socket")
    parser.add_argument("--rungs", action="store_true", help="measure twice: without and with a stopper of three rungs")
    given = parser.parse_args()
    if given.rungs:
        reached = []
        for stopper in ("none", "sha:max=27,min=1,factor=3"):
            with tempfile.TemporaryDirectory(prefix="load ") as folder:
                said, _, utilization = measure(given, Path(folder), stopper=stopper)
            print(f"--stopper {stopper}:\n{said}", flush=True)
            reached.append(utilization)
        print(f"utilization with three rungs: {reached[1] / reached[0]:.4f} of what it is without")
        return
    spent: dict[bool, list[float]] = {False: [], True: []}
    for tls in (False, True, True, False) if given.tls else (False,):
        with tempfile.TemporaryDirectory(prefix="load ") as folder:
            said, server_ms, _ = measure(given, Path(folder), tls=tls)
        print(f"over {'TLS' if tls else 'a Unix socket'}:\n{said}" if given.tls else said, flush=True)
        spent[tls].append(server_ms)
    if given.tls:
        plain, over_tls = (sum(spent[tls]) / len(spent[tls]) for tls in (False, True))
        print(
            f"server, processor time an evaluation: {plain:.2f} ms over a Unix socket, {over_tls:.2f} ms over TLS: "
            f"{over_tls / plain - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
