"""Applications as a launcher loads them: one that cannot be read costs its own jobs, never the launcher.

Balsam's modes load all applications of the site when they start, and die of any whose class is no application; later
they expect one kind of error where an application that somebody else wrote may raise any.
"""

from __future__ import annotations

from typing import Any

from deephyper_balsam.common.patching import patch

_ANYTHING = (Exception, SystemExit)
"""What somebody's code may raise; `sys.exit()` in it must not end a launcher."""


def tolerant(definition: Any) -> Any:
    """Return what stands for Balsam's `ApplicationDefinition` in a launcher.

    It raises `DeserializeError` alone for an application that cannot be read; errors of Balsam's API come as they are,
    for they say nothing about the application.
    """
    from balsam.schemas import DeserializeError

    class Tolerant:
        _set_client = staticmethod(definition._set_client)

        @staticmethod
        def load_by_site(_site_id: int) -> dict[str, Any]:
            """Load nothing yet: an application is read when a job of it comes, and those of others never are."""
            return {}

        @staticmethod
        def load_by_id(app_id: int) -> Any:
            """Return one application."""
            known = definition._app_id_cache.get(app_id)
            loaded = known or _read(definition._App.objects.get(id=app_id))

            def make(job: Any) -> Any:
                try:
                    return _Careful(loaded(job))
                except _ANYTHING as error:
                    raise DeserializeError(f"the application {loaded.__name__} could not be made: {error!r}") from error

            return make

    def _read(app: Any) -> Any:
        try:
            loaded = definition.from_serialized(app)
        except _ANYTHING as error:  # unpickling runs what somebody wrote
            raise DeserializeError(f"application {app.name} (id {app.id}): {error!r}") from error
        definition._app_id_cache[app.id] = loaded
        return loaded

    class _Careful:
        """An application's face towards the launcher, whose methods may be somebody's own."""

        def __init__(self, app: Any) -> None:
            self._app, self.job = app, app.job

        def __getattr__(self, name: str) -> Any:
            wanted = getattr(self._app, name)
            if not callable(wanted):
                return wanted

            def call(*arguments: Any) -> Any:
                try:
                    return wanted(*arguments)
                except _ANYTHING as error:
                    app = type(self._app).__name__
                    raise DeserializeError(f"the application {app} failed in {name}(): {error!r}") from error

            return call

    return Tolerant


def tolerate_applications() -> None:
    """Let the launcher mode in this process outlive any application."""
    for mode in ("_mpi_mode", "_serial_mode_master"):
        patch(f"balsam.site.launcher.{mode}.ApplicationDefinition", "launcher.applications", tolerant)
