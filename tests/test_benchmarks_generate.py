"""The benchmark of whole stages runs, at the toy's size; its numbers are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_stages_are_measured_and_what_was_not_is_named(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / "generate.py"), str(tmp_path / "weights"), "--preset", "toy"]
    options = ["--threads", "1", "--batches", "1", "--steps", "2", "--json", str(results)]
    on_cpu = ["--weights", "int4", "disk", "--stages", "coglm", "iterative"]
    on_gpu = ["--stages", "coglm", "--device", "cuda"]
    for extra in (on_cpu, on_gpu):
        done = subprocess.run([*command, *options, *extra], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    cpu, gpu = json.loads(results.read_text())
    assert [(row["stage"], row["weights"]) for row in cpu["rows"]] == [
        ("coglm", "int4"), ("coglm", "disk"), ("iterative", "int4"), ("iterative", "disk"),
    ]  # fmt: skip
    for row in cpu["rows"]:
        assert row["s"] > 0 and row["tokens_per_s"] > 0 and 0.1 < row["peak_gb"] < 4 and row["floor_s"] > 0
    if "memory_per_s" not in gpu:
        assert [row["not_measured"] for row in gpu["rows"]] == ["no GPU here"] * 4
