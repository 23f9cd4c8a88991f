"""Balsam's API made cheap for a machine that also runs the launchers: the same routes and tables, less around them.

At many runs a second two small requests of each run cost the most: the run reads its job and writes its result into it.
Of their five milliseconds of a core most goes into threads, tokens and the making of SQL.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

from deephyper_balsam.common.patching import patch
from deephyper_balsam.server.large_answers import give_memory_back, list_in_pieces
from deephyper_balsam.server.logins import bind_tokens
from deephyper_balsam.server.plain_json import keep_plain, read_column
from deephyper_balsam.server.routes import call_instead

_OURS = "server.fast_paths"
_THREADS = 8
_OWNED = (
    "FROM jobs JOIN apps ON jobs.app_id = apps.id JOIN sites ON apps.site_id = sites.id WHERE sites.owner_id = :owner"
)
_ONE_JOB = f"SELECT jobs.* {_OWNED} AND jobs.id = :id"
_TO_UPDATE = (
    f"SELECT jobs.id, jobs.state, jobs.session_id {_OWNED} AND jobs.id = ANY(:ids) ORDER BY jobs.id FOR UPDATE OF jobs"
)
_FOREIGN_BATCH_JOBS = (
    "SELECT batch_jobs.id FROM batch_jobs JOIN sites ON batch_jobs.site_id = sites.id "
    "WHERE sites.owner_id <> :owner AND batch_jobs.id = ANY(:ids)"
)
_THEIR_TRANSFERS = "SELECT id, job_id, state, direction FROM transfer_items WHERE job_id = ANY(:ids)"
"""Read by the types of its columns: the database keeps the name of a direction, and Balsam compares its value."""


def install_fast_paths(app: Any) -> Any:
    """Make Balsam's app cheap; return the database engine that it uses.

    - The engine sends the updates of many rows together, where SQLAlchemy would wait for the answer to each, and reads
      JSON columns by orjson.
    - There is no Redis here, and redis-py 6 tries for five seconds to reach it: in each request that changes something.
    - Nobody reads the times that the one middleware logs, and it costs a quarter of a small request.
    - A token is read once; what stands before and after a route runs where it is; few threads share the interpreter.
    - The two statements of each run are kept as text.
    - Jobs that are alike start in the order in which they were made; Balsam's own order is any that the database finds.
    - What no answer could hold is refused before it is written; large pages are sent in pieces (`plain_json`,
      `large_answers`).
    """
    from balsam.server import settings
    from sqlalchemy import create_engine

    engine = create_engine(
        settings.database_url,
        pool_size=10,
        max_overflow=40,
        connect_args={"options": "-c timezone=utc"},
        executemany_mode="values_plus_batch",
        executemany_batch_page_size=500,
        json_deserializer=read_column,
    )
    patch("balsam.server.models.base._engine", _OURS, lambda _: engine)
    patch("balsam.server.pubsub.pubsub.publish", _OURS, lambda _: lambda *args, **kwargs: None)
    keep_plain(app, engine)
    list_in_pieces(app)
    give_memory_back(app)
    patch("balsam.server.main.app.user_middleware", _OURS, lambda _: [])
    app.middleware_stack = app.build_middleware_stack()
    app.router.on_startup.append(_few_threads)
    _stay_in_the_loop()
    _know_who_asks(app, engine)
    _keep_statements()
    _start_in_order()
    return engine


async def _few_threads() -> None:
    import anyio

    anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS


def _stay_in_the_loop() -> None:
    """Let what FastAPI calls before and after a route run in the loop: nothing of it waits, and a thread costs more."""

    async def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    @contextlib.asynccontextmanager
    async def hold(manager: contextlib.AbstractContextManager[Any]) -> AsyncIterator[Any]:
        with manager as held:
            yield held

    patch("fastapi.dependencies.utils.run_in_threadpool", _OURS, lambda _: call)
    patch("fastapi.dependencies.utils.contextmanager_in_threadpool", _OURS, lambda _: hold)


def _know_who_asks(app: Any, engine: Any) -> None:
    """Read each token once, until it expires or an account is changed: Balsam's own decodes it at each request."""
    from deephyper_balsam.server.guard import Tokens

    bind_tokens()
    tokens = app.state.tokens = Tokens(engine)

    async def user(token: str) -> Any:
        return await tokens.user(token)

    def replace(read: Any) -> Any:
        call_instead(app, read, user)
        return read  # `Tokens` reads a new one by it

    patch("balsam.server.auth.token.user_from_token", _OURS, replace)


