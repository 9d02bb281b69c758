"""What a training run must remember: its settings, its averaged weights, and all of it in one atomic file.

A run that was killed at any moment resumes from its last checkpoint and ends with the very same weights,
bit for bit on a CPU, as one that was never interrupted. Batches follow from the step number, so the file
needs no position in the data: model, averaged weights, optimizers, step, torch's random state, and the
objective's own state. It holds tensors and plain containers only, and is read without unpickling anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from minicogview.errors import MiniCogViewError
from minicogview.numbers import checked, number

Precision = Literal["auto", "fp32", "bf16"]
OptimizerName = Literal["adamw", "muon"]
START_OVER = "start over with resume=False (--no-resume), or choose another folder"
GO_ON = "give the same again, go on with the new ones by force=True (--force)"


class Objective(Protocol):
    """What ``fit`` trains. Besides the two members below, an objective may have any of these:

    * ``after_step(step)``: called after each update of the weights (dead-code revival, for example);
    * ``validate() -> dict[str, float]``: called without gradients, in eval mode, with the averaged weights;
    * ``decides() -> dict``: plain values besides the settings that decide the result (batch size, data seed, a
      ``checksum`` of the data); a checkpoint is resumed only under the same ones;
    * ``state_dict()`` and ``load_state_dict(state)``: further state, in tensors and plain containers;
    * ``calls_parts = True``: says that ``loss`` calls parts of the model instead of the model itself, so that
      there is no forward pass to compile.
    """

    @property
    def model(self) -> nn.Module:
        """The model; ``fit`` moves it to its device, and batches belong where its parameters are."""

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Scalar loss of batch number ``step``, which must depend on nothing but the seed and ``step``.

        The mapping holds further scalars for the log (0-d tensors are read only when logged, so that a GPU
        need not wait). Two keys are counts of this batch and become rates: "tokens" and "samples".
        """


@dataclass(frozen=True)
class Settings:
    """The settings that decide the resulting weights; a checkpoint is resumed only under the same ones.

    Attributes:
        steps: updates of the whole run; the learning rate reaches zero there.
        lr, warmup: highest learning rate, and the number of updates it takes to get there.
        weight_decay, betas: of AdamW. Biases, norms and embeddings do not decay.
        grad_clip: largest allowed norm of the gradient.
        ema_decay: of the averaged weights; update ``s`` uses ``min(ema_decay, (1 + s) / (10 + s))``.
        precision: "bf16" runs forward passes under autocast; weights and their updates stay float32. "auto" is
            bf16 where the device is faster with it, otherwise fp32; a resumed run keeps the one it began with.
        optimizer: "adamw", or "muon" for the matrices inside the model, see ``optimizers.py``.
    """

    steps: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    precision: Precision = "auto"
    optimizer: OptimizerName = "adamw"

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "warmup", "weight_decay", "grad_clip", "ema_decay"):
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        if len(self.betas) != 2:
            raise MiniCogViewError(f"betas is {self.betas}: give two numbers, such as (0.9, 0.95)")
        object.__setattr__(self, "betas", tuple(number(beta, "betas", 0, 0.99999) for beta in self.betas))
        for name, known in (("precision", Precision), ("optimizer", OptimizerName)):
            chosen = getattr(self, name)
            if chosen not in get_args(known):
                raise MiniCogViewError(f"unknown {name} {chosen!r}: choose one of {', '.join(get_args(known))}")


