"""Site configs: which there are, and a new Balsam site made from one without prompts.

A config is a folder with ``settings.yml``, ``job-template.sh`` and ``README.md``. Its settings are Balsam's own
settings file, complete; the shorter form of Balsam's default configs is understood, too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deephyper_balsam.common import strict_yaml
from deephyper_balsam.common.bundled_files import folder
from deephyper_balsam.errors import InputError, SettingsError, UnknownSiteError
from deephyper_balsam.store.gateway import Gateway

SETTINGS_FILE = "settings.yml"
SITE_ID_FILE = ".balsam-site"
SITE_FOLDERS = ("log", "qsubmit", "data")
# What a config leaves to its user begins so: YOUR_PROJECT, YOUR_PARTITION
PLACEHOLDER = re.compile(r"\bYOUR_[A-Z_]+\b")
# Settings that are texts, or hold nothing but texts
_TEXTS = (
    "allowed_projects",
    "filter_tags",
    "job_mode",
    "job_template_path",
    "level",
    "optional_batch_job_params",
    "serial_mode_startup_params",
    "sort_by",
    "submit_project",
    "submit_queue",
    "transfer_locations",
)
_QUEUE_PLACEHOLDERS = ("YOUR_QUEUE", "YOUR_PARTITION")


@dataclass(frozen=True)
class SiteConfig:
    """A folder that describes a machine.

    Attributes
    ----------
    name
        The folder's name, such as ``"local"``.
    path
        The folder.
    """

    name: str
    path: Path

    @property
    def summary(self) -> str:
        """The first sentence of the README's text, or an empty string."""
        readme = self.path / "README.md"
        if not readme.is_file():
            return ""
        lines = readme.read_text(encoding="utf-8").splitlines()
        text = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "")
        return text.split(". ")[0].rstrip(".")

    def to_dict(self) -> dict[str, str]:
        """Return what ``site configs --json`` shows."""
        return {"name": self.name, "path": str(self.path), "summary": self.summary}

    def settings_text(self) -> str:
        """Return the text of the site's ``settings.yml``.

        Raises
        ------
        SettingsError
            When the file is not YAML, or neither of the two forms.
        """
        source = self.path / SETTINGS_FILE
        text = source.read_text(encoding="utf-8")
        data = read_settings(text, source)
        if not isinstance(data, dict):
            raise SettingsError(
                f"{source} must hold Balsam's settings as `name: value` lines, but got {type(data).__name__}."
            )
        if "compute_node" not in data:
            return text
        from balsam.config.site_builder import SiteDefaults, render_settings_file

        try:
            return str(render_settings_file(SiteDefaults(**data).dict())) + "\n"
        except ValueError as error:
            raise SettingsError(f"{source} is no valid site config: {error}") from error


@dataclass(frozen=True)
class Site:
    """A Balsam site: its id and name in Balsam's database, and its folder."""

    id: int
    name: str
    path: Path


def site_configs() -> list[SiteConfig]:
    """Return the configs that this installation brings, by name."""
    top = folder("site-configs")
    return [SiteConfig(path.parent.name, path.parent) for path in sorted(top.glob(f"*/{SETTINGS_FILE}"))]


def site_config(name_or_path: str | Path) -> SiteConfig:
    """Return the config of that name, or the user's own folder at that path.

    Raises
    ------
    UnknownSiteError
        When there is neither; the message lists the names that exist.
    """
    known = {config.name: config for config in site_configs()}
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    path = Path(name_or_path).expanduser()
    if (path / SETTINGS_FILE).is_file():
        path = path.resolve()
        return SiteConfig(path.name, path)
    raise UnknownSiteError(
        f"There is no site config {str(name_or_path)!r}. Known: {', '.join(known)}; "
        f"or the path of a folder with {SETTINGS_FILE} and job-template.sh."
    )


def read_settings(text: str, source: Path) -> Any:
    """Return what a ``settings.yml`` holds, after looking for what YAML reads otherwise than it was meant.

    Balsam reads the same file by itself, so what is misread must be mended there.

    Raises
    ------
    SettingsError
        When the text is no YAML, or a value is not read as it was written.
    """
    try:
        data = strict_yaml.read(text)
        wrong = list(strict_yaml.surprises(text, _TEXTS))
    except yaml.YAMLError as error:
        raise SettingsError(f"{source} is not YAML: {error}") from error
    if wrong:
        raise SettingsError(f"{source}: {'; '.join(wrong)}.")
    return data


