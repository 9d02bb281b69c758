"""Layers from the disk one after another: the same numbers, and little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_checkpoints_importing import write_release
from tiny import TINY
from torch import nn

from minicogview.checkpoints.importing import import_released
from minicogview.checkpoints.weight_files import load_coglm, load_direct, load_iterative
from minicogview.coglm import CogLM
from minicogview.lopar import IterativeSR
from minicogview.scale.streaming import Stream, forget_pages, mapped_from_files, stream_layers
from minicogview.super_resolution import DirectSR

linux = pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    coglm, iterative = CogLM(TINY.coglm), IterativeSR(TINY.iterative)
    models = {"coglm": coglm, "direct": DirectSR(TINY.direct, coglm.transformer), "iterative": iterative}
    root = tmp_path_factory.mktemp("release")
    write_release(root / "release", models)
    import_released(root / "release", root / "weights", TINY, limit=20_000)
    return root / "weights"


@linux
def test_what_is_mapped_is_known_and_comes_back(folder: Path) -> None:
    model = load_coglm(folder / "coglm.safetensors", dtype=None)
    weights = [p.data for p in model.parameters()]
    assert mapped_from_files(weights)
    before = [weight.clone() for weight in weights]
    for weight in weights:
        forget_pages(weight)
    assert all(torch.equal(a, b) for a, b in zip(before, weights))
    assert not mapped_from_files([torch.zeros(2**20)])
    own = nn.Linear(600, 600)  # made in memory: must keep its numbers
    value = own.weight.clone()
    assert len(list(Stream([[own]]).walk([own]))) == 1 and torch.equal(own.weight, value)


@torch.no_grad()
def test_the_same_numbers_from_the_disk(folder: Path) -> None:
    coglm = load_coglm(folder / "coglm.safetensors", dtype=None)
    direct = load_direct(folder / "direct.safetensors", coglm.transformer, dtype=None)
    iterative = load_iterative(folder / "iterative.safetensors", coglm.transformer, dtype=None)
    coarse, fine = torch.randint(64, (2, 9)), torch.randint(64, (2, 81))
    texts = [[70, 71], [72]]
    for model, codes in ((direct, coarse), (iterative, fine)):
        expected = model(texts, codes)
        stream_layers(model)
        streamed = model(texts, codes)
        again = model(texts, codes)
        for one, other, third in zip(expected, streamed, again, strict=True):
            assert one.dtype == torch.half and torch.equal(one, other) and torch.equal(one, third)
    tokens, positions = torch.randint(64, (1, 5)), torch.arange(5)[None]
    expected = coglm.transformer(tokens, positions)
    coglm.transformer.walk = Stream([[layer] for layer in coglm.transformer.layers]).walk
    assert torch.equal(coglm.transformer(tokens, positions), expected)


PROGRAM = """
import sys, torch
from pathlib import Path
from minicogview.checkpoints.weight_files import load_iterative
from minicogview.scale.streaming import stream_layers

model = load_iterative(sys.argv[1], dtype=None)
if sys.argv[2] == "stream":
    stream_layers(model)

model([[70]], torch.zeros(1, 81, dtype=torch.long))
print(int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024)
"""


@linux
def test_streaming_holds_few_layers(tmp_path: Path) -> None:
    """After a pass, a model of 12 layers of 9 MB is in memory as a whole, and with streaming hardly any of it."""
    from dataclasses import replace

    from minicogview.checkpoints.weight_files import save_model

    config = replace(
        TINY.iterative, coglm=replace(TINY.coglm, transformer=replace(TINY.coglm.transformer, n_layers=12, d_model=608))
    )
    save_model(tmp_path / "iterative.safetensors", IterativeSR(config), config, "iterative")
    held = {}
    for how in ("plain", "stream"):
        program = [sys.executable, "-c", PROGRAM, str(tmp_path / "iterative.safetensors"), how]
        ended = subprocess.run(program, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        held[how] = float(ended.stdout)
    assert held["stream"] < held["plain"] - 60, held  # MB; twelve layers are 106 MB
