"""From logits to a token: temperature, top-k, cluster sampling and classifier-free guidance.

Plain top-k keeps the k likeliest tokens. It rests on an assumption that nobody states: that two different tokens are
two different ideas. A picture codebook holds many near-identical rows, so top-k may keep k copies of one colour and cut
off every other idea. Cluster sampling first draws one of the k likeliest *groups* of similar tokens (``clusters.py``),
then a token inside that group.

Source: CogView2 (Ding et al. 2022), section 4.2 and appendix. Mirrors ``coglm_strategy.py`` and
``sr_pipeline/dsr_sampling.py`` of the official code (cluster samplers) and its LoPAR sampler (top-k).

Shapes: ``B`` rows (any leading shape works), ``V`` tokens, ``C`` clusters, ``M`` members of the largest cluster,
``K`` choices kept, ``D`` width of a codebook row.

Different on purpose: each picture has a table of uniform random numbers, generated from its own seed and turned into
tokens by inverting the cumulative distribution. So nothing loops over the batch, and a picture does not depend on
how many are drawn beside it. ``clusters=None`` is the plain top-k sampler, and temperature 0 takes the likeliest token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minicogview.clusters import Clusters
from minicogview.config import SamplingConfig
from minicogview.errors import MiniCogViewError

# --- which choices are kept, and how likely each is: both the samplers and the exact distributions call these


def top_k_choices(logits: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k tokens (B, K), likeliest first, and their renormalised probabilities (B, K)."""
    best, tokens = logits.float().topk(min(top_k, logits.shape[-1]))  # (B, K)
    return tokens, (best / temperature).softmax(-1)


