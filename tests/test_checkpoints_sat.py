"""Released checkpoint folders: what is read, how ranks are merged, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minicogview.checkpoints.sat import SatFolder, cut_axis, sat_to_ours
from minicogview.errors import MiniCogViewError

GOLDEN = Path(__file__).parent / "golden" / "coglm" / "coglm"


def make_sat(folder: Path, *ranks: object, **beside: object) -> Path:
    """A checkpoint folder; each rank is a ``module`` dictionary, and ``beside`` is stored next to it in the file."""
    (folder / "10").mkdir(parents=True)
    (folder / "latest").write_text("10\n")
    sizes = {"num_layers": 1, "model_parallel_size": len(ranks)}
    (folder / "model_config.json").write_text(json.dumps(sizes))
    for i, module in enumerate(ranks):
        torch.save({"module": module, **beside}, folder / "10" / f"mp_rank_{i:02d}_model_states.pt")
    return folder


def cut(module: dict[str, Tensor], n_ranks: int) -> list[dict[str, Tensor]]:
    """The ``module`` of every rank that the original would write for several GPUs, by the rules of its layers."""
    ranks: list[dict[str, Tensor]] = [{} for _ in range(n_ranks)]
    for name, value in module.items():
        if "query_key_value" in name:  # each rank has the q, k and v of its own heads
            thirds = [third.chunk(n_ranks) for third in value.chunk(3)]
            parts = [torch.cat([third[i] for third in thirds]) for i in range(n_ranks)]
        elif "dense_h_to_4h" in name or "word_embeddings" in name:
            parts = list(value.chunk(n_ranks))
        elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) or (
            "attention_plus.dense" in name and name.endswith("weight")
        ):
            parts = list(value.chunk(n_ranks, dim=1))
        else:
            parts = [value] * n_ranks
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.contiguous()
    return ranks


def test_the_golden_folder_is_read() -> None:
    folder = SatFolder(GOLDEN)
    assert folder.n_ranks == 1 and folder.sizes["num_layers"] == 3
    name = "transformer.layers.2.attention.query_key_value.weight"
    assert folder.shapes[name] == (168, 56) and folder.tensor(name).shape == (168, 56)
    before = folder.tensor(name).clone()
    folder.let_go(folder.shapes)  # the file is read again when a tensor is used
    assert torch.equal(folder.tensor(name), before)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_are_merged(n_ranks: int, tmp_path: Path) -> None:
    whole = SatFolder(GOLDEN)
    module = {name: whole.tensor(name) for name in whole.shapes}
    merged = SatFolder(make_sat(tmp_path / "sat", *cut(module, n_ranks)))
    assert merged.shapes == whole.shapes
    assert all(torch.equal(merged.tensor(name), value) for name, value in module.items())


def test_the_second_attention_is_cut_like_the_first() -> None:
    assert cut_axis("mixins.attention_plus.query_key_value.3.weight") == 0
    assert cut_axis("mixins.attention_plus.dense.3.weight") == 1
    assert cut_axis("mixins.attention_plus.dense.3.bias") is None
    assert cut_axis("mixins.extra_position_embedding.position_embeddings.weight") is None


def test_ranks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    bias = "transformer.final_layernorm.bias"
    folder = make_sat(tmp_path / "a", {bias: torch.zeros(2)}, {bias: torch.ones(2)})
    with pytest.raises(MiniCogViewError, match=f"different values of {bias}"):
        SatFolder(folder).tensor(bias)
    (folder / "10" / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(MiniCogViewError, match=r"lacks mp_rank_01_model_states.pt: copy all ranks"):
        SatFolder(folder)
    other = make_sat(tmp_path / "b", {bias: torch.zeros(2)}, {"transformer.x": torch.zeros(2)})
    with pytest.raises(MiniCogViewError, match=f"different parameters: {bias}, transformer.x"):
        SatFolder(other)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MiniCogViewError, match=r"model_config.json is missing: is .*nowhere a checkpoint folder"):
        SatFolder(tmp_path / "nowhere")
    folder = make_sat(tmp_path / "sat", {"transformer.x": torch.zeros(1000)})
    file = folder / "10" / "mp_rank_00_model_states.pt"
    whole = file.read_bytes()
    for wrong, message in ((whole[:900], "damaged or not a torch file"), (b"", "is damaged"), (b"hello", "is damaged")):
        file.write_bytes(wrong)
        with pytest.raises(MiniCogViewError, match=message) as caught:
            SatFolder(folder)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    torch.save([1, 2], file)
    with pytest.raises(MiniCogViewError, match="no dictionary of tensors named module"):
        SatFolder(folder)
    (folder / "latest").unlink()
    with pytest.raises(MiniCogViewError, match="latest is missing"):
        SatFolder(folder)
    (folder / "model_config.json").write_text("{")
    with pytest.raises(MiniCogViewError, match=r"model_config.json is damaged"):
        SatFolder(folder)


def test_what_training_left_beside_the_weights_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # DeepSpeed is installed when the file is written, but not when it is read
        name = "deepspeed.runtime.fp16.loss_scaler"
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            patch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        kind = type("DynamicLossScaler", (), {"__module__": name})
        sys.modules[name].DynamicLossScaler = kind  # type: ignore[attr-defined]
        scaler = kind()
        scaler.cur_scale = 65536.0
        beside = {
            "args": argparse.Namespace(lr=1e-4, fp16=True, name="cogview"),
            "np_rng_state": np.random.get_state(),
            "random_rng_state": random.getstate(),
            "torch_rng_state": torch.get_rng_state(),
            "lr": np.float64(0.1),
            "optimizer": {"loss_scaler": scaler, "dynamic_loss_scale": True},
            "global_steps": 10,
        }
        folder = make_sat(tmp_path / "sat", {"transformer.x": torch.ones(2)}, **beside)
    assert SatFolder(folder).tensor("transformer.x").sum() == 2


class Attack:
    """A pickle that would make a folder when loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


class Stranger:
    """A type that is not in the list of harmless ones."""


@pytest.mark.parametrize("where", ["module", "beside"])
def test_a_file_cannot_run_code(where: str, tmp_path: Path) -> None:
    trap = tmp_path / "made_by_the_file"
    attack = Attack(trap)
    if where == "module":
        folder = make_sat(tmp_path / "sat", attack)
    else:
        folder = make_sat(tmp_path / "sat", {"transformer.x": torch.ones(2)}, extra=attack)
    with pytest.raises(MiniCogViewError, match=r"holds (posix|nt)\.mkdir, which .* might run code: refused"):
        SatFolder(folder)
    assert not trap.exists()
    pickle.loads(pickle.dumps(attack))  # the trap itself works
    assert trap.exists()
    other = make_sat(tmp_path / "other", {"transformer.x": torch.ones(2)}, extra=Stranger())
    with pytest.raises(MiniCogViewError, match=r"holds test_checkpoints_sat\.Stranger, which is not a tensor"):
        SatFolder(other)


def test_unknown_names_are_reported() -> None:
    assert sat_to_ours("transformer.layers.7.mlp.dense_h_to_4h.bias") == "layers.7.mlp.up.bias"
    with pytest.raises(MiniCogViewError, match=r"transformer\.layers\.0\.router\.weight"):
        sat_to_ours("transformer.layers.0.router.weight")
