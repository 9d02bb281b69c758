"""The errors of 8-bit and 4-bit weights in models whose logits the original computed are small and known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quantization_error.py"
SPEC = importlib.util.spec_from_file_location("quantization_error", SCRIPT)
assert SPEC and SPEC.loader
SPEC.loader.exec_module(quantization_error := importlib.util.module_from_spec(SPEC))


@pytest.mark.parametrize("name", ["coglm", "direct", "iterative", "toy"])
def test_errors_of_the_golden_models(name: str) -> None:
    seen: dict[str, float] = {}
    eight = quantization_error.errors(name, 8, seen.__setitem__)
    four = quantization_error.errors(name, 4)
    assert eight["unquantized"] < 1e-5  # the reference is right
    assert 0.003 < eight["matrices"] < 0.006 and 0.06 < four["matrices"] < 0.1
    assert eight["worst_matrix"] == max(seen.values()) and len(seen) >= 8
    assert eight["logits"] < 0.03 and eight["same"] > 0.95
    assert eight["logits"] < four["logits"] < 0.35 and four["same"] > 0.6
