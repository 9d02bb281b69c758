"""From text to pictures: loading, drawing, filling in and describing."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, write_tiny

import minicogview
from minicogview import masking, pipeline
from minicogview.attention import attention_bias
from minicogview.checkpoints.weight_files import save_model
from minicogview.config import PRESETS
from minicogview.errors import MiniCogViewError
from minicogview.pipeline import CogView2
from minicogview.vqvae import VQVAE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> CogView2:
    return CogView2.from_pretrained(folder, TINY)


# --- importing


def test_importing_the_package_loads_nothing() -> None:
    program = "import sys, minicogview; minicogview.PRESETS; print('torch' in sys.modules, minicogview.CogView2)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "<class", "'minicogview.pipeline.CogView2'>"]


def test_public_names() -> None:
    for name in minicogview.__all__:
        assert getattr(minicogview, name) is not None and name in dir(minicogview)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        minicogview.nothing  # noqa: B018
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{minicogview.__version__}"\n' in pyproject


# --- drawing


def test_generate_keeps_tokens_scores_and_seeds(model: CogView2) -> None:
    pictures = model.generate("a red apple", n=3, seed=5)
    assert len(pictures) == 3 and pictures.seeds == [5, 6, 7] and pictures.text == "a red apple"
    assert pictures.tokens.shape == (3, 3, 3) and pictures.scores.shape == (3,)
    assert [image.size for image in pictures] == [(12, 12)] * 3
    for image, tokens in zip(pictures, pictures.tokens):
        assert np.array_equal(image, model.tokenizer.decode_picture(tokens))


def test_same_seed_same_picture_whatever_n(model: CogView2, monkeypatch: pytest.MonkeyPatch) -> None:
    four = model.generate("红苹果", n=4, seed=10)
    assert len({tuple(tokens.flatten().tolist()) for tokens in four.tokens}) == 4
    again, alone = model.generate("红苹果", n=4, seed=10), model.generate("红苹果", n=1, seed=12)
    assert torch.equal(four.tokens, again.tokens)
    assert torch.equal(four.tokens[2], alone.tokens[0]) and np.array_equal(four[2], alone[0])
    monkeypatch.setattr(pipeline, "BATCH", 3)
    steps: list[tuple[str, int, int]] = []
    split = model.generate("红苹果", n=4, seed=10, on_step=lambda *step: steps.append(step))
    assert torch.equal(four.tokens, split.tokens)
    assert steps == [("coglm", done, 2 * 9) for done in range(1, 2 * 9 + 1)]


def test_text_decides_the_picture_and_blanks_do_not(model: CogView2) -> None:
    apple, cat = model.generate("a red apple", n=2), model.generate("cat face", n=2)
    assert not torch.equal(apple.tokens, cat.tokens)
    assert torch.equal(apple.tokens, model.generate(" a red apple\n", n=2).tokens)


def test_scores_are_the_plain_models_mean_log_probability(model: CogView2) -> None:
    pictures = model.generate("a red apple", n=2, temperature=0.5, top_k=3, text_weight=0)
    ids, coglm = model.encode("a red apple"), model.coglm
    prompt = torch.tensor([*ids, model.tokenizer.boi])
    tokens = torch.cat([prompt.expand(2, -1), pictures.tokens.flatten(1)], 1)  # (2, S)
    positions, mask = masking.inference(len(ids), tokens.shape[1], TINY.coglm.layout)
    with torch.no_grad():
        hidden = coglm.transformer(tokens, positions[None], attention_bias(mask))[:, len(ids) : -1]
        log_p = coglm.transformer.logits(hidden, TINY.vqvae.codebook_size).log_softmax(-1)
    expected = log_p.gather(-1, pictures.tokens.flatten(1)[..., None]).mean((1, 2))
    torch.testing.assert_close(pictures.scores, expected, atol=1e-4, rtol=0)


def test_sampling_settings_can_be_replaced(model: CogView2) -> None:
    certain = model.generate("cat", n=3, temperature=0)
    assert torch.equal(certain.tokens[0], certain.tokens[2])
    free = model.generate("cat", n=3, temperature=3, top_k=64, n_clusters=0)
    assert not torch.equal(free.tokens[0], free.tokens[2])
    guided = model.generate("cat", n=3, guidance=3.0)
    assert guided.tokens.shape == (3, 3, 3) and len(guided.scores) == 3
    alone = model.generate("cat", n=1, seed=2, guidance=3.0)
    assert torch.equal(guided.tokens[2], alone.tokens[0])
    assert model.sampling == TINY.sampling


def test_post_selection_keeps_the_likeliest_captions(model: CogView2, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = model.generate("red apple", n=6, seed=3)
    assert everything.caption_scores is None
    scores = torch.stack([model.score(tokens, ["red apple"])[0] for tokens in everything.tokens])
    monkeypatch.setattr(pipeline, "BATCH", 4)
    kept = model.generate("red apple", n=6, seed=3, keep=2)
    order = scores.argsort(descending=True)[:2]
    assert len(kept) == 2 and kept.seeds == [everything.seeds[i] for i in order]
    assert torch.equal(kept.tokens, everything.tokens[order])
    assert all(np.array_equal(a, everything[i]) for a, i in zip(kept, order.tolist()))
    assert kept.caption_scores is not None
    torch.testing.assert_close(kept.caption_scores, scores[order])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": "cat", "n": 2, "keep": 3}, "keep is 3: give an integer from 1 to 2"),
        ({"text": "cat", "keep": 0}, "keep is 0"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "apple " * 60}, r"text has 60 tokens, at most 48 fit"),
        ({"text": "cat", "n": 0}, "n is 0"),
        ({"text": "cat", "seed": -1}, "seed is -1"),
        ({"text": "cat", "temperature": -1}, "temperature is -1: give a number from 0 to 1000"),
        ({"text": "cat", "temperature": float("nan")}, "temperature is nan"),
        ({"text": "cat", "top_k": 0}, "top_k is 0"),
        ({"text": "cat", "n_clusters": 65}, "65 clusters of 64"),
        ({"text": None}, "text is None: give a string"),
        ({"text": 7}, "text is 7: give a string"),
        ({"text": "cat", "n": 10**9}, "n is 1000000000: give an integer from 1 to 10000"),
        ({"text": "cat", "n": 1.5}, "n is 1.5"),
        ({"text": "cat", "n": "2"}, "n is '2'"),
        ({"text": "cat", "n": True}, "n is True"),
        ({"text": "cat", "seed": 0.5}, "seed is 0.5"),
        ({"text": "cat", "seed": 10**22}, "seed is 1000"),
        ({"text": "cat", "stages": 0}, "stages is 0: give an integer from 1 to 1"),
        ({"text": "cat", "temperature": "0.5"}, "temperature is '0.5': give a number"),
        ({"text": "cat", "temperature": None}, "temperature is None"),
        ({"text": "cat", "temperature": 1e-30}, "temperature is 1e-30: give 0"),
        ({"text": "cat", "top_k": 5.5}, "top_k is 5.5: give an integer"),
        ({"text": "cat", "guidance": -5}, "guidance is -5: give a number from 0 to 1000"),
        ({"text": "cat", "text_weight": float("inf")}, "text_weight is inf"),
        ({"text": "cat", "heat": 1}, "unknown sampling setting 'heat': choose from temperature"),
    ],
)
def test_generate_refuses(model: CogView2, arguments: dict, message: str) -> None:
    with pytest.raises(MiniCogViewError, match=message):
        model.generate(**arguments)


def test_numbers_of_other_types_are_taken(model: CogView2) -> None:
    plain = model.generate("cat", n=2, seed=3, top_k=5, temperature=2)
    settings = {"top_k": 5.0, "temperature": np.float32(2)}
    same = model.generate("cat", n=np.int64(2), seed=torch.tensor(3), keep=None, stages=1.0, **settings)
    assert torch.equal(plain.tokens, same.tokens) and same.seeds == [3, 4] and type(same.seeds[0]) is int
    assert torch.equal(plain.tokens[:1], model.generate("cat", n=1.0, seed=np.int8(3), **settings).tokens)
    free = model.generate("cat", n=2, seed=None)
    assert torch.equal(free.tokens, model.generate("cat", n=2, seed=free.seeds[0]).tokens)  # the seed is reported
    assert model.complete("cat", free.tokens[0], torch.eye(3), n=2.0, seed=None).tokens.shape == (2, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_the_process_does_not_matter(folder: Path, model: CogView2, dtype: torch.dtype) -> None:
    def results(model: CogView2) -> list[torch.Tensor]:
        drawn = model.generate("a red apple", n=3, seed=1, keep=2)
        completed = model.complete("cat", drawn[0], torch.eye(3), seed=1)
        return [drawn.tokens, drawn.caption_scores, completed.tokens, model.score(drawn[0], ["cat", "dog"])]

    expected = results(model)
    torch.set_default_dtype(dtype)
    try:
        found = [results(model), results(CogView2.from_pretrained(folder, TINY))]
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    for values in found:
        assert all(torch.equal(one, other) for one, other in zip(values, expected, strict=True))


# --- the other tasks


def test_complete_draws_the_region_and_keeps_the_rest(model: CogView2) -> None:
    start = model.generate("a red apple", n=1, seed=3).tokens[0]
    region = [[0, 0, 1], [0, 1, 1], [0, 0, 0]]
    pictures = model.complete("cat", start, region, n=5, seed=1, temperature=2, top_k=16)
    kept = ~torch.tensor(region).bool()
    assert pictures.tokens.shape == (5, 3, 3)
    assert (pictures.tokens[:, kept] == start[kept]).all()
    assert len({tuple(tokens.flatten().tolist()) for tokens in pictures.tokens}) > 1
    alone = model.complete("cat", start, np.array(region), seed=3, temperature=2, top_k=16)
    assert torch.equal(alone.tokens[0], pictures.tokens[2])
    for wrong in (torch.zeros(3, 3), torch.ones(2, 3)):
        with pytest.raises(MiniCogViewError, match=r"region of shape .* give \(3, 3\)"):
            model.complete("cat", start, wrong)


def test_pictures_come_in_many_forms(model: CogView2, tmp_path: Path) -> None:
    picture = model.generate("cat", n=1)[0]
    codes = model.codes(picture)
    assert codes.shape == (3, 3)
    picture.save(tmp_path / "cat.png")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for same in (tmp_path / "cat.png", str(tmp_path / "cat.png"), pixels, pixels / 255, codes, codes.int()):
        assert torch.equal(model.codes(same), codes)
    assert model.codes(Image.new("RGB", (50, 20))).shape == (3, 3)
    for wrong in (torch.zeros(3, 4).long(), torch.full((3, 3), 64), torch.full((3, 3), -1)):
        with pytest.raises(MiniCogViewError, match=r"codes of shape .* give \(3, 3\) with values 0..63"):
            model.codes(wrong)
    with pytest.raises(MiniCogViewError, match="does not exist"):
        model.codes(tmp_path / "dog.png")


def test_caption_and_score(model: CogView2) -> None:
    picture = model.generate("cat", n=1)[0]
    assert isinstance(model.caption(picture), str) and isinstance(model.caption(picture, "zh"), str)
    with pytest.raises(MiniCogViewError, match="language 'fr'"):
        model.caption(picture, "fr")
    texts = ["a red apple", "红苹果", "cat", "猫"]
    together = model.score(picture, texts)
    one_by_one = torch.cat([model.score(picture, [text]) for text in texts])
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=0)
    assert torch.equal(model.score(picture, "a red apple"), model.score(picture, ["a red apple"]))
    assert (together < 0).all() and len(model.score(picture, [])) == 0
    with pytest.raises(MiniCogViewError, match="text is empty"):
        model.score(picture, ["cat", ""])


# --- loading


def test_sizes_name_the_preset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MiniCogViewError, match="sizes of no preset: name the preset"):
        CogView2.from_pretrained(folder)
    assert CogView2.from_pretrained(folder, "toy").sampling == PRESETS["toy"].sampling
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    assert CogView2.from_pretrained(str(folder)).sampling == TINY.sampling
    monkeypatch.setenv("HOME", str(folder.parent))
    for home in (f"~/{folder.name}", Path("~", folder.name)):
        assert CogView2.from_pretrained(home).sampling == TINY.sampling


def test_presets_without_weights(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("small", "cogview2"):
        with pytest.raises(MiniCogViewError, match=f"no weights ship with the preset '{name}': give a folder"):
            CogView2.from_pretrained(name)
    with pytest.raises(MiniCogViewError, match="'toyy' is neither a preset"):
        CogView2.from_pretrained("toyy")
    with pytest.raises(MiniCogViewError, match="unknown preset 'toyy'"):
        CogView2.from_pretrained(folder, "toyy")
    shutil.copytree(folder, tmp_path / "tiny")
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr("minicogview.checkpoints.models.SHIPPED", tmp_path)
    assert CogView2.from_pretrained("tiny").size == 12


@pytest.mark.parametrize("name", ["coglm.safetensors", "vqvae.safetensors", "text.model"])
def test_missing_and_damaged_files_are_named(folder: Path, tmp_path: Path, name: str) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    whole = (broken / name).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" * 100, b"not a weight file"):
        (broken / name).write_bytes(damaged)
        with pytest.raises(MiniCogViewError, match=re.escape(str(broken / name))) as caught:
            CogView2.from_pretrained(broken, TINY)
        assert "\n" not in str(caught.value)
    (broken / name).unlink()
    with pytest.raises(MiniCogViewError, match=re.escape(str(broken / name))):
        CogView2.from_pretrained(broken, TINY)


def test_files_of_different_models_are_refused(folder: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(folder, tmp_path / "mixed"))
    other = dataclasses.replace(TINY.vqvae, codebook_size=32)
    save_model(mixed / "vqvae.safetensors", VQVAE(other), other, "vqvae")
    with pytest.raises(MiniCogViewError, match=r"different models: coglm\.safetensors expects 64 picture codes"):
        CogView2.from_pretrained(mixed, TINY)
    shutil.copyfile(folder / "coglm.safetensors", mixed / "vqvae.safetensors")
    with pytest.raises(MiniCogViewError, match="holds 'coglm', expected 'vqvae'"):
        CogView2.from_pretrained(mixed, TINY)


def test_cluster_labels_beside_the_weights_are_used(folder: Path, tmp_path: Path) -> None:
    labelled = Path(shutil.copytree(folder, tmp_path / "labelled"))
    labels = np.arange(64) % 5
    np.save(labelled / "cluster_label.npy", labels)
    model = CogView2.from_pretrained(labelled, TINY)
    clusters = model.sampler([0]).clusters
    assert clusters is not None and clusters.labels.tolist() == labels.tolist()
    picture = model.generate("cat", n=1, n_clusters=5)  # their own number of clusters
    assert torch.equal(picture.tokens, model.generate("cat", n=1).tokens) and model.generate("cat", n=1, n_clusters=0)
    with pytest.raises(MiniCogViewError, match=r"n_clusters is 7: give an integer from 5 to 5 .cluster_label\.npy"):
        model.generate("cat", n=1, n_clusters=7)
    np.save(labelled / "cluster_label.npy", labels[:5])
    with pytest.raises(MiniCogViewError, match=r"cluster_label\.npy"):
        CogView2.from_pretrained(labelled, TINY)


# --- the shipped weights


def test_shipped_toy_draws_a_red_apple_and_knows_it() -> None:
    model = CogView2.from_pretrained("toy")
    pictures = model.generate("a red apple", n=2, seed=0)
    assert [picture.size for picture in pictures] == [(96, 96)] * 2
    for picture in pictures:
        pixels = np.array(picture).reshape(-1, 3).astype(float)
        red, green, blue = pixels[pixels.min(1) < 200].mean(0)  # what is not white
        assert red > green + 40 and red > blue + 40
    likeliest = model.score(pictures[0], ["red apple", "cat face", "blue heart", "airplane"]).argmax()
    assert int(likeliest) == 0
