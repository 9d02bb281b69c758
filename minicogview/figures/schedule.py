"""Figures and an animation of iterative super-resolution: which cells each round masks and resamples.

A cell is the darker, the later the round that last resampled it. Grey cells keep the direct stage's code, and orange
dots mark the cells that are masked in the round shown. Style and palette come from ``figures/plot.py``.

Shapes: ``T`` rounds, ``rows, columns`` of the fine grid.
"""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from minicogview.figures.plot import GREY, MAP, ORANGE, WIDTH, figure, png
from minicogview.lopar import OFFICIAL, Schedule

COLUMNS = 4  # panels side by side


def round_masks(schedule: Schedule | Tensor, side: int = 12) -> Tensor:
    """The cells (T, side, side) bool that a schedule masks in each round; a tensor is taken to be such masks."""
    if isinstance(schedule, Tensor):
        return schedule.bool().cpu()
    return torch.stack([schedule.masked(round, (side, side)) for round in range(1, schedule.n_rounds + 1)])


def last_guessed(masks: Tensor) -> Tensor:
    """For each round, the last round so far that resampled each cell, 0 if none: (T, rows, columns) int64.

    Args:
        masks: (T, rows, columns) bool from ``round_masks``.
    """
    rounds = torch.arange(1, len(masks) + 1)[:, None, None]
    return (masks * rounds).cummax(0).values


def round_colours(n_rounds: int) -> list[str]:
    """Colours as #rrggbb: grey for 0, then the course's colour map from light to dark for rounds 1 to ``n_rounds``."""
    return [GREY, *(mpl.colors.to_hex(shade) for shade in mpl.colormaps[MAP](np.linspace(0.25, 1.0, n_rounds)))]


def _draw_cells(ax: Axes, rounds: Tensor, n_rounds: int) -> None:
    """Cells (rows, columns), coloured by the round that last resampled them, with white lines between them."""
    ax.imshow(rounds.numpy(), cmap=ListedColormap(round_colours(n_rounds)), vmin=-0.5, vmax=n_rounds + 0.5)
    height, width = rounds.shape
    if max(height, width) <= 40:
        line = 8 / max(8, height, width)  # points
        ax.vlines(np.arange(width + 1) - 0.5, -0.5, height - 0.5, color="white", linewidth=line)
        ax.hlines(np.arange(height + 1) - 0.5, -0.5, width - 0.5, color="white", linewidth=line)
    ax.locator_params(nbins=5, integer=True)
    ax.tick_params(length=0, labelsize=7)
    ax.spines[:].set_visible(False)


def _draw_round(ax: Axes, masks: Tensor, round: int) -> None:
    """The grid after ``round``, counted from 1; 0 draws the grid as the direct stage leaves it."""
    rounds = last_guessed(masks)[round - 1] if round else torch.zeros(masks.shape[1:], dtype=torch.long)
    _draw_cells(ax, rounds, len(masks))
    if round == 0:
        ax.set_title("before", fontsize=9)
        return
    mask = masks[round - 1]
    places = mask.nonzero().flip(1).numpy()  # (n, 2): x, y
    dots = EllipseCollection([0.4], [0.4], [0], units="x", offsets=places, offset_transform=ax.transData, color=ORANGE)
    ax.add_collection(dots)
    ax.set_title(f"round {round}: {int(mask.sum())} of {mask.numel()}", fontsize=9)


def _draw_tile(ax: Axes, schedule: Schedule) -> None:
    """The schedule's tile with its numbers."""
    tile = torch.tensor(schedule.tile)
    _draw_cells(ax, tile.clamp(0, schedule.n_rounds), schedule.n_rounds)
    for row, line in enumerate(schedule.tile):
        for column, code in enumerate(line):
            dark = code > 0.55 * schedule.n_rounds
            size = min(9.0, 60 / len(line))
            ax.text(column, row, str(code), ha="center", va="center", fontsize=size, color="white" if dark else "black")
    ax.set_title("tile: last round of a cell", fontsize=9)


def _legend(n_rounds: int) -> list[Patch | Line2D]:
    names = ["never resampled"] + [f"last in round {round}" for round in range(1, n_rounds + 1)]
    patches = [Patch(color=shade, label=name) for shade, name in zip(round_colours(n_rounds), names, strict=True)]
    dot = Line2D([], [], color=ORANGE, marker="o", markersize=5, linestyle="none", label="masked in this round")
    return [*patches, dot]


def schedule_figure(schedule: Schedule | Tensor = OFFICIAL, side: int = 12) -> Figure:
    """The tile of a schedule with its numbers, then one panel for each round.

    Args:
        schedule: a LoPAR schedule; or masks (T, rows, columns) of another method that works in rounds, which has no
            tile. ``maskgit.resample_by_confidence`` can record its masks, (B, F) for each round.
        side: cells along each side of the grid over which the schedule's tile is repeated.
    """
    masks = round_masks(schedule, side)
    first = 1 if isinstance(schedule, Schedule) else 0
    rows = -(-(first + len(masks) + 1) // COLUMNS)
    fig = figure(rows * (WIDTH / COLUMNS + 0.3))
    axes = fig.subplots(rows, COLUMNS, squeeze=False).flatten()
    if isinstance(schedule, Schedule):
        _draw_tile(axes[0], schedule)
    for round in range(1, len(masks) + 1):
        _draw_round(axes[first + round - 1], masks, round)
    for ax in axes[first + len(masks) :]:
        ax.axis("off")
    axes[first + len(masks)].legend(handles=_legend(len(masks)), loc="center", fontsize=7.5)
    fig.supxlabel("cell column", fontsize=9)
    fig.supylabel("cell row", fontsize=9)
    return fig


def schedule_frames(schedule: Schedule | Tensor = OFFICIAL, side: int = 12) -> list[Image.Image]:
    """The frames of ``schedule_animation``: the grid before the first round, and after each round."""
    masks, frames = round_masks(schedule, side), []
    for round in range(len(masks) + 1):
        fig = figure(2.9, 2.6)
        ax = fig.subplots()
        ax.set(xlabel="cell column", ylabel="cell row")
        _draw_round(ax, masks, round)
        frames.append(Image.open(io.BytesIO(png(fig))).convert("RGB"))
    return frames


def schedule_animation(schedule: Schedule | Tensor = OFFICIAL, side: int = 12, milliseconds: int = 900) -> bytes:
    """The rounds one after another, as the bytes of an animated GIF that repeats.

    In a notebook, show it with ``IPython.display.Image(schedule_animation())``.

    Args:
        schedule, side: as for ``schedule_figure``. milliseconds: how long each round is shown.
    """
    first, *rest = schedule_frames(schedule, side)
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()
