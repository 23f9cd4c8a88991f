"""Balsam's server without aredis.

`balsam/server/pubsub.py` imports aredis to tell browsers of events through a Redis server. Ours has no Redis, and
aredis imports distutils, which Python 3.12 has no more. So a module that only says so stands in its place.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from deephyper_balsam.common.patching import claim


class _NoRedis:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(
            "This Balsam server sends no events: it has no Redis. Ask its API for what changed instead."
        )


def stand_in_for_aredis() -> None:
    """Put the stand-in where `import aredis` finds it; call it before anything of `balsam.server` is imported."""
    claim("aredis", "server.no_redis")
    module: Any = ModuleType("aredis", "No Redis here: made by deephyper_balsam.server.no_redis.")
    module.StrictRedis = module.PubSub = _NoRedis
    sys.modules["aredis"] = module
