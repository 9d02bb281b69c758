"""Training: one loop (``loop.fit``), its optimizers, its log, its checkpoint, and one module per objective.

Nothing here needs more than torch, numpy, einops, sentencepiece, safetensors, pillow and tqdm, so that it
runs on a bare GPU machine. TensorBoard is used where it is installed.
"""

from __future__ import annotations

from minicogview.training.loop import RunOptions, fit
from minicogview.training.state import Objective, Precision, Settings

__all__ = ["Objective", "Precision", "RunOptions", "Settings", "fit"]
