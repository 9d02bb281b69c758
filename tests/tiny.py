"""Small things to test with: a complete system of a few thousand random numbers, and a few emoji instead of all."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minicogview
from minicogview.checkpoints.weight_files import save_model
from minicogview.coglm import CogLM
from minicogview.config import LayoutConfig, SamplingConfig, VQVAEConfig, make_preset
from minicogview.data import emoji
from minicogview.vqvae import VQVAE

SHIPPED = Path(minicogview.__file__).parent / "weights" / "toy"
N_PIECES = 4500  # of the shipped text model

TINY = make_preset(
    "tiny",
    VQVAEConfig(
        channels=4,
        encoder_multipliers=(1, 1, 1),
        encoder_blocks=1,
        codebook_size=64,
        codebook_dim=4,
        latent_channels=4,
        decoder_multipliers=((1, 1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)),
        n_groups=2,
    ),
    LayoutConfig(max_text=48, grid=3, n_patches=1, patch_size=2),
    {"n_layers": 2, "d_model": 16, "n_heads": 2},
    n_text_pieces=N_PIECES,
    level=0,
    sampling=SamplingConfig(temperature=1.0, top_k=8, n_clusters=16),
    direct_sampling=SamplingConfig(temperature=1.0, top_k=8, n_clusters=16),
)
# Like the toy: fine tokens start from the enlarged picture, and the direct stage has layers of its own.
ENLARGED = replace(
    TINY,
    direct=replace(TINY.direct, fine_start="enlarged", own_layers=True),
    iterative=replace(TINY.iterative, fine_start="enlarged"),
)


def write_tiny(folder: Path) -> Path:
    """Write the weights of a random system into ``folder``, the same ones on every call."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vqvae, coglm = VQVAE(TINY.vqvae), CogLM(TINY.coglm)
    with torch.no_grad():
        for table in (coglm.transformer.token_embedding, coglm.transformer.position_embedding):
            table.weight.mul_(10)  # so that the text and the position matter
    save_model(folder / "vqvae.safetensors", vqvae, TINY.vqvae, "vqvae")
    save_model(folder / "coglm.safetensors", coglm, TINY.coglm, "coglm")
    shutil.copyfile(SHIPPED / "text.model", folder / "text.model")
    return folder


def keep_emoji(kept: Sequence[emoji.Emoji], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends there are only these emoji, so that only these are drawn, into a cache in ``folder``."""
    keys = {one.key for one in kept}
    rows = tuple(row for row in emoji._rows() if row[0].key in keys)
    monkeypatch.setattr(emoji, "_rows", lambda: rows)
    monkeypatch.setenv("MINICOGVIEW_CACHE", str(folder))
