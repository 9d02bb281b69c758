"""Clusters of picture tokens: groups of codebook rows that look alike, for cluster sampling (``sampling.py``).

The idea: a picture codebook holds many rows that decode to nearly the same pixels. k-means puts such rows into one
cluster, so that a sampler can first choose between ideas, then between near-copies of one idea.
CogView2 (Ding et al. 2022, arXiv 2204.14217), section 4.2 and appendix.

Mirrors: the file ``cluster_label.npy`` of the official code, which has one label per picture token.

Shapes: ``V`` tokens, ``C`` clusters, ``M`` members of the largest cluster, ``D`` width of a codebook row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minicogview.errors import MiniCogViewError
from minicogview.numbers import integer


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters of all picture tokens, from token to cluster and back; make them with ``Clusters.of(labels)``.

    Attributes:
        labels: (V,) int64, the cluster of each token.
        members: (C, M) int64, the tokens of each cluster; shorter rows are padded with token 0.
        bias: (C, M) float32, 0 for members and -inf for padding.
    """

    labels: Tensor
    members: Tensor
    bias: Tensor

    @classmethod
    def of(cls, labels: Tensor | Clusters) -> Clusters:
        """Clusters from (V,) integer labels. A cluster may be empty; it is then never drawn."""
        if isinstance(labels, Clusters):
            return labels
        labels = labels.long()
        sizes = labels.bincount()  # (C,)
        order = labels.argsort(stable=True)  # tokens, cluster by cluster
        first = sizes.cumsum(0) - sizes  # (C,) where each cluster begins in that order
        rank = torch.arange(len(labels), device=labels.device) - first[labels[order]]  # index inside the cluster
        shape = (len(sizes), int(sizes.max()))
        members = torch.zeros(shape, dtype=torch.long, device=labels.device)
        bias = torch.full(shape, -torch.inf, device=labels.device)
        members[labels[order], rank] = order
        bias[labels[order], rank] = 0.0
        bias[sizes == 0] = 0.0  # an empty cluster would give a softmax over nothing; its probability is 0 anyway
        return cls(labels, members, bias)

    @property
    def n_clusters(self) -> int:
        """Number of clusters, including empty ones below the highest label."""
        return len(self.members)

    def to(self, device: torch.device | str) -> Clusters:
        """The same clusters on another device."""
        return Clusters(self.labels.to(device), self.members.to(device), self.bias.to(device))


# --- where clusters come from


def clusters_for(n_clusters: int, codebook: Tensor, labels: Tensor | None = None) -> Clusters | None:
    """Clusters for a sampler, from ``labels`` or else by k-means; None for ``n_clusters`` 0, which is plain top-k."""
    if n_clusters == 0:
        return None
    return Clusters.of(cluster_codebook(codebook, n_clusters) if labels is None else labels)


def check_count(n_clusters: int, labels: Tensor | None) -> None:
    """Refuse a number of clusters that a label file does not have; 0, for none, is always possible."""
    if labels is not None and n_clusters != 0:
        count = int(labels.max()) + 1
        integer(n_clusters, "n_clusters", count, count, "cluster_label.npy has this many; 0: no clusters")


def cluster_codebook(codebook: Tensor, n_clusters: int, seed: int = 0, n_iterations: int = 30) -> Tensor:
    """Group similar codebook rows by k-means (k-means++ initialisation, then Lloyd's iterations).

    Args:
        codebook: (V, D) float.
        n_clusters: C, at most V.
        seed: of the initialisation. The same seed gives the same labels on the same machine; ship the labels with the
            weights instead of computing them again on another one.

    Returns:
        (V,) int64 labels in 0..C-1. Where rows are equal, a cluster may end up empty.

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
    """k-means++: each new centre is a point drawn in proportion to its squared distance to the nearest centre."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    squared = (points - points[chosen[0]]).square().sum(-1)  # (V,)
    while len(chosen) < n:
        # A point at distance 0 is drawn only when there are fewer distinct rows than clusters.
        weights = squared if squared.sum() > 0 else torch.ones_like(squared)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        squared = torch.minimum(squared, (points - points[chosen[-1]]).square().sum(-1))
    return points[chosen]


def load_labels(path: str | Path, n_tokens: int = 20000) -> Tensor:
    """Read a label file in the original's format, ``cluster_label.npy``: one integer for each picture token.

    Returns:
        (n_tokens,) int64 labels.

    Raises:
        MiniCogViewError: if the file is missing, is not a plain numpy array (a pickled one is refused, since
            unpickling runs code), has another length, or holds anything but integers from 0.
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
        raise MiniCogViewError(f"cluster labels in {path} are not integers from 0: is it another file?")
    return torch.from_numpy(labels.astype(np.int64))
