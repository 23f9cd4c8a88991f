"""Shell commands as run functions: fill in the configuration, run, read the objective from what the command left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_ROUNDS = 5  # a child that loses its parent may come to us, and one that ends may just have started another
_PLACEHOLDER = re.compile(r"{{\s*(\w+)\s*}}")


class ProcessKilled(RuntimeError):
    """A signal killed the command."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.signal_number = signal_number


def render_command(spec: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """Fill ``{{ names }}`` with the configuration's values, quoted for the shell.

    ``{{ here }}`` is the folder of the application's YAML, ``{{ python }}`` this Python. A hyperparameter that is
    inactive in this configuration becomes the empty string ``''``.
    """
    values = {"here": spec["here"], "python": sys.executable, **parameters}

    def fill(match: re.Match[str]) -> str:
        return shlex.quote(str(values.get(match.group(1), "")))

    return _PLACEHOLDER.sub(fill, spec["command"])


def run_command(spec: Mapping[str, Any], parameters: Mapping[str, Any], workdir: Path) -> Any:
    """Run the shell command of `spec` for one configuration and return its objective.

    Its output goes to `command.out` in the trial's folder and, line by line, to the job's own output.

    Raises
    ------
    ProcessKilled
        When a signal killed the command.
    RuntimeError
        When the command ends with a status other than 0, or its output holds no objective.
    """
    command = render_command(spec, parameters)
    environment = {**os.environ, **{str(key): str(value) for key, value in spec.get("environment", {}).items()}}
    lines: list[str] = []
    print(f"$ {command}", flush=True)  # noqa: T201 - the job's output belongs to the user
    with (
        open(workdir / "command.out", "w", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=workdir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                sys.stdout.write(line)
                lines.append(line)
        except BaseException:  # its time is over: Popen would wait for the command
            end_children(process.pid)
            process.kill()
            raise
    output = "".join(lines)
    if process.returncode < 0 or 128 < process.returncode <= 192:  # bash says 128 + n of a signal n
        raise ProcessKilled(abs(process.returncode) % 128)
    if process.returncode != 0:
        tail = "".join(lines[-10:]).strip()
        raise RuntimeError(f"the command ended with status {process.returncode}; its last lines: {tail or '(none)'}")
    value = read_objective(spec["objective"], output, workdir)
    return value if spec.get("maximize", True) else _negate(value)


def _negate(value: Any) -> Any:
    return -value if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def read_objective(rule: Mapping[str, Any], output: str, workdir: Path) -> Any:
    """Return the objective that a command left: the last match of ``rule["regex"]``, or a key of the JSON file."""
    if "regex" in rule:
        matches = re.findall(rule["regex"], output, flags=re.MULTILINE)
        if not matches:
            raise RuntimeError(f"no line of the output matches the objective's regex {rule['regex']!r}")
        return float(matches[-1])
    path = workdir / rule["json"]
    if not path.is_file():
        raise RuntimeError(f"the command left no {rule['json']} in its folder {workdir}")
    found: Any = json.loads(path.read_text())
    key = rule.get("key", "objective")
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            raise RuntimeError(f"{rule['json']} has no key {key!r}")
        found = found[part]
    return found


def end_children(pid: int, sparing: int | None = None, grace_s: float = 2.0) -> None:
    """End every process that `pid` started and that still runs, except `sparing`; with what they start meanwhile."""
    for first in (True, *[False] * (_ROUNDS - 1)):
        with contextlib.suppress(psutil.NoSuchProcess):
            children = [child for child in psutil.Process(pid).children(recursive=True) if child.pid != sparing]
            if not children:
                return
            for child in children if first else ():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()
            _, alive = psutil.wait_procs(children, timeout=grace_s if first else 0)
            for child in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(alive, timeout=1)
