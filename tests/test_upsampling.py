"""All three stages together: what each of them returns, and what editing may not touch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import ENLARGED, TINY, write_tiny

from minicogview.checkpoints.weight_files import save_direct, save_model
from minicogview.config import Preset
from minicogview.errors import MiniCogViewError
from minicogview.lopar import OFFICIAL, IterativeSR
from minicogview.pictures import to_image
from minicogview.pipeline import CogView2
from minicogview.super_resolution import DirectSR


def write_stages(folder: Path, preset: Preset) -> Path:
    """A random system with both super-resolution stages."""
    write_tiny(folder)
    base = CogView2.from_pretrained(folder, preset).coglm.transformer
    torch.manual_seed(1)
    save_direct(folder / "direct.safetensors", DirectSR(preset.direct, base))
    iterative = IterativeSR(preset.iterative)
    with torch.no_grad():
        iterative.base.token_embedding.weight.mul_(10)  # so that neighbours and texts matter
    save_model(folder / "iterative.safetensors", iterative, preset.iterative, "iterative")
    return folder


@pytest.fixture(scope="module", params=[TINY, ENLARGED], ids=["tiled", "enlarged"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CogView2:
    return CogView2.from_pretrained(write_stages(tmp_path_factory.mktemp("all"), request.param), request.param)


def test_every_stage_keeps_its_picture(model: CogView2) -> None:
    pictures = model.generate("a red apple", n=2, seed=3)
    assert model.n_stages == 3 and pictures.images is pictures.iterative
    assert pictures.coglm and pictures.direct and pictures.fine_tokens is not None
    sizes = [stage[0].size for stage in (pictures.coglm, pictures.direct, pictures.images)]
    assert sizes == [(12, 12), (36, 36), (36, 36)] and pictures.fine_tokens.shape == (2, 9, 9)
    assert np.array_equal(pictures[1], model.tokenizer.decode_picture(pictures.fine_tokens[1]))
    assert not np.array_equal(pictures.direct[0], pictures[0])


def test_seeds_matter_only_where_fine_tokens_are_drawn(model: CogView2) -> None:
    upsampler = model.upsampler
    assert upsampler
    coarse = torch.randint(TINY.vqvae.codebook_size, (1, 9), generator=torch.Generator().manual_seed(0)).expand(2, -1)
    for choice in ("sample", "mean"):
        chosen = dataclasses.replace(upsampler, preset=dataclasses.replace(upsampler.preset, fine_choice=choice))
        direct = chosen.run_direct([[], []], coarse, seeds=[0, 1])
        iterative = chosen.run_iterative([[], []], direct[:1].expand(2, -1), seeds=[0, 1])[-1]
        for one, other in (direct, iterative):
            assert torch.equal(one, other) == (choice == "mean")


def test_stages_stop_early(model: CogView2) -> None:
    whole, first, second = (model.generate("a red apple", n=1, stages=stages) for stages in (None, 1, 2))
    assert first.direct is first.iterative is first.fine_tokens is None and first.images is first.coglm
    assert second.iterative is None and second[0].size == (36, 36)
    assert whole.direct and np.array_equal(second[0], whole.direct[0])
    assert torch.equal(whole.tokens, first.tokens)
    for stages in (1, 2, 3):
        told: list[tuple[int, np.ndarray]] = []
        keep = lambda *each, told=told: told.append(each)  # noqa: E731
        drawn = model.generate("a red apple", n=3, seed=5, stages=stages, on_picture=keep)
        assert [seed for seed, _ in told] == [5, 6, 7] and all(a is b for (_, a), b in zip(told, drawn, strict=True))
    for stages in (0, 4):
        with pytest.raises(MiniCogViewError, match=f"stages is {stages}: give an integer from 1 to 3"):
            model.generate("a red apple", stages=stages)


def test_a_picture_follows_from_its_seed_alone(model: CogView2) -> None:
    four, one = model.generate("cat", n=4, seed=0), model.generate("cat", n=1, seed=2)
    assert four.fine_tokens is not None and one.fine_tokens is not None
    assert torch.equal(four.fine_tokens[2], one.fine_tokens[0])


def test_selected_pictures_are_upsampled_in_their_order(model: CogView2) -> None:
    all_of_them, kept = (model.generate("cat", n=4, keep=keep) for keep in (4, 2))
    assert kept.seeds == all_of_them.seeds[:2] and len(kept) == 2
    assert all_of_them.fine_tokens is not None and kept.fine_tokens is not None
    assert torch.equal(kept.fine_tokens, all_of_them.fine_tokens[:2])


def test_progress_names_the_stages(model: CogView2) -> None:
    steps: list[tuple[str, int, int]] = []
    model.generate("cat", n=2, on_step=lambda *step: steps.append(step))
    assert list(dict.fromkeys(name for name, _, _ in steps)) == ["coglm", "direct", "iterative"]
    assert all(0 < done <= total for _, done, total in steps) and steps[-1] == ("iterative", 2, 2)


def test_editing_upsamples_what_the_mask_marks_and_nothing_else(model: CogView2) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    mask = torch.zeros(50, 70, dtype=torch.bool)
    mask[20:31, 5:22] = True
    pictures = model.edit("a red apple", Image.fromarray(noise), mask, n=2)
    assert pictures.coglm and pictures.direct and pictures.iterative and pictures.fine_tokens is not None
    for stage in (pictures.coglm, pictures.direct, pictures.iterative):
        for picture in stage:
            assert np.array_equal(np.array(picture)[~mask.numpy()], noise[~mask.numpy()])
            assert not np.array_equal(np.array(picture)[mask.numpy()], noise[mask.numpy()])
    one, other = pictures.fine_tokens.flatten(1)
    assert 0.05 < (one == other).float().mean() < 1  # tokens outside of the mask are those of the picture


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["L", "RGB", "RGBA", "P"]), st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_stage_touches_a_pixel_outside_of_any_mask(
    model: CogView2, height: int, width: int, mode: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    mask = rng.random((height, width)) < rng.choice([0.02, 0.5, 1])
    mask[rng.integers(height), rng.integers(width)] = True
    before = np.array(to_image(picture))
    pictures = model.edit("a red apple", picture, mask)
    assert pictures.coglm and pictures.direct and pictures.iterative
    for stage in (pictures.coglm, pictures.direct, pictures.iterative):
        assert np.array_equal(np.array(stage[0])[~mask], before[~mask])


def test_a_region_holds_in_every_round(model: CogView2) -> None:
    upsampler = model.upsampler
    assert upsampler is not None
    before, region = torch.randint(64, (1, 81)), torch.zeros(9, 9, dtype=torch.bool)
    region[3:6] = True
    rounds = upsampler.run_iterative([[70]], before, [0], region)
    assert len(rounds) == OFFICIAL.n_rounds
    assert all(torch.equal(after[0, ~region.flatten()], before[0, ~region.flatten()]) for after in rounds)
    assert not torch.equal(rounds[-1], before)


def test_weights_of_the_first_stage_alone_draw_coarse_pictures(tmp_path: Path) -> None:
    model = CogView2.from_pretrained(write_tiny(tmp_path), TINY)
    assert model.n_stages == 1 and model.generate("cat", n=1)[0].size == (12, 12)
    with pytest.raises(MiniCogViewError, match="stages is 2: give an integer from 1 to 1"):
        model.generate("cat", stages=2)


def test_a_photograph_keeps_every_pixel_outside_of_the_mask() -> None:
    """The shipped weights on a photograph that comes with matplotlib: a painted mask, all stages."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = Image.open(file).convert("RGB")
    y, x = np.mgrid[: photo.height, : photo.width]
    mask = (y - 420) ** 2 + (x - 300) ** 2 < 70**2
    mask |= (abs(y - 100) < 6) & (abs(x - 220) < 90)
    model = CogView2.from_pretrained("toy")
    pictures = model.edit("a red apple", photo, mask, n=1)
    before = np.array(photo)
    stages = [stage for stage in (pictures.coglm, pictures.direct, pictures.iterative) if stage is not None]
    assert len(stages) == model.n_stages > 1
    for stage in stages:
        after = np.array(stage[0])
        assert np.array_equal(after[~mask], before[~mask]) and (after[mask] != before[mask]).any()
