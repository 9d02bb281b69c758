"""Sampling: draws follow the stated distributions, seeds hold, limits and bad input are caught."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minicogview import sampling
from minicogview.clusters import Clusters
from minicogview.config import SamplingConfig
from minicogview.errors import MiniCogViewError
from minicogview.sampling import Sampler

V, C = 60, 7
CONFIG = SamplingConfig(temperature=0.9, top_k=3, cluster_temperature=0.7)


def random_logits(rows: int, seed: int = 0, width: int = V) -> torch.Tensor:
    return 2 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def random_clusters(seed: int = 1, width: int = V) -> Clusters:
    return Clusters.of(torch.randint(0, C, (width,), generator=torch.Generator().manual_seed(seed)))


def plain_cluster_probabilities(logits, labels, temperature, top_k, cluster_temperature):
    """One row, one loop over clusters, no shared code: the definition."""
    p = (logits / temperature).softmax(0)
    mass = {int(c): float(p[labels == c].sum()) for c in labels.unique()}
    kept = sorted(mass, key=mass.__getitem__, reverse=True)[:top_k]
    result = torch.zeros_like(p)
    for c in kept:
        inside = labels == c
        result[inside] = (logits[inside] / temperature / cluster_temperature).softmax(0) * mass[c]
    return result / sum(mass[c] for c in kept)


# --- distributions


@pytest.mark.parametrize("top_k", [1, 3, C, 50])
def test_cluster_probabilities_equal_the_definition(top_k):
    logits, clusters = random_logits(5), random_clusters()
    got = sampling.cluster_probabilities(logits, clusters.labels, 1.15, top_k, 0.6)
    for row, expected in zip(got, logits, strict=True):
        want = plain_cluster_probabilities(expected, clusters.labels, 1.15, top_k, 0.6)
        torch.testing.assert_close(row, want, atol=1e-6, rtol=1e-5)


def test_empty_clusters_and_banned_tokens_are_never_drawn():
    labels = torch.tensor([0, 0, 3, 3, 5, 5])  # clusters 1, 2, 4 are empty
    logits = random_logits(2, width=6)
    logits[:, 4:] = -torch.inf  # cluster 5 is banned as a whole
    p = sampling.cluster_probabilities(logits, labels, 1.0, 6)
    assert p.isfinite().all() and (p[:, 4:] == 0).all()
    torch.testing.assert_close(p, logits.softmax(-1))
    noise = torch.rand(1000, 2)
    drawn = sampling.sample(logits[:1].expand(1000, -1), noise, 1.0, 6, clusters=Clusters.of(labels))
    assert drawn.max() < 4


def test_top_k_keeps_exactly_k_and_renormalises():
    p = sampling.top_k_probabilities(random_logits(4), temperature=1.3, top_k=5)
    assert ((p > 0).sum(-1) == 5).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(4))


@pytest.mark.parametrize("clustered", [True, False])
def test_draws_follow_the_stated_distribution(clustered):
    n = 100_000
    logits, clusters = random_logits(1), random_clusters() if clustered else None
    settings = CONFIG.temperature, CONFIG.top_k, CONFIG.cluster_temperature
    noise = torch.rand(n, 2, generator=torch.Generator().manual_seed(5))
    drawn = sampling.sample(logits.expand(n, -1), noise, *settings, clusters)
    if clusters is None:
        expected = sampling.top_k_probabilities(logits, *settings[:2])[0]
    else:
        expected = sampling.cluster_probabilities(logits, clusters, *settings)[0]
    found = drawn.bincount(minlength=V) / n
    assert (found[expected == 0] == 0).all()
    error = (found - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp(min=1e-9)
    assert error[expected > 0].max() < 4.5  # standard errors


def test_extreme_uniform_numbers_stay_inside_the_support():
    probability = torch.tensor([[0.0, 0.3, 0.7, 0.0]])
    assert sampling.pick(probability, torch.tensor([0.0])).item() == 1
    assert sampling.pick(probability, torch.tensor([1 - 2.0**-24])).item() == 2


def test_any_leading_shape_equals_flat_rows():
    logits, clusters = random_logits(12), random_clusters()
    noise = torch.rand(12, 2)
    flat = sampling.sample(logits, noise, 1.0, 3, 0.8, clusters)
    grid = sampling.sample(logits.view(3, 4, V), noise.view(3, 4, 2), 1.0, 3, 0.8, clusters)
    assert torch.equal(flat, grid.flatten())


@pytest.mark.parametrize("clusters", [None, random_clusters()])
def test_temperature_zero_takes_the_likeliest(clusters):
    logits = random_logits(3)
    config = dataclasses.replace(CONFIG, temperature=0.0)
    assert torch.equal(Sampler([0, 1, 2], config, clusters)(logits, 0), logits.argmax(-1))


def test_nearest_to_the_mean_takes_the_code_of_least_expected_squared_error():
    codebook = torch.randn(V, 4, generator=torch.Generator().manual_seed(0))
    logits = random_logits(6).view(2, 3, V)
    codes = sampling.NearestToMean(codebook, temperature=0.5)(logits, 0)
    error = (logits / 0.5).softmax(-1) @ torch.cdist(codebook, codebook).square()  # (2, 3, V), of every choice
    assert torch.equal(codes, error.argmin(-1))
    assert not torch.equal(codes, logits.argmax(-1))
    line = torch.tensor([[0.0], [1.0], [2.0]])  # two codes equally likely, and one between them
    assert sampling.NearestToMean(line)(torch.tensor([[[1.0, -9.0, 1.0]]]), 0).item() == 1
    with pytest.raises(MiniCogViewError, match="temperature 0 is not above 0"):
        sampling.NearestToMean(line, temperature=0)


def test_half_precision_logits_are_accepted():
    logits, clusters = random_logits(2).bfloat16(), random_clusters()
    assert sampling.cluster_probabilities(logits, clusters, 1.0, 3).dtype == torch.float32
    assert Sampler([0, 1], CONFIG, clusters)(logits, 0).shape == (2,)


# --- seeds


def draw(seeds: list[int], n_steps: int = 20) -> torch.Tensor:
    sampler = Sampler(seeds, CONFIG, random_clusters())
    return torch.stack(
        [sampler(random_logits(1, step).expand(len(seeds), -1), step) for step in range(n_steps)], 1
    )


def test_the_same_seed_gives_the_same_picture_whatever_stands_beside_it():
    assert torch.equal(draw([7, 8, 9]), draw([7, 8, 9]))
    assert torch.equal(draw([7, 8, 9])[1:2], draw([8]))
    assert not torch.equal(draw([7]), draw([8]))


def test_the_length_of_a_run_does_not_change_its_start():
    short, long = sampling.uniforms([3], 10), sampling.uniforms([3], 1000)
    assert torch.equal(short, long[:, :10])
    assert 0 <= long.min() and long.max() < 1


# --- guidance and settings


def test_guidance_of_one_changes_nothing_and_two_goes_as_far_again():
    cond, uncond = random_logits(2), random_logits(2, seed=9)
    assert torch.equal(sampling.guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(sampling.guide(cond, uncond, 2.0), 2 * cond - uncond)


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_k": 0}, {"cluster_temperature": 0.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(MiniCogViewError, match=next(iter(wrong))):
        dataclasses.replace(CONFIG, **wrong)


def test_labels_of_another_codebook_are_refused():
    with pytest.raises(MiniCogViewError, match="61 tokens, but cluster labels for 60"):
        sampling.cluster_probabilities(random_logits(1, width=V + 1), random_clusters(), 1.0, 3)
