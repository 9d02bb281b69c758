"""Weight files: they come back, damage is named, and nothing in them runs code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minicogview.checkpoints.files import load_coglm, load_vqvae, load_weights, save_model
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
    from minicogview.checkpoints.files import load_into

    config, state = load_weights(file, "coglm")
    state["extra"] = state.pop("transformer.final_norm.bias")
    state["transformer.final_norm.weight"] = torch.zeros(3)
    with pytest.raises(MiniCogViewError) as caught:
        load_into(CogLM(config), state, file)
    for part in ("transformer.final_norm.bias", "extra", "transformer.final_norm.weight (3,)"):
        assert part in str(caught.value)
