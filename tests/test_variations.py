"""Variations, outpainting and styles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_upsampling import write_stages
from tiny import ENLARGED

from minicogview.errors import MiniCogViewError
from minicogview.pipeline import CogView2
from minicogview.styles import STYLES, get_style
from minicogview.variations import outpaint, random_region, vary


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CogView2:
    return CogView2.from_pretrained(write_stages(tmp_path_factory.mktemp("all"), ENLARGED), ENLARGED)


@pytest.mark.parametrize(("share", "cells"), [(0.001, 1), (0.5, 8), (1.0, 16)])
def test_a_region_has_the_asked_share(share: float, cells: int) -> None:
    region = random_region(4, share, seed=0)
    assert region.shape == (4, 4) and int(region.sum()) == cells
    assert torch.equal(region, random_region(4, share, seed=0))
    if cells == 8:
        assert not torch.equal(region, random_region(4, share, seed=1))


def test_variations_keep_the_other_tokens(model: CogView2) -> None:
    codes = torch.arange(9).reshape(3, 3)
    pictures = vary(model, "cat", codes, share=0.4, n=3, seed=7)
    assert len(pictures) == 3 and pictures.seeds == [7, 8, 9] and pictures[0].size == (36, 36)
    for i, tokens in enumerate(pictures.tokens):
        region = random_region(3, 0.4, 7 + i)
        assert torch.equal(tokens[~region], codes[~region])
    assert (pictures.tokens != codes).any()


def test_outpainting_grows_the_picture_and_keeps_it(model: CogView2) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    (picture,) = outpaint(model, "cat", Image.fromarray(noise), (4, 0, 6, 10), n=1)
    grown = np.array(picture)
    assert grown.shape == (30, 34, 3) and np.array_equal(grown[4:24, :24], noise)
    edge = np.pad(noise, ((4, 6), (0, 10), (0, 0)), mode="edge")
    assert not np.array_equal(grown[:4], edge[:4]) and not np.array_equal(grown[:, 24:], edge[:, 24:])


def test_bad_numbers_are_refused(model: CogView2) -> None:
    codes = torch.zeros(3, 3, dtype=torch.long)
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(MiniCogViewError, match="share is"):
            vary(model, "cat", codes, share=share)
    with pytest.raises(MiniCogViewError, match="n is 0"):
        vary(model, "cat", codes, n=0)
    for margins in ((0, 0, 0, 0), (-1, 0, 0, 5)):
        with pytest.raises(MiniCogViewError, match="margins are"):
            outpaint(model, "cat", Image.new("RGB", (8, 8)), margins)


def test_styles_change_words_and_settings(model: CogView2) -> None:
    assert len({style.suffix for style in STYLES.values()}) == 10 and STYLES["none"].text("a cat") == "a cat"
    style = get_style("comics")
    styled = style.model(model)
    assert style.text("a cat") == "a cat 漫画 隔绝" and styled.coglm is model.coglm
    assert styled.sampling.temperature == 1.1 and model.sampling.temperature == 1.0
    assert styled.upsampler and styled.upsampler.preset.direct_sampling.top_k == 5
    assert model.upsampler and model.upsampler.preset.direct_sampling.top_k == 8
    assert styled.generate(style.text("a cat"), n=1)[0].size == (36, 36)
    with pytest.raises(MiniCogViewError, match="unknown style 'cubist': choose one of none, mainbody"):
        get_style("cubist")
