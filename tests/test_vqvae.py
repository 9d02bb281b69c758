"""The picture tokenizer, its training and its measures. Equality with the original: parity/test_parity_vqvae.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange, reduce, repeat
from tiny import keep_emoji
from torch import Tensor

from minicogview.checkpoints.weight_files import load_vqvae
from minicogview.config import VQVAEConfig, get_preset
from minicogview.data.emoji import indices, load_emoji, render
from minicogview.errors import MiniCogViewError
from minicogview.evaluation.metrics import perplexity, psnr, ssim, tokenizer_psnr
from minicogview.training.codebook import CodebookLearner
from minicogview.training.vqvae import TokenizerObjective, jigsaw, spread_of_equals
from minicogview.vqvae import VQVAE, from_official, from_official_name, official_config

TINY = VQVAEConfig(
    channels=8,
    encoder_multipliers=(1, 1, 2),
    encoder_blocks=1,
    codebook_size=32,
    codebook_dim=4,
    latent_channels=8,
    decoder_multipliers=((1, 1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)),
    n_groups=4,
)


@pytest.fixture
def tiny() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(TINY).eval()


def mosaics(n: int = 64, size: int = 16) -> Tensor:
    """Pictures (N, 3, S, S) uint8 whose 4x4 cells each have one of 8 colours: a tiny model learns them in seconds."""
    generator = torch.Generator().manual_seed(0)
    palette = torch.randint(0, 256, (8, 3), generator=generator).to(torch.uint8)
    cells = palette[torch.randint(0, 8, (n, size // 4, size // 4), generator=generator)]
    return repeat(cells, "n h w c -> n c (h p) (w q)", p=4, q=4).contiguous()


@torch.no_grad()
def test_each_level_spends_one_code_on_its_rate(tiny: VQVAE) -> None:
    pictures = torch.rand(2, 3, 32, 48)
    assert TINY.rates == (4, 8, 16)
    for level, rate in enumerate(TINY.rates):
        codes = tiny.encode(pictures, level)
        assert codes.dtype == torch.int64 and codes.shape == (2, 32 // rate, 48 // rate)
        assert 0 <= int(codes.min()) and int(codes.max()) < TINY.codebook_size
        assert tiny.decode(codes, level).shape == pictures.shape


@torch.no_grad()
def test_forward_agrees_with_encode_and_decode(tiny: VQVAE) -> None:
    pictures = torch.rand(2, 3, 32, 32)
    outputs, commitment, codes = tiny(pictures)
    assert commitment.item() > 0
    for level in range(tiny.levels):
        assert torch.equal(codes[level], tiny.encode(pictures, level))
        decoded = tiny.decode(codes[level], level)
        torch.testing.assert_close(tiny.denormalise(outputs[level]), decoded, atol=1e-5, rtol=0)


def test_nearest_is_the_nearest(tiny: VQVAE) -> None:
    z = torch.randn(5, 7, TINY.codebook_dim)
    expected = torch.cdist(z.reshape(-1, TINY.codebook_dim), tiny.quantizer.codebook).argmin(1)
    assert torch.equal(tiny.quantizer.nearest(z).flatten(), expected)
    rows = tiny.quantizer.codebook[:12].reshape(3, 4, -1)
    assert torch.equal(tiny.quantizer.nearest(rows), torch.arange(12).reshape(3, 4))


def test_gradient_passes_straight_through_the_codebook(tiny: VQVAE) -> None:
    z = torch.randn(1, TINY.codebook_dim, 2, 2, requires_grad=True)
    rows, _, _ = tiny.quantizer.straight_through(z)
    rows.sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.ones_like(z))
    assert not tiny.quantizer.codebook.requires_grad


@pytest.mark.parametrize(
    ("shape", "level", "words"),
    [
        ((1, 3, 30, 32), 0, "32x30"),
        ((1, 3, 32, 40), 2, "16"),
        ((3, 32, 32), 0, "expected"),
        ((1, 3, 32, 32), 3, "level 3"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(tiny: VQVAE, shape: tuple[int, ...], level: int, words: str) -> None:
    with pytest.raises(MiniCogViewError, match=words):
        tiny.encode(torch.rand(shape), level)


def test_decode_refuses_an_unknown_level(tiny: VQVAE) -> None:
    with pytest.raises(MiniCogViewError, match="levels 0 to 2"):
        tiny.decode(torch.zeros(1, 2, 2, dtype=torch.long), level=-1)


def test_official_names_cover_every_weight_once() -> None:
    description = json.loads((Path(__file__).parent / "golden/hvqvae/full.json").read_text())
    names = [from_official_name(name) for name in description["keys"]]
    with torch.device("meta"):
        ours = VQVAE(get_preset("cogview2").vqvae).state_dict()
    assert len(set(names)) == len(names) and set(names) == set(ours)
    assert official_config(description["keys"]) == get_preset("cogview2").vqvae


def test_foreign_weights_are_refused_by_name() -> None:
    with pytest.raises(MiniCogViewError, match="not the weights of a CogView2 picture tokenizer"):
        from_official({"transformer.word_embeddings.weight": torch.zeros(2, 2)})


# ---------------------------------------------------------------- learning the codebook


def test_a_row_moves_to_the_mean_of_its_vectors() -> None:
    learner = CodebookLearner(torch.nn.Parameter(torch.eye(2), requires_grad=False))
    z = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0]])
    for _ in range(1500):
        learner.update(torch.tensor([0, 0, 1]), z)
    torch.testing.assert_close(learner.codebook.data, torch.tensor([[3.0, 0.0], [0.0, 1.0]]), atol=1e-3, rtol=0)


def test_unused_rows_move_to_where_the_error_is_largest() -> None:
    learner = CodebookLearner(torch.nn.Parameter(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), requires_grad=False))
    learner.counts[1] = 0.0
    z = torch.cat([torch.zeros(100, 2), torch.tensor([[0.0, 5.0]])])  # background, and one detail
    assert learner.revive(z, torch.Generator().manual_seed(0)) == 1
    assert learner.codebook[1].tolist() == [0.0, 5.0]
    assert learner.revive(z, torch.Generator().manual_seed(0)) == 0


def test_rows_that_mean_the_same_are_merged_and_used_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    background = 0.01 * torch.randn(1000, 4, generator=generator)
    detail = torch.randn(7, 4, generator=generator) * 10
    z = torch.cat([background, detail.repeat(20, 1)])
    rows = 0.01 * torch.randn(8, 4, generator=generator)  # all of them on the background
    learner = CodebookLearner(torch.nn.Parameter(rows, requires_grad=False))
    assert learner.settle(z, generator, rounds=12) > 0
    assert float(torch.cdist(detail, learner.codebook).amin(1).max()) < 0.1
    assert float(torch.pdist(learner.codebook).min()) > 0.1


def test_kmeans_start_finds_separate_clusters() -> None:
    centres = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)) * 10
    z = centres.repeat(50, 1) + 0.01 * torch.randn(400, 4, generator=torch.Generator().manual_seed(2))
    learner = CodebookLearner(torch.nn.Parameter(torch.zeros(8, 4), requires_grad=False))
    learner.place(z, torch.Generator().manual_seed(0))
    assert float(torch.cdist(centres, learner.codebook).amin(1).median()) < 0.1


# ---------------------------------------------------------------- training


def test_a_batch_depends_on_seed_and_step_only(tiny: VQVAE) -> None:
    pictures = {16: torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)}
    first, again = (TokenizerObjective(tiny, pictures, batch_pixels=2048, seed=1) for _ in range(2))
    first.batch(3)
    assert torch.equal(first.batch(4), again.batch(4))
    assert not torch.equal(first.batch(4), again.batch(5))
    assert not torch.equal(first.batch(4), TokenizerObjective(tiny, pictures, batch_pixels=2048).batch(4))


def test_a_jigsaw_is_undone_by_the_inverse_order() -> None:
    x = torch.rand(3, 2, 8, 12)
    order = torch.randperm(3 * 2 * 3, generator=torch.Generator().manual_seed(0))
    shuffled = jigsaw(x, 4, order)
    assert not torch.equal(shuffled, x)
    assert torch.equal(jigsaw(shuffled, 4, order.argsort()), x)
    assert torch.equal(shuffled[0, :, :4, :4], rearrange(x, "b c (h p) (w q) -> (b h w) c p q", p=4, q=4)[order[0]])


def test_equal_cells_with_different_vectors_are_punished() -> None:
    pictures = torch.rand(1, 3, 4, 12)
    pictures[..., 4:8] = pictures[..., :4]  # cells 0 and 1 show the same, cell 2 something else
    alike = torch.tensor([1.0, 1.0, 5.0]).view(1, 1, 1, 3)
    apart = torch.tensor([0.0, 2.0, 5.0]).view(1, 1, 1, 3)
    assert spread_of_equals(pictures, alike, rate=4).item() == 0
    expected = (1 + 1 + 0) / 3 / apart.var().item()
    assert spread_of_equals(pictures, apart, rate=4).item() == pytest.approx(expected)


def run(objective: TokenizerObjective, steps: int) -> list[float]:
    """A plain training loop: the losses."""
    trained = [p for p in objective.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-3)
    losses = []
    for step in range(steps):
        loss, _ = objective.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(step)
        losses.append(loss.item())
    return losses


def test_training_learns_plain_cells(tiny: VQVAE) -> None:
    objective = TokenizerObjective(tiny, {16: mosaics()}, batch_pixels=4096, warm_up=40, revive_until=400)
    run(objective, 100)
    pictures = mosaics()[:8].float() / 255
    with torch.no_grad():
        decoded = tiny.decode(tiny.encode(pictures, 0), 0)
        grey = torch.full_like(pictures, 0.5)
    assert float(psnr(decoded, pictures).mean()) > float(psnr(grey, pictures).mean()) + 3


def test_the_coarser_levels_leave_level_0_as_it_is(tiny: VQVAE) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    run(TokenizerObjective(tiny, {16: mosaics()}, levels=(1, 2), batch_pixels=2048), 3)
    changed = {name for name, value in tiny.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("halvers.", "decoders.0.", "decoders.1.")) for name in changed)


# ---------------------------------------------------------------- measures and the shipped weights


def test_psnr_of_known_errors() -> None:
    reference = torch.full((2, 3, 4, 4), 0.5)
    pictures = reference + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(pictures, reference), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    assert psnr(reference, reference).tolist() == [100.0, 100.0]


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    picture = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ssim(picture, picture), torch.ones(1))
    assert 1 > ssim(picture + 0.05 * noise, picture).item() > ssim(picture + 0.3 * noise, picture).item()


def test_perplexity_counts_codes_in_use() -> None:
    assert perplexity(torch.arange(16).repeat(3), 64) == pytest.approx(16)
    assert perplexity(torch.zeros(10, dtype=torch.long), 64) == pytest.approx(1)


@pytest.fixture(scope="module")
def toy() -> VQVAE:
    return load_vqvae(Path(__file__).parents[1] / "minicogview/weights/toy/vqvae.safetensors")


def test_the_shipped_tokenizer_keeps_its_promise(
    toy: VQVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every fourth held-out picture."""
    assert toy.config == get_preset("toy").vqvae
    keep_emoji(load_emoji("tokenizer_heldout")[::4], tmp_path, monkeypatch)
    assert tokenizer_psnr(toy, 32)["n"] == 40
    assert tokenizer_psnr(toy, 32)["psnr"] >= 25
    assert tokenizer_psnr(toy, 96)["psnr"] >= 30


@torch.no_grad()
def test_plain_background_is_one_code(toy: VQVAE) -> None:
    rows = indices(load_emoji("tokenizer_heldout"))
    pictures = rearrange(torch.from_numpy(render(32)[rows]), "n h w c -> n c h w").float() / 255
    white = reduce(pictures, "n c (h p) (w q) -> n h w", "min", p=4, q=4) == 1
    counts = torch.bincount(toy.encode(pictures, level=0)[white])
    assert int(counts.max()) > 0.9 * int(counts.sum())
