"""Every token is sampled with the original's probability (the golden files' README, section 6)."""

from __future__ import annotations

import pytest
import torch
from golden_data import cases_of, close, golden

from minicogview import sampling
from minicogview.clusters import Clusters


@pytest.mark.parametrize("case", cases_of("sampling/sampling.json"))
def test_sampling_probabilities(case: str) -> None:
    settings, g = golden("sampling/sampling.json")[case], golden("sampling/sampling.safetensors")
    logits, expected = g["logits"], g[f"{case}/probability"]
    temperature = settings["temperature"]
    if case.startswith("itersr"):
        top_k, second, clusters = settings["topk"], 1.0, None
        probability = sampling.top_k_probabilities(logits, temperature, top_k)
    else:
        first_stage = case.startswith("coglm")  # the two programs name the same settings differently
        top_k = settings["top_k" if first_stage else "topk"]
        second = settings["top_k_cluster" if first_stage else "temperature2"]
        clusters = Clusters.of(g["labels"])
        probability = sampling.cluster_probabilities(logits, clusters, temperature, top_k, second)
    close(probability, expected, atol=1e-6)
    if "support" in settings:
        assert (probability > 0).sum(-1).tolist() == settings["support"]

    # The sampler itself, over an even grid of its two random numbers: the share of every token.
    n = 300
    steps = (torch.arange(n) + 0.5) / n
    noise = torch.cartesian_prod(steps, steps)
    for row, share in zip(logits, expected, strict=True):
        drawn = sampling.sample(row.expand(n * n, -1), noise, temperature, top_k, second, clusters)
        close(drawn.bincount(minlength=len(row)) / n**2, share, atol=2 / n)


def test_sampling_cluster_mass() -> None:
    settings, g = golden("sampling/sampling.json"), golden("sampling/sampling.safetensors")
    names = [name for name in settings if name.startswith("coglm")]
    assert names
    for name in names:
        expected = g[f"{name}/cluster_probability"]
        temperature, top_k = settings[name]["temperature"], settings[name]["top_k"]
        kept, mass = sampling.cluster_choices(g["logits"], Clusters.of(g["labels"]), temperature, top_k)
        close(torch.zeros_like(expected).scatter_(-1, kept, mass), expected, atol=1e-6)
