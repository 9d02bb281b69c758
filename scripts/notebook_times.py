"""Run every notebook from top to bottom and print how long each one took, for the README's table.

    OMP_NUM_THREADS=1 python scripts/notebook_times.py

The notebooks on disk are not changed. Seconds are wall-clock time; CPU seconds include all processes of a run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def run(path: Path) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one run, with the start of the kernel.

    Raises:
        CalledProcessError: if a cell fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        before, start = os.times(), time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--output-dir", folder, str(path)],
            check=True,
            capture_output=True,
        )
        after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - start, cpu


if __name__ == "__main__":
    print("| notebook | seconds | CPU seconds |\n|---|---|---|")
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        wall, cpu = run(path)
        print(f"| {path.stem} | {wall:.0f} | {cpu:.0f} |", flush=True)
