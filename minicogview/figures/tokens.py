"""Figures of single picture tokens: what a code looks like, and which codes a sampler may draw.

They are the static twins of the codebook and sampling widgets (``figures/widgets.py``). Style and palette come from
``figures/plot.py``.

Shapes: ``V`` tokens of the codebook, ``h, w`` cells, ``r`` pixels along a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from minicogview import sampling
from minicogview.clusters import Clusters
from minicogview.figures.plot import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, WIDTH, YELLOW, figure, to_array
from minicogview.vqvae import VQVAE


@torch.no_grad()
def swatches(vqvae: VQVAE, codes: Tensor, level: int) -> Tensor:
    """What each code (n,) looks like: (n, 3, r, r) pixels, cut from a picture that consists of that code alone."""
    rate = vqvae.config.rates[level]
    pixels = vqvae.decode(codes[:, None, None].expand(-1, 3, 3), level)
    return pixels[:, :, rate : 2 * rate, rate : 2 * rate].clamp(0, 1)


@torch.no_grad()
def codebook_figure(vqvae: VQVAE, picture: Tensor, level: int, row: int, column: int, n: int = 8) -> Figure:
    """One cell of a picture: its code, and how the picture looks if the cell has one of the nearest codes instead.

    Args:
        picture: (3, H, W) in 0..1.
        row, column: of the cell.
        n: number of nearest codebook rows to show.
    """
    codes = vqvae.encode(picture[None], level)  # (1, h, w)
    rows = vqvae.quantizer.codebook
    distance = (rows - rows[codes[0, row, column]]).square().sum(-1).sqrt()  # (V,)
    nearest = distance.argsort()[:n]
    variants = codes.repeat(len(nearest), 1, 1)
    variants[:, row, column] = nearest
    rate = vqvae.config.rates[level]
    half = -(-len(nearest) // 2)
    fig = figure(3.2)
    cells = fig.add_gridspec(2, half + 2)
    ax = fig.add_subplot(cells[:, :2])
    ax.imshow(to_array(picture))
    corner = column * rate - 0.5, row * rate - 0.5
    ax.add_patch(Rectangle(corner, rate, rate, fill=False, edgecolor=RED, linewidth=2))
    ax.set_title(f"row {row}, column {column}: code {int(nearest[0])}")
    ax.set(xlabel="pixels", ylabel="pixels")
    axes = [fig.add_subplot(cells[i // half, 2 + i % half]) for i in range(len(nearest))]
    for ax in axes:
        ax.axis("off")
    fig.suptitle("The cell with each of the nearest codes: code (distance in the codebook)", fontsize=10)
    for ax, code, pixels in zip(axes, nearest, vqvae.decode(variants, level), strict=False):
        ax.imshow(to_array(pixels))
        ax.set_title(f"{int(code)} ({float(distance[code]):.2f})", fontsize=8)
    return fig


def sampling_figure(
    logits: Tensor,
    labels: Tensor | Clusters,
    temperature: float,
    top_k: int,
    cluster_temperature: float = 1.0,
    n_show: int = 40,
    colours: Tensor | None = None,
) -> Figure:
    """Which tokens of one distribution each sampler keeps: the ``n_show`` likeliest tokens, in the same order.

    Args:
        logits: (V,) of one step.
        labels: (V,) clusters of the tokens.
        colours: (V, 3) in 0..1, the colour of each token, for example the mean of its swatch; None: one colour for
            each cluster (colours repeat).
    """
    clusters = Clusters.of(labels)
    rows = logits[None].float()
    settings = f"k = {top_k}, temperature {temperature:g}"
    panels = {
        f"softmax, temperature {temperature:g}": (rows / temperature).softmax(-1),
        f"top-k of tokens, {settings}": sampling.top_k_probabilities(rows, temperature, top_k),
        f"top-k of clusters, {settings}, second {cluster_temperature:g}": sampling.cluster_probabilities(
            rows, clusters, temperature, top_k, cluster_temperature
        ),
    }
    order = logits.argsort(descending=True)[:n_show]
    if colours is None:
        cycle = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY]
        paint: Any = [cycle[int(c) % len(cycle)] for c in clusters.labels[order]]
    else:
        paint = colours[order].clamp(0, 1).cpu().numpy()
    fig = figure(5.0)
    axes = fig.subplots(3, 1, sharex=True)
    for ax, (name, probability) in zip(axes, panels.items(), strict=True):
        shown = 100 * probability[0, order].cpu().numpy()
        ax.bar(range(len(order)), shown, color=paint, edgecolor="black", linewidth=0.4)
        kept = int((probability[0] > 0).sum())
        n_kept = len(clusters.labels[probability[0] > 0].unique())
        ax.set_title(f"{name}: {kept} tokens of {n_kept} clusters left", loc="left", fontsize=9)
        ax.set_ylabel("probability (%)")
    axes[-1].set_xlabel(
        f"the {len(order)} likeliest tokens, likeliest first (colour = "
        + ("cluster)" if colours is None else "the token's own)")
    )
    return fig


def swatch_figure(
    rows: Mapping[str, Tensor], columns: int = 24, notes: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Swatches in titled groups, each swatch in a thin frame, so that white ones can be seen too.

    Args:
        rows: from a group's title to its pixels (n, 3, r, r) in 0..1, as ``swatches`` returns them.
        columns: swatches in a line; a longer group takes several lines.
        notes: from a group's title to n short texts, which are shown under its swatches.
    """
    notes = notes or {}
    lines = [-(-len(pixels) // columns) * (1.5 if title in notes else 1.0) for title, pixels in rows.items()]
    cell = WIDTH / columns  # inches
    fig = figure(sum(lines) * cell + 0.36 * len(rows))
    axes = fig.subplots(len(rows), 1, squeeze=False, height_ratios=[line + 0.01 for line in lines])[:, 0]
    for ax, (title, pixels), height in zip(axes, rows.items(), lines, strict=True):
        step = 1.5 if title in notes else 1.0
        for number, swatch in enumerate(pixels):
            x, y = number % columns, number // columns * step
            ax.imshow(to_array(swatch), extent=(x + 0.06, x + 0.94, y + 0.94, y + 0.06))
            ax.add_patch(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, fill=False, edgecolor="black", linewidth=0.5))
            if title in notes:
                ax.text(x + 0.5, y + 1.2, notes[title][number], ha="center", va="center", fontsize=7)
        ax.set(xlim=(0, columns), ylim=(height, 0), aspect="equal")
        ax.set_title(title, loc="left", fontsize=9)
        ax.axis("off")
    return fig
