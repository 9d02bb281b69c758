"""The figures of all notebooks: one width, one palette, one colour map for masks and attention.

Every function returns a matplotlib ``Figure`` and shows nothing by itself. In a notebook, make the call the last line
of a cell (or ``display`` it); in a script, call ``figure.savefig``. The palette is Okabe and Ito's, whose colours
readers with any common colour blindness can tell apart. Lines also differ in their dashes.

Masks: a row is the token that looks, a column the token looked at; dark blue means "may look". The strips along the
edges show what each token is, and a red mark beside a row shows that its prediction counts in the loss.

Shapes: ``S`` sequence length, ``N`` heads or pictures, ``V`` tokens.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from einops import rearrange
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minicogview.colour import on_white
from minicogview.config import LayoutConfig, SpecialIds
from minicogview.masking import Sample

WIDTH = 7.2  # inches: a notebook's column
MAP = "Blues"  # colour map of masks and attention: white is nothing, dark is all
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = PALETTE
GREY = "#BBBBBB"
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "SimHei")

# What role a token has in its task. Tokens "in view" are context: they see each other in both directions.
KIND_COLOURS = {
    "text in view": ORANGE,
    "text to predict": YELLOW,
    "start token": "#000000",
    "picture in view": GREEN,
    "picture to predict": SKY,
    "given left neighbour": PURPLE,
    "not used": GREY,
}


def style() -> None:
    """Set matplotlib's defaults to the course's style. Call it once, in the set-up cell."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    mpl.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.2),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "font.family": ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in known)],
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "black"])
            + cycler(linestyle=DASHES),
            "legend.frameon": False,
            "image.interpolation": "nearest",
        }
    )


class PlainFigure(Figure):
    """A figure that a notebook displays by itself. It is unknown to pyplot, which would display it a second time."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(fig: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    return buffer.getvalue()


def figure(height: float = 3.2, width: float = WIDTH) -> Figure:
    """An empty figure in the course's style; sizes in inches."""
    if mpl.rcParams["figure.figsize"][0] != WIDTH:
        style()
    return PlainFigure(figsize=(width, height))


# --- pictures


def to_array(picture: Any) -> np.ndarray:
    """A PIL picture, a tensor (3, H, W) in 0..1 or an array, as an array (H, W, 3) that matplotlib can show."""
    if not isinstance(picture, Tensor):
        return np.asarray(on_white(picture) if hasattr(picture, "convert") else picture)
    pixels = picture.detach().float().clamp(0, 1).cpu().numpy()
    return rearrange(pixels, "c h w -> h w c") if pixels.ndim == 3 and len(pixels) == 3 else pixels


