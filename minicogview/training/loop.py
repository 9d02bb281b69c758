"""One training loop for every model: AdamW or Muon, cosine schedule, averaged weights, and exact resume.

The loop knows steps; an *objective* knows what is learned. ``objective.loss(step)`` draws its own batch from
(seed, step) alone, so nothing about the data has to be stored: a run that was killed goes on from its last
checkpoint and ends with the very same weights, bit for bit on a CPU, as one that was never interrupted.

The averaged weights (EMA) are those to judge and to ship: averaging takes out the noise of single steps
(Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", 1992).

Simplified: one device, one precision, no gradient accumulation. Scale is applied from outside.
Different from common practice: the EMA covers trainable parameters only; buffers (a VQ-VAE's codebook
statistics, which are running means already) and frozen base weights are used as they are.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from minicogview.errors import MiniCogViewError
from minicogview.training.log import Log
from minicogview.training.resume import EMA, Checkpoint, Objective, OptimizerName, Precision, Settings


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

    With ``settings.optimizer`` "muon", Muon has the matrices inside of the model and AdamW the rest. Muon makes each
    update's singular values equal (Jordan et al., "Muon: an optimizer for hidden layers", 2024), and torch scales it
    to the size of AdamW's updates, so that one learning rate serves both.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise MiniCogViewError("the model has no trainable parameter: set requires_grad on what should learn")
    by_muon = [settings.optimizer == "muon" and p.ndim == 2 and id(p) not in embeddings for p in trainable]
    matrices = [p for p, muon in zip(trainable, by_muon) if muon]
    rest = [p for p, muon in zip(trainable, by_muon) if not muon]
    decays = [p.ndim >= 2 and id(p) not in embeddings for p in rest]
    groups = [
        {"params": [p for p, d in zip(rest, decays) if d], "weight_decay": settings.weight_decay},
        {"params": [p for p, d in zip(rest, decays) if not d], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        fused = trainable[0].device.type in ("cpu", "cuda")  # one pass over memory instead of about ten
        optimizers.append(torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused))
    if matrices:
        if not hasattr(torch.optim, "Muon"):
            raise MiniCogViewError(f"torch {torch.__version__} has no Muon: install 2.9 or newer, or use adamw")
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


def _update(
    objective: Objective,
    optimizers: list[torch.optim.Optimizer],
    settings: Settings,
    device: torch.device,
    step: int,
) -> dict[str, Any]:
    """One update of the weights; returns the scalars to log."""
    rate = learning_rate(step, steps=settings.steps, lr=settings.lr, warmup=settings.warmup)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = rate
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        loss, scalars = objective.loss(step)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], settings.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
    return {"loss": loss.detach(), **scalars, "grad_norm": norm, "lr": rate}


def _check_finite(scalars: Mapping[str, Any], step: int) -> None:
    for key in ("loss", "grad_norm"):
        if not math.isfinite(float(scalars[key])):
            raise MiniCogViewError(
                f"{key} became {float(scalars[key])} at step {step}: lower lr, lengthen warmup, or use fp32; "
                "the last checkpoint is still good"
            )


def _validate(
    objective: Objective, validate: Callable[[], Mapping[str, float]], ema: EMA, precision: Precision
) -> dict[str, float]:
    """The objective's own measure, with averaged weights; training goes on as if it had not been taken."""
    device = ema.params[0].device
    cuda = [device] if device.type == "cuda" else []
    objective.model.eval()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.random.fork_rng(cuda), torch.no_grad(), ema.in_model(), autocast:
        values = validate()
    objective.model.train()
    return {key: float(value) for key, value in values.items()}


