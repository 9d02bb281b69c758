"""How the weights move: AdamW, or Muon for the matrices, and a learning rate that warms up and then falls.

AdamW (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019) scales the step of every single weight.
Muon treats a matrix as a whole and makes the singular values of its update equal, so that no direction of the matrix
is left behind (Jordan et al., "Muon: an optimizer for hidden layers", 2024).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minicogview.errors import MiniCogViewError
from minicogview.training.state import Settings


def learning_rate(step: int, *, steps: int, lr: float, warmup: int) -> float:
    """Learning rate of update number ``step`` (from 0): linear warm-up to ``lr``, then a cosine to zero.

    Example:
        >>> [round(learning_rate(s, steps=8, lr=1.0, warmup=2), 2) for s in (0, 1, 2, 5, 8)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW over the trainable parameters; biases, norms (all 1-D) and embeddings do not decay.

    With ``settings.optimizer`` "muon", Muon trains the matrices inside the model and AdamW the rest. Torch scales
    Muon's updates to the size of AdamW's, so that one learning rate serves both.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, decaying, others = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for p in model.parameters():
        if p.requires_grad:
            is_weight = p.ndim >= 2 and id(p) not in embeddings
            by_muon = is_weight and p.ndim == 2 and settings.optimizer == "muon"
            (matrices if by_muon else decaying if is_weight else others).append(p)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decaying, settings.weight_decay), (others, 0.0))
        if parameters
    ]
    if not groups and not matrices:
        raise MiniCogViewError("the model has no trainable parameter: set requires_grad on what should learn")
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        fused = groups[0]["params"][0].device.type in ("cpu", "cuda")  # one pass over memory instead of about ten
        optimizers.append(torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused))
    if matrices:
        optimizers.append(make_muon(matrices, settings))
    return optimizers


class MuonInFloat32(TorchFunctionMode):
    """A context in which ``torch.optim.Muon`` makes singular values equal in float32.

    It converts each gradient to bfloat16 first, whatever the precision of training. Where a processor multiplies
    bfloat16 slowly, that made an update 24 times as long; so the conversion is answered with a float32 copy.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)  # a copy, because Muon divides it in place
        return func(*args, **(kwargs or {}))


def updates_in(precision: str) -> AbstractContextManager[Any]:
    """A context in which optimizers compute in the precision of the run, "bf16" or "fp32"."""
    return nullcontext() if precision == "bf16" else MuonInFloat32()


def make_muon(matrices: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Muon over these matrices, where torch has it."""
    if not hasattr(torch.optim, "Muon"):
        raise MiniCogViewError(f"torch {torch.__version__} has no Muon: install 2.9 or newer, or use adamw")
    return torch.optim.Muon(
        matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
