"""Interactive versions of three figures: click a token, click a cell, or change a sampler's settings.

They are built from plain ipywidgets (buttons, sliders, an image), so they work in JupyterLab, Colab and Voila. Each is
a thin layer over a function that draws the same figure for readers without a running notebook: ``plot.mask_figure``,
``tokens.codebook_figure`` and ``tokens.sampling_figure``.

Shapes: ``S`` sequence length, ``V`` tokens, ``H, W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import ipywidgets as ipw
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from minicogview.clusters import Clusters
from minicogview.config import LayoutConfig, SpecialIds
from minicogview.errors import MiniCogViewError
from minicogview.figures import plot
from minicogview.figures import tokens as plot_tokens
from minicogview.masking import Sample
from minicogview.vqvae import VQVAE

CELL = "22px"  # side of a button that stands for one token


def _buttons(colours: list[str], columns: int, click: Callable[[int], None]) -> tuple[ipw.GridBox, list]:
    """Small coloured buttons in rows of ``columns``; ``click`` is called with the number of the clicked button."""
    size = ipw.Layout(width=CELL, height=CELL, padding="0", margin="0")
    buttons = []
    for number, colour in enumerate(colours):
        button = ipw.Button(layout=size, tooltip=str(number))
        button.style.button_color = colour
        button.on_click(lambda _, number=number: click(number))
        buttons.append(button)
    grid = ipw.Layout(grid_template_columns=f"repeat({columns}, {CELL})", grid_gap="1px")
    return ipw.GridBox(buttons, layout=grid), buttons


def mask_explorer(
    samples: Mapping[str, Sample], ids: SpecialIds, layout: LayoutConfig, columns: int = 20
) -> ipw.VBox:
    """Choose a task and click a token to see what it may look at: its row is framed, and unseen tokens turn white.

    Args:
        samples: from a task's name to a sequence from ``masking.py``. Every token is a button, and more than a few
            hundred of them make a page slow.
    """
    task = ipw.Dropdown(options=list(samples), description="task")
    image = ipw.Image(format="png")
    tokens = ipw.Box()

    def show_task(*_: object) -> None:
        sample = samples[task.value]
        colours = [plot.KIND_COLOURS[kind] for kind in plot.token_kinds(sample, ids, layout)]

        def show_token(row: int) -> None:
            image.value = plot.png(plot.sample_figure(sample, ids, layout, task.value, row=row))
            for button, colour, seen in zip(buttons, colours, sample.mask[row].tolist(), strict=True):
                button.style.button_color = colour if seen else "#FFFFFF"
                button.description = ""
            buttons[row].description = "?"  # the token that looks

        box, buttons = _buttons(colours, columns, show_token)
        tokens.children = (box,)
        show_token(len(colours) - 1)

    task.observe(show_task, "value")
    show_task()
    return ipw.VBox([task, ipw.Label("The sequence, left to right: click a token."), tokens, image])


def codebook_explorer(vqvae: VQVAE, picture: Tensor, level: int = 0) -> ipw.HBox:
    """Click a cell of a picture (3, H, W) in 0..1 to see its code, and how the picture looks with the nearest codes."""
    rate = vqvae.config.rates[level]
    means = picture.unfold(1, rate, rate).unfold(2, rate, rate).mean((-1, -2))  # (3, h, w)
    height, width = means.shape[1:]
    image = ipw.Image(format="png")

    def show(cell: int) -> None:
        row, column = divmod(cell, width)
        image.value = plot.png(plot_tokens.codebook_figure(vqvae, picture, level, row, column))

    colours = [to_hex(colour) for colour in means.clamp(0, 1).flatten(1).T.tolist()]
    box, _ = _buttons(colours, width, show)
    show(height // 2 * width + width // 2)
    return ipw.HBox([ipw.VBox([ipw.Label("Click a cell."), box]), image])


def sampling_explorer(
    logits: Tensor, labels: Tensor | Clusters, colours: Tensor | None = None, top_k: int = 8
) -> ipw.VBox:
    """Change temperature, k and second temperature, and see which tokens may be drawn and how likely each is.

    Args:
        logits: (V,) of one step. labels: (V,) clusters. colours: (V, 3) in 0..1 of the tokens; None: by cluster.
    """
    clusters = Clusters.of(labels)
    dials = {
        "temperature": ipw.FloatSlider(1.0, min=0.1, max=2.0, step=0.05, description="temperature"),
        "top_k": ipw.IntSlider(top_k, min=1, max=max(top_k, min(64, clusters.n_clusters)), description="k"),
        "cluster_temperature": ipw.FloatSlider(1.0, min=0.1, max=2.0, step=0.05, description="second"),
    }
    return with_dials(partial(plot_tokens.sampling_figure, logits, clusters, colours=colours), **dials)


def with_dials(draw: Callable[..., Figure], **dials: ipw.Widget) -> ipw.VBox:
    """Any figure with input widgets above it: whenever one changes, ``draw(name=value, ...)`` draws it again."""
    image = ipw.Image(format="png")

    def show(*_: object) -> None:
        image.value = plot.png(draw(**{name: dial.value for name, dial in dials.items()}))

    for dial in dials.values():
        if hasattr(dial, "continuous_update"):
            dial.continuous_update = False  # draw only when a slider is released, not while it is dragged
        dial.observe(show, "value")
    show()
    return ipw.VBox([*dials.values(), image])


def with_button(draw: Callable[..., Figure], label: str = "draw", **dials: ipw.Widget) -> ipw.VBox:
    """Any figure with input widgets and a button above it: a click calls ``draw(name=value, ...)``.

    This suits figures that take a second or more, too long to draw them again at every keystroke. If ``draw`` raises
    ``MiniCogViewError``, its message appears in a line above the last good figure.
    """
    image, complaint = ipw.Image(format="png"), ipw.Label()
    button = ipw.Button(description=label)

    def show(*_: object) -> None:
        try:
            image.value = plot.png(draw(**{name: dial.value for name, dial in dials.items()}))
            complaint.value = ""
        except MiniCogViewError as error:
            complaint.value = str(error)

    button.on_click(show)
    show()
    return ipw.VBox([*dials.values(), button, complaint, image])
