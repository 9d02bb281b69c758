"""One training loop for every model: AdamW or Muon, a cosine schedule, averaged weights, and exact resume.

The loop counts steps; an *objective* knows what is learned. ``objective.loss(step)`` draws its own batch from
(seed, step) alone, so nothing about the data has to be stored: a run that was killed resumes from its last
checkpoint and ends with the very same weights, bit for bit on a CPU, as one that was never interrupted.

The averaged weights (EMA) are the ones to evaluate and to ship: averaging removes the noise of single steps
(Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", 1992).

Simplified: one device, one precision, no gradient accumulation. Scale is applied from outside.
Different from common practice: the EMA covers trainable parameters only; buffers (a VQ-VAE's codebook
statistics, which are running means already) and frozen base weights are used as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from minicogview.errors import MiniCogViewError
from minicogview.numbers import checked
from minicogview.scale.machine import pick_device, training_precision
from minicogview.training.log import Log
from minicogview.training.optimizers import learning_rate, make_optimizers, updates_in
from minicogview.training.state import EMA, Checkpoint, Objective, Settings


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. None of this but ``force`` decides the weights, so it may differ in a resume.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", ...; see ``scale.machine.pick_device``.
        resume: continue from the folder's checkpoint if there is one; otherwise it is overwritten. A finished run is
            extended if ``settings.steps`` has grown: the learning rate goes on where the longer schedule has it.
        force: resume although settings or data are others than those that the run began with.
        compile: compile the model's forward pass. Compiled kernels may round differently.
        max_seconds: stop (and save) after this time; None: never.
        save_every_s, save_every: seconds and (if given) updates between checkpoints.
        validate_every: updates between calls of ``objective.validate``, which is also called after the last
            update; None: never.
        log_every: updates between lines of the log.
        progress: show a progress bar.
    """

    device: str = "auto"
    resume: bool = True
    force: bool = False
    compile: bool = False
    max_seconds: float | None = None
    save_every_s: float = 120.0
    save_every: int | None = None
    validate_every: int | None = None
    log_every: int = 20
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("max_seconds", "save_every_s", "save_every", "validate_every", "log_every"):
            if getattr(self, name) is not None or name in ("save_every_s", "log_every"):
                object.__setattr__(self, name, checked(name, getattr(self, name)))


DEFAULTS = RunOptions()


# --- the loop


def fit(
    objective: Objective, folder: str | os.PathLike[str], settings: Settings, options: RunOptions = DEFAULTS
) -> dict[str, Any]:
    """Train ``objective.model`` for ``settings.steps`` updates, or until ``options.max_seconds`` have passed.

    ``folder``, which is made if missing, receives ``checkpoint.pt``, ``log.jsonl`` and TensorBoard's events. The
    same call resumes an interrupted run. **On return the model has the averaged weights** and is in eval mode;
    the checkpoint keeps both these and the latest ones.

    Returns:
        Plain values: ``step`` (updates done), ``steps``, ``finished``, ``start`` (where this call began),
        ``seconds`` (of this call), ``train`` (last logged means), ``validation`` (last, may be empty),
        ``checkpoint`` (path).

    Raises:
        MiniCogViewError: for an unusable folder or device, a damaged or foreign checkpoint, an objective that
            cannot be compiled, or a loss that is not finite.
    """
    run = Run(objective, Path(folder), settings, options)
    with contextlib.closing(run):
        for step in range(run.start, settings.steps):
            run.update(step)
            run.after_step(step)
            run.average(step)
            stop = run.is_over()
            run.log(stop)
            run.validate()
            run.save(stop)
            if stop:
                break
    return run.summary()


