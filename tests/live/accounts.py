"""A second account of this machine, for tests in which a stranger attacks."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def second_account(prefix: str) -> Iterator[pwd.struct_passwd]:
    """Make an account without any right, and remove it; the test is skipped where none can be made."""
    if os.geteuid() != 0 or shutil.which("useradd") is None:
        pytest.skip("only root can make the second account")
    name = f"{prefix}{os.getpid()}"
    done = subprocess.run(["useradd", "--no-create-home", name], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no account can be made here: {done.stderr}")
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", name], check=True, capture_output=True)
