"""What stands in the way of the Triton kernels is said in one line, also where Triton cannot be installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minicogview.kernels import available
from minicogview.kernels.available import why_no_triton

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")

HIDES_TRITON = Path(__file__).parent / "no_triton"
WITHOUT_TRITON = """
import importlib.util

import torch
from torch import nn

from minicogview.errors import MiniCogViewError
from minicogview.kernels.available import why_no_triton
from minicogview.local_attention import choose_impl, local_attention
from minicogview.scale.quantization import dequantize, fused_product, quantize, quantize_layers

assert importlib.util.find_spec("triton") is None
q, k, v = torch.randn(3, 1, 16, 2, 16)
assert choose_impl("auto", q) == "blocked"
assert torch.allclose(*(local_attention(q, k, v, (4, 4), impl=impl) for impl in ("auto", "reference")), atol=1e-5)
try:
    local_attention(q, k, v, (4, 4), impl="triton")
except MiniCogViewError as error:
    print(error)
x, model = torch.randn(3, 128), nn.Sequential(nn.Linear(128, 16))
expected = nn.functional.linear(x, dequantize(quantize(model[0].weight, 4)), model[0].bias)
quantize_layers(model, 4)
assert not fused_product(x) and torch.allclose(model(x), expected, atol=1e-5)
print(why_no_triton(x, "x"))
"""


def test_the_package_works_without_triton() -> None:
    folders = os.pathsep.join([str(HIDES_TRITON), os.environ.get("PYTHONPATH", "")])
    command, env = [sys.executable, "-c", WITHOUT_TRITON], {**os.environ, "PYTHONPATH": folders}
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    reason = "Triton is not installed: pip install triton (Linux only)\n"
    assert ended.stdout == f"local_attention: impl='triton' cannot run: {reason}{reason}"


def test_asking_does_not_import_triton() -> None:
    imports = "import sys, minicogview.scale.quantization, minicogview.local_attention"
    subprocess.run([sys.executable, "-c", f"{imports}; assert 'triton' not in sys.modules"], check=True)


@needs_triton
@pytest.mark.parametrize("interpreted", [False, True])
def test_devices_and_types(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "interpreted", lambda: interpreted)
    x = torch.zeros(2, 64)
    if not interpreted:
        assert why_no_triton(x, "q").startswith("q is on cpu: use a GPU, or set TRITON_INTERPRET=1 before Triton")
        return
    assert why_no_triton(x, "q") == why_no_triton(x.half(), "q") == ""
    assert why_no_triton(x.double(), "q") == "q is torch.float64: use one of torch.float32, torch.float16"
    wanted = "q is torch.bfloat16: use one of torch.float32, torch.float16 in Triton's interpreter"
    assert why_no_triton(x.bfloat16(), "q") == wanted
