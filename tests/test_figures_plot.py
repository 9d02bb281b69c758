"""Figures: each is drawn for every task, and names what the mask says."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from minicogview import masking
from minicogview.config import LayoutConfig, SpecialIds, VQVAEConfig
from minicogview.figures import plot
from minicogview.figures import tokens as plot_tokens
from minicogview.vqvae import VQVAE

IDS = SpecialIds(pad=103, boi=200, boe=201, boc=202)
LAYOUT = LayoutConfig(max_text=24, grid=5, n_patches=2, patch_size=3)
TINY = VQVAEConfig(
    channels=8,
    encoder_multipliers=(1, 1, 1),
    encoder_blocks=1,
    codebook_size=32,
    codebook_dim=8,
    decoder_multipliers=((1, 1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)),
    n_groups=4,
)


def raw(with_second_text: bool = True) -> torch.Tensor:
    tokens = torch.full((12 + 25,), IDS.pad)
    tokens[:5] = torch.arange(110, 115)
    if with_second_text:
        tokens[6:9] = torch.arange(120, 123)
    tokens[12:] = torch.arange(25)
    return tokens


def draw(figure) -> tuple[np.ndarray, str]:
    """The figure's pixels, and all words on it."""
    words = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB")), "\n".join(words)


def region() -> torch.Tensor:
    hole = torch.zeros(5, 5)
    hole[1:4, 2:4] = 1
    return hole


def test_transparent_pictures_are_shown_on_white():
    assert (plot.to_array(Image.new("RGBA", (4, 3), (255, 0, 0, 0))) == 255).all()
    pixels = torch.rand(3, 4, 5)
    assert np.array_equal(plot.to_array(pixels), pixels.permute(1, 2, 0).numpy())
    assert plot.to_array(pixels[0]).shape == (4, 5)


def test_every_task_has_its_figure():
    sample = masking.text_to_image(raw(), IDS, LAYOUT)
    _, words = draw(plot.text_to_image_figure(sample, IDS, LAYOUT))
    assert all(kind in words for kind in ("text in view", "picture to predict", "start token", "not used"))
    sample = masking.image_to_text(raw(), IDS, LAYOUT, [201, 202], [(0, 0), (1, 1)])
    _, words = draw(plot.image_to_text_figure(sample, IDS, LAYOUT))
    assert all(kind in words for kind in ("text to predict", "picture in view", "picture to predict"))
    _, words = draw(
        plot.text_spans_figure(masking.text_spans(torch.arange(30), [(4, 2), (12, 3)]), IDS, LAYOUT)
    )
    assert "text to predict" in words and "picture" not in words
    _, words = draw(plot.inference_figure(5, *masking.inference(5, 31, LAYOUT), LAYOUT))
    assert "text in view" in words
    sample, _ = masking.completion(torch.arange(110, 115), torch.arange(25), region(), IDS, LAYOUT)
    _, words = draw(plot.completion_figure(sample, IDS, LAYOUT))
    assert "given left neighbour" in words


def test_kinds_follow_the_patches():
    corners = [(0, 0), (1, 1)]
    sample = masking.image_to_text(raw(), IDS, LAYOUT, [201, 202], corners)
    kinds = plot.token_kinds(sample, IDS, LAYOUT)
    inside, _ = masking.patch_cells(corners, LAYOUT)
    assert [kind == "picture to predict" for kind in kinds[12:]] == inside.tolist()
    assert kinds[0] == kinds[6] == "start token" and kinds[1] == "text to predict" and kinds[10] == "not used"


def test_kinds_leave_the_mask_alone_and_take_a_text_of_one_token():
    tokens = raw(with_second_text=False)
    tokens[1:5] = IDS.pad
    sample = masking.text_to_image(tokens, IDS, LAYOUT)
    before = sample.mask.clone()
    assert plot.token_kinds(sample, IDS, LAYOUT)[0] == "text in view"
    assert torch.equal(sample.mask, before)


def test_cells_of_a_completion_are_found_by_position():
    sample, _ = masking.completion(torch.arange(110, 115), torch.arange(25), region(), IDS, LAYOUT)
    found = sample.tokens[plot.cell_index(sample, LAYOUT)]
    expected = torch.where(region().bool(), -1, torch.arange(25).view(5, 5))
    assert torch.equal(found, expected)


def test_a_framed_row_says_how_much_it_sees():
    sample = masking.text_to_image(raw(), IDS, LAYOUT)
    _, words = draw(plot.sample_figure(sample, IDS, LAYOUT, "", row=13))
    assert "token 13 sees 8 of 37" in words  # 5 of text, start token, two cells


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plot.curve(
            {"a": [1, 10], "b": ([0, 5], [2, 3])}, "step", "loss (nats)", log=True, limits={"x": 5}
        ),
        lambda: plot.bars(["a", "b"], {"en": [1, 2], "zh": [2, 3]}, "top-1 (%)"),
        lambda: plot.histogram({"a": torch.randn(50), "b": np.zeros(9)}, "score"),
        lambda: plot.attention_maps(torch.rand(5, 6, 6), of="cell"),
        lambda: plot.show_pictures(torch.rand(5, 3, 8, 8), ["a"] * 5, title="all"),
        lambda: plot.show_pictures([Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8)], columns=1),
    ],
)
def test_plain_figures_are_drawn(figure):
    pixels, _ = draw(figure())
    assert len(np.unique(pixels)) > 1


def test_codebook_and_sampling_figures():
    torch.manual_seed(0)
    vqvae = VQVAE(TINY).eval()
    assert plot_tokens.swatches(vqvae, torch.arange(6), level=1).shape == (6, 3, 8, 8)
    _, words = draw(plot_tokens.codebook_figure(vqvae, torch.rand(3, 16, 16), 0, row=1, column=2))
    assert "row 1, column 2" in words
    labels = torch.arange(100) % 10
    _, words = draw(plot_tokens.sampling_figure(torch.randn(100), labels, 1.0, 3, 0.5))
    assert "3 tokens of" in words and "30 tokens of 3 clusters left" in words
