"""Balsam's API made cheap for a machine that also runs the launchers: the same routes and tables, less around them.

At many runs a second two small requests of each run cost the most: the run reads its job and writes its result into it.
Of their five milliseconds of a core most goes into threads, tokens and the making of SQL.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

_THREADS = 8
_OWNED = (
    "FROM jobs JOIN apps ON jobs.app_id = apps.id JOIN sites ON apps.site_id = sites.id WHERE sites.owner_id = :owner"
)
_ONE_JOB = f"SELECT jobs.* {_OWNED} AND jobs.id = :id"
_TO_UPDATE = (
    f"SELECT jobs.id, jobs.state, jobs.session_id {_OWNED} AND jobs.id = ANY(:ids) ORDER BY jobs.id FOR UPDATE OF jobs"
)
_THEIR_TRANSFERS = "SELECT id, job_id, state, direction FROM transfer_items WHERE job_id = ANY(:ids)"


def lighten(app: Any) -> Any:
    """Make Balsam's app cheap; return the database engine that it uses.

    - The engine sends the updates of many rows together, where SQLAlchemy would wait for the answer to each, and reads
      JSON columns by orjson.
    - There is no Redis here, and redis-py 6 tries for five seconds to reach it: in each request that changes something.
    - Nobody reads the times that the one middleware logs, and it costs a quarter of a small request.
    - A token is read once; what stands before and after a route runs where it is; few threads share the interpreter.
    - The two statements of each run are kept as text.
    """
    import orjson
    from balsam.server import settings
    from balsam.server.models import base
    from balsam.server.pubsub import pubsub
    from sqlalchemy import create_engine

    base._engine = create_engine(
        settings.database_url,
        pool_size=10,
        max_overflow=40,
        connect_args={"options": "-c timezone=utc"},
        executemany_mode="values_plus_batch",
        executemany_batch_page_size=500,
        json_deserializer=orjson.loads,
    )
    pubsub.publish = lambda *args, **kwargs: None
    app.user_middleware.clear()
    app.middleware_stack = app.build_middleware_stack()
    app.router.on_startup.append(_few_threads)
    _stay_in_the_loop()
    _know_who_asks(app)
    _keep_statements()
    return base._engine


async def _few_threads() -> None:
    import anyio

    anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS


def _stay_in_the_loop() -> None:
    """Let what FastAPI calls before and after a route run in the loop: nothing of it waits, and a thread costs more."""
    from fastapi.dependencies import utils

    replaced: Any = utils

    async def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    @contextlib.asynccontextmanager
    async def hold(manager: contextlib.AbstractContextManager[Any]) -> AsyncIterator[Any]:
        with manager as held:
            yield held

    replaced.run_in_threadpool = call
    replaced.contextmanager_in_threadpool = hold


def _know_who_asks(app: Any) -> None:
    """Read each token once, until it expires: Balsam's own decodes it, and prints the user's name, at each request."""
    import jwt
    from balsam.server import settings
    from balsam.server.auth.token import user_from_token

    known: dict[str, tuple[float, Any]] = {}

    async def user(token: str) -> Any:
        expiry, who = known.get(token, (0.0, None))
        if expiry <= time.time():
            who = user_from_token(token)
            claims = jwt.decode(token, settings.auth.secret_key, algorithms=[settings.auth.algorithm])
            known[token] = float(claims["exp"]), who
        return who

    def replace(dependant: Any) -> None:
        if dependant.call is user_from_token:
            dependant.call = user
        for part in dependant.dependencies:
            replace(part)

    for route in app.routes:
        if hasattr(route, "dependant"):
            replace(route.dependant)


def _keep_statements() -> None:
    """Replace the two functions of Balsam that each run needs by ones that do the same with SQL that is ready.

    Rows are locked in the order of their ids, so that two updates of the same jobs wait for each other and no more.
    """
    from balsam.server import ValidationError
    from balsam.server.models.crud import jobs
    from sqlalchemy import text

    one_job, to_update, their_transfers = text(_ONE_JOB), text(_TO_UPDATE), text(_THEIR_TRANSFERS)
    fetch_many = jobs.fetch

    def fetch(db: Any, owner: Any, paginator: Any = None, job_id: int | None = None, filterset: Any = None) -> Any:
        if job_id is None or paginator is not None or filterset:
            return fetch_many(db, owner, paginator, job_id, filterset)
        return 1, [dict(db.execute(one_job, {"owner": owner.id, "id": job_id}).mappings().one())]

    def bulk_update(db: Any, owner: Any, patch_dicts: Mapping[int, dict[str, Any]]) -> int:
        ids = list(patch_dicts)
        rows = db.execute(to_update, {"owner": owner.id, "ids": ids}).all()
        if len(rows) < len(ids):
            raise ValidationError("Could not find some Job IDs")
        transfers: dict[int, list[Any]] = {row.id: [] for row in rows}
        for item in db.execute(their_transfers, {"ids": ids}):
            transfers[item.job_id].append(item)
        jobs.do_update_jobs(db, rows, transfers, patch_dicts)
        return len(rows)

    jobs.fetch, jobs.bulk_update = fetch, bulk_update
