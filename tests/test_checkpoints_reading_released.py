"""Released folders from strangers: wrong types, odd names and strange tensors end in one line; old files are read."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints_importing import write_release
from test_checkpoints_reading import POINTER, refusal
from test_checkpoints_sat import Attack, make_sat
from tiny import TINY

from minicogview.checkpoints.importing import import_released
from minicogview.checkpoints.sat import SatFolder, sat_config
from minicogview.checkpoints.weight_files import FILES, load_coglm
from minicogview.cli.main import main
from minicogview.coglm import CogLM

BIAS = "transformer.final_layernorm.bias"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_release(tmp_path / "release", {"coglm": CogLM(TINY.coglm)})
    return tmp_path / "release"


def config_of(release: Path) -> Path:
    return release / "coglm" / "model_config.json"


@pytest.mark.parametrize(
    "text", ["[]", "null", '"x"', "3", "", "{" * 50_000, '{"a": NaN}', '{"a": Infinity}', "\x00", "{}", POINTER]
)
def test_a_model_config_that_is_none(text: str, release: Path, tmp_path: Path) -> None:
    config_of(release).write_text(text)
    assert "model_config.json" in refusal(lambda: import_released(release, tmp_path / "out", TINY))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "field", ["num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_sequence_length",
              "model_parallel_size", "layernorm_order"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, "x", [], {}, True, 1.5, -1, 0, 10**9, 10**30, 1e300])
def test_a_size_of_another_type(field: str, value: Any, release: Path, tmp_path: Path) -> None:
    config_of(release).write_text(json.dumps(json.loads(config_of(release).read_text()) | {field: value}))
    refusal(lambda: import_released(release, tmp_path / "out", TINY))
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_does_no_harm(release: Path) -> None:
    for path in (config_of(release), config_of(release).with_name("latest")):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert SatFolder(release / "coglm").n_ranks == 1


@pytest.mark.parametrize("name", [b"\xff\xfe", b"", b"../../etc", b"/etc", b"x" * 5000, b"a\x00b", b"missing", b"a\nb"])
def test_latest_names_a_folder_beside_it(name: bytes, release: Path) -> None:
    (release / "coglm" / "latest").write_bytes(name)
    refusal(lambda: SatFolder(release / "coglm"))


def test_an_iteration_that_is_a_link_out_of_the_folder(release: Path) -> None:
    (release / "coglm" / "20000").rename(release.parent / "outside")
    (release / "coglm" / "20000").symlink_to(release.parent / "outside")
    assert "link out of the folder" in refusal(lambda: SatFolder(release / "coglm"))


STRANGE: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.ones(2, 2).to_sparse(),
    "meta": lambda: torch.ones(2, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "0-d": lambda: torch.tensor(1.0),
    "integers": lambda: torch.ones(2, dtype=torch.int64),
    "booleans": lambda: torch.ones(2, dtype=torch.bool),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "no tensor": lambda: [1, 2],
    "expanded": lambda: torch.ones(1).expand(10**12),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
def test_strange_tensors_are_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    folder = make_sat(tmp_path / "sat", {BIAS: make()})
    said = refusal(lambda: SatFolder(folder))
    assert BIAS in said or "not a tensor" in said


@pytest.mark.parametrize(
    "name", ["x", "", ".", "transformer", "transformer.", "mixins.", "a\nb.c", "layers.²", 3, ("a",)]
)
def test_odd_names_are_refused(name: Any, release: Path, tmp_path: Path) -> None:
    file = release / "coglm" / "20000" / "mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=True)["module"]
    torch.save({"module": module | {name: torch.ones(2)}}, file)
    refusal(lambda: import_released(release, tmp_path / "out", TINY))
    assert not (tmp_path / "out").exists()


def test_unexpected_parameters_can_be_ignored(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = release / "coglm" / "20000" / "mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=True)["module"]
    extra = {"transformer.layers.0.router.weight": torch.zeros(2), "odd": torch.zeros(2)}
    torch.save({"module": module | extra}, file)
    assert "unexpected: odd, transformer.layers.0.router" in refusal(
        lambda: import_released(release, tmp_path / "o", TINY)
    )
    report = import_released(release, tmp_path / "out", TINY, ignore_unexpected=True)
    assert report["ignored"] == sorted(extra)
    assert load_coglm(tmp_path / "out" / FILES["coglm"]).config == TINY.coglm
    del module["transformer.final_layernorm.bias"]
    torch.save({"module": module | extra}, file)
    said = refusal(lambda: import_released(release, tmp_path / "o", TINY, ignore_unexpected=True))
    assert "missing: transformer.final_norm.bias" in said
    assert main(["import", str(release), str(tmp_path / "o"), "--ignore-unexpected"]) == 2  # another preset's sizes
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("said", [True, False])
def test_sandwich_order_is_seen_in_the_tensors(said: bool, release: Path, tmp_path: Path) -> None:
    sizes = json.loads(config_of(release).read_text())
    names = SatFolder(release / "coglm").shapes
    if not said:
        del sizes["layernorm_order"]
    config = sat_config(sizes, TINY.coglm.ids, TINY.coglm.layout, 64, names)
    assert config == TINY.coglm
    if not said:
        assert sat_config(sizes, TINY.coglm.ids, TINY.coglm.layout, 64, []).transformer.norm == "pre"
        config_of(release).write_text(json.dumps(sizes))
        import_released(release, tmp_path / "out", TINY)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_import_finds_nan(value: float, release: Path, tmp_path: Path) -> None:
    file = release / "coglm" / "20000" / "mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=True)["module"]
    module[BIAS][1] = value
    torch.save({"module": module}, file)
    assert f"NaN or infinity in {BIAS}" in refusal(lambda: import_released(release, tmp_path / "out", TINY))


def test_names_of_one_storage_are_written_as_copies(release: Path, tmp_path: Path) -> None:
    """As DeepSpeed leaves them, all in one buffer; and the very same tensor under two names."""
    file = release / "coglm" / "20000" / "mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=True)["module"]
    buffer = torch.cat([value.flatten() for value in module.values()])
    parts = buffer.split([value.numel() for value in module.values()])
    module = {name: part.view(value.shape) for (name, value), part in zip(module.items(), parts)}
    module["transformer.layers.1.mlp.dense_h_to_4h.bias"] = module["transformer.layers.0.mlp.dense_h_to_4h.bias"]
    torch.save({"module": module}, file)
    import_released(release, tmp_path / "out", TINY)
    state = load_coglm(tmp_path / "out" / FILES["coglm"], None).transformer.state_dict()
    assert torch.equal(state["layers.1.mlp.up.bias"], state["layers.0.mlp.up.bias"])
    assert torch.equal(state["token_embedding.weight"], module["transformer.word_embeddings.weight"])


def test_a_legacy_file_is_read(release: Path, tmp_path: Path) -> None:
    """Its tensors are not mapped from the file, so their memory must not be given back."""
    import_released(release, tmp_path / "new", TINY)
    file = release / "coglm" / "20000" / "mp_rank_00_model_states.pt"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    folder = SatFolder(release / "coglm")
    folder.let_go(folder.shapes)
    assert not folder.mapped and folder.tensor("transformer.final_layernorm.weight").min() == 1
    import_released(release, tmp_path / "old", TINY)
    for path in (tmp_path / "new").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "old" / path.name).read_bytes()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_refused_pickle_is_one_line(
    protocol: int, legacy: bool, release: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trap = tmp_path / "trap"
    file = release / "coglm" / "20000" / "mp_rank_00_model_states.pt"
    content = {"module": {BIAS: torch.ones(2)}, "x": Attack(trap)}
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refusal(lambda: SatFolder(release / "coglm"))
    assert main(["import", str(release), str(tmp_path / "out")]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out and not trap.exists()


def test_ranks_of_different_shapes(tmp_path: Path) -> None:
    for name, shapes in ((BIAS, [(2,), (3,)]), ("transformer.layers.0.attention.dense.weight", [(2,), (2,)]),
                         ("transformer.layers.0.attention.query_key_value.weight", [(4, 2), (4, 2)]),
                         ("transformer.word_embeddings.weight", [(4, 2), (4, 3)])):  # fmt: skip
        folder = make_sat(tmp_path / name, *({name: torch.zeros(shape)} for shape in shapes))
        assert f"{name} cannot be merged from" in refusal(lambda: SatFolder(folder))  # noqa: B023
