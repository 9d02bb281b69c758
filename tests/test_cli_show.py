"""What a picture's file says about how it was made, and that the command in it makes the same picture again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import run, run_json, tiny, weights

from minicogview.results import save

__all__ = ["tiny", "weights"]  # fixtures


def test_every_picture_can_be_made_again(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n", "3", "--seed", "7", "--top-k", "5", "--temperature", "2", "--style", "flat", "--keep", "2"]
    first, _ = run_json(capsys, "generate", "a 'red' apple", "红苹果", *tiny, *options, "--preset", "tiny")
    assert first["settings"]["top_k"] == 5 and first["style"] == "flat" and {"vqvae", "coglm"} < set(first["sha256"])
    for file in (*first["files"], first["sheet"]):
        known = run_json(capsys, "show", file)
        assert known["settings"] == first["settings"] and known["sha256"] == first["sha256"]
        assert {"minicogview", "torch", "python"} == set(known["versions"])
        words = shlex.split(known["command"])
        assert words.pop(0) == "minicogview"
        (again, *_) = run_json(capsys, *words, "--out", "again", "--overwrite")
        other = again["sheet" if file == first["sheet"] else "files"]
        with Image.open(file) as one, Image.open(other if isinstance(other, str) else other[0]) as two:
            assert np.array_equal(np.asarray(one), np.asarray(two))
    assert known["prompt"] == ["a 'red' apple", "红苹果"] and known["n"] == 3 and known["keep"] == 2
    status, out, err = run(capsys, "show", first["files"][0])
    assert (status, err) == (0, "") and "a 'red' apple" in out and out.splitlines()[-1].startswith("command ")
    with Image.open(first["files"][0]) as image:
        assert image.text["parameters"].startswith("a 'red' apple\n") and "seed: " in image.text["parameters"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not say how it was made"),
        ("null", "does not say how it was made"),
        ("[1]", "does not say how it was made"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"prompt": "cat", "settings": {}, "n": 1}', "seed is None"),
        ('{"prompt": "cat", "settings": {}, "n": "1; rm -rf", "seed": 1}', "n is '1; rm -rf'"),
    ],
)
def test_show_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    save(Image.new("RGB", (4, 4)), tmp_path / "a.png", {} if text is None else {"minicogview": text})
    status, out, err = run(capsys, "show", str(tmp_path / "a.png"))
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err
    assert "does not exist" in run(capsys, "show", str(tmp_path / "b.png"))[2]
    (tmp_path / "c.png").write_text("no picture")
    assert "cannot be read" in run(capsys, "show", str(tmp_path / "c.png"))[2]


def test_a_strangers_file_cannot_put_words_into_the_shell_or_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"prompt": "cat; rm -rf ~ \x1b[2J", "settings": {"top_k": "3 $(id)"}, "n": 1, "seed": 1, "command": "rm"}
    save(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"minicogview": json.dumps(record)})
    status, out, _ = run(capsys, "show", str(tmp_path / "a.png"))
    assert status == 0 and "\x1b" not in out
    command = out.splitlines()[-1].removeprefix("command").strip()
    assert shlex.split(command) == [
        "minicogview", "generate", "cat; rm -rf ~  [2J", "--n", "1", "--seed", "1", "--top-k", "3 $(id)"
    ]  # fmt: skip
