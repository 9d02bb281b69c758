"""Weight files: they come back, damage is named, and nothing in them runs code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minicogview.checkpoint import load_coglm, load_vqvae, load_weights, read_sat, sat_to_ours, save_model
from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, LayoutConfig, SpecialIds, TransformerConfig
from minicogview.errors import MiniCogViewError

SIZES = TransformerConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=40, max_positions=20)
CONFIG = CogLMConfig(SIZES, LayoutConfig(max_text=3, grid=4), SpecialIds(23, 37, 38, 39), n_codes=20)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "coglm.safetensors"
    save_model(path, CogLM(CONFIG), CONFIG, "coglm", dtype=torch.float32)
    return path


def test_a_model_comes_back(tmp_path: Path) -> None:
    model = CogLM(CONFIG)
    save_model(tmp_path / "deep" / "m.safetensors", model, CONFIG, "coglm", dtype=torch.float32)
    back = load_coglm(tmp_path / "deep" / "m.safetensors")
    assert back.config == CONFIG
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m.safetensors"]


def test_half_precision_is_the_default(tmp_path: Path) -> None:
    model = CogLM(CONFIG)
    save_model(tmp_path / "m.safetensors", model, CONFIG, "coglm")
    back = load_coglm(tmp_path / "m.safetensors").state_dict()
    assert all(torch.equal(v.half().float(), back[k]) for k, v in model.state_dict().items())


def test_missing_damaged_and_foreign_files_are_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(MiniCogViewError, match=r"other\.safetensors is missing"):
        load_coglm(tmp_path / "other.safetensors")
    with pytest.raises(MiniCogViewError, match="holds 'coglm', expected 'vqvae'"):
        load_vqvae(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MiniCogViewError, match="is damaged"):
        load_coglm(file)
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(MiniCogViewError, match="holds None"):
        load_weights(tmp_path / "plain.safetensors", "coglm")


def test_wrong_tensors_are_listed_by_name(file: Path) -> None:
    from minicogview.checkpoint import load_into

    config, state = load_weights(file, "coglm")
    state["extra"] = state.pop("transformer.final_norm.bias")
    state["transformer.final_norm.weight"] = torch.zeros(3)
    with pytest.raises(MiniCogViewError) as caught:
        load_into(CogLM(config), state, file)
    for part in ("transformer.final_norm.bias", "extra", "transformer.final_norm.weight (3,)"):
        assert part in str(caught.value)


def make_sat(folder: Path, module: object) -> Path:
    (folder / "10").mkdir(parents=True)
    (folder / "latest").write_text("10")
    (folder / "model_config.json").write_text(json.dumps({"num_layers": 1}))
    torch.save({"module": module}, folder / "10" / "mp_rank_00_model_states.pt")
    return folder


def test_sat_folders_are_read_and_several_ranks_refused(tmp_path: Path) -> None:
    folder = make_sat(tmp_path / "sat", {"transformer.final_layernorm.bias": torch.ones(2)})
    sizes, module = read_sat(folder)
    assert sizes == {"num_layers": 1} and module["transformer.final_layernorm.bias"].sum() == 2
    (folder / "10" / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(MiniCogViewError, match="several model-parallel ranks"):
        read_sat(folder)
    with pytest.raises(MiniCogViewError, match="cannot read"):
        read_sat(tmp_path / "nowhere")


class Attack:
    """A pickle that would make a folder when loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_sat_file_cannot_run_code(tmp_path: Path) -> None:
    trap = tmp_path / "made_by_the_file"
    folder = make_sat(tmp_path / "sat", Attack(trap))
    with pytest.raises(MiniCogViewError, match="cannot read"):
        read_sat(folder)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Attack(trap)))  # the trap itself works
    assert trap.exists()


def test_unknown_sat_names_are_reported() -> None:
    assert sat_to_ours("transformer.layers.7.mlp.dense_h_to_4h.bias") == "layers.7.mlp.up.bias"
    with pytest.raises(MiniCogViewError, match=r"transformer\.layers\.0\.router\.weight"):
        sat_to_ours("transformer.layers.0.router.weight")