class EMA:
    """Exponential moving average of a model's trainable parameters.

    ``torch.optim.swa_utils.AveragedModel`` would copy frozen weights too, and it cannot put its weights into
    the objective's own model for the time of a validation.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.decay, self.names, self.params = decay, list(named), [p.detach() for p in named.values()]
        self.shadow = [p.clone() for p in self.params]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current weights; early steps use a smaller decay, so that the start is soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, self.params, 1.0 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrite the model's weights with the averaged ones."""
        torch._foreach_copy_(self.params, self.shadow)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Within this context the model has the averaged weights; afterwards it has its own again."""
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
        """Load averaged weights; raises KeyError or RuntimeError where names or shapes differ."""
        for name, tensor in zip(self.names, self.shadow):
            tensor.copy_(state[name])


class Checkpoint:
    """Everything that a run needs to be resumed, in one file that is either the old or the new one, never half of it.

    ``settings.precision`` must no longer be "auto" when the first file is written; ``load`` replaces an "auto".
    """

    def __init__(
        self,
        path: Path,
        objective: Objective,
        optimizers: Sequence[torch.optim.Optimizer],
        ema: EMA,
        settings: Settings,
        force: bool = False,
    ):
        self.path, self.objective, self.optimizers = path, objective, optimizers
        self.ema, self.settings, self.force = ema, settings, force
        self.step: int | None = None  # of the file, once this run has written or read it
        self.decides: dict[str, Any] = getattr(objective, "decides", dict)()

    def save(self, step: int) -> None:
        """Write the state after ``step`` updates: a temporary file first, then one atomic rename."""
        extra = getattr(self.objective, "state_dict", None)
        device = self.ema.params[0].device
        state = {
            "step": step,
            "settings": dataclasses.asdict(self.settings),
            "decides": self.decides,
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
            self.step = step
        except OSError as error:
            raise MiniCogViewError(f"cannot write checkpoint {self.path}: {error}; free some space") from None

    def load(self) -> int:
        """Restore everything; returns the number of updates done.

        Raises:
            MiniCogViewError: if the file is damaged, belongs to another model or, without ``force``, to other settings.
                Only the number of steps may have grown since the run was finished.
        """
        state = self._read()
        try:
            differ = self._differences(state)
            if differ and not self.force:
                raise MiniCogViewError(
                    f"checkpoint {self.path} does not fit ({'; '.join(differ)}): {GO_ON}, or {START_OVER}"
                )
            self.objective.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                optimizer.load_state_dict(saved)
                for group, settings in zip(optimizer.param_groups, own, strict=True):
                    group.update(settings)  # they differ from the stored ones only under ``force``
            if load := getattr(self.objective, "load_state_dict", None):
                load(state["objective"])
            torch.set_rng_state(state["rng"])
            device = self.ema.params[0].device
            if device.type == "cuda" and state["rng_cuda"] is not None:
                torch.cuda.set_rng_state(state["rng_cuda"], device)
            self.step = int(state["step"])
            return self.step
        except MiniCogViewError:
            raise
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise MiniCogViewError(
                f"checkpoint {self.path} does not fit ({_one_line(error)}): {START_OVER}"
            ) from None

    def _read(self) -> dict[str, Any]:
        """The file's content, on the CPU; raises MiniCogViewError if the file is damaged."""
        try:
            with zipfile.ZipFile(self.path) as archive:  # torch itself does not verify the checksums
                if (bad := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {bad}")
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise MiniCogViewError(
                f"checkpoint {self.path} is damaged ({_one_line(error)}): {START_OVER}"
            ) from None

    def _differences(self, state: Mapping[str, Any]) -> list[str]:
        """What decides the result and is not as the run began; "auto" becomes the stored precision."""
        stored = state["settings"]
        if self.settings.precision == "auto":  # another machine may be faster with another precision
            self.settings = dataclasses.replace(self.settings, precision=stored["precision"])
        now = dataclasses.asdict(self.settings)
        differ = [f"{key} was {stored.get(key)}, is {now[key]}" for key in now if stored.get(key) != now[key]]
        if state["step"] == stored.get("steps") and now["steps"] > stored["steps"]:  # a finished run is extended
            differ = [line for line in differ if not line.startswith("steps ")]
        if "decides" in state:  # not in files of version 0.1.0
            before, now = state["decides"], self.decides
            keys = [key for key in before | now if before.get(key) != now.get(key)]
            differ += [f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys]
        model = self.objective.model
        for name, parameter in model.named_parameters():
            other = state["model"].get(name)
            fixed = not parameter.requires_grad and other is not None and other.shape == parameter.shape
            if fixed and not torch.equal(parameter.detach().cpu(), other.to(parameter.dtype)):
                return [*differ, f"the weights that are not trained, such as {name}, are others"]
        return differ


def checksum(*tensors: Tensor | None) -> str:
    """A short hash of tensors, to tell data from other data."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(str((tensor.shape, tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _one_line(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = f"it lacks {text}" if isinstance(error, KeyError) else text
    return text if len(text) <= limit else text[:limit] + " ..."
