"""Indexes from strangers: names stay in the folder, and wrong types and damaged shards end in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints_reading import POINTER, change_index, index_of, refusal, write_whole
from tiny import TINY

from minicogview.checkpoints import reading
from minicogview.checkpoints.reading import inside, read_json
from minicogview.checkpoints.weight_files import (
    FILES,
    load_coglm,
    load_config,
    load_direct,
    load_vqvae,
    same_as_coglm,
    stored_dtype,
)
from minicogview.cli.doctor import imported
from minicogview.config import to_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "out", tmp_path / "weights"))


# --- names that a file holds


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x", "..", ".", "", "a/b", "a\\b", "C:x", "a\nb", "x" * 999])
def test_an_index_names_files_beside_it_alone(name: str, folder: Path) -> None:
    change_index(folder, weight_map=dict.fromkeys(index_of(folder)["weight_map"], name), sha256={})
    assert "expected the plain name of a file beside it" in refusal(lambda: load_coglm(folder / "coglm.safetensors"))


def test_links_out_of_the_folder_are_refused(folder: Path) -> None:
    file = sorted(folder.glob("coglm-*"))[0]
    outside = folder.parent / "outside.safetensors"
    file.rename(outside)
    file.symlink_to(outside)
    assert f"names {file.name}, which is a link out of the folder" in refusal(
        lambda: load_coglm(folder / FILES["coglm"])
    )
    file.unlink()
    outside.rename(folder / "other.safetensors")
    file.symlink_to("other.safetensors")  # a link within the folder does no harm
    load_coglm(folder / FILES["coglm"])
    link = folder.parent / "link"
    link.symlink_to(folder)  # nor does a link to the folder
    load_coglm(link / FILES["coglm"])


def test_the_cache_of_a_hub_is_read(tmp_path: Path) -> None:
    """Its folders have links into the folder ``blobs`` beside them."""
    blob, snapshot = tmp_path / "blobs" / "0123", tmp_path / "snapshots" / "abc"
    for path in (blob.parent, snapshot):
        path.mkdir(parents=True)
    blob.write_text("x")
    (snapshot / "name").symlink_to("../../blobs/0123")
    assert inside(snapshot, "name", tmp_path).read_text() == "x"
    (snapshot / "evil").symlink_to("../../../x")
    assert "link out of the folder" in refusal(lambda: inside(snapshot, "evil", tmp_path))


@pytest.mark.parametrize(
    "names", ["{", "3", '["../coglm"]', '["base.nothing"]', "[[1]]", '[{"a": 1}]', "[" * 100_000, '"base."', "null"]
)
def test_same_as_coglm_names_weights_of_coglm_alone(names: str, folder: Path) -> None:
    coglm = load_coglm(folder / FILES["coglm"])
    change_index(folder, "direct", metadata=index_of(folder, "direct")["metadata"] | {"same_as_coglm": names})
    path = folder / FILES["direct"]
    for work in (lambda: load_direct(path, coglm.transformer), lambda: same_as_coglm(path, coglm)):
        assert "has a damaged list same_as_coglm" in refusal(work)


# --- indexes and shards

WRONG_INDEXES: dict[str, Any] = {
    f"{field} {value!r}": {field: value}
    for field, values in {
        "weight_map": (None, [], [1], 3, "x", {}, {"a": 1}, {"a": None}, {"a": {"b": {}}}),
        "sha256": (None, [], 3, "x", {"a": None}, {"missing.safetensors": "0"}),
        "metadata": (None, [], "x", {"kind": 3, "config": "{}"}),
    }.items()
    for value in values
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_INDEXES.values(), ids=WRONG_INDEXES.keys())
def test_an_index_with_wrong_types_is_damaged(wrong: dict[str, Any], folder: Path) -> None:
    change_index(folder, **wrong)
    assert "index.json is damaged (" in refusal(lambda: load_coglm(folder / FILES["coglm"]))


@pytest.mark.parametrize("text", ["", "[]", "null", "{" * 9, '{"a":' * 100_000, "[" * 100_000, '{"a": NaN}', "\udcff"])
def test_json_that_is_no_index(text: str, folder: Path) -> None:
    (folder / "coglm.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "is damaged (" in refusal(lambda: load_coglm(folder / FILES["coglm"]))


def test_large_json_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text('{"a": "' + "x" * 1000 + '"}')
    assert len(read_json(tmp_path / "x.json")["a"]) == 1000
    monkeypatch.setattr(reading, "MAX_JSON", 999)
    assert "is larger than" in refusal(lambda: read_json(tmp_path / "x.json"))


@pytest.mark.parametrize("how", ["truncated", "empty", "garbled", "swapped", "pointer", "header"])
def test_a_damaged_shard_is_one_line(how: str, folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("coglm-*"))
    content = first.read_bytes()
    if how == "swapped":
        first.write_bytes(second.read_bytes())
    else:
        damaged = {
            "truncated": content[:-8],
            "empty": b"",
            "garbled": bytes(len(content)),
            "pointer": POINTER.encode(),
            "header": (2**62).to_bytes(8, "little") + content[8:],
        }
        first.write_bytes(damaged[how])
    said = refusal(lambda: load_coglm(folder / FILES["coglm"]))
    assert first.name in said and ("damaged" in said or "Git LFS pointer" in said)
    assert (said.endswith("run `git lfs pull`")) == (how == "pointer")
    assert "UNUSABLE" in "\n".join(imported(folder, verify=False)[0])


# --- configurations in headers


@pytest.mark.parametrize(
    "field, value",
    [
        ("n_layers", 10**9), ("n_layers", "2"), ("n_layers", True), ("n_layers", -1), ("n_layers", 2.0),
        ("d_model", 10**40), ("d_model", None), ("d_model", [16]), ("n_heads", 0), ("n_heads", 3),
        ("norm", "sideways"), ("norm", ["pre"]), ("pb_relax", "1"), ("pb_relax", 1e999), ("another", 1),
    ],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense(field: str, value: Any, tmp_path: Path) -> None:
    config = json.loads(to_json(TINY.coglm))
    config["transformer"][field] = value
    path = tmp_path / "coglm.safetensors"
    state = {"transformer.final_norm.weight": torch.ones(16)}
    save_file(state, path, metadata={"kind": "coglm", "config": json.dumps(config)})
    assert str(path) in refusal(lambda: load_config(path, "coglm"))


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", "{}", "{" * 100_000, '{"transformer": 3}', '{"channels": "x"}']
)
def test_text_that_is_no_configuration(text: str, tmp_path: Path) -> None:
    for kind in ("coglm", "vqvae", "direct"):
        path = tmp_path / FILES[kind]
        save_file({"a": torch.ones(1)}, path, metadata={"kind": kind, "config": text})
        if (kind, text) != ("vqvae", "{}"):  # all of its fields have defaults
            refusal(lambda: load_config(path, kind))  # noqa: B023 (called at once)
    refusal(lambda: load_vqvae(tmp_path / FILES["vqvae"]))
    refusal(lambda: stored_dtype(tmp_path / FILES["coglm"]))


@pytest.mark.parametrize("changes", [{"channels": 2**31}, {"n_groups": 0}, {"n_groups": 3}, {"codebook_size": 10**7}])
def test_a_tokenizer_larger_than_its_file_takes_no_memory(changes: dict[str, int], tmp_path: Path) -> None:
    config, path = replace(TINY.vqvae, **changes), tmp_path / "vqvae.safetensors"
    state = {f"w{i}": torch.ones(1) for i in range(20)}
    save_file(state, path, metadata={"kind": "vqvae", "config": to_json(config)})
    assert str(path) in refusal(lambda: load_vqvae(path))