def fill_in(text: str, project: str | None = None, queue: str | None = None) -> str:
    """Put a project and a queue where a config's settings leave them to the user; one that they name already is fine.

    Raises
    ------
    InputError
        When a name has characters that no scheduler takes, or the settings name others themselves.
    """
    for what, value, names in (("project", project, ("YOUR_PROJECT",)), ("queue", queue, _QUEUE_PLACEHOLDERS)):
        if value is None:
            continue
        if not re.fullmatch(r"[\w.@+-]+", value):
            raise InputError(f"A {what} is one word of letters, digits and . _ - + @, but got {value!r}.")
        if not any(re.search(rf"\b{name}\b", text) for name in names):
            known = [
                str(name) for name in (strict_yaml.read(text).get("scheduler") or {}).get(f"allowed_{what}s") or ()
            ]
            if value not in known:
                raise InputError(
                    f"This site config names its {what}s itself, and {value} is none of them: {', '.join(known)}. "
                    f"Choose one of these, or edit {SETTINGS_FILE}."
                )
        for name in names:
            text = re.sub(rf"\b{name}\b", value, text)
    return text


def init_site(
    path: str | Path,
    config: str | Path | SiteConfig,
    name: str,
    client_path: str | Path | None = None,
    *,
    project: str | None = None,
    queue: str | None = None,
) -> Site:
    """Make a new Balsam site without asking anything, and report it to Balsam. When that fails, nothing is left behind.

    Parameters
    ----------
    path
        The site's folder, which must not exist yet; its parent must.
    config
        A name from `site_configs`, or the path of a folder like those.
    name
        The site's name in Balsam, unique among the user's sites.
    client_path
        The credentials file. Default: what Balsam itself takes (``$BALSAM_CLIENT_PATH`` or ``~/.balsam/client.yml``).
    project, queue
        What replaces the config's ``YOUR_PROJECT``, and its ``YOUR_QUEUE`` or ``YOUR_PARTITION``.

    Returns
    -------
    Site
        The new site.

    Raises
    ------
    InputError
        When the path exists or cannot be made, the name is taken, or a project or queue cannot be filled in.
    UnknownSiteError
        When the config is unknown.
    SettingsError
        When Balsam does not accept the config's settings.
    NotLoggedInError
        When there are no credentials, or Balsam refuses them.
    UnreachableError
        When the API does not answer.
    """
    config = config if isinstance(config, SiteConfig) else site_config(config)
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise InputError(f"{path} exists already. Name a folder that does not exist; a site is made in a new one.")
    if not name.strip():
        raise InputError("A site's name must not be empty.")

    checked = check_config(config, project=project, queue=queue)
    return Site(_make_site(Gateway(client_path), path, name, checked.text, checked.template), name, path)


def _make_site(gateway: Gateway, path: Path, name: str, text: str, template: Path) -> int:
    """Make the folder and report it to Balsam, or leave nothing; return the site's id."""
    try:
        path.mkdir(parents=False)
    except OSError as error:
        raise InputError(
            f"Cannot make the folder {path}: {error.strerror}. Its parent must exist and be writable."
        ) from error
    try:
        _write_site(path, text, template)
        site_id = _create_site(gateway, name, path)
        id_file = path / SITE_ID_FILE
        id_file.write_text(str(site_id))
        id_file.chmod(0o440)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return site_id


@dataclass(frozen=True)
class CheckedConfig:
    """What a new site of a config would have; the site need not exist.

    Attributes
    ----------
    name
        The config's.
    text
        The settings as they would be written.
    settings
        Balsam's settings, read from `text`.
    template
        The job template.
    """

    name: str
    text: str
    settings: Any
    template: Path

    def queues_and_projects(self) -> dict[str, Any]:
        """Return what the site would tell Balsam: `name`, `allowed_queues` and `allowed_projects`."""
        scheduler = read_settings(self.text, self.template.parent / SETTINGS_FILE)["scheduler"] or {}
        queues = {str(queue): dict(block) for queue, block in (scheduler.get("allowed_queues") or {}).items()}
        projects = map(str, scheduler.get("allowed_projects") or ())
        return {
            "name": self.name,
            "allowed_queues": {queue: block for queue, block in queues.items() if not PLACEHOLDER.search(queue)},
            "allowed_projects": [project for project in projects if not PLACEHOLDER.search(project)],
        }


