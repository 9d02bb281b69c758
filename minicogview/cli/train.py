"""``minicogview train``: the commands that made the shipped weights, with their settings as defaults.

Killed training goes on from its checkpoint when the same command is given again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minicogview.cli.shared import Folder, OptionalFolder, OptionalInt, check_folder, show
from minicogview.config import get_preset


def train_text(out: Folder = Path("runs/toy"), json: bool = False) -> int:
    """Train the toy's SentencePiece model on the emoji's names and tags (seconds).

    Args:
        out: folder that text.model is written into.
        json: print the result as JSON.
    """
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
    precision: Literal["bf16", "fp32"] = "bf16",
    start_from: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = True,
    json: bool = False,
) -> int:
    """Train the toy's picture tokenizer on the emoji; the defaults made the shipped one.

    Args:
        out: folder for vqvae.safetensors, checkpoints and logs.
        steps: updates of the encoder, the codebook and the finest decoder.
        coarse_steps: updates of the two coarser rates afterwards.
        lr: highest learning rate.
        precision: of the forward passes.
        start_from: weight file to go on from.
        seed: of weights and batches.
        device: auto, cpu, cuda, cuda:1, ...
        resume: go on from the checkpoint in the folder, if there is one.
        json: print the result as JSON.
    """
    check_folder(out)
    from minicogview.training import vqvae

    result = vqvae.train(
        out, steps=steps, coarse_steps=coarse_steps, lr=lr, seed=seed, start_from=start_from,
        precision=precision, device=device, resume=resume, progress=not json,
    )  # fmt: skip
    return show(result, json)


@dataclass(frozen=True)
class StageRun:
    """How to train a super-resolution stage; what learns from what, and where it goes."""

    steps: int
    """updates"""
    lr: float
    """highest learning rate"""
    preset: str = "toy"
    """sizes of the model"""
    weights: OptionalFolder = None
    """folder with the stages before this one, vqvae.safetensors and text.model; the shipped ones if not given"""
    out: Folder = Path("runs/toy")
    """folder for the weights, checkpoints and logs"""
    batch_size: int = 8
    """pictures in an update"""
    warmup: int = 100
    """updates until the learning rate is reached"""
    optimizer: Literal["adamw", "muon"] = "muon"
    """of the matrices inside of the model; embeddings, norms and biases have adamw"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """of the forward passes"""
    judge_every: OptionalInt = None
    """updates between measuring PSNR; never if not given"""
    seed: int = 0
    """of weights and batches"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    resume: bool = True
    """go on from the checkpoint in the folder, if there is one"""
    json: bool = False
    """print the result as JSON"""

    def start(self, train: Callable[..., dict[str, Any]], name: str) -> int:
        """Train, and say where the weights are."""
        sizes = get_preset(self.preset)
        check_folder(self.out)
        from minicogview.checkpoints.loading import find_folder
        from minicogview.training.super_resolution import SuperResolutionRecipe

        result = train(
            sizes, find_folder(self.weights or self.preset), self.out,
            recipe=SuperResolutionRecipe(batch_size=self.batch_size, seed=self.seed), judge_every=self.judge_every,
            steps=self.steps, lr=self.lr, warmup=self.warmup, optimizer=self.optimizer, precision=self.precision,
            device=self.device, resume=self.resume, progress=not self.json,
        )  # fmt: skip
        return show({"weights": str(self.out / f"{name}.safetensors"), **result}, self.json)


Options = Annotated[StageRun, tyro.conf.arg(name="")]  # options without a prefix
DIRECT, ITERATIVE = StageRun(steps=4200, lr=4e-3), StageRun(steps=4500, lr=3e-3)


def train_direct(run: Options = DIRECT) -> int:
    """Train direct super-resolution on top of a finished CogLM."""
    from minicogview.training.recipes import train_direct as train

    return run.start(train, "direct")


def train_iterative(run: Options = ITERATIVE) -> int:
    """Train iterative super-resolution, which starts from CogLM and the direct stage, and learns from its results."""
    from minicogview.training.recipes import train_iterative as train

    return run.start(train, "iterative")


def train_coglm(
    preset: str = "toy",
    weights: OptionalFolder = None,
    out: Folder = Path("runs/toy"),
    steps: int = 13000,
    lr: float = 1.2e-3,
    batch_size: int = 64,
    warmup: int = 200,
    weight_decay: float = 0.05,
    ema_decay: float = 0.999,
    precision: Literal["bf16", "fp32"] = "bf16",
    judge_every: OptionalInt = None,
    seed: int = 0,
    device: str = "auto",
    compile: bool = False,
    resume: bool = True,
    json: bool = False,
) -> int:
    """Train the transformer on the emoji, on all of its tasks; the defaults made the shipped one.

    Args:
        preset: sizes of the model.
        weights: folder with vqvae.safetensors and text.model; those that ship with the preset if not given.
        out: folder for coglm.safetensors, checkpoints and logs.
        steps: updates.
        lr: highest learning rate.
        batch_size: samples in an update.
        warmup: updates until the learning rate is reached.
        weight_decay: of AdamW.
        ema_decay: of the averaged weights, which are those that are kept.
        precision: of the forward passes.
        judge_every: updates between drawing 100 names of each split in each language; never if not given.
        seed: of weights and batches.
        device: auto, cpu, cuda, cuda:1, ...
        compile: compile the model first.
        resume: go on from the checkpoint in the folder, if there is one.
        json: print the result as JSON.
    """
    sizes = get_preset(preset)
    check_folder(out)
    from minicogview.checkpoints.loading import find_folder
    from minicogview.training.coglm import CogLMRecipe
    from minicogview.training.recipes import train_coglm as run

    folder = find_folder(weights or preset)
    result = run(
        sizes, folder, out, recipe=CogLMRecipe(batch_size=batch_size, seed=seed), judge_every=judge_every,
        steps=steps, lr=lr, warmup=warmup, weight_decay=weight_decay, ema_decay=ema_decay,
        precision=precision, device=device, compile=compile, resume=resume, progress=not json,
    )  # fmt: skip
    for name in ("vqvae.safetensors", "text.model"):
        if not (out / name).exists():  # with them, --weights takes the folder as it is
            shutil.copyfile(folder / name, out / name)
    return show({"weights": str(out / "coglm.safetensors"), **result}, json)
