"""One stage's weights at a time: the same pictures, and never more weights in memory than the stage at work needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_upsampling import write_stages
from tiny import ENLARGED
from torch import nn

from minicogview.checkpoints.weight_files import load_direct, load_iterative, save_direct
from minicogview.cli.main import main
from minicogview.errors import MiniCogViewError
from minicogview.evaluation.judge import Judge
from minicogview.pipeline import CogView2
from minicogview.super_resolution import DirectSR
from minicogview.transformer import Transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stages(tmp_path_factory.mktemp("stages"), ENLARGED)


def in_memory(*modules: nn.Module | None) -> int:
    """Parameters with numbers, each counted once."""
    parameters = {id(p): p for module in modules if module is not None for p in module.parameters()}
    return sum(p.numel() for p in parameters.values() if p.device.type != "meta")


def test_the_same_pictures_with_one_stage_at_a_time(folder: Path) -> None:
    model = CogView2.from_pretrained(folder, ENLARGED, offload=True)
    whole = CogView2.from_pretrained(folder, ENLARGED)
    upsampler = model.upsampler
    assert upsampler and model.n_stages == 3
    counts: dict[str, int] = {}

    def on_step(stage: str, done: int, total: int) -> None:
        counts[stage] = in_memory(model.coglm, upsampler.direct, upsampler.iterative)

    assert in_memory(model.coglm, upsampler.direct, upsampler.iterative) == 0  # nothing is read before it is needed
    for _ in range(2):  # and what was let go of comes back
        pictures = model.generate("a red apple", n=2, seed=3, keep=1, on_step=on_step)
    coglm, direct = whole.coglm, load_direct(folder / "direct.safetensors", whole.coglm.transformer)
    iterative = load_iterative(folder / "iterative.safetensors")
    assert counts == {"coglm": in_memory(coglm), "direct": in_memory(direct), "iterative": in_memory(iterative)}
    same = whole.generate("a red apple", n=2, seed=3, keep=1)
    assert torch.equal(pictures.fine_tokens, same.fine_tokens) and np.array_equal(pictures[0], same[0])

    mask = np.zeros((9, 9), dtype=np.uint8)
    mask[2:5, 2:5] = 255
    edited, other = (one.edit("a dog", same.coglm[0].resize((9, 9)), mask) for one in (model, whole))
    assert np.array_equal(edited[0], other[0])
    assert model.caption(same[0]) == whole.caption(same[0])
    assert torch.equal(model.score(same[0], ["a dog", "狗"]), whole.score(same[0], ["a dog", "狗"]))


def test_a_foreign_direct_stage_is_refused_when_its_turn_comes(folder: Path, tmp_path: Path) -> None:
    write_stages(tmp_path, ENLARGED)
    torch.manual_seed(7)
    other = DirectSR(ENLARGED.direct, Transformer(ENLARGED.coglm.transformer))
    save_direct(tmp_path / "direct.safetensors", other)
    model = CogView2.from_pretrained(tmp_path, ENLARGED, offload=True)
    assert len(model.generate("a red apple", n=1, stages=1)) == 1
    with pytest.raises(MiniCogViewError, match=r"direct.safetensors was trained on top of another coglm"):
        model.generate("a red apple", n=1)


def test_the_command_has_it_and_judging_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, extra in (("all", []), ("one", ["--offload"])):
        assert main(["generate", "a red apple", "--n", "1", "--out", str(tmp_path / name), *extra]) == 0
    one, other = (Image.open(tmp_path / name / "a-red-apple_0.png").tobytes() for name in ("all", "one"))
    assert one == other
    capsys.readouterr()
    with pytest.raises(MiniCogViewError, match="without offload"):
        Judge(CogView2.from_pretrained("toy", offload=True))
