"""The commands that train and evaluate: what they write and print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import few_pixels, run, run_json, tiny, weights

from minicogview.data.emoji import load_emoji

__all__ = ["few_pixels", "tiny", "weights"]  # fixtures


def test_evaluate(tiny: list[str], few_pixels: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--split", "heldout", "--lang", "zh", "--template", "--limit", "3", *tiny]
    result = run_json(capsys, "evaluate", "retrieval", *options)
    assert set(result) == {"n", "top1", "top5", "same_tone"} and result["n"] == 3
    assert run_json(capsys, "evaluate", "retrieval", "--limit", "2", *tiny)["same_tone"] is None
    result = run_json(capsys, "evaluate", "captioning", "--n-pictures", "4", "--n-names", "3", *tiny)
    assert result["n"] == 4 and result["n_names"] == 3 and 0 <= result["top1"] <= 1
    result = run_json(capsys, "evaluate", "infilling", "--n-pictures", "2", *tiny)
    assert set(result) == {"n", "psnr", "psnr_tokenizer", "exact"}
    result = run_json(capsys, "evaluate", "selection", "--n", "2", "--limit", "3", "--temperature", "1", *tiny)
    assert set(result) == {"n", "random", "kept", "any"} and result["n"] == 3
    status, out, _ = run(capsys, "evaluate", "infilling", "--n-pictures", "2", *tiny)
    assert status == 0 and out.splitlines()[0].split() == ["n", "2"]
    too_few = ["captioning", "--n-pictures", "3", "--n-names", "4"]
    for wrong in (["retrieval", "--limit", "0"], ["selection", "--n", "0"], too_few):
        status, out, err = run(capsys, "evaluate", *wrong, *tiny, "--json")
        assert (status, out, err.count("\n")) == (2, "", 1)


def test_evaluate_tokenizer(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minicogview.evaluation.metrics.render", lambda size: np.zeros((3139, size, size, 3), np.uint8))
    result = run_json(capsys, "evaluate", "tokenizer", "--size", "16", "--level", "1", *tiny)
    assert {"n", "psnr", "ssim"} <= set(result) and result["n"] == len(load_emoji("tokenizer_heldout"))


def test_train_coglm_makes_a_folder_that_can_be_used(
    tiny: list[str], few_pixels: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--preset", "tiny", *tiny, "--out", "run", "--batch-size", "2", "--device", "cpu"]
    result = run_json(capsys, "train", "coglm", *options, "--steps", "2")
    assert result["weights"] == str(Path("run/coglm.safetensors")) and result["step"] == 2
    assert run_json(capsys, "train", "coglm", *options, "--steps", "2")["start"] == 2  # nothing left to do
    status, _, err = run(capsys, "train", "coglm", *options, "--steps", "2", "--seed", "1", "--batch-size", "3")
    assert status == 2 and "batch_size was 2, is 3; seed was 0, is 1" in err and "--force" in err
    extended = run_json(capsys, "train", "coglm", *options, "--steps", "3")
    assert (extended["start"], extended["step"]) == (2, 3)
    forced = run_json(capsys, "train", "coglm", *options, "--steps", "4", "--batch-size", "3", "--force")
    assert (forced["start"], forced["step"]) == (3, 4)
    assert run_json(capsys, "train", "coglm", *options, "--steps", "2", "--no-resume")["start"] == 0
    assert run(capsys, "generate", "cat", "--weights", "run", "--n", "1")[0] == 0


def test_train_and_judge_super_resolution(
    tiny: list[str], few_pixels: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = load_emoji("train")[:24]
    monkeypatch.setattr("minicogview.training.recipes.load_emoji", lambda split: few if split == "train" else [])
    options = ["--preset", "tiny", "--batch-size", "2", "--device", "cpu", "--steps", "2"]
    (folder,) = (Path(tiny[i + 1]) for i, option in enumerate(tiny) if option == "--weights")
    run_json(capsys, "train", "direct", *options, "--weights", str(folder), "--out", str(folder))
    result = run_json(capsys, "train", "iterative", *options, "--weights", str(folder), "--out", str(folder))
    assert result["weights"] == str(folder / "iterative.safetensors") and result["step"] == 2
    numbers = run_json(capsys, "evaluate", "sharpness", "--limit", "3", "--preset", "tiny", "--weights", str(folder))
    assert {"psnr_bicubic", "psnr_direct", "psnr_iterative", "ssim_iterative"} < set(numbers) and numbers["n"] == 3


def test_train_vqvae_hands_its_options_on(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def train(folder: Path, finest: Any, coarser: Any, options: Any, **others: Any) -> dict[str, Any]:
        given.update(others, folder=folder, finest=finest, coarser=coarser, options=options)
        return {"weights": "somewhere"}

    monkeypatch.setattr("minicogview.training.vqvae.train", train)
    command = ["train", "vqvae", "--out", "run", "--steps", "5", "--coarse-steps", "0", "--seed", "3", "--no-resume"]
    assert run_json(capsys, *command)["weights"]
    assert given["folder"] == Path("run") and given["seed"] == 3 and given["options"].resume is False
    assert given["finest"].steps == 5 and given["finest"].precision == "auto" and given["coarser"] is None
