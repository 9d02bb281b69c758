"""Weight files: models survive being stored, damage is reported, and shared weights belong to one CogLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minicogview.checkpoints.shards import write_shards
from minicogview.checkpoints.weight_files import (
    fingerprint,
    identity,
    load_coglm,
    load_config,
    load_direct,
    load_into,
    load_part,
    load_vqvae,
    load_weights,
    save_direct,
    save_model,
)
from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, LayoutConfig, SpecialIds, SuperResolutionConfig, TransformerConfig, to_json
from minicogview.errors import MiniCogViewError
from minicogview.super_resolution import DirectSR

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
    config, state = load_weights(file, "coglm")
    state["extra"] = state.pop("transformer.final_norm.bias")
    state["transformer.final_norm.weight"] = torch.zeros(3)
    with pytest.raises(MiniCogViewError) as caught:
        load_into(CogLM(config), state, file)
    for part in ("transformer.final_norm.bias", "extra", "transformer.final_norm.weight (3,)"):
        assert part in str(caught.value)


def write_index(folder: Path, model: CogLM, kind: str = "coglm") -> Path:
    """The model as several files with an index; returns the path that stands for all of them."""
    state = model.state_dict()
    sizes = {name: value.nbytes for name, value in state.items()}
    facts = {"kind": kind, "config": to_json(model.config)}
    write_shards(folder, "coglm", sizes, state.__getitem__, facts, "a test", limit=3000)
    return folder / "coglm.safetensors"


def test_one_file_and_several_are_read_alike(tmp_path: Path) -> None:
    model = CogLM(CONFIG)
    save_model(tmp_path / "coglm.safetensors", model, CONFIG, "coglm", dtype=torch.float32)
    several = write_index(tmp_path / "index", model)
    assert len(list(several.parent.glob("coglm-*.safetensors"))) > 3
    assert load_config(several, "coglm") == CONFIG
    one, other = (load_weights(path, "coglm")[1] for path in (tmp_path / "coglm.safetensors", several))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(MiniCogViewError, match="holds 'vqvae', expected 'coglm'"):
        load_coglm(write_index(tmp_path / "foreign", model, "vqvae"))


def test_a_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    model = CogLM(CONFIG)
    save_model(tmp_path / "coglm.safetensors", model, CONFIG, "coglm")
    assert fingerprint(load_coglm(tmp_path / "coglm.safetensors").transformer) == fingerprint(model.transformer)
    assert fingerprint(CogLM(CONFIG).transformer) != fingerprint(model.transformer)
    several = write_index(tmp_path / "index", model)
    assert identity(tmp_path / "coglm.safetensors") == "" != identity(several)
    assert fingerprint(load_coglm(several).transformer) == identity(several)


def test_a_direct_stage_belongs_to_one_coglm(tmp_path: Path) -> None:
    several = write_index(tmp_path, CogLM(CONFIG))
    coglm, path = load_coglm(several), tmp_path / "direct.safetensors"
    direct = DirectSR(SuperResolutionConfig(CONFIG, n_text=3), coglm.transformer)
    save_direct(path, direct)
    assert load_direct(path, coglm.transformer).base is coglm.transformer
    for base in (coglm.transformer, several):  # the model, or its file
        assert load_part(path, "direct", base)[1].keys() == direct.state_dict().keys()
    for other in (CogLM(CONFIG).transformer, None):
        with pytest.raises(MiniCogViewError, match=r"direct\.safetensors was trained on top of another coglm"):
            load_part(path, "direct", other)
