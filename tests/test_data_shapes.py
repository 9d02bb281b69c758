"""Scenes of shapes: the checker is right about clean and blurred pictures and notices each wrong attribute."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from minicogview.checkpoints.weight_files import load_coglm, load_vqvae
from minicogview.coglm import CogLM
from minicogview.data.shapes import (
    COLOURS,
    HELDOUT_PAIRS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    check,
    draw,
    find,
    random_scene,
)
from minicogview.errors import MiniCogViewError
from minicogview.tokenizer import Tokenizer
from minicogview.training.recipes import TOY_WEIGHTS

SHIPPED = TOY_WEIGHTS.parent / "shapes"
SCENE = Scene(
    things=(Thing("small", "red", "circle"), Thing("big", "blue", "square")), relation="above", place=0
)
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def scenes(n: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, heldout=i % 3 == 0) for i in range(n)]


def another(values: list[str], but: set[str], rng: random.Random) -> str:
    return rng.choice([value for value in values if value not in but])


@pytest.mark.parametrize(("size", "n"), [(16, 500), (32, 500), (64, 60)])
def test_clean_drawings_score_everything(size: int, n: int) -> None:
    for scene in scenes(n):
        result = check(draw(scene, size), scene)
        assert all(result.values()), (scene, result)
        assert ("relation" in result) == (len(scene.things) == 2)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("attribute", ["count", "colour", "shape", "size", "relation"])
def test_each_wrong_attribute_is_noticed(attribute: str, size: int) -> None:
    rng = random.Random(1)
    for scene in scenes(150, seed=1):
        wrong = _spoil(scene, attribute, rng)
        if wrong is None:
            continue
        result = check(draw(wrong, size), scene)
        assert not result[attribute], (scene, wrong, result)
        if attribute != "count":
            assert [key for key, right in result.items() if not right] == [attribute], (scene, wrong, result)


def _spoil(scene: Scene, attribute: str, rng: random.Random) -> Scene | None:
    """The same scene with one attribute changed, None if that is not possible."""
    first, *rest = scene.things
    if attribute == "relation":
        return replace(scene, relation=OPPOSITE[scene.relation]) if scene.relation else None
    if attribute == "count":
        return Scene((first,), None, 0) if rest else Scene((first, _other_thing(first)), "above", 0)
    if attribute == "colour":
        first = replace(first, colour=another(list(COLOURS), {thing.colour for thing in scene.things}, rng))
    elif attribute == "shape":
        first = replace(first, shape=another(list(SHAPES), {first.shape}, rng))
    else:
        first = replace(first, size=another(list(SIZES), {first.size}, rng))
    return replace(scene, things=(first, *rest))


def _other_thing(thing: Thing) -> Thing:
    return Thing("big", "blue" if thing.colour != "blue" else "red", "square")


def test_the_checker_tolerates_blur_and_noise() -> None:
    noise = np.random.default_rng(0)
    for scene in scenes(200, seed=2):
        soft = Image.fromarray(draw(scene, 32)).filter(ImageFilter.GaussianBlur(0.7))
        grainy = np.clip(np.asarray(soft) + noise.normal(0, 10, (32, 32, 3)), 0, 255).astype(np.uint8)
        assert all(check(grainy, scene).values()), scene


def test_at_16_pixels_the_checker_tolerates_noise() -> None:
    noise = np.random.default_rng(0)
    for scene in scenes(200, seed=3):
        grainy = np.clip(draw(scene, 16) + noise.normal(0, 15, (16, 16, 3)), 0, 255).astype(np.uint8)
        assert all(check(grainy, scene).values()), scene


def test_an_empty_and_a_noisy_picture_show_nothing() -> None:
    white = np.full((32, 32, 3), 255, dtype=np.uint8)
    assert find(white) == []
    assert not any(check(white, SCENE).values())
    chaos = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert not all(check(chaos, SCENE).values())


def test_pictures_without_the_heldout_pairs_and_with_them() -> None:
    rng = random.Random(4)
    for _ in range(300):
        seen = {(thing.colour, thing.shape) for thing in random_scene(rng).things}
        assert not seen & HELDOUT_PAIRS
        first, *rest = random_scene(rng, heldout=True).things
        assert (first.colour, first.shape) in HELDOUT_PAIRS
        assert not {(thing.colour, thing.shape) for thing in rest} & HELDOUT_PAIRS
    assert {shape for _, shape in HELDOUT_PAIRS} == set(SHAPES)


def test_captions() -> None:
    assert caption(SCENE, "en") == "a small red circle above a big blue square"
    assert caption(SCENE, "zh") == "小红色圆形在大蓝色方形上面"
    beside = replace(SCENE, relation="left of")
    assert caption(beside, "en") == "a small red circle to the left of a big blue square"
    assert caption(beside, "zh") == "小红色圆形在大蓝色方形左边"
    alone = Scene(things=SCENE.things[:1], relation=None, place=3)
    assert (caption(alone, "en"), caption(alone, "zh")) == ("a small red circle", "小红色圆形")
    with pytest.raises(MiniCogViewError, match="en, zh"):
        caption(SCENE, "fr")


def test_different_captions_for_different_scenes() -> None:
    words = {(scene.things, scene.relation): caption(scene, "zh") for scene in scenes(500)}
    assert len(set(words.values())) == len(words)


@pytest.mark.parametrize(("size", "most"), [(16, 100), (32, 180)])
def test_drawings_use_few_patches_of_four_pixels(size: int, most: int) -> None:
    pictures = [draw(scene, size) for scene in scenes(500)]
    starts = range(0, size, 4)
    patches = {
        picture[i : i + 4, j : j + 4].tobytes() for picture in pictures for i in starts for j in starts
    }
    assert len(patches) <= most


def test_a_size_off_the_grid_is_refused() -> None:
    with pytest.raises(MiniCogViewError, match="multiple of 16"):
        draw(SCENE, 20)


# --- What ships for the notebook on CogLM (scripts/make_shapes.py) --------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> tuple[CogLM, Tokenizer]:
    vqvae = load_vqvae(SHIPPED / "vqvae.safetensors")
    return load_coglm(SHIPPED / "coglm.safetensors"), Tokenizer(SHIPPED / "text.model", 24, vqvae)


def test_shipped_text_model_has_a_piece_for_every_word(shipped: tuple[CogLM, Tokenizer]) -> None:
    _, tokenizer = shipped
    for scene in scenes(200):
        english = caption(scene, "en")
        assert len(tokenizer.encode(english)) == len(english.split())
        assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in (english, caption(scene, "zh")))


def test_shipped_tokenizer_keeps_scenes_exact(shipped: tuple[CogLM, Tokenizer]) -> None:
    _, tokenizer = shipped
    right = []
    for scene in scenes(60):  # a third of them with held-out pairs
        codes = tokenizer.encode_picture(torch.from_numpy(draw(scene, 16)).permute(2, 0, 1))
        right.append(all(check(np.asarray(tokenizer.decode_picture(codes)), scene).values()))
    assert np.mean(right) >= 0.95


def test_shipped_coglm_fits_the_tokenizer_and_is_small(shipped: tuple[CogLM, Tokenizer]) -> None:
    model, tokenizer = shipped
    assert (model.config.ids, model.config.n_codes) == (tokenizer.special_ids, tokenizer.codebook_size)
    assert model.config.transformer.vocab_size == tokenizer.vocab_size
    assert (SHIPPED / "coglm.safetensors").stat().st_size < 1.5e6
    tokens = model.generate([tokenizer.encode("a big red square")], lambda logits, step: logits.argmax(-1)).tokens
    assert tokens.shape == (1, 16) and tokens.max() < tokenizer.codebook_size
