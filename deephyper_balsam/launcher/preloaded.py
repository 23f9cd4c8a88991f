"""What the process has loaded from which runs are forked (`forking.py`); nothing else imports this module.

``$DEEPHYPER_BALSAM_PRELOAD`` names further modules, separated by commas: what each run would import first, such as
``torch``. They must bear being copied: no threads, no GPU, no open connections at import.
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from importlib import import_module

PRELOAD_VARIABLE = "DEEPHYPER_BALSAM_PRELOAD"

# A scheduler signals every process of an allocation; this one must outlive the runs to say how they ended
signal.signal(signal.SIGTERM, signal.SIG_IGN)

for needed in ("balsam.site.launcher.python_runner", "deephyper_balsam.node.worker"):
    import_module(needed)
for ours in ("forking", "wall_time"):  # what a fork runs, and what the script of a launcher imports
    import_module(f"deephyper_balsam.launcher.{ours}")
with contextlib.suppress(Exception):  # the classes that settings.yml names; the run itself says what is wrong with it
    import_module("balsam.config").SiteConfig()
for name in filter(None, os.environ.get(PRELOAD_VARIABLE, "").split(",")):
    try:
        import_module(name.strip())
    except Exception:
        traceback.print_exc()  # into the launcher's output: a run that needs it says so itself
