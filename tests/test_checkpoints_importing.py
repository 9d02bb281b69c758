"""Importing the release: the same models come out, equal weights are written once, and no partial file is left."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, RELEASED
from safetensors import safe_open
from test_checkpoints_sat import cut
from tiny import SHIPPED, TINY
from torch import Tensor, nn

from minicogview.checkpoints import importing, shards
from minicogview.checkpoints.importing import MODELS, import_released
from minicogview.checkpoints.sat import SatFolder, ours_to_sat
from minicogview.checkpoints.weight_files import load_coglm, load_direct, load_iterative
from minicogview.cli.doctor import doctor
from minicogview.cli.main import main
from minicogview.coglm import CogLM
from minicogview.config import TransformerConfig
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.pipeline import CogView2
from minicogview.super_resolution import DirectSR

ITERATIONS = {"coglm": "20000", "direct": "3000", "iterative": "4000"}


def write_release(folder: Path, models: dict[str, nn.Module], n_ranks: int = 1) -> None:
    """A release of tiny models in the form of the authors' upload."""
    sizes = TINY.coglm.transformer
    for kind, model in models.items():
        place = folder / MODELS[kind] / ITERATIONS[kind]
        place.mkdir(parents=True)
        (place.parent / "latest").write_text(ITERATIONS[kind])
        said = {
            "num_layers": sizes.n_layers, "hidden_size": sizes.d_model, "num_attention_heads": sizes.n_heads,
            "vocab_size": sizes.vocab_size, "max_sequence_length": sizes.max_positions,
            "layernorm_order": "sandwich", "model_parallel_size": n_ranks,
        }  # fmt: skip
        (place.parent / "model_config.json").write_text(json.dumps(said))
        module = {ours_to_sat(name): value.half() for name, value in model.state_dict().items()}
        for i, rank in enumerate(cut(module, n_ranks)):
            torch.save({"module": rank}, place / f"mp_rank_{i:02d}_model_states.pt")


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    coglm, iterative = CogLM(TINY.coglm), IterativeSR(TINY.iterative)
    direct = DirectSR(TINY.direct, coglm.transformer)  # on top of a frozen CogLM, as in the original
    for model in (coglm, iterative, direct):
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float()
    return {"coglm": coglm, "direct": direct, "iterative": iterative}


@pytest.fixture
def release(tmp_path: Path, models: dict[str, nn.Module]) -> Path:
    write_release(tmp_path / "release", models)
    return tmp_path / "release"


def assert_same(one: nn.Module, other: nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("limit", [2**29, 2_000])
def test_the_models_come_out_as_they_went_in(release: Path, models: dict, tmp_path: Path, limit: int) -> None:
    target = tmp_path / "weights"
    steps: list[tuple[str, int, int]] = []
    report = import_released(release, target, TINY, lambda *step: steps.append(step), limit)
    assert report["parts"] == ["coglm", "direct", "iterative"] and report["missing"] == ["vqvae", "text", "labels"]
    coglm = load_coglm(target / "coglm.safetensors")
    direct = load_direct(target / "direct.safetensors", coglm.transformer)
    assert_same(coglm, models["coglm"])
    assert_same(direct, models["direct"])
    assert_same(load_iterative(target / "iterative.safetensors", coglm.transformer), models["iterative"])
    assert direct.base is coglm.transformer  # one copy in memory
    written = {path.name for path in target.iterdir()}
    assert not any(name.endswith((".part", ".import.json")) for name in written)
    files = [path for path in target.glob("direct-*.safetensors")]
    names = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    assert names and not any(name.startswith("base.") for name in names)  # and one copy on disk
    last = [step for step in steps if step[0].startswith("coglm")][-1]
    assert last[1] == last[2]
    if limit < 2**29:
        assert len(list(target.glob("coglm-*.safetensors"))) > 3


def test_the_golden_release_comes_through_to_the_bit(tmp_path: Path) -> None:
    """So what the golden files prove about the models is also true of imported weights."""
    for kind, place in (("coglm", "coglm/coglm"), ("direct", "sr/cogview2-dsr"), ("iterative", "sr/cogview2-itersr")):
        folder = SatFolder(GOLDEN / place)
        said = folder.sizes
        transformer = TransformerConfig(
            n_layers=said["num_layers"], d_model=said["hidden_size"], n_heads=said["num_attention_heads"],
            vocab_size=said["vocab_size"], max_positions=said["max_sequence_length"],
        )  # fmt: skip
        vqvae = dataclasses.replace(RELEASED.vqvae, codebook_size=said["vocab_size"] - 3)
        coglm = dataclasses.replace(RELEASED.coglm, transformer=transformer, n_codes=vqvae.codebook_size)
        preset = dataclasses.replace(RELEASED, vqvae=vqvae, n_text_pieces=0).with_coglm(coglm)
        (tmp_path / kind).mkdir()
        shutil.copytree(GOLDEN / place, tmp_path / kind / MODELS[kind])
        import_released(tmp_path / kind, tmp_path / kind / "out", preset)
        with shards_of(tmp_path / kind / "out" / f"{kind}.safetensors.index.json") as file:
            for name in folder.shapes:
                assert torch.equal(file.get_tensor(importing.our_name(kind, name)), folder.tensor(name)), name


class shards_of:
    def __init__(self, index: Path):
        self.shards = shards.Shards(index)

    def __enter__(self) -> shards.Shards:
        self.shards.verify()
        return self.shards

    def __exit__(self, *_: object) -> None:
        pass


def test_several_ranks_give_the_same_files(models: dict, tmp_path: Path) -> None:
    for n_ranks in (1, 2):
        write_release(tmp_path / f"release{n_ranks}", models, n_ranks)
        import_released(tmp_path / f"release{n_ranks}", tmp_path / f"out{n_ranks}", TINY)
    one, two = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / f"out{n}").glob("*.safetensors"))} for n in (1, 2)
    )
    assert one == two and one


