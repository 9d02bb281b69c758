"""From logits to a token: temperature, top-k, cluster sampling, and the two dials around them.

A picture codebook holds many near-identical rows. Plain top-k keeps k copies of the same colour and cuts
off every other idea; cluster sampling first draws one of the k likeliest *groups* of similar tokens, then
a token inside that group. Text is weighted up by adding a constant to the attention scores of text columns.

Source: CogView2 (Ding et al. 2022), section 4.2 and appendix; mirrors ``coglm_strategy.py`` and
``sr_pipeline/dsr_sampling.py`` of the official code (cluster samplers) and its LoPAR sampler (top-k).

Legend: ``B`` rows (any leading shape works), ``V`` tokens, ``C`` clusters, ``M`` members of the largest
cluster, ``K`` choices kept, ``D`` width of a codebook row.

Deliberately different: randomness is one table of uniform numbers per picture, drawn from that picture's own
seed and turned into tokens by inverting the cumulative distribution. So nothing loops over the batch, and
picture i does not depend on how many are drawn beside it. ``clusters=None`` is the plain top-k sampler, and
temperature 0 takes the likeliest token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minicogview.config import SamplingConfig
from minicogview.errors import MiniCogViewError


@dataclass(frozen=True, eq=False)
class Clusters:
    """A partition of the picture tokens, stored both ways round; make one with ``Clusters.of(labels)``.

    Attributes:
        labels: (V,) int64, cluster of each token.
        members: (C, M) int64, tokens of each cluster; short rows are filled up with token 0.
        bias: (C, M) float32, 0 at real members and -inf at the filling.
    """

    labels: Tensor
    members: Tensor
    bias: Tensor

    @classmethod
    def of(cls, labels: Tensor | Clusters) -> Clusters:
        """Clusters from (V,) integer labels; clusters without a member are allowed and never drawn."""
        if isinstance(labels, Clusters):
            return labels
        labels = labels.long()
        sizes = labels.bincount()  # (C,)
        order = labels.argsort(stable=True)  # tokens, cluster by cluster
        rank = torch.arange(len(labels), device=labels.device) - (sizes.cumsum(0) - sizes)[labels[order]]
        shape = (len(sizes), int(sizes.max()))
        members = torch.zeros(shape, dtype=torch.long, device=labels.device)
        bias = torch.full(shape, -torch.inf, device=labels.device)
        members[labels[order], rank] = order
        bias[labels[order], rank] = 0.0
        bias[sizes == 0] = 0.0  # avoids a softmax over nothing; the cluster's own mass is 0
        return cls(labels, members, bias)

    @property
    def n_clusters(self) -> int:
        """Number of clusters, empty ones below the highest label included."""
        return len(self.members)

    def to(self, device: torch.device | str) -> Clusters:
        """The same clusters on another device."""
        return Clusters(self.labels.to(device), self.members.to(device), self.bias.to(device))


# --- what may be drawn, and how likely it is: the samplers and the exact distributions both call these


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

    ``temperature`` is the product of the first and the second one.
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
        top_k: tokens that stay in play.
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
    """Probability (B, V) of every token under cluster sampling: stage one and direct super-resolution.

    Args:
        logits: (B, V), any float type.
        labels: (V,) cluster of each token, or the ``Clusters`` made from them.
        temperature: above 0; acts on clusters and on tokens.
        top_k: *clusters* that stay in play; there is no limit on tokens.
        cluster_temperature: second temperature, above 0; acts inside the drawn cluster only. The original
            calls it ``top_k_cluster`` and ``temperature2``: both are temperatures, not counts.

    Raises:
        MiniCogViewError: if there are not as many labels as logits.
    """
    clusters = Clusters.of(labels)
    kept, mass = cluster_choices(logits, clusters, temperature, top_k)  # (B, K)
    result = torch.zeros_like(logits, dtype=torch.float32)
    for choice in range(kept.shape[-1]):
        tokens, inside = member_choices(
            logits, clusters, kept[..., choice], temperature * cluster_temperature
        )
        share = mass[..., choice, None]
        # Where a whole cluster was banned with -inf, `inside` is NaN and the share 0.
        result.scatter_add_(-1, tokens, torch.where(share > 0, share * inside, 0.0))
    return result


# --- drawing


def uniforms(seeds: Sequence[int], n_draws: int) -> Tensor:
    """The random numbers (B, n_draws, 2) of ``B`` pictures in [0, 1): row i follows from ``seeds[i]`` alone.

    They are made on the CPU whatever the model runs on, so a seed means the same picture everywhere.
    """
    rows = [torch.rand(n_draws, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def pick(probability: Tensor, uniform: Tensor) -> Tensor:
    """Index (B,) drawn from ``probability`` (B, K): where its cumulative sum passes ``uniform`` (B,)."""
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
    """Draw one token per row, vectorised over all of them.

    Args:
        logits: (B, V); any leading shape, so super-resolution passes (B, S, V).
        noise: (B, 2) uniform numbers: the first picks the cluster (or the token of top-k), the second the
            token inside the cluster.
        temperature: 0 takes the likeliest token.
        top_k: clusters kept, or tokens kept where ``clusters`` is None.
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
    """What the generators call at every step: ``sampler(logits, step) -> tokens``.

    Any callable of that signature can stand in for it; the parity tests put in a rule without randomness.
    Picture i is drawn from ``seeds[i]`` alone: with seeds 0, 1, 2 its second picture is the first one of
    seeds 1, 2, 3, and the same whether 2 or 20 are drawn (up to the rounding of the model's own sums).

    Attributes:
        seeds: one per row of the batch.
        config: temperature, top-k and second temperature.
        clusters: of the picture tokens, or None for plain top-k.
        n_steps: the most tokens that one picture may need.
    """

    seeds: Sequence[int]
    config: SamplingConfig = field(default_factory=SamplingConfig)
    clusters: Clusters | None = None
    n_steps: int = 1024

    def __post_init__(self) -> None:
        check(self.config)
        self.noise = uniforms(self.seeds, self.n_steps)  # (B, n_steps, 2)

    def __call__(self, logits: Tensor, step: int | Tensor) -> Tensor:
        """Tokens (B,) from logits (B, V), or (1, V) shared by all, at generation step ``step`` from 0.

        Super-resolution draws many cells at once: then ``step`` is (S,), logits are (B, S, V), tokens (B, S).
        """
        if self.noise.device != logits.device:
            self.noise = self.noise.to(logits.device)
            self.clusters = self.clusters.to(logits.device) if self.clusters else None
        c = self.config
        rows, noise = logits.expand(len(self.seeds), *logits.shape[1:]), self.noise[:, step]
        return sample(rows, noise, c.temperature, c.top_k, c.cluster_temperature, self.clusters)


