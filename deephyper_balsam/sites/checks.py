"""Whether a Balsam site is ready for work: settings, folders, commands, API and agent."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from deephyper_balsam.errors import DeepHyperBalsamError, InputError
from deephyper_balsam.gateway import Gateway
from deephyper_balsam.sites.configs import SETTINGS_FILE, SITE_FOLDERS, SITE_ID_FILE

_AGENT_SILENT_S = 120.0
# What the scheduler and run classes call, by a part of the class's dotted path.
_COMMANDS = {
    "slurm": ("sbatch", "squeue", "scancel", "srun"),
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


def check_site(path: str | Path, client_path: str | Path | None = None) -> list[Check]:
    """Look at everything that a site needs, and change nothing.

    Parameters
    ----------
    path
        The site's folder.
    client_path
        The credentials file. Default: what Balsam itself takes.

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
        checks += [_template(path, settings), _commands(settings)]
    return [*checks, *_api_and_agent(site_id, path, client_path)]


def _settings(path: Path) -> tuple[Any, Check]:
    from balsam.config import Settings

    file = path / SETTINGS_FILE
    try:
        settings = Settings(**yaml.safe_load(file.read_text()))
    except (OSError, TypeError, ValueError, ImportError, yaml.YAMLError) as error:
        return None, Check("settings", False, f"{file}: {error}")
    return settings, Check("settings", True, f"{file} loads")


def _folders(path: Path) -> Check:
    bad = [name for name in SITE_FOLDERS if not os.access(path / name, os.W_OK | os.X_OK)]
    if bad:
        return Check("folders", False, f"missing or not writable in {path}: {', '.join(bad)}")
    return Check("folders", True, f"{', '.join(SITE_FOLDERS)} are writable")


def _template(path: Path, settings: Any) -> Check:
    name = settings.scheduler.job_template_path if settings.scheduler else "job-template.sh"
    if not (path / name).is_file():
        return Check("template", False, f"{path / name} does not exist")
    return Check("template", True, f"{path / name}")


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
    return [api, _agent(row["last_refresh"], path)]


def _agent(last_refresh: str | None, path: Path) -> Check:
    start = f"start it with `balsam site start` in {path}"
    if not (path / "balsam-service.pid").exists():
        return Check("agent", False, f"the agent does not run: {start}")
    age_s = math.inf
    if last_refresh is not None:
        now = datetime.now(timezone.utc).replace(tzinfo=None)
        age_s = max(0.0, (now - datetime.fromisoformat(last_refresh)).total_seconds())
    if age_s > _AGENT_SILENT_S:
        return Check("agent", False, f"the agent was last heard of {age_s / 60:.0f} min ago: {start}")
    return Check("agent", True, f"the agent reported {age_s:.0f} s ago")