def test_weights_that_differ_from_coglm_are_kept(models: dict, tmp_path: Path) -> None:
    changed = DirectSR(TINY.direct)
    changed.load_state_dict(models["direct"].state_dict())
    torch.nn.init.ones_(changed.base.final_norm.bias)
    write_release(tmp_path / "release", {**models, "direct": changed})
    import_released(tmp_path / "release", tmp_path / "out", TINY)
    coglm = load_coglm(tmp_path / "out" / "coglm.safetensors")
    direct = load_direct(tmp_path / "out" / "direct.safetensors", coglm.transformer)
    assert_same(direct, changed)
    assert direct.base is not coglm.transformer
    shared = direct.base.token_embedding.weight, coglm.transformer.token_embedding.weight
    assert shared[0].data_ptr() == shared[1].data_ptr()
    lone = dataclasses.replace(TINY)
    write_release(tmp_path / "alone", {"direct": changed})  # without CogLM, all weights are written
    import_released(tmp_path / "alone", tmp_path / "out2", lone)
    assert_same(load_direct(tmp_path / "out2" / "direct.safetensors", coglm.transformer), changed)


def test_another_number_format_is_written(release: Path, models: dict, tmp_path: Path) -> None:
    import_released(release, tmp_path / "half", TINY)
    import_released(release, tmp_path / "brain", TINY, dtype=torch.bfloat16)
    files = [shards.Shards(tmp_path / name / "coglm.safetensors.index.json") for name in ("half", "brain")]
    for name in files[0].keys():  # noqa: SIM118 (not a dict)
        half, brain = (file.get_tensor(name) for file in files)
        assert (half.dtype, brain.dtype) == (torch.float16, torch.bfloat16) and torch.equal(half.bfloat16(), brain)
    direct = load_direct(
        tmp_path / "brain" / "direct.safetensors",
        load_coglm(tmp_path / "brain" / "coglm.safetensors", dtype=None).transformer,
        dtype=None,
    )
    shared = {name: value for name, value in direct.state_dict().items() if name.startswith("base.")}
    assert all(torch.equal(v, models["direct"].state_dict()[n].bfloat16()) for n, v in shared.items())