@dataclass(eq=False)
class NearestToMean:
    """A sampler without chance: the code whose codebook row is nearest to the mean row of the distribution.

    Of all codes it has the least expected squared distance to the true one, in the codebook's space: a decision by
    minimum Bayes risk (Kumar & Byrne, 2004). The likeliest code has the least chance of being wrong, but may be far off
    when it is. For super-resolution, which is judged by how near it comes; the original draws.

    Attributes:
        codebook: (V, D). temperature: above 0; below 1 sharpens the distribution first.
    """

    codebook: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise MiniCogViewError(f"temperature {self.temperature} is not above 0: there is no mean of one code")

    def __call__(self, logits: Tensor, step: int | Tensor) -> Tensor:
        """Codes (B, S) from logits (B, S, V); ``step`` is not read."""
        codebook = self.codebook = self.codebook.to(logits.device)
        mean = (logits.float() / self.temperature).softmax(-1) @ codebook  # (B, S, D)
        return torch.cdist(mean, codebook).argmin(-1)


def check(config: SamplingConfig) -> None:
    """Raise ``MiniCogViewError`` on settings that no sampler can follow, naming the setting and its range."""
    if config.temperature < 0:
        raise MiniCogViewError(f"temperature {config.temperature} is below 0: use 0 (no chance) or more")
    if config.cluster_temperature <= 0:
        raise MiniCogViewError(
            f"cluster_temperature {config.cluster_temperature} is not above 0: 1 is neutral"
        )
    if config.top_k < 1:
        raise MiniCogViewError(f"top_k {config.top_k} keeps nothing: use 1 or more")


