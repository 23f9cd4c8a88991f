"""Whether a Balsam site is ready for work: settings, folders, commands, packages, API, clock, agent and nodes."""

from __future__ import annotations

import importlib
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import yaml

from deephyper_balsam.errors import DeepHyperBalsamError, InputError, SettingsError
from deephyper_balsam.sites import queue_limits
from deephyper_balsam.sites.agent import PID_FILE, Agent
from deephyper_balsam.sites.configs import (
    PLACEHOLDER,
    SETTINGS_FILE,
    SITE_FOLDERS,
    SITE_ID_FILE,
    read_settings,
)
from deephyper_balsam.sites.reach import allocation_of, try_from_nodes
from deephyper_balsam.store.gateway import Gateway

_AGENT_SILENT_S = 120.0
_CLOCK_SKEW_S = 10.0
# What every run and launcher imports, in the environment that the agent runs in, which is this one
_PACKAGES = ("balsam", "deephyper_balsam", "dill", "psutil", "zmq")
# What the scheduler and run classes call, by a part of the class's dotted path.
_COMMANDS = {
    "slurm": ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun"),
    "pbs": ("qsub", "qstat", "qdel"),
    "cobalt": ("qsub", "qstat", "qdel"),
    "theta": ("aprun",),
    "lsf": ("bsub", "bjobs", "bkill"),
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its name, whether it is as it should be, and what was found."""

    name: str
    ok: bool
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """Return the check as a dict."""
        return asdict(self)


def check_site(path: str | Path, client_path: str | Path | None = None, imports: Sequence[str] = ()) -> list[Check]:
    """Look at everything that a site needs, and change nothing.

    Parameters
    ----------
    path
        The site's folder.
    client_path
        The credentials file. Default: what Balsam itself takes.
    imports
        Modules that run functions import.

    Raises
    ------
    InputError
        When `path` is no site.
    """
    path = Path(path).expanduser().absolute()
    try:
        site_id = int((path / SITE_ID_FILE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no Balsam site: it has no readable {SITE_ID_FILE}. "
            "Make one with `deephyper-balsam site init PATH --config local --name NAME`."
        ) from error
    settings, settings_check = _settings(path)
    checks = [settings_check, _folders(path)]
    if settings is not None:
        checks += [_template(path, settings), _names(path, settings), _commands(settings)]
    found = _api_and_agent(site_id, path, client_path)
    if settings is not None and found[0].ok:
        found += _nodes(settings, path, client_path)
    return [*checks, _packages(imports), *found]


def _settings(path: Path) -> tuple[Any, Check]:
    from balsam.config import Settings

    file = path / SETTINGS_FILE
    try:
        settings = Settings(**read_settings(file.read_text(encoding="utf-8"), file))
    except SettingsError as error:
        return None, Check("settings", False, _one_line(error))
    except (OSError, TypeError, ValueError, ImportError, yaml.YAMLError) as error:
        return None, Check("settings", False, f"{file}: {_one_line(error)}")
    return settings, Check("settings", True, f"{file} loads")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _folders(path: Path) -> Check:
    bad = [name for name in SITE_FOLDERS if not _writable(path / name)]
    if bad:
        return Check("folders", False, f"missing or not writable in {path}: {', '.join(bad)}")
    return Check("folders", True, f"{', '.join(SITE_FOLDERS)} are writable")


def _writable(folder: Path) -> bool:
    """Try it: a full or read-only file system, or a quota, looks writable by its permissions."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError:
        return False
    return True


def _names(path: Path, settings: Any) -> Check:
    """Whether project and queues are filled in, and the template renders."""
    left = set(PLACEHOLDER.findall(_without_comments(path / SETTINGS_FILE)))
    template = path / (settings.scheduler.job_template_path if settings.scheduler else "job-template.sh")
    if template.is_file():
        left |= set(PLACEHOLDER.findall(_without_comments(template)))
    if left:
        return Check("names", False, f"fill in {', '.join(sorted(left))} in {path / SETTINGS_FILE} and {template.name}")
    if settings.scheduler is None:
        return Check("names", True, "no scheduler")
    if not settings.scheduler.allowed_queues or not settings.scheduler.allowed_projects:
        return Check("names", False, f"{path / SETTINGS_FILE} allows no queue or no project: no BatchJob can be made")
    projects = settings.scheduler.allowed_projects
    try:
        ours = queue_limits.read_blocks(path)
        limits = [
            queue_limits.from_settings(queue, {**ours.get(queue, {}), **block.dict()})
            for queue, block in settings.scheduler.allowed_queues.items()
        ]
    except (SettingsError, ValueError) as error:
        return Check("names", False, f"{path / SETTINGS_FILE}: {_one_line(error)}")
    unknown = _unknown_queues(settings.scheduler)
    if unknown:
        return Check(
            "names",
            False,
            f"the scheduler has no queue {', '.join(unknown)}: see allowed_queues in {path / SETTINGS_FILE}",
        )
    allowed = "; ".join(f"{queue.queue} ({queue.in_words})" for queue in limits)
    return Check("names", True, f"queues {allowed}; projects {', '.join(projects)}")


def _unknown_queues(scheduler: Any) -> list[str]:
    """Return the queues that a BatchJob may name and the scheduler does not have, where it tells."""
    ask = getattr(scheduler.scheduler_class, "known_queues", None)
    try:
        known = ask() if ask is not None else None
    except Exception:  # a command that is missing or does not answer is another check's
        return []
    return [] if known is None else [queue for queue in scheduler.allowed_queues if queue not in known]


def _without_comments(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("# "))


def _packages(imports: Sequence[str]) -> Check:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    for name in imports:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever an import does: a run would fail with it, too
            missing.append(f"{name} ({type(error).__name__}: {error})")
    if missing:
        return Check("packages", False, f"cannot be imported by {sys.executable}: {', '.join(missing)}")
    return Check("packages", True, f"{', '.join([*_PACKAGES, *imports])} in {sys.prefix}")


def _clock(ahead_s: float | None) -> list[Check]:
    """Compare this machine's clock with the API's: times of jobs come from both. Nothing when it tells no time."""
    if ahead_s is None:
        return []
    if abs(ahead_s) > _CLOCK_SKEW_S:
        where = "ahead of" if ahead_s < 0 else "behind"
        return [Check("clock", False, f"this machine's clock is {abs(ahead_s):.0f} s {where} the API's: set it by NTP")]
    return [Check("clock", True, f"within {_CLOCK_SKEW_S:.0f} s of the API's")]


def _template(path: Path, settings: Any) -> Check:
    """Whether the job template can be read and filled, and what comes out is a script for bash."""
    file = path / (settings.scheduler.job_template_path if settings.scheduler else "job-template.sh")
    if not file.is_file():
        return Check("template", False, f"{file} does not exist")
    try:
        text = _rendered(file, path)
    except (OSError, UnicodeDecodeError) as error:
        return Check("template", False, f"{file} cannot be read: {_one_line(error)}")
    except Exception as error:  # jinja2's errors, and whatever an expression in it raises
        return Check("template", False, f"{file} cannot be filled: {type(error).__name__}: {_one_line(error)}")
    bash = subprocess.run(["/bin/bash", "-n"], input=text.encode("utf-8", "replace"), capture_output=True)
    if bash.returncode:
        return Check(
            "template",
            False,
            f"{file} makes no script for bash: {' '.join(bash.stderr.decode(errors='replace').split())}",
        )
    return Check("template", True, f"{file}")


def _rendered(file: Path, path: Path) -> str:
    from jinja2 import Template

    text: str = Template(file.read_text(encoding="utf-8")).render(
        project="PROJECT",
        queue="QUEUE",
        num_nodes=2,
        wall_time_min=90,
        job_mode="mpi",
        filter_tags={"search": "NAME"},
        partitions=None,
        optional_params={},
        balsam_site_path=path,
        balsam_bin=Path(sys.executable).parent,
        pg_bin=Path("/"),
        launcher_cmd=f"{sys.executable} /launcher.py",
    )
    return text


def _commands(settings: Any) -> Check:
    classes = [settings.launcher.mpi_app_launcher, settings.launcher.local_app_launcher]
    if settings.scheduler:
        classes.append(settings.scheduler.scheduler_class)
    names = " ".join(f"{cls.__module__}.{cls.__name__}" for cls in classes).lower()
    wanted = sorted({command for word, commands in _COMMANDS.items() if word in names for command in commands})
    missing = [command for command in wanted if shutil.which(command) is None]
    if missing:
        return Check("commands", False, f"not found on this machine: {', '.join(missing)}")
    return Check("commands", True, ", ".join(wanted) or "none needed")


def _api_and_agent(site_id: int, path: Path, client_path: str | Path | None) -> list[Check]:
    try:
        gateway = Gateway(client_path)
        row = next((row for row in gateway.sites() if row["id"] == site_id), None)
    except DeepHyperBalsamError as error:
        return [Check("api", False, str(error))]
    if row is None:
        return [Check("api", False, f"Balsam has no site of yours with id {site_id}")]
    if Path(row["path"]) not in (path, path.resolve()):
        api = Check("api", False, f"Balsam has the site {row['name']} in {row['path']}, not in {path}")
    else:
        api = Check("api", True, f"Balsam knows the site as {row['name']} (id {site_id})")
    return [api, *_clock(gateway.clock_ahead_s), _agent(row["last_refresh"], path)]


def _agent(last_refresh: str | None, path: Path) -> Check:
    start = f"start it with `balsam site start` in {path}, where BALSAM_SITE_PATH names no other site"
    file = path / PID_FILE
    try:
        agent = Agent.read(path)
    except FileNotFoundError:
        return Check("agent", False, f"the agent does not run: {start}")
    except (OSError, ValueError):
        return Check("agent", False, f"{file} is not readable: remove it, then {start}")
    if agent.here:
        try:
            python = Path(psutil.Process(agent.pid).cmdline()[0])
        except (psutil.NoSuchProcess, ValueError, IndexError):
            return Check("agent", False, f"the agent (pid {agent.pid}) is gone: remove {file}, then {start}")
        except psutil.AccessDenied:  # of another user: nobody can tell
            python = Path(sys.executable)
        if python.is_absolute() and not python.exists():
            return Check(
                "agent",
                False,
                f"the agent's Python {python} is gone, and launchers need it: `balsam site stop`, then {start}",
            )
        if agent.fault is not None:
            return Check(
                "agent",
                False,
                f"the agent (pid {agent.pid}) runs, but {agent.fault}, and it does not start them again: "
                f"`balsam site stop`, then {start}; for a local server `deephyper-balsam server up` does both",
            )
    age_s = math.inf
    if last_refresh is not None:
        now = datetime.now(timezone.utc).replace(tzinfo=None)
        age_s = max(0.0, (now - datetime.fromisoformat(last_refresh)).total_seconds())
    if age_s > _AGENT_SILENT_S:
        heard = f"was last heard of {_ago(age_s)}"
        if agent.lives:
            return Check(
                "agent",
                False,
                f"the agent (pid {agent.pid}) runs, but {heard}: the scheduler or Balsam may not answer it; see the "
                f"newest log in {path / 'log'}. If that does not pass: `balsam site stop`, then {start}",
            )
        return Check("agent", False, f"the agent on {agent.host} {heard}: {start}")
    return Check("agent", True, f"the agent reported {age_s:.0f} s ago")


def _nodes(settings: Any, path: Path, client_path: str | Path | None) -> list[Check]:
    """Whether compute nodes reach the API; nothing where this is no allocation."""
    if allocation_of(settings) is None:
        return []
    try:
        reached, detail = try_from_nodes(settings, path, Gateway(client_path).client_path)
    except (OSError, ValueError, RuntimeError) as error:  # the scheduler's commands, and what they print
        return [Check("nodes", False, f"it could not be tried from the nodes: {_one_line(error)}")]
    return [Check("nodes", reached, detail)]


def _ago(age_s: float) -> str:
    return "never" if math.isinf(age_s) else f"{age_s / 60:.0f} min ago"
