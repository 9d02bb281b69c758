"""What stands in the way of the Triton kernels is said in one line, also where Triton cannot be installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from minicogview.kernels import available
from minicogview.kernels.available import why_no_triton

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # from here on, importing it is an error
import torch
from minicogview import local_attention
from minicogview.kernels.available import why_no_triton
from minicogview.scale import quantization
x = torch.zeros(1, 4, 1, 16)
print(local_attention.choose_impl("auto", x), quantization.fused_product(x[0, :, 0]), why_no_triton(x, "x"))
"""


def test_the_package_works_without_triton() -> None:
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=os.environ, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "blocked False Triton is not installed: pip install triton (Linux only)\n"


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
