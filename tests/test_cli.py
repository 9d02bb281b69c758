"""The command line: what it writes and prints, and how it answers wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, write_tiny

from minicogview.cli import generate as cli_generate
from minicogview.cli.main import main
from minicogview.config import PRESETS
from minicogview.data.emoji import load_emoji
from minicogview.evaluation import judge as evaluate


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that select the random system, with an empty folder as the working folder."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    return ["--weights", str(weights)]


@pytest.fixture
def few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in place of the emoji, which take too long to render at another size."""
    n = len(load_emoji("all"))

    def noise(size: int, progress: bool = True) -> torch.Tensor:
        return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(size))

    monkeypatch.setattr(evaluate, "emoji_pictures", noise)
    monkeypatch.setattr("minicogview.training.recipes.emoji_pictures", noise)
    monkeypatch.setattr("minicogview.data.codes.emoji_pictures", noise)  # what encode_pairs calls


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a successful command prints as JSON, and that it prints nothing else."""
    status, out, err = run(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


# --- generate


def test_generate_writes_pictures_and_a_sheet(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "generate", "A red apple!", "红苹果", *tiny, "--n", "3", "--out", "a/b")
    assert (status, err) == (0, "")
    names = [f"{stem}_{seed}.png" for stem in ("a-red-apple", "红苹果") for seed in range(3)]
    assert sorted(path.name for path in Path("a/b").iterdir()) == sorted([*names, "contact_sheet.png"])
    assert all(str(Path("a/b", name)) in out for name in [*names, "contact_sheet.png"])
    assert Image.open("a/b/红苹果_2.png").size == (264, 264)  # 12 pixels, each 22 wide
    assert Image.open("a/b/contact_sheet.png").size == (3 * 268 + 4, 2 * 268 + 4)


def test_generate_prints_json(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = [*tiny, "--n", "2", "--seed", "7", "--out", "out", "--scale", "1"]
    (report,) = run_json(capsys, "generate", "cat", *options)
    assert report["text"] == "cat" and report["seeds"] == [7, 8] and len(report["scores"]) == 2
    assert report["files"] == [str(Path("out/cat_7.png")), str(Path("out/cat_8.png"))]
    assert report["sheet"] == str(Path("out/contact_sheet.png"))
    assert [Image.open(path).size for path in report["files"]] == [(12, 12)] * 2


def test_generate_keeps_the_best(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n", "5", "--keep", "2", "--seed", "3", "--out", "kept"]
    (report,) = run_json(capsys, "generate", "cat", *options, *tiny)
    assert len(report["files"]) == 2 and sorted(report["caption_scores"], reverse=True) == report["caption_scores"]
    assert [Path(file).stem for file in report["files"]] == [f"cat_{seed}" for seed in report["seeds"]]
    _, out, _ = run(capsys, "generate", "cat", *options, *tiny)
    assert out.count("caption score") == 2


def test_generate_repeats_itself(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for n, seed, out in [("4", "0", "a"), ("4", "0", "b"), ("1", "3", "c")]:
        assert run(capsys, "generate", "cat", *tiny, "--n", n, "--seed", seed, "--out", out)[0] == 0
    last = [Path(out, "cat_3.png").read_bytes() for out in "abc"]
    assert last[0] == last[1] == last[2]
    assert last[0] != Path("a/cat_0.png").read_bytes()


def test_sampling_options_reach_the_sampler(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n", "2", "--temperature", "0", "--top-k", "3", "--guidance", "2"]
    (report,) = run_json(capsys, "generate", "cat", *tiny, *options)
    first, second = (np.array(Image.open(path)) for path in report["files"])
    assert np.array_equal(first, second)  # the likeliest tokens


def test_nothing_is_overwritten_unless_asked_for(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def files(text: str, *options: str) -> list[str]:
        (report,) = run_json(capsys, "generate", text, *tiny, "--n", "1", "--out", "out", *options)
        return [Path(path).name for path in (*report["files"], report["sheet"])]

    assert files("red apple") == ["red-apple_0.png", "contact_sheet.png"]
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert files("Red apple!") == ["red-apple-2_0.png", "contact_sheet-2.png"]
    assert files("red apple", "--seed", "1") == ["red-apple-3_1.png", "contact_sheet-3.png"]
    assert all(Path("out", name).read_bytes() == content for name, content in before.items())
    assert files("cat", "--overwrite") == ["cat_0.png", "contact_sheet.png"]
    assert files("Red apple!", "--overwrite", "--temperature", "0") == ["red-apple_0.png", "contact_sheet.png"]
    assert len(list(Path("out").iterdir())) == 7
    assert Path("out/red-apple_0.png").read_bytes() != before["red-apple_0.png"]
    Image.new("RGB", (9, 9)).save("photo.png")
    for name in ("cat_vary_0.png", "cat_vary-2_0.png"):
        (file,) = run_json(capsys, "vary", "cat", "photo.png", *tiny, "--n", "1", "--out", "out")["files"]
        assert Path(file).name == name


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_each_picture_is_written_when_it_is_done(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reason: BaseException
) -> None:
    save = Image.Image.save

    def fail_at_the_third(self: Image.Image, path: Any, *args: Any, **options: Any) -> None:
        if "cat_2" in str(path):
            raise reason
        save(self, path, *args, **options)

    monkeypatch.setattr(Image.Image, "save", fail_at_the_third)
    status, out, err = run(capsys, "generate", "cat", *tiny, "--n", "5", "--out", "out")
    stopped = isinstance(reason, KeyboardInterrupt)
    assert (status, out, err.count("\n")) == (130 if stopped else 2, "", 1)
    assert ("finished pictures are saved" if stopped else "No space left on device") in err
    assert {"cat_0.png", "cat_1.png"} <= {path.name for path in Path("out").iterdir()}
    assert not {"cat_2.png", "cat_3.png"} & {path.name for path in Path("out").iterdir()}


def test_the_home_folder_is_understood(
    tiny: list[str], weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(weights.parent))
    options = ["--weights", f"~/{weights.name}", "--n", "1", "--out", "~/pictures"]
    (report,) = run_json(capsys, "generate", "cat", *options)
    assert report["files"] == [str(weights.parent / "pictures/cat_0.png")] and not Path("~").exists()
    for wrong in ("~nobody-of-this-name/x\0", "x\0"):
        status, _, err = run(capsys, "train", "text", "--out", wrong)
        assert status == 2 and "cannot write into" in err and err.count("\n") == 1


def test_a_contact_sheet_of_many_pictures_stays_small() -> None:
    small, large = Image.new("RGB", (96, 96)), Image.new("RGB", (480, 480))
    assert cli_generate.sheet_scale([[small] * 4]) >= 3 and cli_generate.sheet_scale([[small] * 4, [small] * 800]) == 2
    assert cli_generate.sheet_scale([[large] * 10_000]) == 1


def test_file_names() -> None:
    taken: set[str] = set()
    texts = ["A red apple!", "a red apple?", "猫 脸", "🍎", "../../etc", "x" * 300]
    stems = [cli_generate.free_stem(text, taken) for text in texts]
    assert stems == ["a-red-apple", "a-red-apple-2", "猫-脸", "picture", "etc", "x" * 40]


def test_help_is_quick_because_it_loads_no_torch() -> None:
    program = (
        "import sys\nfrom minicogview.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(name in ended.stdout for name in ("generate", "train", "evaluate", "info"))
    assert ended.stdout.splitlines()[-1] == "0 False"


# --- edit


def test_edit_draws_inside_the_mask_alone(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(before).save("photo.png")
    mask = np.zeros((30, 50), np.uint8)
    mask[:15, 10:25] = 255
    Image.fromarray(mask).save("mask.png")
    painted = run_json(capsys, "edit", "a cat", "photo.png", "--mask", "mask.png", "--n", "2", "--out", "a", *tiny)
    boxed = run_json(capsys, "edit", "a cat", "photo.png", "--box", "0", "0.2", "0.5", "0.5", "--n", "2", *tiny)
    assert len(painted["files"]) == 2 and painted["seeds"] == [0, 1]
    for one, other in zip(painted["files"], boxed["files"], strict=True):
        after = np.asarray(Image.open(one))
        assert np.array_equal(after, np.asarray(Image.open(other)))
        assert np.array_equal(after[mask == 0], before[mask == 0]) and (after[mask > 0] != before[mask > 0]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --mask FILE or --box"),
        (["--mask", "photo.png", "--box", "0", "0", "1", "1"], "either --mask FILE or --box"),
        (["--box", "0.5", "0", "0.2", "1"], "top above bottom"),
        (["--box", "0.5", "0", "0.51", "1"], "holds no pixel"),
        (["--mask", "nowhere.png"], "nowhere.png does not exist"),
        (["--mask", "black.png"], "marks nothing"),
        (["--mask", "large.png"], "mask has size (9, 9), the picture (8, 8)"),
    ],
)
def test_edit_refuses(tiny: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, side, colour in (("photo", 8, 90), ("black", 8, 0), ("large", 9, 255)):
        Image.new("L", (side, side), colour).save(f"{name}.png")
    status, out, err = run(capsys, "edit", "cat", "photo.png", *options, "--out", "new", *tiny)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err
    assert not Path("new").exists()


def test_vary_and_outpaint(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (9, 7), (90, 0, 0)).save("photo.png")
    result = run_json(capsys, "vary", "cat", "photo.png", "--share", "0.3", "--n", "2", "--out", "new", *tiny)
    assert result["files"] == [str(Path("new") / f"cat_vary_{i}.png") for i in range(2)]
    options = ["--margins", "2", "0", "3", "4", "--n", "1", "--out", "new", *tiny]
    (file,) = run_json(capsys, "outpaint", "cat", "photo.png", *options)["files"]
    assert Image.open(file).size == (13, 12) and Image.open(file).getpixel((8, 8)) == (90, 0, 0)
    status, out, err = run(capsys, "vary", "cat", "photo.png", "--share", "2", *tiny)
    assert (status, out) == (2, "") and "share is 2" in err


# --- Ctrl-C


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "cat"], "stopped; finished pictures are saved"),
        (
            ["edit", "cat", "photo.png", "--box", "0", "0", "1", "1"],
            "stopped; pictures are saved only when all are drawn",
        ),
        (["evaluate", "retrieval"], "stopped; nothing was saved"),
        (["import", ".", "out"], "stopped; run the same command again to resume; complete files are kept"),
        (["train", "vqvae"], "stopped; run the same command again to resume from its last checkpoint, if it has one"),
        (["train", "text"], "stopped; nothing was saved"),
        (["doctor", "toy"], "stopped"),
        (
            ["evaluate", "captioning", "--weights=random"],
            "stopped; nothing was saved; the same command writes the random weights that are still missing",
        ),
    ],
)
def test_ctrl_c_says_what_is_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for work in (
        "cli.shared.WeightsOptions.load", "cli.doctor.doctor", "checkpoints.importing.import_released",
        "training.vqvae.train", "training.text.train_toy",
    ):  # fmt: skip
        monkeypatch.setattr(f"minicogview.{work}", stop)
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *arguments) == (130, "", f"minicogview: {message}\n")


# --- info, pipes


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    toy = run_json(capsys, "info", "toy")
    assert toy["total"]["parameters"] * 2 == toy["total"]["fp16_bytes"] < 40e6
    status, out, err = run(capsys, "info", "cogview2")
    assert (status, err) == (0, "")
    assert "5,902,285,824" in out and "GFLOP" in out


def test_a_closed_pipe_is_no_error() -> None:
    program = "import sys; from minicogview.cli.main import main; sys.exit(main(['info', 'toy', '--json']))"
    command = [sys.executable, "-u", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


# --- the shipped weights


def test_shipped_toy_from_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minicogview", "generate", "a red apple", "猫脸", "--n", "2", "--json"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert (ended.returncode, ended.stderr) == (0, "")
    reports = json.loads(ended.stdout)
    assert [report["text"] for report in reports] == ["a red apple", "猫脸"]
    assert all(Image.open(tmp_path / path).size == (288, 288) for report in reports for path in report["files"])
