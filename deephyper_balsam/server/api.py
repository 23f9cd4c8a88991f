"""Balsam's API server: ``python -m deephyper_balsam.server.api --fd N``, with its order on the standard input.

The app is Balsam's own. What stands around it: the tables are made from Balsam's models (the wheel lacks the
migrations), the socket is one on which the parent listens already, what each request costs is cut to a half and less
(`fast_paths.py`), and what a client may send is bounded (`guard.py`).

The order is one JSON object: `environment` with Balsam's settings, `challenge_key`, `username`, `password`, the stack's
`folder`, and `look_s`, the seconds between two looks at the site's agent (`mender.py`); for a server that other hosts
reach also `tls_folder` and `tls_names` (`tls_listener.py`). It comes by a pipe, so that no secret stands in a command
line or in an environment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Any

from deephyper_balsam.common.patching import missing, patch
from deephyper_balsam.errors import BalsamChangedError
from deephyper_balsam.server.fast_paths import install_fast_paths
from deephyper_balsam.server.no_redis import stand_in_for_aredis

_TAGS_INDEX = "ix_jobs_tags"
_OF_A_JOB = ("log_events", "transfer_items")  # without an index each is read whole for every job that is deleted


def create_tables(engine: Any) -> None:
    """Make the tables and indexes that the database lacks.

    The index on tags is written as SQL: Balsam's model declares it as a text expression, which SQLAlchemy refuses.
    """
    from balsam.server.models.tables import Base
    from sqlalchemy import text

    def without_tags_index(metadata: Any) -> Any:
        indexes = metadata.tables["jobs"].indexes
        found = [index for index in indexes if index.name == _TAGS_INDEX]
        if not found:
            raise missing(f"index {_TAGS_INDEX} of its table jobs")
        indexes.difference_update(found)
        return metadata

    patch("balsam.server.models.tables.Base.metadata", "server.api", without_tags_index)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE INDEX IF NOT EXISTS {_TAGS_INDEX} ON jobs USING gin (tags jsonb_path_ops)"))
        for table in _OF_A_JOB:
            connection.execute(text(f"CREATE INDEX IF NOT EXISTS ix_{table}_job_id ON {table} (job_id)"))


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m deephyper_balsam.server.api", description=main.__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--tls-fd", type=int)
    given = parser.parse_args()
    listener = socket.socket(fileno=given.fd)
    order = json.loads(sys.stdin.read())
    inherited = dict(os.environ)
    os.environ.update(order["environment"])  # this process alone reads it, before Balsam does
    os.umask(0o077)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    stand_in_for_aredis()
    import uvicorn
    from balsam.server.main import app

    from deephyper_balsam.server import guard, tls_listener
    from deephyper_balsam.server.certificates import Certificates
    from deephyper_balsam.server.mender import look_after_agent

    guard.close_routes()
    create_tables(install_fast_paths(app))
    tokens = app.state.tokens
    tokens.users.prepare()
    tokens.users.ensure(order["username"], order["password"])
    look_after_agent(Path(order["folder"]), inherited, order["look_s"])
    tls = None
    if given.tls_fd is not None:
        folder, names = Path(order["tls_folder"]), order["tls_names"]
        context = tls_listener.tls_context(Certificates(folder))
        tls_listener.keep_valid(context, folder, names)
        tls = socket.socket(fileno=given.tls_fd), context
    config = uvicorn.Config(
        guard.Guard(app, order["challenge_key"], tokens.accepts),
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=3,
        loop="uvloop",
        http=guard.BoundedProtocol,
        ws="none",
        lifespan="on",
        limit_concurrency=guard.MAX_CONNECTIONS,
        timeout_keep_alive=tls_listener.KEEP_ALIVE_S if tls is not None else 5,
    )
    tls_listener.Server(config, tls).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BalsamChangedError as failure:
        sys.exit(f"Error: {failure}")
