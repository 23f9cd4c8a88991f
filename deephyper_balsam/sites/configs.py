"""Site configs: which there are, and a new Balsam site made from one without prompts.

A config is a folder with ``settings.yml``, ``job-template.sh`` and ``README.md``. Its settings are Balsam's own settings
file, complete; the shorter form of Balsam's default configs is understood, too.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deephyper_balsam.errors import (
    BalsamError,
    InputError,
    NotLoggedInError,
    SettingsError,
    UnknownSiteError,
    UnreachableError,
)
from deephyper_balsam.resources import folder

SETTINGS_FILE = "settings.yml"
SITE_ID_FILE = ".balsam-site"
_SITE_FOLDERS = ("log", "qsubmit", "data")


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
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"{source} is not YAML: {error}") from error
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


def init_site(
    path: str | Path, config: str | Path | SiteConfig, name: str, client_path: str | Path | None = None
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

    Raises
    ------
    InputError
        When the path exists or cannot be made, or the name is taken.
    UnknownSiteError
        When the config is unknown.
    SettingsError
        When Balsam does not accept the config's settings.
    NotLoggedInError
        When there are no credentials, or Balsam refuses them.
    UnreachableError
        When the API does not answer.
    """
    from pydantic import ValidationError

    config = config if isinstance(config, SiteConfig) else site_config(config)
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise InputError(f"{path} exists already. Name a folder that does not exist; a site is made in a new one.")
    if not name.strip():
        raise InputError("A site's name must not be empty.")

    from balsam.config import Settings

    text = config.settings_text()
    try:
        settings = Settings(**yaml.safe_load(text))
    except ValidationError as error:
        raise SettingsError(f"Balsam does not accept {config.path / SETTINGS_FILE}: {error}") from error
    template = config.path / (settings.scheduler.job_template_path if settings.scheduler else "job-template.sh")
    if not template.is_file():
        raise SettingsError(f"The site config {config.name} lacks its job template {template}.")

    client = load_client(client_path)
    try:
        path.mkdir(parents=False)
    except OSError as error:
        raise InputError(
            f"Cannot make the folder {path}: {error.strerror}. Its parent must exist and be writable."
        ) from error
    try:
        _write_site(path, text, template)
        record = _create_site(client, name, path)
        id_file = path / SITE_ID_FILE
        id_file.write_text(str(record.id))
        id_file.chmod(0o440)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return Site(int(record.id), name, path)


def _write_site(path: Path, settings_text: str, template: Path) -> None:
    settings_file = path / SETTINGS_FILE
    settings_file.write_text(settings_text, encoding="utf-8")
    settings_file.chmod(0o600)
    for name in _SITE_FOLDERS:
        (path / name).mkdir()
    (path / "qsubmit").chmod(0o700)
    target = path / template.name
    shutil.copyfile(template, target)
    target.chmod(0o700)


def _create_site(client: Any, name: str, path: Path) -> Any:
    taken = call(client, lambda: client.Site.objects.filter(name=name).count())
    if taken:
        raise InputError(
            f"You have a Balsam site named {name!r} already. Choose another name (`balsam site ls` shows them)."
        )
    return call(client, lambda: client.Site.objects.create(name=name, path=path))


def load_client(client_path: str | Path | None = None, *, retry_count: int = 0, connect_timeout_s: float = 5.0) -> Any:
    """Return a Balsam client with quick retries, built from a credentials file and not from the environment.

    Raises
    ------
    NotLoggedInError
        When the file does not exist, cannot be read, or its token is over.
    """
    from balsam.config import ClientSettings

    path = Path(client_path) if client_path is not None else Path(ClientSettings.settings_path())
    try:
        data = yaml.safe_load(path.read_text())
        settings = ClientSettings(**{**data, "retry_count": retry_count, "connect_timeout": connect_timeout_s})
        client = settings.build_client()
    except FileNotFoundError as error:
        raise NotLoggedInError(
            f"There are no Balsam credentials at {path}. Run `balsam login`, "
            "or `deephyper-balsam server up` for a server of your own."
        ) from error
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise NotLoggedInError(
            f"The Balsam credentials at {path} cannot be used: {error}. Run `balsam login`."
        ) from error
    return client


def call(client: Any, request: Any) -> Any:
    """Make a request and turn what Balsam's client raises into our errors.

    Raises
    ------
    UnreachableError, NotLoggedInError, BalsamError
        When the API does not answer, refuses the credentials, or answers with an error.
    """
    import logging

    import requests
    from balsam.client import NotAuthenticatedError

    log = logging.getLogger("balsam.client.requests_client")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return request()
    except NotAuthenticatedError as error:
        raise NotLoggedInError(
            f"Your login at {client.api_root} is over or was never made. Run `balsam login`."
        ) from error
    except (TimeoutError, requests.RequestException) as error:
        message = str(error)
        if "401" in message:
            raise NotLoggedInError(
                f"{client.api_root} does not accept your credentials. Run `balsam login`."
            ) from error
        if any(f"{code} " in message for code in (400, 403, 404, 422, 500)):
            raise BalsamError(f"Balsam at {client.api_root} answered: {message}") from error
        raise UnreachableError(
            f"Balsam's API at {client.api_root} does not answer. Is the server up (`deephyper-balsam server status`)? {message}"
        ) from error
    finally:
        with contextlib.suppress(Exception):
            log.setLevel(level)
