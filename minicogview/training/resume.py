"""What a training run must remember: its settings, its averaged weights, and all of it in one atomic file.

A run that was killed at any moment goes on from its last checkpoint and ends with the very same weights,
bit for bit on a CPU, as one that was never interrupted. Batches follow from the step number, so the file
needs no place in the data: model, averaged weights, optimizer, step, torch's random state, and whatever the
objective adds. It holds tensors and plain containers only, and is read without unpickling anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from minicogview.errors import MiniCogViewError

Precision = Literal["fp32", "bf16"]
OptimizerName = Literal["adamw", "muon"]


class Objective(Protocol):
    """What ``fit`` trains. Besides the two members below, an objective may have any of these methods:

    * ``after_step(step)``: called after each update of the weights (dead-code revival, for example);
    * ``validate() -> dict[str, float]``: called without gradients, in eval mode, with the averaged weights;
    * ``state_dict()`` and ``load_state_dict(state)``: further state of tensors and plain containers.
    """

    @property
    def model(self) -> nn.Module:
        """The model; ``fit`` moves it to its device, and batches belong where its parameters are."""

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Scalar loss of batch number ``step``, which must depend on nothing but the seed and ``step``.

        The mapping holds further scalars for the log (0-d tensors are read only when logged, which
        spares a GPU the wait). Two keys are counts of this batch and become rates: "tokens", "samples".
        """


@dataclass(frozen=True)
class Settings:
    """The settings that decide the resulting weights; a checkpoint goes on only under the same ones."""

    steps: int
    lr: float
    warmup: int
    weight_decay: float
    betas: tuple[float, float]
    grad_clip: float
    ema_decay: float
    precision: Precision
    optimizer: OptimizerName = "adamw"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0:
            raise MiniCogViewError(
                f"steps={self.steps}, warmup={self.warmup}: need steps >= 1 and warmup >= 0"
            )
        if self.precision not in ("fp32", "bf16"):
            raise MiniCogViewError(f"unknown precision {self.precision!r}: choose fp32 or bf16")
        if self.optimizer not in ("adamw", "muon"):
            raise MiniCogViewError(f"unknown optimizer {self.optimizer!r}: choose adamw or muon")


class EMA:
    """Exponential moving average of a model's trainable parameters.

    ``torch.optim.swa_utils.AveragedModel`` would copy frozen weights too, and cannot lend its weights to the
    model that the objective holds.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.decay, self.names, self.params = decay, list(named), [p.detach() for p in named.values()]
        self.shadow = [p.clone() for p in self.params]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current weights; early steps forget faster, so that the start does not linger."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, self.params, 1.0 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrite the model's weights with the averaged ones."""
        torch._foreach_copy_(self.params, self.shadow)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Within this context the model has the averaged weights; afterwards its own again."""
        own = [p.clone() for p in self.params]
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, own)

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged weights by parameter name."""
        return dict(zip(self.names, self.shadow))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over averaged weights; raises KeyError or RuntimeError where names or shapes differ."""
        for name, tensor in zip(self.names, self.shadow):
            tensor.copy_(state[name])


class Checkpoint:
    """All that a run needs to go on, in one file that is either the old or the new one, never half of it."""

    def __init__(
        self,
        path: Path,
        objective: Objective,
        optimizers: Sequence[torch.optim.Optimizer],
        ema: EMA,
        settings: Settings,
    ):
        self.path, self.objective, self.optimizers, self.ema, self.settings = (
            path,
            objective,
            optimizers,
            ema,
            settings,
        )

    def save(self, step: int) -> None:
        """Write the state after ``step`` updates: a temporary file first, then one atomic rename."""
        extra = getattr(self.objective, "state_dict", None)
        device = self.ema.params[0].device
        state = {
            "step": step,
            "settings": dataclasses.asdict(self.settings),
            "model": self.objective.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "objective": extra() if extra else {},
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        temporary = self.path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise MiniCogViewError(f"cannot write checkpoint {self.path}: {error}; free some space") from None

    def load(self) -> int:
        """Restore everything; returns the number of updates done.

        Raises:
            MiniCogViewError: if the file is damaged, or of another model or other settings.
        """
        advice = "start over with resume=False, or choose another folder"
        try:
            with zipfile.ZipFile(self.path) as archive:  # torch itself does not verify the checksums
                if (bad := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {bad}")
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (
            OSError,
            RuntimeError,
            EOFError,
            ValueError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:
            raise MiniCogViewError(
                f"checkpoint {self.path} is damaged ({_one_line(error)}): {advice}"
            ) from None
        try:
            self._check_settings(state["settings"])
            self.objective.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            if load := getattr(self.objective, "load_state_dict", None):
                load(state["objective"])
            torch.set_rng_state(state["rng"])
            device = self.ema.params[0].device
            if device.type == "cuda" and state["rng_cuda"] is not None:
                torch.cuda.set_rng_state(state["rng_cuda"], device)
            return int(state["step"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise MiniCogViewError(
                f"checkpoint {self.path} does not fit ({_one_line(error)}): {advice}"
            ) from None

    def _check_settings(self, stored: Mapping[str, Any]) -> None:
        now = dataclasses.asdict(self.settings)
        differ = [f"{key} was {stored.get(key)}, is {now[key]}" for key in now if stored.get(key) != now[key]]
        if differ:
            raise ValueError("; ".join(differ))


def _one_line(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = f"it lacks {text}" if isinstance(error, KeyError) else text
    return text if len(text) <= limit else text[:limit] + " ..."
