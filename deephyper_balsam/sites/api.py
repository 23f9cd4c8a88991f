"""Balsam's API server on loopback: ``python -m deephyper_balsam.sites.api --port N``, its settings in BALSAM_*.

The app is Balsam's own. What stands around it: the tables are made from Balsam's models (the wheel lacks the
migrations), the socket listens on 127.0.0.1 only, and what each request costs is cut to a half and less (`lighten.py`).
"""

from __future__ import annotations

import argparse
import errno
import socket
import sys
from typing import Any

from deephyper_balsam.sites.lighten import lighten

EXIT_PORT_TAKEN = 98
_TAGS_INDEX = "ix_jobs_tags"


def create_tables(engine: Any) -> None:
    """Make the tables and indexes that the database lacks.

    The index on tags is written as SQL: Balsam's model declares it as a text expression, which SQLAlchemy refuses.
    """
    from balsam.server.models.tables import Base
    from sqlalchemy import text

    jobs = Base.metadata.tables["jobs"]
    for index in [index for index in jobs.indexes if index.name == _TAGS_INDEX]:
        jobs.indexes.remove(index)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE INDEX IF NOT EXISTS {_TAGS_INDEX} ON jobs USING gin (tags jsonb_path_ops)"))


def main() -> int:
    """Serve until SIGTERM; return 98 when the port is taken."""
    parser = argparse.ArgumentParser(prog="python -m deephyper_balsam.sites.api", description=main.__doc__)
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return EXIT_PORT_TAKEN
        raise

    import uvicorn
    from balsam.server.main import app

    create_tables(lighten(app))
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", timeout_graceful_shutdown=3, loop="uvloop", http="httptools"
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