class Run:
    """One call of ``fit``: what its steps share, and the parts of a step in the order in which the loop calls them."""

    def __init__(self, objective: Objective, folder: Path, settings: Settings, options: RunOptions):
        self.began = self.saved = time.monotonic()
        self.objective, self.options, self.device = objective, options, pick_device(options.device)
        make_folder(folder)
        model = objective.model.to(self.device).train()
        self.optimizers, self.ema = make_optimizers(model, settings), EMA(model, settings.ema_decay)
        path, force = folder / "checkpoint.pt", options.force
        self.checkpoint = Checkpoint(path, objective, self.optimizers, self.ema, settings, force)
        self.start = self.done = self.resume()
        self.settings = self.checkpoint.settings  # with a precision that is no longer "auto"
        if options.compile:
            compile_in_place(objective)
        self.scalars: dict[str, Any] = {}  # of the latest update
        self.train: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.lines = Log(folder, self.start)
        self.bar = tqdm(
            total=settings.steps, initial=self.start, unit="step", disable=not options.progress, dynamic_ncols=True
        )

    def resume(self) -> int:
        """Load the checkpoint if there is one, unless ``resume`` is off; returns the number of updates done."""
        checkpoint = self.checkpoint
        if self.options.resume and checkpoint.path.exists():
            return checkpoint.load()
        precision = training_precision(checkpoint.settings.precision, self.device)
        checkpoint.settings = dataclasses.replace(checkpoint.settings, precision=precision)
        return 0

    def update(self, step: int) -> None:
        """One update of the weights."""
        settings = self.settings
        rate = learning_rate(step, steps=settings.steps, lr=settings.lr, warmup=settings.warmup)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = rate
        with self.autocast():
            loss, scalars = self.objective.loss(step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], settings.grad_clip)
        with updates_in(settings.precision):
            for optimizer in self.optimizers:
                optimizer.step()
        self.scalars = {"loss": loss.detach(), **scalars, "grad_norm": norm, "lr": rate}
        self.done = step + 1

    def after_step(self, step: int) -> None:
        """Whatever else the objective does after an update, such as moving a codebook."""
        if hasattr(self.objective, "after_step"):
            self.objective.after_step(step)

    def average(self, step: int) -> None:
        """Move the averaged weights towards the new ones."""
        self.ema.update(step)

    def is_over(self) -> bool:
        """Whether this call ends now: all updates are done, or its time is up."""
        limit = self.options.max_seconds
        return self.done == self.settings.steps or (limit is not None and time.monotonic() - self.began > limit)

    def log(self, stop: bool) -> None:
        """Collect the scalars of this update; now and then write their means."""
        self.lines.add(self.scalars)
        self.bar.update()
        if stop or self.due(self.options.log_every):
            self.check_finite()
            self.train = self.lines.write_means(self.done)
            shown = {k: f"{v:.4g}" for k, v in self.train.items() if k == "loss" or k.endswith("_per_s")}
            self.bar.set_postfix(shown)

    def validate(self) -> None:
        """Now and then call the objective's ``validate`` with the averaged weights; training does not notice it."""
        every = self.options.validate_every
        if not every or not hasattr(self.objective, "validate"):
            return
        if self.done == self.settings.steps or self.due(every):
            cuda = [self.device] if self.device.type == "cuda" else []
            self.objective.model.eval()
            with torch.random.fork_rng(cuda), torch.no_grad(), self.ema.in_model(), self.autocast(), self.eager():
                self.validation = {key: float(value) for key, value in self.objective.validate().items()}
            self.objective.model.train()
            self.lines.write(self.done, self.validation, "validation")

    def save(self, stop: bool) -> None:
        """Now and then write a checkpoint, and always before stopping."""
        too_old = time.monotonic() - self.saved > self.options.save_every_s
        if stop or too_old or self.due(self.options.save_every):
            self.check_finite()
            self.checkpoint.save(self.done)
            self.saved = time.monotonic()

    def close(self) -> None:
        """Close the log and the progress bar."""
        self.bar.close()
        self.lines.close()

    def summary(self) -> dict[str, Any]:
        """Leave the averaged weights in the model, and say what was done."""
        self.ema.copy_to_model()
        self.objective.model.eval()
        return {
            "step": self.done,
            "steps": self.settings.steps,
            "finished": self.done >= self.settings.steps,
            "start": self.start,
            "seconds": time.monotonic() - self.began,
            "train": self.train,
            "validation": self.validation,
            "checkpoint": str(self.checkpoint.path),
        }

    # Used by several of the parts above.

    def due(self, every: int | None) -> bool:
        """Whether something that happens once in ``every`` updates happens after this one."""
        return every is not None and every > 0 and self.done % every == 0

    def autocast(self) -> torch.autocast:
        """A context in which forward passes have the run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def eager(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which nothing is compiled: validation has other shapes, and each would be compiled anew."""
        return torch.compiler.set_stance("force_eager") if self.options.compile else contextlib.nullcontext()

    def check_finite(self) -> None:
        """Raise MiniCogViewError if the latest update was broken, before it reaches the log or a checkpoint."""
        for key in ("loss", "grad_norm"):
            if not math.isfinite(value := float(self.scalars[key])):
                saved = self.checkpoint.step
                left = "no checkpoint was written" if saved is None else f"the checkpoint of step {saved} is still good"
                raise MiniCogViewError(
                    f"{key} became {value} at step {self.done - 1}: lower lr, lengthen warmup, or use fp32; {left}"
                )


# --- before the first step


def compile_in_place(objective: Objective) -> None:
    """Compile the model, which ``loss`` calls; its parameters keep their names, and the objective its reference.

    Raises:
        MiniCogViewError: if this would compile nothing, because ``loss`` calls parts of the model and not the model.
    """
    model, reason = objective.model, ""
    if getattr(objective, "calls_parts", False) or type(model).forward is nn.Module.forward:
        reason = "its loss calls parts of the model"
    elif type(model).__module__.startswith("torch."):
        reason = f"torch does not compile its own {type(model).__name__}, only a class around it"
    if reason:
        raise MiniCogViewError(f"{type(objective).__name__} cannot be compiled ({reason}): train it without compile")
    model.compile()


def make_folder(folder: Path) -> None:
    """Make a folder unless it is there; raises MiniCogViewError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MiniCogViewError(f"cannot make folder {folder}: {error.strerror}; choose another") from None
