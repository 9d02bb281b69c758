"""Whether the Triton kernels can run here. Importing this file does not import Triton, which exists for Linux only.

The rest of the package asks here first, and imports a kernel only when nothing stands in the way.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

LARGEST_HEAD = 128  # head size of local attention
GROUP = 64  # of a quantized matrix: this many weights of a row share a scale and an offset
MOST_ROWS = 16  # of the quantized product: as many rows as tensor cores take at once


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, because TRITON_INTERPRET=1 was set when Triton was imported."""
    import triton

    return not isinstance(triton.language.sum, triton.runtime.JITFunction)


def why_no_triton(x: Tensor, name: str) -> str:
    """Why no Triton kernel can take a tensor, which messages call ``name``, and what to do; empty if one can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux only)"
    interpreter = interpreted()
    if not x.is_cuda and not interpreter:
        return (
            f"{name} is on {x.device}: use a GPU, or set TRITON_INTERPRET=1 before Triton is first imported, "
            "to run the kernels slowly in its interpreter"
        )
    known = [torch.float32, torch.float16] if interpreter else [torch.float32, torch.float16, torch.bfloat16]
    if x.dtype not in known:
        where = " in Triton's interpreter" if interpreter and x.dtype == torch.bfloat16 else ""
        return f"{name} is {x.dtype}: use one of {', '.join(map(str, known))}{where}"
    return ""
