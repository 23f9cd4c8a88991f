#!/usr/bin/env python3
"""Cobalt and PBS as a few real processes: ``qsub``, ``qstat``, ``qdel``, ``nodelist``, ``aprun`` and ``mpiexec``.

One file plays all of them; `install` makes a folder of links to it for $PATH, and the link's name says which command it
is. The queue is a folder with a JSON file a job (``$FAKE_BATCH``). A job's script is run at once as a process group of
its own, with the variables that the real system sets, until its wall time. What is printed has the form of the manual
pages qsub(1), qstat(1), qdel(1) of Cobalt, and qsub(1B), qstat(1B), qdel(1B) of PBS Professional.

For tests: the file ``states.json`` in the folder replaces the state of a job that is shown, and ``down`` makes the
commands fail.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

COMMANDS = {
    "cobalt": ("qsub", "qstat", "qdel", "nodelist", "aprun"),
    "pbs": ("qsub", "qstat", "qdel", "mpiexec"),
}
KILL_DELAY_S = 10.0


def install(folder: Path, kind: str) -> dict[str, str]:
    """Make the commands of ``"cobalt"`` or ``"pbs"`` in `folder`/bin; return the variables that make them found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    names = [f"nid{number:05d}" for number in range(100, 108)] + [f"x3005c0s{number}b0n0" for number in range(8)]
    (folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join(names)} {socket.gethostname()}\n")
    for name in COMMANDS[kind]:
        script = folder / "bin" / name
        call = f"runpy.run_path({str(Path(__file__).resolve())!r})['main']({name!r}, sys.argv[1:])"
        script.write_text(f"#!{sys.executable} -S\nimport runpy, sys\n{call}\n")
        script.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"FAKE_BATCH": str(folder), "FAKE_BATCH_KIND": kind, "PATH": path}


class Queue:
    """The jobs in a folder."""

    def __init__(self) -> None:
        self.folder = Path(os.environ["FAKE_BATCH"])
        if (self.folder / "down").exists():
            fail("qstat: cannot connect to server (errno=15010)", 255)

    def write(self, job: dict[str, Any]) -> None:
        path = self.folder / "jobs" / f"{job['id']}.json"
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        temporary.write_text(json.dumps(job))
        temporary.replace(path)

    def read(self, number: int) -> dict[str, Any] | None:
        path = self.folder / "jobs" / f"{number}.json"
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / "jobs").glob("*.json"))]

    def shown_state(self, job: dict[str, Any], usual: str) -> str:
        states = self.folder / "states.json"
        return str(json.loads(states.read_text()).get(str(job["id"]), usual)) if states.exists() else usual


def fail(message: str, code: int) -> Any:
    print(message, file=sys.stderr)
    sys.exit(code)


def options(words: list[str], with_value: str, long: tuple[str, ...] = ()) -> tuple[dict[str, list[str]], list[str]]:
    """Split ``-x value`` and ``--long value`` words from the rest, as these old commands do."""
    found: dict[str, list[str]] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not equals and (word[1:] in with_value.split() or word[2:] in long):
            value = rest.pop(0)
        found.setdefault(name, []).append(value)
    return found, rest


# ---- qsub


def qsub_cobalt(words: list[str]) -> None:
    given, (script, *arguments) = options(
        words, "A q n t o e O", ("env", "jobname", "debuglog", "attrs", "cwd", "dependencies")
    )
    if not os.access(script, os.X_OK):
        fail("Error: command is not executable", 1)
    for needed in ("-A", "-n", "-t"):
        if needed not in given:
            fail(f"Not all required options provided: {needed}", 2)
    pairs = re.split(r"(?<!\\):", given.get("--env", [""])[0])
    job = {
        "name": given.get("--jobname", ["N/A"])[0],
        "project": given["-A"][0],
        "queue": given.get("-q", ["default"])[0],
        "nodes": int(given["-n"][0]),
        "wall_s": int(given["-t"][0]) * 60,
        "output": given.get("-o", [Path(script).with_suffix(".output")])[0],
        "log": given.get("--debuglog", [f"{Path(script).stem}.cobaltlog"])[0],  # by itself in the working folder
        "env": dict(pair.replace(r"\:", ":").partition("=")[::2] for pair in pairs if pair),
        "script": script,
        "arguments": arguments,
        "after": int(given["--dependencies"][0]) if "--dependencies" in given else None,
    }
    number = start(job)
    print(f'Job routed to queue "{job["queue"]}".\n{number}')