def _keep_statements() -> None:
    """Replace the two functions of Balsam that each run needs by ones that do the same with SQL that is ready.

    Rows are locked in the order of their ids, so that two updates of the same jobs wait for each other and no more.
    Balsam's own lets a job name another user's BatchJob as the one that ran it, which is refused here.
    """
    from balsam.server import ValidationError
    from balsam.server.models import TransferItem
    from balsam.server.models.crud import jobs
    from sqlalchemy import text

    one_job, to_update, foreign_batch_jobs = text(_ONE_JOB), text(_TO_UPDATE), text(_FOREIGN_BATCH_JOBS)
    their_transfers = text(_THEIR_TRANSFERS).columns(
        TransferItem.id, TransferItem.job_id, TransferItem.state, TransferItem.direction
    )

    def fetching(fetch_many: Callable[..., Any]) -> Callable[..., Any]:
        def fetch(db: Any, owner: Any, paginator: Any = None, job_id: int | None = None, filterset: Any = None) -> Any:
            if job_id is None or paginator is not None or filterset:
                return fetch_many(db, owner, paginator, job_id, filterset)
            return 1, [dict(db.execute(one_job, {"owner": owner.id, "id": job_id}).mappings().one())]

        return fetch

    def refuse_foreign_batch_jobs(db: Any, owner: Any, changes: Iterable[Mapping[str, Any]]) -> None:
        named = {change["batch_job_id"] for change in changes if change.get("batch_job_id") is not None}
        if named and db.execute(foreign_batch_jobs, {"owner": owner.id, "ids": list(named)}).first() is not None:
            raise ValidationError("Could not find some Batch Job IDs")

    def updating(update_many: Callable[..., Any]) -> Callable[..., Any]:
        def update_query(db: Any, owner: Any, update_data: dict[str, Any], filterset: Any) -> Any:
            refuse_foreign_batch_jobs(db, owner, [update_data])
            return update_many(db, owner, update_data, filterset)

        return update_query

    def bulk_update(db: Any, owner: Any, patch_dicts: Mapping[int, dict[str, Any]]) -> int:
        refuse_foreign_batch_jobs(db, owner, patch_dicts.values())
        ids = list(patch_dicts)
        rows = db.execute(to_update, {"owner": owner.id, "ids": ids}).all()
        if len(rows) < len(ids):
            raise ValidationError("Could not find some Job IDs")
        transfers: dict[int, list[Any]] = {row.id: [] for row in rows}
        for item in db.execute(their_transfers, {"ids": ids}):
            transfers[item.job_id].append(item)
        jobs.do_update_jobs(db, rows, transfers, patch_dicts)
        return len(rows)

    patch("balsam.server.models.crud.jobs.fetch", _OURS, fetching)
    patch("balsam.server.models.crud.jobs.bulk_update", _OURS, lambda _: bulk_update)
    patch("balsam.server.models.crud.jobs.update_query", _OURS, updating)


def _start_in_order() -> None:
    """Let the launcher that asks for work take the oldest of jobs that are alike: none waits for ever beside newer."""
    from balsam.server.models import Job
    from sqlalchemy.sql import Select

    class InOrder:
        def __init__(self, db: Any) -> None:
            self._db = db

        def __getattr__(self, name: str) -> Any:
            return getattr(self._db, name)

        def execute(self, statement: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(statement, Select) and statement._for_update_arg is not None:
                statement = statement.order_by(Job.id)  # after what it is ordered by already
            return self._db.execute(statement, *arguments, **named)

    def acquiring(acquire: Callable[..., Any]) -> Callable[..., Any]:
        def acquire_in_order(db: Any, owner: Any, session_id: int, spec: Any) -> Any:
            return acquire(InOrder(db), owner, session_id, spec)

        return acquire_in_order

    patch("balsam.server.models.crud.sessions.acquire", _OURS, acquiring)
