"""The benchmark of whole stages runs at sizes that take seconds; its numbers are not looked at."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tiny import SHIPPED, TINY

from minicogview.config import PRESETS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ALIKE = ["--threads", "1", "--batches", "1", "--steps", "2"]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with smaller measurements of this machine's limits."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import generate

    monkeypatch.setattr(generate, "PRODUCT", (36, 64, 64))
    monkeypatch.setattr(generate, "SUM", 2**20)
    monkeypatch.setattr(generate, "disk_speed", functools.partial(generate.disk_speed, gigabytes=1 / 64))
    return generate


def test_stages_are_measured_and_what_was_not_is_named(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows in this process, on a system of a few thousand numbers."""

    def here(command: list[str], **_: object) -> SimpleNamespace:
        with monkeypatch.context() as inner, contextlib.redirect_stdout(io.StringIO()) as printed:
            inner.setattr(sys, "argv", command[1:])
            generate.main()
        return SimpleNamespace(returncode=0, stdout=printed.getvalue())

    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(generate.subprocess, "run", here)
    results = tmp_path / "results.json"
    on_cpu = ["--weights", "int4", "disk", "--stages", "coglm", "direct", "iterative", "picture"]
    on_gpu = ["--stages", "coglm", "--device", "cuda"]
    for extra in (on_cpu, on_gpu):
        options = [*ALIKE, *extra, "--json", str(results)]
        monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path / "weights"), "--preset", "tiny", *options])
        generate.main()
    cpu, gpu = json.loads(results.read_text())
    rows = [(row["stage"], row["weights"]) for row in cpu["rows"]]
    assert rows == [(s, w) for s in ("coglm", "direct", "iterative") for w in ("int4", "disk")] + [("picture", "6GB")]
    for row in cpu["rows"]:
        assert row["s"] > 0 and 0.1 < row["peak_gb"] < 8
        assert row["stage"] == "picture" or (row["tokens_per_s"] > 0 and row["floor_s"] > 0)
    if "memory_per_s" not in gpu:
        assert [row["not_measured"] for row in gpu["rows"]] == ["no GPU here"] * 4


def test_a_row_has_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "generate.py"), str(SHIPPED), "--preset", "toy"]
    done = subprocess.run([*command, *ALIKE, "--row", "coglm", "int4", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["s"] > 0 and 0.1 < row["peak_gb"] < 4