def qsub_pbs(words: list[str]) -> None:
    given, (script, *_) = options(words, "N A q v o e j k l W")
    directives: dict[str, str] = {}
    for line in Path(script).read_text(encoding="utf-8").splitlines():
        match = re.match(r"#PBS\s+-l\s+(\w+)=(.*)", line)
        if match:
            directives.setdefault(match[1], match[2].strip())
    directives.update(word.partition("=")[::2] for word in given.get("-l", []))
    if not re.fullmatch(r"\d+:[0-5]\d:[0-5]\d", directives.get("walltime", "")):
        fail(f"qsub: Illegal attribute or resource value Resource_List.walltime: {directives.get('walltime')}", 168)
    hours, minutes, seconds = map(int, directives["walltime"].split(":"))
    split = shlex.shlex(given.get("-v", [""])[0], posix=True)
    split.whitespace, split.whitespace_split, split.commenters = ",", True, ""
    pairs = list(split)
    job = {
        "name": given.get("-N", [Path(script).name])[0],
        "project": given["-A"][0],
        "queue": "medium" if given["-q"][0] == "prod" else given["-q"][0],  # a routing queue
        "nodes": int(directives["select"].partition(":")[0]),
        "wall_s": hours * 3600 + minutes * 60 + seconds,
        "output": given["-o"][0],
        "env": dict(pair.partition("=")[::2] for pair in pairs),
        "script": script,
        "after": next((int(word.rpartition(":")[2]) for word in given.get("-W", []) if "afterany" in word), None),
    }
    print(f"{start(job)}.polaris-pbs-01.hsn.cm.polaris.alcf.anl.gov")


