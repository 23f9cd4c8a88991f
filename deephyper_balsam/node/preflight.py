"""One evaluation as a node would do it, and what would fail there: `deephyper-balsam problem check`.

A process of its own runs it: an empty folder, a path without the current folder and `PYTHONPATH`, another `__main__`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from deephyper_balsam.common.clock import moment
from deephyper_balsam.errors import TargetError
from deephyper_balsam.node.recording import Recorder
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.shell_command import nothing_left_behind
from deephyper_balsam.node.targets import own_traceback, reason, split_target
from deephyper_balsam.node.worker import evaluate, make_run_function, print_anything

_ONE_MACHINE = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_NO_FILES = ("/dev/", "/proc/", "/sys/")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_GPU_WORDS = re.compile(r"\b(cuda|gpus?|nvidia|hip|rocm|xpu)\b", re.IGNORECASE)
_MAX_NAMED = 5
_MOST_PRINTED = 2**20


@dataclass(frozen=True)
class Preflight:
    """How one evaluation went.

    Attributes
    ----------
    outcome
        As of `deephyper_balsam.node.worker.evaluate`.
    printed
        What it wrote to its output, or the end of that.
    findings
        What will fail or surprise on a node, each in one line with what to do.
    """

    outcome: dict[str, Any]
    printed: str
    findings: list[str]


def run_preflight(spec: Mapping[str, Any], config: Mapping[str, Any], gpus_per_rank: float = 0) -> Preflight:
    """Evaluate `config` in a process and an empty folder of its own, and look for what will not work on a node."""
    began_at = moment()
    with TemporaryDirectory(prefix="preflight-") as place:
        folder, left = Path(place).resolve() / "trial", Path(place) / "left.json"
        folder.mkdir()
        task = json.dumps({"spec": dict(spec), "config": dict(config), "left": str(left)})
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        output = Path(place) / "output"
        # As on a node, nothing outlives its evaluation; no pipe, which what stays in the background would hold open
        with nothing_left_behind(), output.open("wb") as file:
            ended = subprocess.run(
                [sys.executable, "-m", "deephyper_balsam.node.preflight"],
                input=task.encode(),
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                check=False,
            )
        printed = _end_of(output)
        if left.exists():
            outcome = json.loads(left.read_text())
        else:
            failure = f"the process ended with status {ended.returncode} and left no result (os._exit, or a signal?)"
            outcome = {"objective": None, "failure": failure, "metadata": {}, "start": began_at, "end": moment()}
    opened = outcome.pop("opened", {"read": [], "written": []})
    looks: tuple[Iterator[str], ...] = (
        _where_it_lies(spec),
        _missing_module(outcome, spec),
        _main(outcome, spec),
        _printed(outcome, printed),
        _relative(opened["read"]),
        _outside(opened["written"]),
        _gpus(outcome, gpus_per_rank),
        iter(opened.get("records", ())),
    )
    return Preflight(outcome, printed, [finding for look in looks for finding in look])


def _end_of(output: Path) -> str:
    with output.open("rb") as file:
        file.seek(max(0, output.stat().st_size - _MOST_PRINTED))
        return file.read().decode("utf-8", "replace")


def _file_of(spec: Mapping[str, Any]) -> Path | None:
    place, _ = split_target(str(spec["target"]))
    return Path(place) if place.startswith("/") else None


def _where_it_lies(spec: Mapping[str, Any]) -> Iterator[str]:
    for place in [_file_of(spec), *map(Path, spec.get("search_path") or [])]:
        if place is not None and str(place).startswith(tuple(f"{root}/" for root in _ONE_MACHINE)):
            yield f"{place} lies on this machine alone: put it into a folder that every node sees, such as your home."


def _missing_module(outcome: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    found = re.search(r"No module named '([^']+)'", outcome["failure"] or "")
    if not found:
        return
    module, top = found[1], found[1].partition(".")[0]
    here = Path.cwd()
    beside = f"beside {_file_of(spec)}" if _file_of(spec) else "into a package that is installed"
    if (here / f"{top}.py").is_file() or (here / top).is_dir():
        yield f"{module} lies in the current folder, which is not on a node's path: put it {beside}, or install it."
        return
    for entry in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if (Path(entry) / f"{top}.py").is_file() or (Path(entry) / top).is_dir():
            yield f"{module} is found through PYTHONPATH, which a node does not have: put it {beside}, or install it."
            return
    yield f"{module} is not installed in this environment: install it here, and in the site's environment."


def _main(outcome: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    failure = outcome["failure"] or ""
    file = _file_of(spec)
    undefined = re.search(r"name '(\w+)' is not defined", failure)
    if "__main__" in failure:
        yield "It takes something from `__main__`, which is another program on a node: import it from its own file."
    elif undefined and file and file.suffix == ".py" and undefined[1] in _names_of_main(file):
        yield (
            f'`{undefined[1]}` is set only under `if __name__ == "__main__"`, which does not run on a node: '
            "move it above the functions."
        )


def _names_of_main(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    guards = [node for node in tree.body if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)]
    nodes = [node for guard in guards for node in ast.walk(guard)]
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imported = [alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    return names | {(alias.asname or alias.name).partition(".")[0] for alias in imported}


def _printed(outcome: Mapping[str, Any], printed: str) -> Iterator[str]:
    numbers = [line for line in printed.splitlines() if re.search(r"\d", line)]
    if "returned None" in (outcome["failure"] or "") and numbers:
        yield f"It prints its result ({numbers[-1].strip()[:80]!r}) and returns nothing: `return` the number."


def _relative(read: list[str]) -> Iterator[str]:
    for path in [path for path in read if (Path.cwd() / path).exists()][:_MAX_NAMED]:
        yield (
            f"It opens {path!r} from the current folder; an evaluation runs in an empty folder of its own: "
            "name the file by its absolute path or from `__file__`."
        )


def _outside(written: list[str]) -> Iterator[str]:
    for path in written[:_MAX_NAMED]:
        yield (
            f"It writes {path}, outside of its own folder, and evaluations that run at the same time overwrite it: "
            "write to a relative path."
        )


def _gpus(outcome: Mapping[str, Any], gpus_per_rank: float) -> Iterator[str]:
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists():
        return
    if gpus_per_rank > 0:
        yield (
            f"`gpus_per_rank`, --gpus-per-rank {gpus_per_rank:g}, asks for GPUs, and this machine has none: it was "
            "tried without."
        )
    elif _GPU_WORDS.search(outcome["failure"] or ""):
        yield (
            "It needs a GPU, and this machine has none: try it on a node, and search with `gpus_per_rank=1` "
            "(--gpus-per-rank 1)."
        )


# --- the process that evaluates ----------------------------------------------------------------------------------


class _Watched(Recorder):
    """A recorder that sees how a run uses it."""

    def __init__(self) -> None:
        super().__init__()
        self._count = self._asked = 0
        self._back: tuple[float, float] | None = None

    def add(self, budget: float, objective: float) -> None:
        self._count += 1
        last = self.curve.last
        if self._back is None and last is not None and budget <= last[0]:
            self._back = last[0], budget
        super().add(budget, objective)

    def stopped(self) -> bool:
        self._asked += 1
        return False

    def findings(self) -> list[str]:
        """Return what there is to say of it."""
        said = []
        if self._count > 1 and not self._asked:
            said.append(
                "It records as it goes and never asks `job.stopped()`: no stopper ends it early. Ask after each "
                "record, and return `job.objective` when it says so."
            )
        if self._back is not None:
            said.append(
                f"Its budgets go back: it recorded at {self._back[0]:g} and then at {self._back[1]:g}, which replaces "
                "what it had recorded from there on. Count from the very beginning of the run, also after a restart."
            )
        return said


def _watch_files(folder: Path) -> tuple[dict[str, list[str]], Callable[[], None]]:
    """Keep which relative paths are opened to read, and which files outside of `folder` to write."""
    opened: dict[str, list[str]] = {"read": [], "written": []}
    scratch, on = gettempdir(), [True]

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not on[0] or not isinstance(arguments[0], (str, bytes)):
            return
        path, flags = os.fsdecode(arguments[0]), arguments[2]
        full = os.path.realpath(path)
        if isinstance(flags, int) and flags & _WRITES:
            ours = full.startswith((f"{folder}/", *_NO_FILES)) or "__pycache__" in full
            kind = "" if ours or os.path.dirname(full).startswith(f"{scratch}/tmp") else "written"
            path = full
        else:
            kind = "" if os.path.isabs(path) else "read"
        if kind and path not in opened[kind]:
            opened[kind].append(path)

    sys.addaudithook(see)

    def stop() -> None:
        on[0] = False  # an audit hook cannot be taken out

    return opened, stop


def main() -> None:
    """Read the task from the input, evaluate, and leave the outcome in a file."""
    task = json.load(sys.stdin)
    folder = Path.cwd()
    began_at = moment()
    print_anything()
    opened, stop = _watch_files(folder)
    try:
        recorder = _Watched()
        outcome = evaluate(make_run_function(task["spec"], folder), RunningJob(0, task["config"], recorder))
        opened["records"] = recorder.findings()
    except TargetError as error:
        outcome = {"objective": None, "failure": reason(error), "traceback": own_traceback(error), "metadata": {}}
        outcome.update(start=began_at, end=moment())
    stop()
    Path(task["left"]).write_text(json.dumps({**outcome, "opened": opened}), encoding="utf-8")


if __name__ == "__main__":
    main()