def show_pictures(
    pictures: Sequence[Any] | Tensor, titles: Sequence[str] = (), columns: int = 4, title: str = ""
) -> Figure:
    """Pictures side by side, ``columns`` in a row, with a title over each.

    Args:
        pictures: PIL pictures, arrays (H, W, 3), or tensors (3, H, W) in 0..1; or one tensor (N, 3, H, W).
    """
    columns = max(1, min(columns, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    cell = min(WIDTH / columns, 2.4)  # inches
    fig = figure(rows * (cell + (0.25 if titles else 0)) + (0.3 if title else 0), cell * columns)
    axes = fig.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.axis("off")
    for ax, picture in zip(axes, pictures, strict=False):
        ax.imshow(to_array(picture))
    for ax, text in zip(axes, titles, strict=False):
        ax.set_title(text, fontsize=9, wrap=True)
    if title:
        fig.suptitle(title, fontsize=10)
    return fig


# --- numbers


def numbers(values: Any) -> np.ndarray:
    """A tensor, a list of tensors or a list of numbers, as an array that matplotlib accepts without warnings."""
    if isinstance(values, Tensor):
        return values.detach().float().cpu().numpy()
    return np.asarray([float(value) for value in values])


def curve(
    series: Mapping[str, Any],
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: bool = False,
    limits: Mapping[str, float] | None = None,
    aside: bool = False,
) -> Figure:
    """Line plots in common axes.

    Args:
        series: from names to values, or to (x, values).
        xlabel, ylabel: with units.
        log: whether the y axis is logarithmic.
        limits: horizontal lines, from names to values, such as ``{"fp16 overflows": 65504}``.
        aside: put the legend to the right of the axes, which helps if there are many lines.
    """
    fig = figure()
    ax = fig.subplots()
    for name, values in series.items():
        x, y = values if isinstance(values, tuple) else (np.arange(len(values)), values)
        ax.plot(numbers(x), numbers(y), label=name)
        if not isinstance(values, tuple):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, value in (limits or {}).items():
        ax.axhline(value, color="black", linestyle=":", linewidth=1)
        ax.text(0.01, value, name, transform=ax.get_yaxis_transform(), va="bottom", fontsize=8)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, yscale="log" if log else "linear")
    if aside:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif len(series) > 1:
        ax.legend()
    return fig


def bars(names: Sequence[str], series: Mapping[str, Sequence[float]], ylabel: str, title: str = "") -> Figure:
    """Grouped bars: one group for each name, with one bar for each series and its value on top."""
    fig = figure()
    ax = fig.subplots()
    width = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        x = np.arange(len(names)) + (number - (len(series) - 1) / 2) * width
        ax.bar_label(ax.bar(x, numbers(values), width * 0.95, label=label), fmt="%.3g", fontsize=8)
    ax.set_xticks(range(len(names)), names)
    ax.margins(y=0.12)  # room for the numbers
    ax.set(ylabel=ylabel, title=title)
    if len(series) > 1:
        ax.legend()
    return fig


def histogram(series: Mapping[str, Any], xlabel: str, ylabel: str = "count", bins: int = 40, title: str = "") -> Figure:
    """Outlined histograms of several sets of numbers with common bins."""
    fig = figure()
    ax = fig.subplots()
    values = {name: numbers(v).ravel() for name, v in series.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins).tolist()
    for (name, v), dash in zip(values.items(), DASHES, strict=False):
        ax.hist(v, edges, histtype="step", label=name, linewidth=1.5, linestyle=dash)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(series) > 1:
        ax.legend()
    return fig


def attention_maps(
    maps: Tensor, titles: Sequence[str] = (), columns: int = 4, title: str = "", of: str = "token", label: str = "share"
) -> Figure:
    """Attention of several heads, on one scale from 0.

    Args:
        maps: (N, S, S), where a row is the token that looks; or, with ``of="cell"``, (N, grid, grid): how much one
            token looks at each cell of the picture.
        label: what the numbers are (shares of all attention); if it is empty, there is no colour bar.
    """
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    fig = figure(rows * (WIDTH / columns + 0.15) + 0.3)
    axes = fig.subplots(rows, columns, squeeze=False)
    shown = None
    for number, ax in enumerate(axes.flatten()):
        if number >= len(maps):
            ax.axis("off")
            continue
        shown = ax.imshow(numbers(maps[number]), cmap=MAP, vmin=0, vmax=float(maps.max()))
        ax.locator_params(integer=True)
        ax.set_title(titles[number] if titles else f"head {number}")
        ax.set_xlabel("cell column" if of == "cell" else "token looked at")
        if number % columns == 0:
            ax.set_ylabel("cell row" if of == "cell" else "token that looks")
    if shown is not None and label:
        fig.colorbar(shown, ax=axes, label=label, fraction=0.03)
    if title:
        fig.suptitle(title, fontsize=10)
    return fig


# --- masks


def token_kinds(sample: Sample, ids: SpecialIds, layout: LayoutConfig) -> list[str]:
    """The role of each token in its task, a key of ``KIND_COLOURS``, inferred from the mask.

    Two tokens that see each other are context ("in view"), since two causal tokens never do. A sequence without a
    start token is text alone, whatever its positions.
    """
    mask = sample.mask.bool()  # (S, S)
    in_view = (mask & mask.T & ~torch.eye(len(mask), dtype=torch.bool)).any(0) | mask.all(0)
    start = torch.isin(sample.tokens, torch.tensor([ids.boi, ids.boe, ids.boc]))
    picture = (sample.positions > layout.max_text) & start.any()
    used = mask.any(0) | picture
    given = picture & ~in_view & (sample.tokens >= 0) & (sample.tokens == -1).any()
    kinds = []
    for i in range(len(mask)):
        place = "picture" if picture[i] else "text"
        kinds.append(f"{place} in view" if in_view[i] else f"{place} to predict")
        for kind, here in (("start token", start), ("given left neighbour", given), ("not used", ~used)):
            if here[i]:
                kinds[i] = kind
    return kinds


def _draw_mask(
    ax: Axes, mask: Tensor, kinds: Sequence[str], loss: Tensor | None, labels: Sequence[str], row: int | None
) -> None:
    size = len(mask)
    ax.imshow(numbers(mask), cmap=MAP, vmin=0, vmax=1.15)
    names = list(KIND_COLOURS)
    colours = ListedColormap(list(KIND_COLOURS.values()))
    codes = np.array([names.index(kind) for kind in kinds]) + 0.5
    near, far, end = -0.5 - size * 0.012, -0.5 - size * 0.052, size - 0.5  # the strips along two edges
    ax.imshow(codes[:, None], colours, vmin=0, vmax=colours.N, extent=(far, near, end, -0.5))
    ax.imshow(codes[None, :], colours, vmin=0, vmax=colours.N, extent=(-0.5, end, near, far))
    if size <= 40:
        between, ends = np.arange(size + 1) - 0.5, (-0.5, size - 0.5)
        ax.vlines(between, *ends, color="#DDDDDD", linewidth=0.5)
        ax.hlines(between, *ends, color="#DDDDDD", linewidth=0.5)
    ax.locator_params(integer=True)
    if labels:
        ax.set_xticks(range(size), labels, rotation=90, fontsize=7)
        ax.set_yticks(range(size), labels, fontsize=7)
    if loss is not None:
        rows = np.flatnonzero(loss.cpu().numpy())
        ax.barh(rows, size * 0.025, 0.8, left=size * 1.012 - 0.5, color=RED)
    if row is not None:
        ax.add_patch(Rectangle((-0.5, row - 0.5), size, 1, fill=False, edgecolor=RED, linewidth=1.8))
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    edge = size * 0.055
    ax.set(xlim=(-0.5 - edge, size - 0.5 + edge), ylim=(size - 0.5, -0.5 - edge))
    ax.set(xlabel="token looked at", ylabel="token that looks")


def mask_figure(
    mask: Tensor,
    kinds: Sequence[str],
    title: str = "",
    words: str = "",
    loss: Tensor | None = None,
    labels: Sequence[str] = (),
    row: int | None = None,
    grid: Tensor | None = None,
) -> Figure:
    """Any attention mask, with coloured strips along its edges that show what each token is.

    Args:
        mask: (S, S), 1 where the row's token may look at the column's token.
        kinds: (S,) keys of ``KIND_COLOURS``, from ``token_kinds``.
        words: one or two sentences under the title.
        loss: (S,) 1 where the row's prediction counts in the loss; marked red on the right.
        labels: (S,) short names of the tokens, for small masks.
        row: index of a row to frame, to show what this one token may look at.
        grid: (g, g) index into ``kinds`` for each cell of the picture; adds a map of the picture.
    """
    fig = figure(5.5)
    fig.set_layout_engine("none")  # it would ignore the strips and marks, which lie outside the axes
    ax = fig.add_axes((0.08, 0.08, 4.6 / WIDTH, 4.6 / 5.5))  # square, in fractions of the figure
    _draw_mask(ax, mask, kinds, loss, labels, row)
    fig.text(0.01, 0.985, title + ("\n" + words if words else ""), va="top", linespacing=1.3)
    if grid is not None:
        _draw_cells(fig.add_axes((0.77, 0.58, 1.6 / WIDTH, 1.6 / 5.5)), mask, kinds, grid, row)
    used = [Patch(color=colour, label=kind) for kind, colour in KIND_COLOURS.items() if kind in kinds]
    if loss is not None and bool(loss.any()):
        used.append(Patch(color=RED, label="prediction in the loss"))
    if row is not None:
        seen = f"token {row} sees {int(mask[row].sum())} of {len(mask)}"
        used.append(Patch(facecolor="none", edgecolor=RED, label=seen))
    corner = (0.74, 0.52 if grid is not None else 0.88)
    fig.legend(handles=used, loc="upper left", bbox_to_anchor=corner, fontsize=8)
    return fig


def _draw_cells(ax: Axes, mask: Tensor, kinds: Sequence[str], grid: Tensor, row: int | None) -> None:
    """The picture's cells, coloured by kind; if ``row`` is given, cells that this token may not look at are faded."""
    colours = np.array([mpl.colors.to_rgba(KIND_COLOURS[kind]) for kind in kinds])[grid.numpy()]  # (g, g, 4)
    if row is not None:
        colours[..., 3] = np.where(mask[row].bool().cpu().numpy()[grid.numpy()], 1.0, 0.25)
    ax.imshow(colours)
    ticks = np.arange(len(grid) + 1) - 0.5
    ax.set_xticks(ticks, minor=True)
    ax.set_yticks(ticks, minor=True)
    ax.grid(which="minor", color="white", linewidth=0.8)
    ax.tick_params(which="both", length=0, labelsize=7)
    ax.locator_params(nbins=5, integer=True)
    ax.spines[:].set_visible(False)
    ax.set_title("in the picture" + ("\n(faded: not seen)" if row is not None else ""), fontsize=8)


def cell_index(sample: Sample, layout: LayoutConfig) -> Tensor:
    """Index in the sequence of each cell of the picture, (grid, grid), found by the tokens' positions."""
    order = torch.argsort(sample.positions, stable=True)[-layout.n_image :]
    return rearrange(order, "(row column) -> row column", row=layout.grid)


def sample_figure(
    sample: Sample,
    ids: SpecialIds,
    layout: LayoutConfig,
    title: str,
    words: str = "",
    row: int | None = None,
) -> Figure:
    """The mask of one training or inference sequence, with the roles of its tokens; ``row`` is framed."""
    kinds = token_kinds(sample, ids, layout)
    grid = cell_index(sample, layout) if any(kind.startswith("picture") for kind in kinds) else None
    return mask_figure(sample.mask, kinds, title, words, sample.loss_mask, row=row, grid=grid)


def text_to_image_figure(sample: Sample, ids: SpecialIds, layout: LayoutConfig) -> Figure:
    """Explains ``masking.text_to_image``."""
    words = "All tokens see the chosen text; each cell of the picture sees the cells before it."
    return sample_figure(sample, ids, layout, "Text to image", words)


def image_to_text_figure(sample: Sample, ids: SpecialIds, layout: LayoutConfig) -> Figure:
    """Explains ``masking.image_to_text``: captions, and patches of the picture to fill in."""
    words = "All tokens see the cells outside the patches; captions see the picture, but it sees no text."
    return sample_figure(sample, ids, layout, "Image to text, and patches to fill in", words)


def text_spans_figure(sample: Sample, ids: SpecialIds, layout: LayoutConfig) -> Figure:
    """Explains ``masking.text_spans``."""
    words = "All tokens see the text between the spans; spans are predicted from left to right."
    return sample_figure(sample, ids, layout, "Text spans", words)


def completion_figure(sample: Sample, ids: SpecialIds, layout: LayoutConfig) -> Figure:
    """Explains ``masking.completion``: the hole comes last, so that its cells see everything around them."""
    words = "Kept cells come first, and all tokens after <start_of_image> see them; the hole is causal."
    return sample_figure(sample, ids, layout, "Completion", words)


def inference_figure(n_text: int, positions: Tensor, mask: Tensor, layout: LayoutConfig) -> Figure:
    """Explains ``masking.inference``: drawing a picture of a text."""
    kinds = ["text in view"] * n_text + ["start token"] + ["picture to predict"] * (len(mask) - n_text - 1)
    words = f"Positions: text 0 to {n_text - 1}, start token {layout.max_text}, then the picture."
    return mask_figure(mask, kinds, "Drawing a picture", words)
