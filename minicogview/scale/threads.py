"""Whether idle threads of PyTorch sleep; decided when the package is imported, before torch is loaded if possible.

The idea: PyTorch's threads wait for work in a loop by default, which holds up every other program on the same cores.
They sleep instead if the variable OMP_WAIT_POLICY says so when torch is loaded. So it is set here, and a program that
imports minicogview before torch profits from it. This module must not import torch.
"""

from __future__ import annotations

import os
import sys

if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
SPIN = "torch" in sys.modules and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive"
