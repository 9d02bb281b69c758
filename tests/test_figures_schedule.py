"""Figures of schedules: the numbers they are drawn from, and that still and moving ones show every round."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from test_figures_plot import draw

from minicogview.figures.schedule import last_guessed, round_colours, round_masks, schedule_animation, schedule_figure
from minicogview.lopar import OFFICIAL, Schedule, spread_schedule


def test_last_guessed_follows_the_tile() -> None:
    rounds = last_guessed(round_masks(OFFICIAL, side=12))
    tile = torch.tensor(OFFICIAL.tile).clamp(min=0).repeat(2, 2)
    assert torch.equal(rounds[-1], tile)
    for round, shown in enumerate(rounds, 1):
        assert torch.equal(shown, tile.clamp(max=round))


def test_masks_of_any_order_are_taken() -> None:
    masks = torch.tensor([[[1, 0, 0]], [[0, 1, 0]], [[1, 0, 0]]])
    assert last_guessed(round_masks(masks)).tolist() == [[[1, 0, 0]], [[1, 2, 0]], [[3, 2, 0]]]


@pytest.mark.parametrize("schedule", [OFFICIAL, spread_schedule(9, side=4)])
def test_figure_names_every_round_and_every_number(schedule: Schedule) -> None:
    pixels, words = draw(schedule_figure(schedule, side=12))
    for round, mask in enumerate(round_masks(schedule, 12), 1):
        assert f"round {round}: {int(mask.sum())} of 144" in words and f"last in round {round}" in words
    lines = words.split("\n")
    for code in np.unique(schedule.tile):
        assert lines.count(str(code)) >= int((np.array(schedule.tile) == code).sum())
    drawn = {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in np.unique(pixels.reshape(-1, 3), axis=0)}
    assert {colour.lower() for colour in round_colours(schedule.n_rounds)} <= drawn


def test_figure_without_a_tile() -> None:
    _, words = draw(schedule_figure(torch.ones(2, 5, 7)))
    assert "round 2: 35 of 35" in words and "tile" not in words


def test_animation_has_a_frame_for_every_round() -> None:
    data = schedule_animation(spread_schedule(3), side=6, milliseconds=500)
    with Image.open(io.BytesIO(data)) as movie:
        assert movie.format == "GIF" and movie.n_frames == 4  # before, and after each round
        assert movie.info["duration"] == 500 and movie.info["loop"] == 0
        frames = []
        for number in range(movie.n_frames):
            movie.seek(number)
            frames.append(np.asarray(movie.convert("RGB"), dtype=float))
    assert all(np.abs(a - b).max() > 50 for a, b in pairwise(frames))
