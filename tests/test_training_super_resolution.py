"""Training both super-resolution stages: batches follow from (seed, step), masks are of many sizes, both learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_super_resolution import CODES, tiny_config

from minicogview.checkpoints.weight_files import load_direct, load_iterative, save_direct, save_model
from minicogview.errors import MiniCogViewError
from minicogview.lopar import OFFICIAL, IterativeSR
from minicogview.super_resolution import DirectSR, Slots
from minicogview.tokenizer import Tokenizer
from minicogview.training import RunOptions, Settings, fit
from minicogview.training.lopar import IterativeObjective, draw_mask
from minicogview.training.recipes import TOY_WEIGHTS
from minicogview.training.super_resolution import DirectObjective, Pairs, SuperResolutionRecipe, replace_codes

CODEBOOK = torch.randn(CODES, 4, generator=torch.Generator().manual_seed(1))
RECIPE = SuperResolutionRecipe(batch_size=4, n_neighbours=3, softness=0.2)
SETTINGS = Settings(steps=150, lr=3e-3, warmup=5, ema_decay=0.9)


class Words(Tokenizer):
    """Every character is a token of the tiny vocabulary."""

    def encode(self, text: str) -> list[int]:
        return [CODES + ord(character) % 20 for character in text]


def make_pairs() -> Pairs:
    """Each coarse code stands for one 3 x 3 block of fine codes: something that can be learned."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(8, (6, 4, 4), generator=generator)
    blocks = torch.randint(CODES, (8, 3, 3), generator=generator)
    fine = blocks[coarse].permute(0, 1, 3, 2, 4).reshape(6, 144)
    words = Words(TOY_WEIGHTS / "text.model", CODES)
    return Pairs(coarse.flatten(1), fine, lambda i, language, rng: f"{language}{i}", words)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return make_pairs()


def direct_objective(pairs: Pairs, **options: bool) -> DirectObjective:
    torch.manual_seed(0)
    return DirectObjective(DirectSR(tiny_config()), pairs, CODEBOOK, RECIPE, **options)


def iterative_objective(pairs: Pairs, direct_codes: torch.Tensor | None = None) -> IterativeObjective:
    torch.manual_seed(0)
    return IterativeObjective(IterativeSR(tiny_config(n_text=2)), pairs, CODEBOOK, RECIPE, direct_codes)


def test_batches_depend_on_seed_and_step_alone(pairs: Pairs) -> None:
    rows, texts = pairs.draw(4, 0.5, seed=1, step=7)
    again, same_texts = pairs.draw(4, 0.5, seed=1, step=7)
    assert torch.equal(rows, again) and texts == same_texts
    assert texts != pairs.draw(4, 0.5, seed=1, step=8)[1]
    assert all(text == [] for text in pairs.draw(4, 1.0, 0, 0)[1])
    for make in (direct_objective, iterative_objective):
        one, two = make(pairs), make(pairs)
        two.loss(0)
        assert torch.equal(one.loss(3)[0], two.loss(3)[0])


def test_replaced_codes_are_neighbours() -> None:
    codes, near = torch.zeros(50, 144, dtype=torch.long), torch.tensor([[5, 6, 7]] * CODES)
    noisy = replace_codes(codes, near, 0.5, np.random.default_rng(0))
    assert set(noisy.unique().tolist()) == {0, 5, 6, 7} and 0.15 < (noisy != 0).float().mean() < 0.35
    assert torch.equal(replace_codes(codes, near, 0.0, np.random.default_rng(0)), codes)


def test_masks_are_never_empty_and_of_many_sizes() -> None:
    rng = np.random.default_rng(0)
    shares = [float(draw_mask((12, 12), OFFICIAL, rng).float().mean()) for _ in range(200)]
    assert min(shares) > 0 and min(shares) < 0.1 and max(shares) > 0.8


def test_only_what_is_new_is_trained_unless_asked_for(pairs: Pairs) -> None:
    frozen, free = direct_objective(pairs), direct_objective(pairs, train_base=True)
    names = {name for name, p in frozen.model.named_parameters() if p.requires_grad}
    assert names and not any(name.startswith("base.") for name in names)
    assert all(p.requires_grad for p in free.model.parameters())


def test_the_direct_stage_learns(pairs: Pairs, tmp_path: Path) -> None:
    objective = direct_objective(pairs, train_base=True)
    with torch.no_grad():
        before = float(objective.loss(1000)[0])
    fit(objective, tmp_path, SETTINGS, RunOptions(progress=False))
    with torch.no_grad():
        assert float(objective.loss(1000)[0]) < 0.7 * before


def test_the_iterative_stage_learns_from_direct_codes_too(pairs: Pairs, tmp_path: Path) -> None:
    objective = iterative_objective(pairs, direct_codes=(pairs.fine + 1) % CODES)
    with torch.no_grad():
        before = float(objective.loss(1000)[0])
    fit(objective, tmp_path, SETTINGS, RunOptions(progress=False))
    with torch.no_grad():
        assert float(objective.loss(1000)[0]) < 0.85 * before


def test_direct_codes_are_shown_and_true_codes_predicted(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = iterative_objective(pairs, torch.full_like(pairs.fine, CODES - 1))
    seen: list[torch.Tensor] = []
    forward = IterativeSR.forward

    def spy(self: IterativeSR, texts: Slots, fine: torch.Tensor, before: torch.Tensor) -> object:
        seen.append(fine)
        return forward(self, texts, fine, before)

    monkeypatch.setattr(IterativeSR, "forward", spy)
    for step in range(6):
        objective.loss(step)
    shown, boi = torch.cat(seen), objective.model.config.coglm.ids.boi
    by_direct = ((shown == CODES - 1) | (shown == boi)).all(1)
    assert 0 < by_direct.float().mean() < 1 and (shown == boi).any(1).all()


def test_weights_come_back_and_a_foreign_base_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DirectSR(tiny_config())
    with torch.no_grad():
        model.fine_position.weight.normal_()
    model.half().float()  # the precision of a file
    save_direct(tmp_path / "direct.safetensors", model)
    back = load_direct(tmp_path / "direct.safetensors", model.base)
    assert back.base is model.base and torch.equal(back.fine_position.weight, model.fine_position.weight)
    texts, codes = [[40]], torch.zeros(1, 16, dtype=torch.long)
    assert torch.equal(back(texts, codes)[1], model.eval()(texts, codes)[1])
    other = DirectSR(tiny_config()).base
    with pytest.raises(MiniCogViewError, match=r"trained on top of another coglm\.safetensors"):
        load_direct(tmp_path / "direct.safetensors", other)
    iterative = IterativeSR(tiny_config()).half().float()
    save_model(tmp_path / "iterative.safetensors", iterative, iterative.config, "iterative")
    state = load_iterative(tmp_path / "iterative.safetensors").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in iterative.state_dict().items())

