"""Shell commands as run functions: fill in the configuration, run, read the objective from what the command left."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from deephyper_balsam.node.command_records import CommandRecords
from deephyper_balsam.node.running_job import RunningJob

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.nodes import Call, Template

_ROUNDS = 5  # a child that loses its parent may come to us, and one that ends may just have started another
_OURS = {"here", "python", "parameters", "flag"}  # names in a command that are no hyperparameters
_CHUNK = 1 << 16
_LOOK_S = 0.2
_QUIET_S, _LAST_WORDS_S = 0.5, 5.0  # after a command's end: `> >(tee log)` writes on for a moment
_TAIL_CHARS = 8192
_WINDOW_CHARS, _MATCH_CHARS = 1 << 22, 1 << 20
_PR_SET_CHILD_SUBREAPER = 36


class ProcessKilled(RuntimeError):
    """A signal killed the command."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.signal_number = signal_number


class _Words(str):
    """Words of a command that are quoted already."""


def _quoted(value: Any) -> str:
    return value if isinstance(value, _Words) else shlex.quote(_plain(value))


def _plain(value: Any) -> str:
    """Return a value's text; argparse takes -1e-05 for an option, and -0.00001 for a number."""
    text = str(value)
    return format(Decimal(text), "f") if isinstance(value, float) and value < 0 and "e" in text else text


def _templates() -> Environment:
    """Return how a command is read: Jinja, which bash does not trip over."""
    from jinja2 import Environment

    # bash's ${#array[@]} would begin a comment
    return Environment(
        finalize=_quoted, keep_trailing_newline=True, comment_start_string="<#--", comment_end_string="--#>"
    )


def check_template(command: str) -> None:
    """Refuse a command that cannot be filled in.

    Raises
    ------
    ValueError
        The message has the line and what is wrong there.
    """
    from jinja2 import TemplateSyntaxError, meta, nodes

    try:
        tree = _templates().parse(command)
        _templates().compile(tree)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error
    undeclared = meta.find_undeclared_variables(tree)
    for call in _flags(tree):
        word = call.args[0] if call.args else None
        if isinstance(word, nodes.Name) and word.name in undeclared:
            raise ValueError(f'line {call.lineno}: flag() takes the name in quotes: flag("{word.name}")')


def template_names(command: str) -> set[str]:
    """Return the hyperparameters that a command names, by ``{{ }}``, in a condition, or in ``flag("...")``."""
    from jinja2 import meta, nodes

    tree = _templates().parse(command)
    named = {word.value for call in _flags(tree) for word in call.args[:1] if isinstance(word, nodes.Const)}
    return (meta.find_undeclared_variables(tree) | named) - _OURS


def _flags(tree: Template) -> Iterator[Call]:
    from jinja2 import nodes

    return (call for call in tree.find_all(nodes.Call) if getattr(call.node, "name", None) == "flag")


def bare_names(command: str) -> set[str]:
    """Return the names that stand in a ``{{ }}`` by themselves, outside of every condition."""
    from jinja2 import nodes

    outputs = [node for node in _templates().parse(command).body if isinstance(node, nodes.Output)]
    return {node.name for output in outputs for node in output.nodes if isinstance(node, nodes.Name)} - _OURS


