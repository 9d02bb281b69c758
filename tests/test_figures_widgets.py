"""Widgets: a click or a turned dial changes the picture shown."""

from __future__ import annotations

import torch
from test_figures_plot import IDS, LAYOUT, TINY, raw

from minicogview import masking
from minicogview.figures import widgets
from minicogview.vqvae import VQVAE


def test_clicking_a_token_shows_what_it_sees():
    samples = {
        "draw": masking.text_to_image(raw(), IDS, LAYOUT),
        "spans": masking.text_spans(torch.arange(30), [(4, 2)]),
    }
    task, _, tokens, image = widgets.mask_explorer(samples, IDS, LAYOUT).children
    buttons = tokens.children[0].children
    assert len(buttons) == 37
    before = image.value
    buttons[13].click()
    assert image.value != before and bytes(image.value).startswith(b"\x89PNG")
    white = [button.style.button_color == "#FFFFFF" for button in buttons]
    assert white == (~samples["draw"].mask[13]).tolist()
    task.value = "spans"
    assert len(tokens.children[0].children) == 30


def test_clicking_a_cell_shows_its_code():
    torch.manual_seed(0)
    box, image = widgets.codebook_explorer(VQVAE(TINY).eval(), torch.rand(3, 16, 16)).children
    before = image.value
    box.children[1].children[0].click()
    assert image.value != before


def test_turning_a_dial_draws_again():
    *dials, image = widgets.sampling_explorer(torch.randn(50), torch.arange(50) % 5, top_k=2).children
    for dial, value in zip(dials, (0.5, 3, 0.4), strict=True):
        before = image.value
        dial.value = value
        assert image.value != before


def test_any_figure_can_be_given_dials():
    import ipywidgets as ipw

    from minicogview.figures import plot

    def draw(power, log):
        return plot.curve({"x": [x**power for x in range(1, 5)]}, "x", "y", log=log)

    power, log, image = widgets.with_dials(
        draw, power=ipw.IntSlider(1, min=1, max=3), log=ipw.Dropdown(options=[False, True])
    ).children
    for dial, value in ((power, 2), (log, True)):
        before = image.value
        dial.value = value
        assert image.value != before


def test_a_button_draws_and_tells_what_was_refused():
    import ipywidgets as ipw

    from minicogview.errors import MiniCogViewError
    from minicogview.figures import plot

    def draw(text):
        if not text:
            raise MiniCogViewError("the text is empty")
        return plot.curve({"x": [len(text), 2]}, "x", "y")

    text, button, complaint, image = widgets.with_button(draw, text=ipw.Text("a")).children
    first = image.value
    text.value = "apple"
    assert image.value == first  # nothing happens before the click
    button.click()
    second = image.value
    assert second != first and complaint.value == ""
    text.value = ""
    button.click()
    assert complaint.value == "the text is empty" and image.value == second
