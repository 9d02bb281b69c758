"""Weight files from strangers: each fault ends in one line, no file out of the folder is opened, bits are compared."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoints_importing import write_release
from tiny import SHIPPED, TINY, write_tiny
from torch import nn

from minicogview.checkpoints import reading
from minicogview.checkpoints.importing import import_released
from minicogview.checkpoints.models import load_stages, plan_for
from minicogview.checkpoints.random_weights import write_random
from minicogview.checkpoints.reading import (
    SUMS,
    check_finite,
    check_tensor,
    compare_checksum,
    read_json,
    read_sums,
    shown,
)
from minicogview.checkpoints.sat import open_torch_file
from minicogview.checkpoints.shards import Shards
from minicogview.checkpoints.weight_files import (
    FILES,
    fingerprint,
    load_coglm,
    load_direct,
    load_into,
    load_weights,
    save_direct,
    save_model,
)
from minicogview.cli.doctor import doctor, imported
from minicogview.coglm import CogLM
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.pipeline import CogView2
from minicogview.super_resolution import DirectSR
from minicogview.vqvae import VQVAE

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 10805768\n"


def write_whole(folder: Path) -> Path:
    """A release of a tiny CogLM and a direct stage that shares its weights, and what ``import`` makes of it."""
    torch.manual_seed(0)
    coglm = CogLM(TINY.coglm)
    write_release(folder / "release", {"coglm": coglm, "direct": DirectSR(TINY.direct, coglm.transformer)})
    import_released(folder / "release", folder / "out", TINY, limit=100_000)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "out", tmp_path / "weights"))


def refusal(work: Callable[[], object]) -> str:
    """The one line that some work ends with."""
    with pytest.raises(MiniCogViewError) as caught:
        work()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


def change_index(folder: Path, kind: str = "coglm", **changes: Any) -> None:
    path = folder / f"{kind}.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def index_of(folder: Path, kind: str = "coglm") -> dict[str, Any]:
    return json.loads((folder / f"{kind}.safetensors.index.json").read_text())


# --- numbers


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_refused_at_load(wrong: float, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    model = load_coglm(folder / FILES["coglm"])
    model.transformer.layers[1].mlp.up.weight.data[3, 5] = wrong
    save_model(folder / FILES["coglm"], model, TINY.coglm, "coglm", dtype)
    message = r"coglm\.safetensors holds NaN or infinity in transformer\.layers\.1\.mlp\.up\.weight"
    with pytest.raises(MiniCogViewError, match=message):
        load_coglm(folder / FILES["coglm"])
    with pytest.raises(MiniCogViewError, match=message):
        CogView2.from_pretrained(folder, TINY)
    assert "UNUSABLE: " in "\n".join(imported(folder, verify=False)[0])


def test_quantized_layers_are_checked_and_streamed_ones_are_not(folder: Path) -> None:
    from minicogview.scale.plan import Plan

    model = load_coglm(folder / FILES["coglm"])
    model.transformer.layers[0].mlp.up.weight.data[0, 0] = math.nan
    save_model(folder / FILES["coglm"], model, TINY.coglm, "coglm", torch.float32)
    (folder / "direct.safetensors.index.json").unlink()
    for way in ("memory", "int8"):
        assert "NaN or infinity in" in refusal(lambda: load_stages(folder, Plan(way)))  # noqa: B023
    load_stages(folder, Plan("disk"))  # documented: the layers are read when they are needed


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.uint8, torch.complex64])
def test_matrices_of_another_kind_are_refused(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2, dtype=dtype), "bias": torch.zeros(2)}
    assert f"wrong types ['weight {dtype}']" in refusal(lambda: load_into(model, state, "x"))


def test_finite_numbers_pass() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        check_finite("x", torch.full((3,), torch.finfo(dtype).max, dtype=dtype), "file")
    check_finite("x", torch.zeros(0), "file")


# --- checksums


def test_every_written_file_has_its_checksum(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    for name in ("coglm", "vqvae"):
        path = folder / FILES[name]
        assert compare_checksum(path)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        assert "was altered or damaged: its checksum" in refusal(lambda: load_weights(path, name))  # noqa: B023
        assert said_of(folder, name).startswith("UNUSABLE")


def said_of(folder: Path, name: str, verify: bool = False) -> str:
    """What the doctor says about one part."""
    from minicogview.cli.doctor import NAMES

    lines = imported(folder, verify)[0]
    return next(line[30:] for line in lines if line.startswith(f"  {NAMES[name]}"))


@pytest.mark.parametrize("name", ["coglm", "direct", "iterative", "vqvae", "text"])
def test_one_flipped_bit_in_a_shipped_file_is_noticed(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SHIPPED, tmp_path / "toy"))
    content = bytearray((folder / FILES[name]).read_bytes())
    content[-5000] ^= 4
    (folder / FILES[name]).write_bytes(content)
    message = refusal(lambda: CogView2.from_pretrained(folder))
    assert FILES[name] in message and f"its checksum is not the one in {SUMS}" in message


def test_the_shipped_lists_have_all_files() -> None:
    for folder in (SHIPPED, SHIPPED.parent / "shapes"):
        names = {path.name for path in folder.iterdir()} - {SUMS}
        assert read_sums(folder).keys() == names
        assert all(compare_checksum(folder / name) for name in names)


def test_a_file_that_is_written_again_is_listed_again(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    path = folder / FILES["coglm"]
    (folder / SUMS).write_text(f"{reading.checksum(path)}  {path.name}\n{'0' * 64} *other\n")
    model = load_coglm(path)
    model.transformer.final_norm.bias.data += 1
    save_model(path, model, TINY.coglm, "coglm")
    assert read_sums(folder) == {path.name: reading.checksum(path), "other": "0" * 64}
    load_coglm(path)
    (folder / SUMS).write_text("no list\x00\n\n")
    assert f"{SUMS} is damaged" in refusal(lambda: load_coglm(path))


def test_the_doctor_says_what_it_compared(folder: Path) -> None:
    assert "not verified: --verify compares checksums" in said_of(folder, "coglm")
    assert said_of(folder, "coglm", True).endswith("files, checksums are right")
    sums = index_of(folder)["sha256"]
    first = sorted(sums)[0]
    change_index(folder, sha256={first: sums[first]})
    assert "only 1 have a checksum, which is right" in said_of(folder, "coglm", True)
    change_index(folder, sha256={})
    assert "not verified: there are no checksums" in said_of(folder, "coglm", True)
    assert said_of(folder, "direct", True).startswith("UNUSABLE")  # nothing tells which CogLM this is
    shutil.copyfile(sorted(folder.glob("coglm-*"))[0], folder / "vqvae.safetensors")
    assert said_of(folder, "vqvae").startswith("UNUSABLE")


def test_a_single_file_without_checksum_is_not_verified(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    path = folder / FILES["coglm"]
    with safe_open(path, framework="pt") as file:
        state, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    del facts["sha256"]
    save_file(state, path, metadata=facts)
    load_coglm(path)
    assert "not verified: there is no checksum" in said_of(folder, "coglm")


def test_the_doctor_sees_what_generate_would_refuse(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    (folder / "text.model").write_bytes(b"garbled")
    assert "UNUSABLE: text model" in said_of(folder, "text")
    shutil.copyfile(SHIPPED.parent / "shapes" / "text.model", folder / "text.model")
    assert "UNUSABLE: the files in" in said_of(folder, "text") and "different models" in said_of(folder, "text")
    (folder / "cluster_label.npy").write_bytes(b"garbled")
    assert "UNUSABLE: cannot read cluster labels" in said_of(folder, "labels")
    (folder / "cluster_label.npy").write_text(POINTER)
    assert "Git LFS pointer" in said_of(folder, "labels")
    save_direct(folder / FILES["direct"], DirectSR(TINY.direct, CogLM(TINY.coglm).transformer))
    assert "trained on top of another coglm" in said_of(folder, "direct")
    other = replace(TINY.coglm, n_codes=63)
    iterative = replace(TINY.iterative, coglm=other)
    save_model(folder / FILES["iterative"], IterativeSR(iterative), iterative, "iterative")
    assert "trained on top of another coglm" in said_of(folder, "iterative")


# --- a stage on another CogLM


def test_another_base_is_refused_or_warned_of(folder: Path, tmp_path: Path) -> None:
    plan = plan_for(folder)
    good = load_stages(folder, plan).direct
    torch.manual_seed(7)
    for file in folder.glob("coglm*"):
        file.unlink()
    other = CogLM(TINY.coglm)
    save_model(folder / FILES["coglm"], other, TINY.coglm, "coglm")
    assert "direct.safetensors was trained on top of another coglm" in refusal(lambda: load_stages(folder, plan))
    with pytest.warns(UserWarning, match="was trained on top of another coglm.*its pictures may be poor"):
        loaded = load_stages(folder, plan, allow_other_base=True).direct
    assert good is not None and loaded is not None
    shutil.copyfile(SHIPPED / "text.model", folder / "text.model")
    save_model(folder / FILES["vqvae"], VQVAE(TINY.vqvae), TINY.vqvae, "vqvae")
    refusal(lambda: CogView2.from_pretrained(folder, TINY))
    with pytest.warns(UserWarning, match="was trained on top of another coglm"):
        assert CogView2.from_pretrained(folder, TINY, allow_other_base=True).n_stages == 2
    assert fingerprint(loaded.base) == fingerprint(load_coglm(folder / FILES["coglm"]).transformer)
    with pytest.warns(UserWarning, match="trained on top of another"):
        load_direct(folder / FILES["direct"], other.transformer, allow_other_base=True)


# --- small things


def test_pointers_of_git_lfs_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "coglm.safetensors"
    path.write_text(POINTER)
    for work in (lambda: load_coglm(path), lambda: open_torch_file(path), lambda: read_json(path)):
        assert refusal(work) == f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull`"
    folder = write_tiny(tmp_path / "tiny")
    (folder / "text.model").write_text(POINTER)
    assert "Git LFS pointer" in refusal(lambda: CogView2.from_pretrained(folder, TINY))


def test_what_is_shown_of_a_file_is_one_short_line() -> None:
    assert shown("a\n\tb\x1b[31m\u202ec") == "a b [31m c"
    assert len(shown("x" * 10_000)) == 200


def test_a_checked_tensor_is_any_plain_one() -> None:
    check_tensor("x", torch.ones(2, 3)[:, 1:], "file")
    check_tensor("x", nn.Parameter(torch.ones(2)), "file")


def test_random_weights_pass_the_doctor(tmp_path: Path) -> None:
    tiny = replace(TINY, n_text_pieces=4500)
    folder = write_random(tmp_path, tiny, torch.float32)
    assert not any("UNUSABLE" in line for line in doctor(folder, tiny, verify=True))
    assert Shards(folder / "coglm.safetensors.index.json").verify() == 1
    assert isinstance(load_stages(folder, plan_for(folder)).direct, DirectSR)


def test_a_tensor_that_an_index_promises_but_a_file_lacks(folder: Path) -> None:
    change_index(folder, weight_map=index_of(folder)["weight_map"] | {"more": sorted(folder.glob("coglm-*"))[0].name})
    assert "is damaged (" in refusal(lambda: load_coglm(folder / FILES["coglm"]))