def render_command(spec: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """Fill a command, which is a Jinja template, with the configuration's values, each quoted for the shell.

    ``{{ here }}`` is the folder of the application's YAML, ``{{ python }}`` this Python, ``parameters`` the whole
    configuration. A hyperparameter that is inactive in this configuration is not defined: its ``{{ name }}`` becomes
    the empty string ``''``, and ``{{ flag("name") }}`` nothing; otherwise that is ``--name=value``, or ``--name`` alone
    for True and nothing for False. ``flag("name", "--other")`` gives the word.
    """

    def flag(name: str, word: str | None = None) -> str:
        if not isinstance(name, str):
            raise TypeError(f"flag() takes the name of a hyperparameter in quotes, but got {name!r}")
        value = parameters.get(name, False)
        word = f"--{name}" if word is None else word
        if isinstance(value, bool):
            return _Words(shlex.quote(word) if value else "")
        # `--m -3` is two options to some programs, and `-m=3` sets m to "=3" in others
        return _Words(f"{shlex.quote(word)}{'=' if word.startswith('--') else ' '}{_quoted(value)}")

    ours = {"here": spec["here"], "python": sys.executable, "parameters": parameters, "flag": flag}
    return _templates().from_string(spec["command"]).render({**ours, **parameters})


def run_command(
    spec: Mapping[str, Any], parameters: Mapping[str, Any], workdir: Path, job: RunningJob | None = None
) -> Any:
    """Run the shell command of `spec` for one configuration and return its objective, as the command left it.

    With a `job` it records what the command says of how it goes (`node.command_records`). A command that was asked to
    stop has no objective of its own: None is returned, and what it recorded last counts.

    Its output goes to `command.out` in the trial's folder and to the job's own output. It is over when the command is:
    what it left in the background is ended. bash runs it with ``pipefail``, so that ``train | tee log`` fails when
    ``train`` does; where there is no bash, sh runs it without.

    Raises
    ------
    ProcessKilled
        When a signal killed the command.
    RuntimeError
        When the command ends with a status other than 0, or its output holds no objective.
    """
    command = render_command(spec, parameters)
    records = CommandRecords(spec["record"], job, workdir) if job is not None and spec.get("record") else None
    environment = {**os.environ, **{str(key): str(value) for key, value in spec.get("environment", {}).items()}}
    bash = shutil.which("bash")
    shell = ["bash", "-o", "pipefail", "-c"] if bash else ["sh", "-c"]
    out, tail = workdir / "command.out", ""
    _print(f"$ {command}\n")
    with (
        nothing_left_behind(),
        open(out, "w", encoding="utf-8", newline="") as log,
        subprocess.Popen(
            [*shell, command],
            executable=bash,  # whatever PATH the command gets
            cwd=workdir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            for text in _output(process):
                log.write(text)
                _print(text)
                tail = (tail + text)[-_TAIL_CHARS:]
                if records is not None:
                    records.take_in(text)
                    if records.ends(process.pid):
                        end_children(process.pid)
                        process.kill()
        except BaseException:  # its time is over: Popen would wait for the command
            end_children(process.pid)
            process.kill()
            raise
    if records is not None:
        if records.was_stopped:
            return None
        records.end()
    _check_status(process.returncode, command, tail, uses_bash=bool(bash))
    return read_objective(spec["objective"], out, workdir)


def _check_status(status: int, command: str, tail: str, *, uses_bash: bool) -> None:
    if status == 128 + signal.SIGPIPE and uses_bash and "|" in command:
        return  # `train | head`: who reads has had enough, which is no failure
    if status < 0 or 128 < status <= 192:  # bash says 128 + n of a signal n
        raise ProcessKilled(abs(status) % 128)
    if status != 0:
        pipe = " (of any part of a pipe; `set +o pipefail;` before it lets the last part decide)"
        words = "\n".join(tail.splitlines()[-10:]).strip()
        raise RuntimeError(
            f"the command ended with status {status}{pipe if uses_bash and '|' in command else ''}; "
            f"its last lines: {words or '(none)'}"
        )


def _output(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield what a process prints until it has ended, and a moment more; one in the background may hold the pipe.

    While it prints nothing, the empty text is yielded every now and then.
    """
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    quiet_at = ends_at = math.inf
    while time.monotonic() < min(quiet_at, ends_at):
        if math.isinf(ends_at) and process.poll() is not None:
            ends_at = time.monotonic() + _LAST_WORDS_S
            quiet_at = time.monotonic() + _QUIET_S
        ready, _, _ = select.select([pipe], [], [], _LOOK_S)
        if ready:
            chunk = os.read(pipe, _CHUNK)
            if not chunk:
                break
            yield decoder.decode(chunk)
            if not math.isinf(ends_at):
                quiet_at = time.monotonic() + _QUIET_S
        else:
            yield ""
    yield decoder.decode(b"", final=True)
    process.wait()  # it may close its output before its end


def _print(text: str) -> None:
    """Write to the job's output, which may be in an encoding that lacks some signs."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def read_objective(rule: Mapping[str, Any], output: str | Path, workdir: Path) -> Any:
    """Return the objective that a command left: the last match of ``rule["regex"]``, or a key of the JSON file.

    Parameters
    ----------
    rule
        Where it stands: ``regex``, or ``json`` with the file's name and ``key``.
    output
        What the command printed, or the file with it.
    workdir
        The command's folder.

    Returns
    -------
    float or Any
        A number from the output; whatever stands under the key in the file.

    Raises
    ------
    RuntimeError
        When there is none.
    ValueError
        When what matched is no number, or the file is no JSON.
    """
    if "regex" in rule:
        found = _last_match(re.compile(rule["regex"], re.MULTILINE), _pieces(output))
        if found is None:
            raise RuntimeError(f"no line of the output matches the objective's regex {rule['regex']!r}")
        return float(found)
    path = workdir / rule["json"]
    if not path.is_file():
        raise RuntimeError(f"the command left no {rule['json']} in its folder {workdir}")
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    key = rule.get("key", "objective")
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            raise RuntimeError(f"{rule['json']} has no key {key!r}")
        content = content[part]
    return content


def _pieces(output: str | Path) -> Iterator[str]:
    if isinstance(output, str):
        yield output
        return
    with output.open(encoding="utf-8") as file:  # a lone \r ends a line, too: progress bars
        while piece := file.read(_WINDOW_CHARS):
            yield piece


def _last_match(pattern: re.Pattern[str], pieces: Iterator[str]) -> str | None:
    """Return the group of the last match, never holding more than some megabytes; a match is at most a megabyte."""
    held, found = "", None
    for piece in pieces:
        held += piece
        # A match that more text could make longer is left for the next round
        settled = keep_from = held.rfind("\n", 0, max(0, len(held) - _MATCH_CHARS)) + 1
        for match in pattern.finditer(held):
            if settled - _MATCH_CHARS <= match.start() and match.end() > settled:
                keep_from = min(settled, held.rfind("\n", 0, match.start()) + 1)
                break
            found = match.group(1) or ""
        held = held[keep_from:]
    for match in pattern.finditer(held):
        found = match.group(1) or ""
    return found


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """End, when the block is left, every process that was started in it and still runs, orphans included."""
    adopt_orphans()
    before = {child.pid for child in psutil.Process().children()}
    try:
        yield
    finally:
        end_children(os.getpid(), sparing=before)


def adopt_orphans() -> None:
    """Let this process become the parent of what loses its own below it. Linux only: elsewhere it is not found then."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children(pid: int, sparing: Collection[int] = (), grace_s: float = 2.0) -> None:
    """End every process that `pid` started and that still runs, except `sparing`; with what they start meanwhile."""
    for first in (True, *[False] * (_ROUNDS - 1)):
        with contextlib.suppress(psutil.NoSuchProcess):
            children = [child for child in psutil.Process(pid).children(recursive=True) if child.pid not in sparing]
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
