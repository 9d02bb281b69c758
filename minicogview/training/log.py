"""The log of a training run: one JSON line per window of steps, and TensorBoard where it is installed.

After a resume the log reads as if the run had never stopped: lines that are newer than the checkpoint are dropped,
because their steps are repeated.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm


class Log:
    """Means over the steps since the last line, to ``log.jsonl`` and, where installed, to TensorBoard."""

    def __init__(self, folder: Path, start: int) -> None:
        self.path = folder / "log.jsonl"
        lines = _lines_until(self.path, start) if start else []
        self.path.write_text("".join(lines), encoding="utf-8")
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        except ImportError:
            notice = "tensorboard is not installed: scalars go to log.jsonl only (pip install tensorboard)"
            tqdm.write(notice, file=sys.stderr)
        self.restart()

    def restart(self) -> None:
        """Begin a new window of means and rates."""
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.since = time.monotonic()

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        """Add one step's scalars to the window; a key may be absent from some steps."""
        for key, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        """Means of the window; the counts "tokens" and "samples" become rates per second."""
        sums = {key: float(value) for key, value in self.sums.items()}  # this waits for a GPU ...
        seconds = max(time.monotonic() - self.since, 1e-9)  # ... so the clock is read after it
        rates = {f"{key}_per_s": sums.pop(key) / seconds for key in ("tokens", "samples") if key in sums}
        return {key: value / self.counts[key] for key, value in sums.items()} | rates

    def write_means(self, step: int) -> dict[str, float]:
        """Write a line with the means of the window after ``step`` updates, and begin a new window."""
        means = self.means()
        self.write(step, means, "train")
        self.restart()
        return means

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """One line of scalars, named ``prefix/key``, after ``step`` updates."""
        named = {f"{prefix}/{key}": float(value) for key, value in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | named) + "\n")
        if self.board is not None:
            for key, value in named.items():
                self.board.add_scalar(key, value, step)

    def close(self) -> None:
        """Write what TensorBoard has buffered."""
        if self.board is not None:
            self.board.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of an earlier log up to ``step``; later lines will be written again, and incomplete ones are dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    return kept
