"""``minicogview train``: the commands that made the shipped weights, with their settings as defaults.

Give the same command again to resume interrupted training from its last checkpoint.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minicogview.cli.shared import Folder, OptionalFolder, OptionalInt, Report, at_home, check_folder, show
from minicogview.config import get_preset
from minicogview.numbers import MANY, check_all, integer

Precision = Literal["auto", "bf16", "fp32"]


def train_text(out: Folder = Path("runs/toy"), json: bool = False) -> int:
    """Train the toy's SentencePiece model on the names and tags of the emoji (seconds).

    Args:
        out: folder that text.model is written into.
        json: print the result as JSON.
    """
    out = at_home(out)
    check_folder(out)
    from minicogview.training.text import train_toy

    out.mkdir(parents=True, exist_ok=True)
    train_toy(out / "text.model")
    return show({"weights": str(out / "text.model")}, json)


def train_vqvae(
    out: Folder = Path("runs/toy"),
    steps: int = 4000,
    coarse_steps: int = 1200,
    lr: float = 1.5e-3,
    precision: Precision = "auto",
    start_from: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = True,
    force: bool = False,
    json: bool = False,
) -> int:
    """Train the toy's picture tokenizer on the emoji; the defaults made the shipped one.

    Args:
        out: folder for vqvae.safetensors, checkpoints and logs.
        steps: updates of the encoder, the codebook and the finest decoder; 0 leaves these as they are.
        coarse_steps: updates of the two coarser levels afterwards; 0 leaves these as they are.
        lr: highest learning rate.
        precision: of the forward passes; auto is bf16 where the device is faster with it, otherwise fp32.
        start_from: weight file to start from.
        seed: of weights and batches.
        device: auto, cpu, cuda, cuda:1, ...
        resume: continue from the checkpoint in the folder, if there is one; more --steps extend a finished run.
        force: resume although settings or data are others than those that the run began with.
        json: print the result as JSON.
    """
    check_all("--", coarse_steps=coarse_steps, lr=lr, seed=seed)
    integer(steps, "--steps", 0, MANY)  # 0 leaves the finest level as it is
    out, start_from = at_home(out), start_from and at_home(start_from)
    check_folder(out)
    from minicogview.scale.machine import pick_device
    from minicogview.training import RunOptions, vqvae

    pick_device(device)

    settings = replace(vqvae.FINEST, lr=lr, precision=precision)
    finest, coarser = (replace(settings, steps=n) if n else None for n in (steps, coarse_steps))
    options = RunOptions(device=device, resume=resume, force=force, progress=not json)
    return show(vqvae.train(out, finest, coarser, options, seed=seed, start_from=start_from), json)


@dataclass(frozen=True)
class StageOptions:
    """How to train one of the three stages.

    Attributes:
        steps: updates.
        lr: highest learning rate.
        preset: sizes of the model.
        weights: folder with vqvae.safetensors, text.model and the earlier stages; the preset's own if not given.
        out: folder for the weights, checkpoints and logs.
        batch_size: samples in an update.
        warmup: updates until the highest learning rate is reached.
        weight_decay: of the matrices; embeddings, norms and biases do not decay.
        ema_decay: of the averaged weights, which are the ones that are kept.
        optimizer: of the matrices inside the model; adamw always trains embeddings, norms and biases.
        precision: of the forward passes; auto is bf16 where the device is faster with it, otherwise fp32.
        judge_every: updates between evaluations (CogLM draws 100 names of each split in each language; for the other
            stages it is the PSNR); never if not given.
        seed: of weights and batches.
        device: auto, cpu, cuda, cuda:1, ...
        compile: compile the model first, which takes a minute or more.
        resume: continue from the checkpoint in the folder, if there is one; more --steps extend a finished run.
        force: resume although settings or data are others than those that the run began with.
        json: print the result as JSON.
    """

    steps: int
    lr: float
    preset: str = "toy"
    weights: OptionalFolder = None
    out: Folder = Path("runs/toy")
    batch_size: int = 8
    warmup: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    optimizer: Literal["adamw", "muon"] = "muon"
    precision: Precision = "auto"
    judge_every: OptionalInt = None
    seed: int = 0
    device: str = "auto"
    compile: bool = False
    resume: bool = True
    force: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", at_home(self.out))
        object.__setattr__(self, "weights", self.weights and at_home(self.weights))

    def train(self, name: Literal["coglm", "direct", "iterative"]) -> Report:
        """Train a stage; returns where its weights are, and the summary of ``training.fit``."""
        sizes = get_preset(self.preset)
        check_all(
            "--", steps=self.steps, lr=self.lr, batch_size=self.batch_size, warmup=self.warmup, seed=self.seed,
            weight_decay=self.weight_decay, ema_decay=self.ema_decay, judge_every=self.judge_every,
        )  # fmt: skip
        check_folder(self.out)
        from minicogview.scale.machine import pick_device
        from minicogview.training import RunOptions, Settings, recipes

        pick_device(self.device)
        settings = Settings(
            steps=self.steps, lr=self.lr, warmup=self.warmup, weight_decay=self.weight_decay,
            ema_decay=self.ema_decay, precision=self.precision, optimizer=self.optimizer,
        )  # fmt: skip
        options = RunOptions(
            device=self.device, resume=self.resume, force=self.force, compile=self.compile,
            validate_every=self.judge_every, progress=not self.json,
        )  # fmt: skip
        common = (sizes, self.source(), self.out, settings, options)
        if name == "coglm":
            summary = recipes.train_coglm(*common, recipes.CogLMRecipe(batch_size=self.batch_size, seed=self.seed))
        else:
            recipe = recipes.SuperResolutionRecipe(batch_size=self.batch_size, seed=self.seed)
            train = recipes.train_direct if name == "direct" else recipes.train_iterative
            summary = train(*common, recipe)
        return {"weights": str(self.out / f"{name}.safetensors"), **summary}

    def source(self) -> Path:
        """The folder of the weights to build on."""
        from minicogview.checkpoints.models import find_folder

        return find_folder(self.weights or self.preset)


Options = Annotated[StageOptions, tyro.conf.arg(name="")]  # without a name, options have no prefix
COGLM = StageOptions(steps=13000, lr=1.2e-3, batch_size=64, warmup=200, weight_decay=0.05, optimizer="adamw")
DIRECT, ITERATIVE = StageOptions(steps=4200, lr=4e-3), StageOptions(steps=4500, lr=3e-3)


def train_coglm(stage: Options = COGLM) -> int:
    """Train CogLM on the emoji, on all of its tasks; the defaults made the shipped one."""
    report = stage.train("coglm")
    for name in ("vqvae.safetensors", "text.model"):
        if not (stage.out / name).exists():  # with these two, the folder can be given as --weights
            shutil.copyfile(stage.source() / name, stage.out / name)
    return show(report, stage.json)


def train_direct(stage: Options = DIRECT) -> int:
    """Train the direct stage on top of a finished CogLM."""
    return show(stage.train("direct"), stage.json)


def train_iterative(stage: Options = ITERATIVE) -> int:
    """Train the iterative stage, which starts from CogLM and the direct stage, and learns from the latter's codes."""
    return show(stage.train("iterative"), stage.json)