def check_config(
    config: str | Path | SiteConfig, *, project: str | None = None, queue: str | None = None
) -> CheckedConfig:
    """Return what a new site of a config has: settings that Balsam accepts, and a job template that is there.

    Parameters
    ----------
    config, project, queue
        As for `init_site`.

    Raises
    ------
    InputError, UnknownSiteError, SettingsError
        As `init_site`.
    """
    from balsam.config import Settings

    config = config if isinstance(config, SiteConfig) else site_config(config)
    text = fill_in(config.settings_text(), project, queue)
    try:
        settings = Settings(**read_settings(text, config.path / SETTINGS_FILE))
    except (ImportError, TypeError, ValueError) as error:  # a class's dotted path may be wrong
        raise SettingsError(f"Balsam does not accept {config.path / SETTINGS_FILE}: {error}") from error
    template = config.path / (settings.scheduler.job_template_path if settings.scheduler else "job-template.sh")
    if not template.is_file():
        raise SettingsError(f"The site config {config.name} lacks its job template {template}.")
    return CheckedConfig(config.name, text, settings, template)


def _write_site(path: Path, settings_text: str, template: Path) -> None:
    settings_file = path / SETTINGS_FILE
    settings_file.write_text(settings_text, encoding="utf-8")
    settings_file.chmod(0o600)
    for name in SITE_FOLDERS:
        (path / name).mkdir()
    (path / "qsubmit").chmod(0o700)
    target = path / template.name
    shutil.copyfile(template, target)
    target.chmod(0o700)


def _create_site(gateway: Gateway, name: str, path: Path) -> int:
    taken = {row["name"]: row["path"] for row in gateway.sites()}
    if name in taken:
        raise InputError(f"You have a Balsam site named {name!r} already, in {taken[name]}: choose another name.")
    return gateway.create_site(name, str(path))


def render_script(path: Path, batch_job: Mapping[str, Any]) -> str | None:
    """Return the script that the agent of the site in `path` would submit for a BatchJob; None: it cannot be read here.

    Raises
    ------
    SettingsError
        When the template cannot be rendered.
    """
    from balsam.config import Settings

    if not os.access(path / SETTINGS_FILE, os.R_OK):
        return None
    file = path / SETTINGS_FILE
    settings = Settings(**read_settings(file.read_text(encoding="utf-8"), file))
    return render_template(path / settings.scheduler.job_template_path, path, batch_job)


def render_template(template: Path, path: Path, batch_job: Mapping[str, Any]) -> str:
    """Return the script that a job template makes of a BatchJob.

    Parameters
    ----------
    template
        The file.
    path
        The site's folder, to which the script changes.
    batch_job
        The BatchJob, as Balsam's API takes it.

    Raises
    ------
    SettingsError
        When the template cannot be rendered.
    """
    from balsam.site.script_template import ScriptTemplate
    from jinja2 import Template, TemplateError

    values = {
        **{word: batch_job[word] for word in ("project", "queue", "num_nodes", "wall_time_min", "job_mode")},
        **{word: batch_job[word] for word in ("filter_tags", "optional_params")},
        "balsam_site_path": str(path),
        "balsam_bin": ScriptTemplate.locate_balsam(),
        "launcher_cmd": ScriptTemplate.launcher_entrypoint(),
    }
    try:
        return str(Template(template.read_text(encoding="utf-8")).render(values))
    except (OSError, TemplateError) as error:
        raise SettingsError(f"The job template {template} cannot be rendered: {error}") from error


def forget_site(name: str, path: Path, client_path: str | Path | None = None) -> bool:
    """Delete Balsam's record of a site whose making was cut before its folder knew its id; say if there was one."""
    gateway = Gateway(client_path)
    for row in gateway.sites():
        if row["name"] == name and Path(row["path"]) == path:
            gateway.delete_site(row["id"])
            return True
    return False
