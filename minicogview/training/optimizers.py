"""How the weights move: AdamW, or Muon for the matrices, and a learning rate that warms up and then falls.

AdamW (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019) scales the step of every single weight.
Muon treats a matrix as a whole and makes the singular values of its update equal, so that no direction of the matrix
is left behind (Jordan et al., "Muon: an optimizer for hidden layers", 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

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


def make_muon(matrices: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Muon over these matrices, where torch has it."""
    if not hasattr(torch.optim, "Muon"):
        raise MiniCogViewError(f"torch {torch.__version__} has no Muon: install 2.9 or newer, or use adamw")
    return torch.optim.Muon(
        matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