def pick_device(device: str = "auto") -> torch.device:
    """``"auto"`` is the GPU where there is one, otherwise the CPU; anything else is taken by its name."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without CUDA
        reason = str(error).splitlines()[0]
        raise MiniCogViewError(f"device {device!r} cannot be used ({reason}): choose auto or cpu") from None
    return torch.device(device)


def fit(
    objective: Objective,
    out_dir: str | os.PathLike[str],
    *,
    steps: int,
    lr: float,
    warmup: int = 100,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    grad_clip: float = 1.0,
    ema_decay: float = 0.999,
    precision: Precision = "fp32",
    optimizer: OptimizerName = "adamw",
    compile: bool = False,
    save_every_s: float = 120.0,
    save_every: int | None = None,
    validate_every: int | None = None,
    log_every: int = 20,
    resume: bool = True,
    device: str = "auto",
    max_seconds: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train ``objective.model`` for ``steps`` updates, or until ``max_seconds``, whichever comes first.

    ``out_dir`` receives ``checkpoint.pt``, ``log.jsonl`` and TensorBoard's events. Calling again with the
    same arguments goes on where the checkpoint stands. **On return the model has the averaged weights**, in
    eval mode; the checkpoint keeps both.

    Args:
        objective: what to learn (see ``Objective``).
        out_dir: folder, made if missing.
        steps: updates of the whole run; the schedule reaches zero there.
        lr, warmup: highest learning rate, and the updates it takes to get there.
        weight_decay, betas: of AdamW. Biases, norms and embeddings do not decay.
        optimizer: "adamw", or "muon" for the matrices inside of the model, see ``make_optimizers``.
        grad_clip: largest allowed norm of the gradient.
        ema_decay: of the averaged weights; update ``s`` uses ``min(ema_decay, (1 + s) / (10 + s))``.
        precision: "bf16" runs forward passes under autocast; weights and their updates stay float32.
        compile: compile the model's forward pass.
        save_every_s, save_every: seconds and (if given) updates between checkpoints.
        validate_every: updates between calls of ``objective.validate``; also called after the last update.
        log_every: updates between lines of the log.
        resume: go on from ``out_dir``'s checkpoint if there is one; otherwise it is overwritten.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        max_seconds: stop (and save) after this time.
        progress: show a progress bar.

    Returns:
        Plain values: ``step`` (updates done), ``steps``, ``finished``, ``start`` (where this call began),
        ``seconds`` (of this call), ``train`` (last logged means), ``validation`` (last, may be empty),
        ``checkpoint`` (path).

    Raises:
        MiniCogViewError: for an unusable folder or device, a damaged or foreign checkpoint, or a loss that is
            not finite.
    """
    began = time.monotonic()
    settings = Settings(
        steps, lr, warmup, weight_decay, (betas[0], betas[1]), grad_clip, ema_decay, precision, optimizer
    )
    folder, place = Path(out_dir), pick_device(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MiniCogViewError(f"cannot make folder {folder}: {error.strerror}; choose another") from None
    model = objective.model.to(place).train()
    optimizers = make_optimizers(model, settings)
    ema = EMA(model, ema_decay)
    checkpoint = Checkpoint(folder / "checkpoint.pt", objective, optimizers, ema, settings)
    start = checkpoint.load() if resume and checkpoint.path.exists() else 0
    if compile:
        model.compile()  # in place: names of parameters and the objective's reference stay as they are

    validate = getattr(objective, "validate", None) if validate_every else None
    after_step = getattr(objective, "after_step", None)
    train: dict[str, float] = {}
    validation: dict[str, float] = {}
    done, saved = start, time.monotonic()
    with (
        contextlib.closing(Log(folder, start)) as log,
        tqdm(total=steps, initial=start, unit="step", disable=not progress, dynamic_ncols=True) as bar,
    ):
        for step in range(start, steps):
            scalars = _update(objective, optimizers, settings, place, step)
            if after_step:
                after_step(step)
            ema.update(step)
            done = step + 1
            log.add(scalars)
            bar.update()

            stop = done == steps or (max_seconds is not None and time.monotonic() - began > max_seconds)
            if stop or done % log_every == 0:
                _check_finite(scalars, step)
                train = log.means()
                log.write(done, train, "train")
                bar.set_postfix(
                    {k: f"{v:.4g}" for k, v in train.items() if k == "loss" or k.endswith("_per_s")}
                )
                log.restart()
            if validate and validate_every and (done == steps or done % validate_every == 0):
                validation = _validate(objective, validate, ema, precision)
                log.write(done, validation, "validation")
            if stop or time.monotonic() - saved > save_every_s or (save_every and done % save_every == 0):
                _check_finite(scalars, step)
                checkpoint.save(done)
                saved = time.monotonic()
            if stop:
                break
    ema.copy_to_model()
    model.eval()
    return {
        "step": done,
        "steps": steps,
        "finished": done == steps,
        "start": start,
        "seconds": time.monotonic() - began,
        "train": train,
        "validation": validation,
        "checkpoint": str(checkpoint.path),
    }
