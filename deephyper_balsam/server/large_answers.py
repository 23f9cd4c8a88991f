"""Large answers of the API in pieces, and memory given back after them.

Balsam's own reads all rows of a page, then makes all of them one text. A page of 5000 failed trials with their
tracebacks so took a gigabyte, and the C library kept most of it for good.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from deephyper_balsam.common.patching import patch
from deephyper_balsam.server.routes import call_instead

_ROWS_WHOLE = 500  # a page of so many rows is read at once
_ROWS_A_PIECE = 250
_WHOLE_BYTES = 2_000_000  # an answer up to this size is sent whole
_LOOK_S = 10.0
_GROWN_BYTES = 32_000_000
_M_ARENA_MAX = -8  # of glibc's malloc.h


def list_in_pieces(app: Any) -> None:
    """Read and send the jobs of a large page piece by piece; small pages as ever."""
    import orjson
    from balsam.server.models import Job
    from balsam.server.models.crud import jobs
    from sqlalchemy import func
    from starlette.responses import Response, StreamingResponse

    def pieces(rows: Any) -> Iterator[bytes]:
        comma = b""
        for part in rows.mappings().partitions(_ROWS_A_PIECE):
            yield comma + orjson.dumps([dict(row) for row in part])[1:-1]
            comma = b","

    def list_jobs(db: Any, user: Any, paginator: Any, q: Any) -> Any:
        found = q.apply_filters(jobs.owned_job_selector(user))
        count = db.execute(found.with_only_columns([func.count(Job.id)]).order_by(None)).scalar()
        page = paginator.paginate_core(found).order_by(Job.id)
        many = min(paginator.limit, count - paginator.offset) > _ROWS_WHOLE
        if not many:
            rows = [dict(row) for row in db.execute(page).mappings()]
            return Response(orjson.dumps({"count": count, "results": rows}), media_type="application/json")
        rest = pieces(db.execute(page.execution_options(yield_per=_ROWS_A_PIECE)))
        begun, size = [b'{"count":%d,"results":[' % count], 0
        for piece in rest:
            begun.append(piece)
            size += len(piece)
            if size > _WHOLE_BYTES:
                return StreamingResponse(chain(begun, rest, [b"]}"]), media_type="application/json")
        return Response(b"".join([*begun, b"]}"]), media_type="application/json")

    def replace(known: Any) -> Any:
        call_instead(app, known, list_jobs)
        return list_jobs

    patch("balsam.server.routers.jobs.list", "server.large_answers", replace)


def give_memory_back(app: Any) -> None:
    """Share few heaps among the threads, and give what is free back to the system when this process has grown."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):  # not glibc
        return
    library.mallopt(_M_ARENA_MAX, 2)
    kept: list[Any] = []

    async def watch() -> None:
        used = _resident_bytes()
        while True:
            await asyncio.sleep(_LOOK_S)
            used = min(used, _resident_bytes())
            if _resident_bytes() > used + _GROWN_BYTES:
                await asyncio.get_running_loop().run_in_executor(None, library.malloc_trim, 0)
                used = _resident_bytes()

    async def begin() -> None:
        kept.append(asyncio.get_running_loop().create_task(watch()))  # the loop itself holds it weakly

    app.router.on_startup.append(begin)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
