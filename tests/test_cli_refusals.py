"""What the command line refuses: each wrong input ends with one line and exit status 2, before any work is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import run, tiny, weights

__all__ = ["tiny", "weights"]  # fixtures

WRONG_TRAINING = [
    *((part, "lr", wrong) for part in ("vqvae", "coglm", "iterative") for wrong in ("nan", "-1", "inf", "1e30", "0")),
    *((part, "steps", wrong) for part in ("vqvae", "direct") for wrong in ("-1", "100000000000")),
    *((part, "seed", wrong) for part in ("vqvae", "coglm") for wrong in ("-1", "1" * 22)),
    *(("coglm", "batch-size", wrong) for wrong in ("0", "-1", "1000000000")),
    *(("direct", "weight-decay", wrong) for wrong in ("nan", "-1", "inf")),
    *(("direct", "ema-decay", wrong) for wrong in ("nan", "-0.1", "1.1")),
    ("coglm", "steps", "0"), ("coglm", "warmup", "-1"), ("coglm", "judge-every", "-1"), ("coglm", "judge-every", "0"),
    ("vqvae", "coarse-steps", "-1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "no text was given"),
        (["generate", ""], "text is empty"),
        (["generate", "  "], "text is empty"),
        (["generate", "apple " * 60], "text has 60 tokens, at most 48 fit"),
        (["generate", "cat", "--n", "0"], "--n is 0"),
        (["generate", "cat", "--n", "-3"], "--n is -3"),
        (["generate", "cat", "--n", "2", "--keep", "3"], "--keep is 3: give an integer from 1 to 2"),
        (["generate", "cat", "dog", "--seed", "-1"], "--seed is -1"),
        (["generate", "cat", "--scale", "0"], "--scale is 0"),
        (["generate", "cat", "dog", "--temperature", "-1"], "--temperature is -1.0: give a number from 0 to 1000"),
        (["generate", "cat", "--temperature", "nan"], "temperature is nan"),
        (["generate", "cat", "--top-k", "0"], "--top-k is 0"),
        (["generate", "cat", "--n", "1000000000"], "--n is 1000000000: give an integer from 1 to 10000"),
        (["generate", "cat", "--seed", "1" * 22], "--seed is " + "1" * 22 + ": give an integer from 0"),
        (["generate", "cat", "--scale", "1000000"], "--scale is 1000000: give an integer from 1 to 256"),
        (["generate", "cat", "--guidance", "-5"], "--guidance is -5.0: give a number from 0 to 1000"),
        (["generate", "cat", "--device", "meta"], "device 'meta' cannot be used here"),
        (["generate", "cat", "--memory", "9" * 25], "memory '" + "9" * 25 + "': write auto"),
        (["generate", "cat", "--stages", "0"], "--stages is 0"),
        (["generate", "cat", "--stages", "4"], "--stages is 4: give an integer from 1 to"),
        (["generate", "cat", "--style", "cubist"], "unknown style 'cubist'"),
        (["generate", "cat", "--out", "file"], "cannot write into file (it is a file)"),
        (["generate", "cat", "--out", "file/folder"], "cannot write into file/folder"),
        (["generate", "cat", "--out", "x" * 300], "choose another folder with --out"),
        (["generate", "cat", "--preset", "toyy"], "unknown preset 'toyy': choose one of toy"),
        (["generate", "cat", "--weights", "nowhere"], "'nowhere' is neither a preset"),
        (["generate", "cat", "--weights", "."], "coglm.safetensors is missing"),
        (["info", "toyy"], "unknown preset 'toyy'"),
        (["info", "toy", "--text-tokens", "49"], "--text-tokens is 49: give an integer from 1 to 48"),
        (["evaluate", "retrieval", "--preset", "toyy"], "unknown preset 'toyy'"),
        *((["evaluate", "retrieval", "--limit", wrong], f"--limit is {wrong}: give") for wrong in ("0", "-1")),
        (["evaluate", "retrieval", "--seed", "-1"], "--seed is -1"),
        (["evaluate", "retrieval", "--split", "everything"], "invalid choice 'everything' for argument '--split'"),
        (["evaluate", "captioning", "--n-pictures", "0"], "--n-pictures is 0"),
        (["evaluate", "captioning", "--n-names", "1"], "--n-names is 1: give an integer from 2"),
        (["evaluate", "captioning", "--seed", "-1"], "--seed is -1"),
        (["evaluate", "infilling", "--n-pictures", "-1"], "--n-pictures is -1"),
        (["evaluate", "selection", "--n", "0"], "--n is 0"),
        (["evaluate", "selection", "--temperature", "nan"], "--temperature is nan"),
        (["evaluate", "sharpness", "--limit", "0"], "--limit is 0"),
        (["evaluate", "sharpness", "--device", "meta"], "device 'meta' cannot be used here"),
        *((["evaluate", "tokenizer", "--size", wrong], f"--size is {wrong}: give") for wrong in ("1", "13", "100000")),
        (["evaluate", "tokenizer", "--level", "3"], "--level is 3: give an integer from 0 to 2"),
        (["evaluate", "tokenizer", "--device", "meta"], "device 'meta' cannot be used here"),
        *((["train", part, f"--{option}", wrong], f"--{option} is ") for part, option, wrong in WRONG_TRAINING),
        *((["train", part, "--device", "meta"], "device 'meta' cannot") for part in ("vqvae", "coglm", "direct")),
        (["evaluate", "tokenizer", "--size", "33"], "--size is 33: give a multiple of 4"),
        (["train", "coglm", "--preset", "toyy"], "unknown preset 'toyy'"),
        (["train", "coglm", "--out", "file"], "it is a file"),
        (["train", "vqvae", "--out", "file"], "it is a file"),
        (["train", "text", "--out", "file"], "it is a file"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    tiny: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("minicogview.evaluation.metrics.render", lambda size: np.zeros((3139, size, size, 3), np.uint8))
    Path("file").write_text("something else")
    needs_weights = arguments[0] in ("generate", "evaluate") and not {"--preset", "--weights"} & set(arguments)
    status, out, err = run(capsys, *arguments, *(tiny if needs_weights else []))
    assert (status, out) == (2, "")
    assert message in err and err.startswith("minicogview: ") and err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["file"]


@pytest.mark.parametrize("preset", ["small", "cogview2"])
def test_presets_without_weights(preset: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "generate", "cat", "--preset", preset, "--out", str(tmp_path / "out"))
    assert (status, out) == (2, "") and not (tmp_path / "out").exists()
    assert f"no weights ship with the preset '{preset}'" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["coglm.safetensors", "vqvae.safetensors", "text.model"])
def test_damaged_weights(tiny: list[str], weights: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    broken = Path(shutil.copytree(weights, "broken"), name)
    broken.write_bytes(broken.read_bytes()[:1000])
    status, out, err = run(capsys, "generate", "cat", "--weights", "broken", "--out", "out")
    assert (status, out) == (2, "") and not Path("out").exists()
    assert str(broken) in err and "damaged" in err and err.count("\n") == 1


def test_a_bad_text_does_not_stop_the_others(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["cat", "", "apple " * 60, "\udcff", "红苹果"]
    status, out, err = run(capsys, "generate", *texts, *tiny, "--n", "1", "--json")
    reports = json.loads(out)
    assert status == 2 and [report["text"] for report in reports] == texts
    assert ["error" in report for report in reports] == [False, True, True, True, False]
    assert "at most 48" in reports[2]["error"] and "not valid Unicode" in reports[3]["error"]
    assert len(err.splitlines()) == 3 and len(err) < 500
    assert Image.open("pictures/contact_sheet.png").size == (268 + 4, 2 * 268 + 4)
    names = ["cat_0.png", "contact_sheet.png", "红苹果_0.png"]
    assert sorted(path.name for path in Path("pictures").iterdir()) == names


def test_unknown_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nothing"], ["generate", "cat", "--n", "many"], ["evaluate", "retrieval", "--lang", "fr"]):
        status, out, err = run(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("minicogview: ")
    assert "--n is 'many': give an integer" in run(capsys, "generate", "cat", "--n", "many")[2]
    assert "--temperature is 'hot': give a number" in run(capsys, "vary", "a", "b", "--temperature", "hot")[2]
    assert "Unrecognized options: --nn" in run(capsys, "generate", "cat", "--nn=3")[2]


@pytest.mark.parametrize("command", ["edit", "vary", "outpaint"])
def test_wrong_numbers_are_refused_before_weights_are_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"edit": ["--box", "0", "0", "1", "1"], "vary": [], "outpaint": ["--margins", "1", "1", "1", "1"]}[command]
    for option, value in (("--n", "0"), ("--seed", "-1")):
        status, out, err = run(capsys, command, "cat", "nowhere.png", "--weights", "nowhere", *own, option, value)
        assert (status, out) == (2, "") and f"{option} is {value}" in err