def cluster_choices(
    logits: Tensor, clusters: Clusters, temperature: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """The top_k clusters (B, K) by probability mass, and their renormalised probabilities (B, K)."""
    n_tokens = len(clusters.labels)
    if logits.shape[-1] != n_tokens:
        raise MiniCogViewError(
            f"logits over {logits.shape[-1]} tokens, but cluster labels for {n_tokens}: "
            "cut the logits to the picture tokens, or use the labels that belong to this codebook"
        )
    probability = (logits.float() / temperature).softmax(-1)  # (B, V)
    mass = probability.new_zeros(*logits.shape[:-1], clusters.n_clusters)
    mass.index_add_(-1, clusters.labels, probability)  # (B, C)
    best, kept = mass.topk(min(top_k, clusters.n_clusters))
    return kept, best / best.sum(-1, keepdim=True)


def member_choices(
    logits: Tensor, clusters: Clusters, cluster: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The tokens (B, M) of one chosen ``cluster`` (B,) per row, and their probabilities (B, M) inside it.

    ``temperature`` is the product of the first and the second temperature.
    """
    tokens = clusters.members[cluster]
    inside = logits.float().gather(-1, tokens) / temperature + clusters.bias[cluster]
    return tokens, inside.softmax(-1)


# --- exact distributions


def top_k_probabilities(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """Probability (B, V) of every token under the top-k sampler, which LoPAR uses.

    Args:
        logits: (B, V), any float type.
        temperature: above 0.
        top_k: number of tokens that may be drawn.
    """
    tokens, probability = top_k_choices(logits, temperature, top_k)
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, tokens, probability)


def cluster_probabilities(
    logits: Tensor,
    labels: Tensor | Clusters,
    temperature: float,
    top_k: int,
    cluster_temperature: float = 1.0,
) -> Tensor:
    """Probability (B, V) of every token under cluster sampling, which CogLM and the direct stage use.

    Args:
        logits: (B, V), any float type.
        labels: (V,) cluster of each token, or the ``Clusters`` made from them.
        temperature: above 0; acts on clusters and on tokens.
        top_k: number of *clusters* that may be drawn; the number of tokens is not limited.
        cluster_temperature: second temperature, above 0; acts only inside the drawn cluster. The original calls it
            ``top_k_cluster`` in one place and ``temperature2`` in another: both are temperatures, not counts.

    Raises:
        MiniCogViewError: if the number of labels differs from the number of logits.
    """
    clusters = Clusters.of(labels)
    kept, mass = cluster_choices(logits, clusters, temperature, top_k)  # (B, K)
    result = torch.zeros_like(logits, dtype=torch.float32)
    for choice in range(kept.shape[-1]):
        tokens, inside = member_choices(
            logits, clusters, kept[..., choice], temperature * cluster_temperature
        )
        share = mass[..., choice, None]
        # Where all logits of a cluster are -inf, `inside` is NaN and the share is 0.
        result.scatter_add_(-1, tokens, torch.where(share > 0, share * inside, 0.0))
    return result


# --- drawing


def uniforms(seeds: Sequence[int], n_draws: int) -> Tensor:
    """Random numbers in [0, 1) for ``B`` pictures, (B, n_draws, 2): row i depends on ``seeds[i]`` alone.

    They are always generated on the CPU, so that a seed means the same numbers on every device.
    """
    rows = [torch.rand(n_draws, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def pick(probability: Tensor, uniform: Tensor) -> Tensor:
    """Index (B,) drawn from ``probability`` (B, K): the first where its cumulative sum exceeds ``uniform`` (B,)."""
    cumulative = probability.cumsum(-1)
    # Strictly below the last sum, so that rounding never picks an entry of probability 0.
    target = cumulative[..., -1:] * uniform[..., None].clamp(max=1 - 2.0**-23)
    return (cumulative <= target).sum(-1)


def sample(
    logits: Tensor,
    noise: Tensor,
    temperature: float = 1.0,
    top_k: int = 16,
    cluster_temperature: float = 1.0,
    clusters: Clusters | None = None,
) -> Tensor:
    """Draw one token per row, for all rows at once.

    Args:
        logits: (B, V), with any leading shape: super-resolution passes (B, S, V).
        noise: (B, 2) uniform random numbers: the first picks the cluster (with plain top-k, the token), the second
            the token inside the cluster.
        temperature: 0 takes the likeliest token.
        top_k: number of clusters kept; if ``clusters`` is None, of tokens kept.
        cluster_temperature: see ``cluster_probabilities``.
        clusters: None for the plain top-k sampler.

    Returns:
        (B,) int64 tokens, distributed as ``cluster_probabilities`` or ``top_k_probabilities`` says.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if clusters is None:
        tokens, probability = top_k_choices(logits, temperature, top_k)
        return tokens.gather(-1, pick(probability, noise[..., 0])[..., None])[..., 0]
    kept, mass = cluster_choices(logits, clusters, temperature, top_k)
    cluster = kept.gather(-1, pick(mass, noise[..., 0])[..., None])[..., 0]  # (B,)
    tokens, inside = member_choices(logits, clusters, cluster, temperature * cluster_temperature)
    return tokens.gather(-1, pick(inside, noise[..., 1])[..., None])[..., 0]


@dataclass(eq=False)
class Sampler:
    """Draws the next token of every picture; generation calls it at every step: ``sampler(logits, step) -> tokens``.

    Any callable with that signature can replace it; the parity tests use a rule without randomness. Picture i depends
    on ``seeds[i]`` alone: the second picture of seeds 0, 1, 2 is the first picture of seeds 1, 2, 3, and it is the same
    whether 2 or 20 are drawn (up to rounding in the model's sums).

    Attributes:
        seeds: one for each row of the batch.
        config: temperature, top-k and second temperature.
        clusters: of the picture tokens; None for plain top-k.
        n_steps: the most tokens that one picture may need.
    """

    seeds: Sequence[int]
    config: SamplingConfig = field(default_factory=SamplingConfig)
    clusters: Clusters | None = None
    n_steps: int = 1024

    def __post_init__(self) -> None:
        self.noise = uniforms(self.seeds, self.n_steps)  # (B, n_steps, 2)

    def __call__(self, logits: Tensor, step: int | Tensor) -> Tensor:
        """Tokens (B,) from logits (B, V), or (1, V) shared by all rows, at generation step ``step``, counted from 0.

        Super-resolution draws many cells at once: then ``step`` is (S,), logits are (B, S, V) and tokens (B, S).
        """
        if self.noise.device != logits.device:
            self.noise = self.noise.to(logits.device)
            self.clusters = self.clusters.to(logits.device) if self.clusters else None
        c = self.config
        rows, noise = logits.expand(len(self.seeds), *logits.shape[1:]), self.noise[:, step]
        return sample(rows, noise, c.temperature, c.top_k, c.cluster_temperature, self.clusters)


@dataclass(eq=False)
class NearestToMean:
    """A sampler without randomness: the code whose codebook row is nearest to the mean row under the distribution.

    Of all codes it has the least expected squared distance to the true one, in codebook space: a decision by minimum
    Bayes risk (Kumar & Byrne, 2004). The likeliest code is the least likely to be wrong, but when it is wrong it may be
    far off. This suits super-resolution, which is judged by how close it comes. The original samples.

    Attributes:
        codebook: (V, D). temperature: above 0; below 1, likely codes weigh even more in the mean.
    """

    codebook: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise MiniCogViewError(f"temperature {self.temperature} is not above 0: give a positive number")

    def __call__(self, logits: Tensor, step: int | Tensor) -> Tensor:
        """Codes (B, S) from logits (B, S, V); ``step`` is not used."""
        codebook = self.codebook = self.codebook.to(logits.device)
        mean = (logits.float() / self.temperature).softmax(-1) @ codebook  # (B, S, D)
        return torch.cdist(mean, codebook).argmin(-1)


# --- guidance, which changes the logits before they are sampled


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits (Ho and Salimans 2022): away from "no text", towards the text.

    Not in the original.

    Args:
        cond, uncond: (B, V) logits with and without the text.
        scale: 1 returns ``cond``; a scale above 1 exaggerates what the text changes.
    """
    return torch.lerp(uncond, cond, scale)