def replace_settings(settings: SamplingConfig, overrides: dict[str, Any]) -> SamplingConfig:
    """Settings with some of them replaced, by name.

    Raises:
        MiniCogViewError: if there is no such setting, or its value makes no sense.
    """
    known = [item.name for item in dataclasses.fields(SamplingConfig)]
    for name, value in overrides.items():
        if name not in known:
            raise MiniCogViewError(f"unknown sampling setting {name!r}: choose from {', '.join(known)}")
        if not math.isfinite(value):
            raise MiniCogViewError(f"{name} is {value}: give a finite number")
    replaced = dataclasses.replace(settings, **overrides)
    check(replaced)
    return replaced


# --- the two dials around the sampler


def text_attention_weights(n_text: int, seq_len: int, weight: float) -> Tensor:
    """Log attention weights (seq_len,): ``weight`` on the text columns, 0 elsewhere, for every query row.

    Added to the attention scores, so ``weight`` 1.4 makes each text token count exp(1.4) = 4.1 times.
    ``<start_of_image>`` is not text: leave it out of ``n_text``.
    """
    return F.pad(torch.full((n_text,), float(weight)), (0, seq_len - n_text))


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits (Ho and Salimans 2022): away from "no text", towards the text.

    Args:
        cond, uncond: (B, V) logits with and without the caption.
        scale: 1 gives ``cond`` back, above 1 exaggerates what the caption changes. Not in the original.
    """
    return torch.lerp(uncond, cond, scale)


# --- where clusters come from


def cluster_codebook(codebook: Tensor, n_clusters: int, seed: int = 0, n_iterations: int = 30) -> Tensor:
    """Group similar codebook rows by k-means (k-means++ start, then Lloyd's iterations).

    Args:
        codebook: (V, D) float.
        n_clusters: C, at most V.
        seed: of the start; the same seed gives the same labels on one machine. Ship the labels with the
            weights rather than computing them again elsewhere.

    Returns:
        (V,) int64 labels in 0..C-1. A cluster may end up empty where rows coincide.

    Raises:
        MiniCogViewError: if n_clusters is below 1 or above V.
    """
    if not 1 <= n_clusters <= len(codebook):
        raise MiniCogViewError(f"cannot make {n_clusters} clusters of {len(codebook)} codebook rows")
    points = codebook.detach().float().cpu()
    centres = _spread_out(points, n_clusters, torch.Generator().manual_seed(seed))  # (C, D)
    labels = torch.cdist(points, centres).argmin(-1)
    for _ in range(n_iterations):
        sizes = labels.bincount(minlength=n_clusters)[:, None]  # (C, 1)
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        previous, labels = labels, torch.cdist(points, centres).argmin(-1)
        if torch.equal(previous, labels):
            break
    return labels


def _spread_out(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a point, drawn in proportion to its squared distance to the others."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    squared = (points - points[chosen[0]]).square().sum(-1)  # (V,)
    while len(chosen) < n:
        # A point at distance 0 is drawn only when nothing else is left: fewer distinct rows than clusters.
        weights = squared if squared.sum() > 0 else torch.ones_like(squared)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        squared = torch.minimum(squared, (points - points[chosen[-1]]).square().sum(-1))
    return points[chosen]


def load_labels(path: str | Path, n_tokens: int = 20000) -> Tensor:
    """Read a label file in the original's form, ``cluster_label.npy``: one whole number per picture token.

    Returns:
        (n_tokens,) int64 labels.

    Raises:
        MiniCogViewError: if the file is missing, is not a plain numpy array (pickled ones are refused, since
            unpickling runs code), has another length, or holds anything but whole numbers from 0.
    """
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a plain .npy array"
        raise MiniCogViewError(
            f"cannot read cluster labels from {path} ({reason}): give cluster_label.npy"
        ) from None
    if not isinstance(labels, np.ndarray) or labels.shape != (n_tokens,):
        shape = getattr(labels, "shape", "an archive")
        raise MiniCogViewError(
            f"cluster labels in {path} have shape {shape}: expected ({n_tokens},), one per token"
        )
    if labels.dtype.kind not in "iuf" or (labels < 0).any() or (labels != np.floor(labels)).any():
        raise MiniCogViewError(f"cluster labels in {path} are not whole numbers from 0: is it another file?")
    return torch.from_numpy(labels.astype(np.int64))
