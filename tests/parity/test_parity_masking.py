"""The masks, positions and labels of every task equal the original's (the golden files' README, section 3)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_data import RELEASED, golden
from torch import Tensor

import minicogview
from minicogview import masking
from minicogview.config import LayoutConfig
from minicogview.masking import Sample
from minicogview.tokenizer import FIRST_CHINESE, Tokenizer


def fields(sample: Sample) -> dict[str, Tensor]:
    """A sample under the golden files' names."""
    assert sample.labels is not None and sample.loss_mask is not None
    return {
        "token": sample.tokens,
        "position": sample.positions,
        "attention_mask": sample.mask,
        "label": sample.labels,
        "loss_mask": sample.loss_mask,
    }


def masks_layout(cases: dict[str, Any], arrays: dict[str, np.ndarray]) -> LayoutConfig:
    """Sizes of the pretraining samples, read off the cases: picture, start position, patches."""
    drawn = next(name for name, case in cases.items() if case["task"] == "text_image_generation")
    boi = int(np.flatnonzero(arrays[f"{drawn}/token"] == RELEASED.coglm.ids.boi)[0])
    grid = math.isqrt(len(arrays[f"{drawn}/token"]) - boi - 1)
    patched = next(case for case in cases.values() if case["task"] == "image_text_understanding")
    pairs = zip(patched["patch_corner_codes"], patched["patch_rows_cols"], strict=True)
    side = next((code - column) // row for code, (row, column) in pairs if row > 0)
    return LayoutConfig(
        max_text=int(arrays[f"{drawn}/position"][boi]),
        grid=grid,
        n_patches=len(patched["patch_corner_codes"]),
        patch_size=grid - side,
    )


def released_language_token(text: Tensor) -> int:
    """The start token of a text of the released vocabulary: the tokenizer's own rule.

    The rule only compares ids; the text model inside plays no part, so the shipped small one will do.
    """
    sizes = RELEASED.vqvae.codebook_size, RELEASED.n_text_pieces
    path = Path(minicogview.__file__).parent / "weights/toy/text.model"
    tokenizer = Tokenizer(path, sizes[0], first_chinese=FIRST_CHINESE[sizes])
    return RELEASED.coglm.ids.boe if tokenizer.language(text) == "en" else RELEASED.coglm.ids.boc


def made_by_us(case: dict[str, Any], raw: Tensor, layout: LayoutConfig) -> Sample:
    """The sample that ``masking`` makes of a raw sequence, given the recorded random decisions."""
    ids = RELEASED.coglm.ids
    if case["task"] == "text_image_generation":
        return masking.text_to_image(raw, ids, layout, case.get("second_text_selected", False))
    if case["task"] == "image_text_understanding":
        corners = [(row, column) for row, column in case["patch_rows_cols"]]
        side = layout.grid - layout.patch_size
        assert corners == [divmod(code, side) for code in case["patch_corner_codes"]]
        texts = masking.split_texts(raw, layout.n_image, ids.pad)
        languages = [released_language_token(raw[start:end]) for start, end in texts]
        return masking.image_to_text(raw, ids, layout, languages, corners)
    assert case["task"] == "text_understanding"
    lengths = masking.span_lengths(case["poisson_draws_before_clip"], len(raw))
    assert len(raw) - sum(lengths) == case["gap_population"]
    starts = masking.span_starts(case["gap_positions_unsorted"], lengths)
    return masking.text_spans(raw, list(zip(starts, lengths, strict=True)))


def test_masks_of_pretraining_tasks() -> None:
    cases, arrays = golden("masks/pretraining_tasks.json"), golden("masks/pretraining_tasks.npz")
    assert {name.split("/")[0] for name in arrays} == cases.keys()
    tasks = {"text_image_generation", "image_text_understanding", "text_understanding"}
    assert {case["task"] for case in cases.values()} == tasks
    layout = masks_layout(cases, arrays)
    for name, case in cases.items():
        raw = torch.from_numpy(arrays[f"{name}/input"])
        for field, ours in fields(made_by_us(case, raw, layout)).items():
            expected = torch.from_numpy(arrays[f"{name}/{field}"])
            assert torch.equal(ours.to(expected.dtype), expected), f"{name}: {field} differs"


def test_masks_of_inference() -> None:
    arrays = golden("masks/inference_masks.npz")
    layout = masks_layout(golden("masks/pretraining_tasks.json"), golden("masks/pretraining_tasks.npz"))
    kinds = set()
    for name in sorted({key.split("/")[0] for key in arrays}):
        kind = name.split("_")[0]
        sizes = {part[:3]: int(part[3:]) for part in name.split("_")[1:]}  # len, ctx and perhaps txt
        expected = torch.from_numpy(arrays[f"{name}/attention_mask"])[0, 0].bool()
        if kind == "coglm":
            positions, mask = masking.inference(sizes["ctx"], sizes["len"], layout)
            assert torch.equal(positions, torch.from_numpy(arrays[f"{name}/position_ids"])[0]), name
        else:  # its positions are whatever was handed in
            mask = masking.completion_mask(sizes["txt"], sizes["ctx"], sizes["len"])
        assert torch.equal(mask, expected), name
        kinds.add(kind)
    assert kinds == {"coglm", "comp"}