def test_the_whole_system_loads_and_draws(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    labels = np.arange(64) % 8
    np.save(release / "cluster_label.npy", labels)
    shutil.copyfile(SHIPPED / "text.model", release / "ice_text.model")
    import_released(release, target, TINY)
    from minicogview.checkpoints.weight_files import save_model
    from minicogview.vqvae import VQVAE

    torch.manual_seed(3)
    save_model(target / "vqvae.safetensors", VQVAE(TINY.vqvae), TINY.vqvae, "vqvae")
    pictures = [
        CogView2.from_pretrained(target, TINY, offload=offload).generate("a red apple", n=1, seed=1)
        for offload in (False, True)
    ]
    assert pictures[0].iterative and torch.equal(pictures[0].fine_tokens, pictures[1].fine_tokens)
    assert np.array_equal(np.load(target / "cluster_label.npy"), labels)


# --- interrupted, altered and wrong files


def test_an_interrupted_import_is_resumed(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_released(release, tmp_path / "whole", TINY, limit=2_000)
    target, saved = tmp_path / "weights", []

    def stop(state: dict[str, Tensor], path: Path) -> None:
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(path.name)
        save(state, path)

    save = shards.save_file
    monkeypatch.setattr(shards, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        import_released(release, target, TINY, limit=2_000)
    assert not list(target.glob("*.part")) and not list(target.glob("*.index.json"))
    again: list[str] = []
    monkeypatch.setattr(shards, "save_file", lambda state, path: (again.append(path.name), save(state, path)))
    import_released(release, target, TINY, limit=2_000)
    assert not set(saved) & set(again)
    for path in (tmp_path / "whole").iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name


def test_altered_and_missing_files_are_found(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    import_released(release, target, TINY, limit=2_000)
    index = shards.Shards(target / "coglm.safetensors.index.json")
    index.verify()
    file = sorted(target.glob("coglm-*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(MiniCogViewError, match=rf"{file.name} was altered or damaged: import the weights again"):
        index.verify()
    file.unlink()
    with pytest.raises(MiniCogViewError, match=rf"lacks {file.name}"):
        load_coglm(target / "coglm.safetensors")
    (target / "coglm.safetensors.index.json").write_text("{")
    with pytest.raises(MiniCogViewError, match=r"index\.json is damaged"):
        load_coglm(target / "coglm.safetensors")


def test_wrong_names_and_shapes_are_listed_before_anything_is_written(release: Path, tmp_path: Path) -> None:
    file = release / "cogview2-dsr" / "3000" / "mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=True)["module"]
    del module["transformer.final_layernorm.bias"]
    module["transformer.layers.0.router.weight"] = torch.zeros(2)
    module["transformer.layers.1.mlp.dense_h_to_4h.bias"] = torch.zeros(5)
    torch.save({"module": module}, file)
    with pytest.raises(MiniCogViewError) as caught:
        import_released(release, tmp_path / "out", TINY)
    said = str(caught.value)
    assert "cogview2-dsr is not the direct model. missing: base.final_norm.bias; unexpected: " in said
    assert "transformer.layers.0.router.weight" in said
    assert "transformer.layers.1.mlp.dense_h_to_4h.bias (5,) instead of (64,)" in said
    assert not (tmp_path / "out").exists()


def test_wrong_folders_and_a_full_disk(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MiniCogViewError, match="has no part of the release: expected any of coglm, cogview2-dsr"):
        import_released(tmp_path, tmp_path / "out", TINY)
    with pytest.raises(MiniCogViewError, match=r"coglm has n_layers 2, the preset cogview2 48: it is another model"):
        import_released(release, tmp_path / "out", RELEASED)
    other = dataclasses.replace(TINY, direct=dataclasses.replace(TINY.direct, factor=2))
    with pytest.raises(MiniCogViewError, match=r"cogview2-dsr is not the direct .* another shape: mixins\.extra"):
        import_released(release, tmp_path / "out", other)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MiniCogViewError, match=r"has 0\.0 GB free, the weights take 0\.0 GB more: free some space"):
        import_released(release, tmp_path / "out", TINY)
    assert not (tmp_path / "out").exists()
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    shutil.copytree(release / "cogview2-itersr", swapped / "coglm")
    with pytest.raises(MiniCogViewError, match=r"is not the coglm model\. unexpected: mixins\.extra_position"):
        import_released(swapped, tmp_path / "out", TINY)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "has no part of the release" in capsys.readouterr().err


# --- the doctor


def test_the_doctor_says_what_is_there_and_what_is_missing(release: Path, tmp_path: Path) -> None:
    said = "\n".join(doctor(release, TINY))
    assert re.search(r"CogLM \(first stage\) +0\.0 GB, 1 rank: names and shapes are right", said)
    assert "ice_image.pt is missing: without it tokens cannot be shown" in said
    assert f"next: minicogview import {release} FOLDER" in said
    (release / "cogview2-itersr" / "latest").unlink()
    assert re.search(r"iterative stage +UNUSABLE: .*latest is missing", "\n".join(doctor(release, TINY)))

    shutil.rmtree(release / "cogview2-itersr")
    import_released(release, tmp_path / "out", TINY, limit=2_000)
    lines = doctor(tmp_path / "out", TINY, verify=True)
    said = "\n".join(lines)
    assert re.search(r"CogLM \(first stage\) +0\.0 GB in \d+ files, checksums are right", said)
    assert "iterative.safetensors is missing: without it pictures stay as the direct stage made them" in said
    assert re.search(r"--memory 6GB +all weights in memory.*a picture takes at least 0 s in the first stage", said)
    file = sorted((tmp_path / "out").glob("direct-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    said = "\n".join(doctor(tmp_path / "out", TINY, verify=True))
    assert re.search(r"direct stage +UNUSABLE: .* altered or damaged", said)


def test_the_doctor_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "toy"]) == 0
    assert "those of the preset toy" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert "neither a preset" in capsys.readouterr().err
    (tmp_path / "coglm.safetensors").write_bytes(b"nothing")
    assert main(["doctor", str(tmp_path)]) == 2
    assert "UNUSABLE: weight file" in capsys.readouterr().out
