"""What all tests share. Importing this file must stay cheap: it runs before every test file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported: the threads of one process wait for one another when pytest-xdist uses all cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Triton is imported: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore = ["no_triton"]  # looking for doctests there would import it, and hide Triton from all other tests


def pytest_configure(config: pytest.Config) -> None:
    """Make property tests repeatable: the same examples in every run, and no time limit for a single one."""
    try:
        from hypothesis import settings
    except ModuleNotFoundError:  # only some test files need it
        return
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.load_profile("repeatable")
