"""What the parity tests share: the golden files, how numbers are compared with them, and the models stored in them.

The files in ``tests/golden`` hold numbers that the original program computed (their README describes them). Every size
is read from these files, and a missing file or key fails. ``MINICOGVIEW_GOLDEN`` names another folder of the same form.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from minicogview.checkpoints import sat
from minicogview.config import (
    CogLMConfig,
    LayoutConfig,
    SpecialIds,
    SuperResolutionConfig,
    TransformerConfig,
    get_preset,
)

GOLDEN = Path(os.environ.get("MINICOGVIEW_GOLDEN", Path(__file__).parent / "golden"))
ATOL = 1e-4
RELEASED = get_preset("cogview2")

no_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")
in_every_form = pytest.mark.parametrize("impl", ["reference", "blocked", pytest.param("triton", marks=no_triton)])


def golden(path: str) -> Any:
    """Content of a golden file: a dict of tensors or arrays (.safetensors, .npz), or JSON."""
    file = GOLDEN / path
    if not file.is_file():
        pytest.fail(f"golden file {file} is missing: set MINICOGVIEW_GOLDEN to a complete folder")
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".npz":
        with np.load(file) as archive:
            return dict(archive)
    return json.loads(file.read_text(encoding="utf-8"))


def cases_of(path: str) -> list[str]:
    """Names of the cases in a JSON file; a missing file fails inside the tests, not while they are collected."""
    file = GOLDEN / path
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ["missing"]


def close(actual: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    """Equal within the tolerance of float32, shapes included."""
    torch.testing.assert_close(actual.float(), expected.float(), atol=atol, rtol=0)


def same_choices(actual: Tensor, expected: Tensor, margin: Tensor, atol: float = ATOL) -> None:
    """Equal choices, except at ties, where the runner-up is closer than the tolerance."""
    assert actual.shape == expected.shape
    wrong = (actual != expected) & (margin > atol)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} choices differ beyond a tie"


def golden_layout() -> LayoutConfig:
    """Where text and picture sit, read off the positions of one sequence: text, <start_of_image>, picture."""
    positions = golden("coglm/forward.safetensors")["position_ids"][0]
    n_text = golden("coglm/config.json")["txt"]
    grid = math.isqrt(len(positions) - n_text - 1)
    return LayoutConfig(max_text=int(positions[n_text]), grid=grid)


# --- super-resolution


def stage_sizes(n_heads: int, d_model: int, coarse: int, fine: int, kernel: int, kernel2: int) -> SuperResolutionConfig:
    """Sizes of a stage whose attention alone is tested; a kernel of size k is a window of 2k - 1 rows and k columns."""
    transformer = TransformerConfig(n_layers=1, d_model=d_model, n_heads=n_heads, vocab_size=8)
    config = CogLMConfig(transformer, LayoutConfig(grid=coarse), SpecialIds(pad=0, boi=0, boe=0, boc=0), n_codes=8)
    return SuperResolutionConfig(config, 0, fine // coarse, (2 * kernel - 1, kernel), (kernel2, kernel2))


def leaves(g: dict[str, Tensor], level: int, n_heads: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of one level: as stored, (B, S, D), where gradients gather, and with separate heads, (B, S, N, H)."""
    stored = {f"{name}{level}": g[f"{name}{level}"].clone().requires_grad_() for name in "qkv"}
    q, k, v = (rearrange(x, "b s (n h) -> b s n h", n=n_heads) for x in stored.values())
    return stored, (q, k, v)


def stage_config(name: str) -> tuple[SuperResolutionConfig, dict[str, Tensor]]:
    """Sizes and weights of a golden super-resolution checkpoint, opened the way that a released one is."""
    released = sat.SatFolder(GOLDEN / "sr" / f"cogview2-{name}")
    sizes = released.sizes
    golden_sizes = golden("sr/config.json")
    assert (sizes["num_layers"], sizes["hidden_size"]) == (golden_sizes["layers"], golden_sizes["hidden"])
    ids, layout = SpecialIds(pad=0, boi=golden_sizes["boi"], boe=0, boc=0), golden_layout()
    n_codes = min(RELEASED.vqvae.codebook_size, sizes["vocab_size"])
    slots = golden_sizes[f"{name}_layout"]  # text, then (direct: low level and) everything
    factor = math.isqrt((slots[-1] - slots[-2]) // layout.n_image)
    kernel, kernel2 = golden_sizes["kernel_size"], golden_sizes["kernel_size2"]
    coglm, window = sat.sat_config(sizes, ids, layout, n_codes), (2 * kernel - 1, kernel)
    config = SuperResolutionConfig(coglm, slots[0], factor, window, (kernel2, kernel2))
    prefix = {ours: "" if ours.startswith("fine_") else "base." for ours in map(sat.sat_to_ours, released.shapes)}
    names = {name: sat.sat_to_ours(name) for name in released.shapes}
    return config, {prefix[ours] + ours: released.tensor(name) for name, ours in names.items()}


class Likeliest:
    """The golden files' sampler: it takes the likeliest of the first picture codes.

    Its choices must be the golden ones. Where two codes are tied, it goes on with the golden choice.
    """

    def __init__(self, expected: Tensor, margin: Tensor) -> None:
        self.expected, self.margin = expected.long(), margin  # (B, F) both, or fewer rows of margins
        self.n_codes = golden("sr/config.json")["n_img"]

    def __call__(self, logits: Tensor, cells: Tensor) -> Tensor:
        choice, golden_choice = logits[..., : self.n_codes].argmax(-1), self.expected[:, cells]
        rows = len(self.margin)
        same_choices(choice[:rows], golden_choice[:rows], self.margin[:, cells])
        assert torch.equal(choice[rows:], golden_choice[rows:])
        return golden_choice
