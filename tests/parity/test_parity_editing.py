"""Editing cuts out the boxes that the original cuts out (the golden files' README, section 2)."""

from __future__ import annotations

from golden_data import RELEASED, golden, golden_layout

from minicogview import editing


def test_completion_boxes() -> None:
    cases, pixels, layout = golden("coglm/completion_boxes.json"), RELEASED.coarse_pixels * 3, golden_layout()
    assert cases
    for case in cases:
        mask = editing.box_mask((pixels, pixels), case["h0_w0_h1_w1"])
        assert list(editing.inner_box(mask)) == case["inner_box"]
        box = editing.crop_box(mask)
        assert list(box) == case["crop_box"]
        crop = mask[box[0] : box[2], box[1] : box[3]]
        assert list(crop.shape) == case["crop_shape"]
        rows = ["".join(str(int(cell)) for cell in row) for row in editing.token_region(crop, layout.grid)]
        assert rows == case["small_mask_rows"]
        assert int(editing.token_region(crop, 3 * layout.grid).sum()) == case["big_mask_count"]