def start(job: dict[str, Any]) -> int:
    """Put a job into the queue and start the process that runs it."""
    queue = Queue()
    job["id"] = 1000 + max((found["id"] - 1000 for found in queue.all()), default=0) + 1
    job["submitted"], job["cwd"], job["started"], job["ended"] = time.time(), os.getcwd(), None, None
    queue.write(job)
    subprocess.Popen(
        [sys.executable, __file__, "--run", str(job["id"])],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    return int(job["id"])


def wait_for_turn(queue: Queue, job: dict[str, Any]) -> bool:
    """Wait until the job before this one is over; False: this one was deleted. Cobalt's must have ended well."""
    while job["after"] is not None:
        before = queue.read(job["after"])
        if before is None or (before["ended"] and (before["code"] == 0 or os.environ["FAKE_BATCH_KIND"] == "pbs")):
            break
        if (queue.folder / f"{job['id']}.delete").exists():
            job["ended"], job["code"] = time.time(), 0
            queue.write(job)
            return False
        time.sleep(0.1)
    return True


def run_job(number: int) -> None:
    """Run a job's script with a clean environment, as these systems do, until its end or its wall time."""
    queue = Queue()
    job = queue.read(number)
    assert job is not None
    if not wait_for_turn(queue, job):
        return
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "FAKE_BATCH", "FAKE_BATCH_KIND") if name in os.environ}
    env = {**kept, **job["env"]}
    if os.environ["FAKE_BATCH_KIND"] == "cobalt":
        last = 100 + job["nodes"] - 1
        part = "100" if last == 100 else f"100-{last}"
        env |= {"COBALT_JOBID": str(number), "COBALT_PARTNAME": part, "COBALT_JOBSIZE": str(job["nodes"])}
    else:
        nodes = queue.folder / f"{number}.nodes"
        nodes.write_text("".join(f"x3005c0s{i}b0n0\n" * 2 for i in range(job["nodes"])))  # a line for each chunk
        env |= {"PBS_JOBID": f"{number}.polaris-pbs-01", "PBS_NODEFILE": str(nodes), "PBS_O_WORKDIR": job["cwd"]}
    with open(job["output"], "wb") as output:
        child = subprocess.Popen(
            [job["script"], *job.get("arguments", [])], cwd=job["cwd"], env=env, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    job["started"], job["pid"] = time.time(), child.pid
    queue.write(job)
    log(job, f"Info: COBALT_STARTTIME={int(job['started'])}")
    deadline, told = job["started"] + job["wall_s"], False
    while child.poll() is None:
        if not told and (time.time() > deadline or (queue.folder / f"{number}.delete").exists()):
            os.killpg(child.pid, signal.SIGTERM)
            told, deadline = True, time.time() + KILL_DELAY_S
        elif told and time.time() > deadline:
            os.killpg(child.pid, signal.SIGKILL)
        time.sleep(0.05)
    job["ended"], job["code"] = time.time(), child.returncode
    log(
        job,
        f"Info: task completed normally with an exit code of {child.returncode}; initiating job cleanup and removal",
    )
    queue.write(job)


def log(job: dict[str, Any], text: str) -> None:
    if "log" in job:
        with open(job["log"], "a", encoding="utf-8") as file:
            print(f"{datetime.now(timezone.utc):%a %b %d %H:%M:%S %Y %z} (UTC) {text}", file=file)


# ---- qstat, qdel


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"


QUEUES = {
    "cobalt": ("debug-cache-quad", "debug-flat-quad", "default"),
    "pbs": ("debug", "debug-scaling", "prod", "medium", "preemptable", "capacity"),
}


def list_queues(kind: str) -> None:
    """Print what ``qstat -Q`` prints, as far as names go."""
    Queue()
    heading = {
        "cobalt": "Name              Users  MinTime   MaxTime   MaxRunning  MaxQueued  MaxUserNodes  State",
        "pbs": "Queue              Max   Tot Ena Str   Que   Run   Hld   Wat   Trn   Ext Type",
    }[kind]
    print(heading, "=" * len(heading), *(f"{name:18}  None" for name in QUEUES[kind]), sep="\n")


def qstat_cobalt(words: list[str]) -> None:
    queue = Queue()
    _, numbers = options(words, "u A q")
    jobs = [job for job in queue.all() if job["ended"] is None and (not numbers or str(job["id"]) in numbers)]
    if not jobs:
        sys.exit(1)
    columns = os.environ["QSTAT_HEADER"].split(":")
    now = time.time()
    rows = [columns]
    for job in jobs:
        ran = now - job["started"] if job["started"] else 0
        values = {
            "JobID": str(job["id"]),
            "State": queue.shown_state(job, "running" if job["started"] else "queued"),
            "WallTime": clock(job["wall_s"]),
            "Queue": job["queue"],
            "Nodes": str(job["nodes"]),
            "Project": job["project"],
            "TimeRemaining": clock(job["wall_s"] - ran) if job["started"] else "N/A",
            "QueuedTime": clock((job["started"] or now) - job["submitted"]),
            "JobName": job["name"],
        }
        rows.append([values[column] for column in columns])
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    print("\n".join([lines[0], "=" * len(lines[0]), *lines[1:]]))


def qstat_pbs(words: list[str]) -> None:
    queue = Queue()
    ended, words = "-x" in words, [word for word in words if word != "-x"]
    server = "polaris-pbs-01"
    if "-u" in words:
        print("\nJob ID          Username Queue    Jobname    SessID NDS TSK Memory Time  S Time\n" + "-" * 60)
        for job in queue.all():
            if job["ended"] is None:
                print(f"{job['id']}.polaris* {words[words.index('-u') + 1][:8]} {job['queue']} {job['name'][:9]}*")
        return
    numbers = [word for word in words if word.isdigit()]
    form = "%a %b %d %H:%M:%S %Y"
    shown, unknown = {}, []
    for number in numbers:
        job = queue.read(int(number))
        if job is None:
            unknown.append(f"qstat: Unknown Job Id {number}.{server}")
        elif job["ended"] is not None and not ended:
            unknown.append(
                f"qstat: {number}.{server} Job has finished, use -x or -H to obtain historical job information"
            )
        else:
            entry = {
                "Job_Name": job["name"],
                "Job_Owner": f"ada@{server}",
                "job_state": queue.shown_state(job, "F" if job["ended"] else "R" if job["started"] else "Q"),
                "queue": job["queue"],
                "project": job["project"],
                "qtime": time.strftime(form, time.localtime(job["submitted"])),
                "mtime": time.strftime(form, time.localtime(job["ended"] or job["started"] or job["submitted"])),
                "Resource_List": {"nodect": job["nodes"], "walltime": clock(job["wall_s"])},
            }
            if job["started"]:
                entry["stime"] = time.strftime(form, time.localtime(job["started"]))
            if job["ended"]:
                code = job["code"]
                entry["Exit_status"] = 256 - code if code < 0 else code
            shown[f"{number}.{server}"] = entry
    print(json.dumps({"timestamp": int(time.time()), "pbs_version": "2022.1", "Jobs": shown}, indent=4))
    if unknown:
        fail("\n".join(unknown), 153 if "Unknown" in unknown[0] else 35)


def qdel(words: list[str]) -> None:
    queue = Queue()
    for number in words:
        job = queue.read(int(number))
        if job is None or job["ended"] is not None:
            fail(f"qdel: Unknown Job Id {number}", 153)
        (queue.folder / f"{number}.delete").touch()


def nodelist(_words: list[str]) -> None:
    print("Node_id  Name         Queues   Status  MCDRAM  NUMA  Backfill\n" + "=" * 60)
    for number in range(100, 108):
        print(f"{number}      c0-0c0s0n{number}  default  idle    cache   quad  01:00:00")


# ---- aprun, mpiexec


def on_node(host: str, command: list[str]) -> list[str]:
    """Return `command` for a process whose machine has the name `host`, where that is possible."""
    if not own_names():
        return command
    table = Path(os.environ["FAKE_BATCH"]) / "hosts"
    script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
    return ["unshare", "--uts", "--mount", "bash", "-c", script, host, str(table), *command]


def own_names() -> bool:
    """Whether processes may be given host names of their own."""
    return (
        os.geteuid() == 0
        and not subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode
    )


def launch(words: list[str], with_value: str, long: tuple[str, ...], rank: str, local: str) -> None:
    """Start each rank here, as the launchers do on nodes; the first one's failure is the exit code.

    For root each has its node's name, which serial mode looks at.
    """
    given, command = options(words, with_value, long)
    count = int(given["-n"][0])
    each = int(next(given[name][0] for name in ("-N", "--ppn") if name in given))
    if "-L" in given:
        hosts = [f"nid{int(number):05d}" for number in given["-L"][0].split(",")]
    else:
        hosts = given["--hosts"][0].split(",")
    ranks = [
        subprocess.Popen(
            on_node(hosts[number // each], command),
            env={**os.environ, rank: str(number), local: str(number % each)},
        )
        for number in range(count)
    ]
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in ranks])
    sys.exit(max((process.wait() & 255 for process in ranks), default=0))


def main(name: str, words: list[str]) -> None:
    kind = os.environ["FAKE_BATCH_KIND"]
    if name == "aprun":
        launch(words, "n N L cc d j", (), "ALPS_APP_PE", "ALPS_APP_LOCAL")
    elif name == "mpiexec":
        launch(words, "n", ("ppn", "hosts", "cpu-bind", "depth"), "PMI_RANK", "PALS_LOCAL_RANKID")
    elif name == "qstat" and words == ["-Q"]:
        list_queues(kind)
    elif name in ("qsub", "qstat"):
        {"qsub": {"cobalt": qsub_cobalt, "pbs": qsub_pbs}, "qstat": {"cobalt": qstat_cobalt, "pbs": qstat_pbs}}[name][
            kind
        ](words)
    else:
        {"qdel": qdel, "nodelist": nodelist}[name](words)


if __name__ == "__main__":
    run_job(int(sys.argv[2]))
