"""Learn a codebook: every row follows the vectors that choose it, and no row stays unused.

A row gets no gradient. It is a moving average of the vectors that chose it (van den Oord et al. 2017,
"Neural discrete representation learning", appendix A.1). A row that no vector chooses any more is moved to a vector
that is far from every row; Jukebox (Dhariwal et al. 2020, section 3.1) moves it to any vector, all equally likely.

Shapes: M vectors, K codebook rows, C their width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CodebookLearner:
    """Keeps every row of the codebook at the mean of the vectors that choose it.

    ``counts`` (K,) and ``sums`` (K, C) are moving averages over steps: how many vectors chose a row, and their sum.
    """

    def __init__(self, codebook: nn.Parameter, decay: float = 0.99, dead_below: float = 0.03) -> None:
        self.codebook, self.decay, self.dead_below = codebook, decay, dead_below
        self.counts = torch.ones(len(codebook), device=codebook.device)
        self.sums = codebook.detach().clone()

    @torch.no_grad()
    def place(self, z: Tensor, generator: torch.Generator, rounds: int = 10) -> None:
        """Place the rows by k-means on the vectors z (M, C), seeded by k-means++ with many centres at a time."""
        size = len(self.codebook)
        centres = z[torch.randint(len(z), (1,), generator=generator)]
        while len(centres) < size:
            n_new = min(max(len(centres) // 2, 1), size - len(centres))
            centres = torch.cat([centres, z[_far_from(centres, z, n_new, generator)]])
        for _ in range(rounds):
            counts, sums = _tally(_nearest(z, centres)[0], z, size)
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        self.codebook.copy_(centres)
        self.counts.fill_(1.0)
        self.sums.copy_(centres)

    @torch.no_grad()
    def update(self, codes: Tensor, z: Tensor) -> None:
        """Move the rows towards the vectors z (M, C) that chose them by codes (M,)."""
        self.counts, self.sums = self.counts.to(z), self.sums.to(z)  # the model may have moved to a GPU since
        counts, sums = _tally(codes, z, len(self.codebook))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codebook.copy_(self.sums / self.counts.clamp_min(1e-3)[:, None])

    @torch.no_grad()
    def settle(self, z: Tensor, generator: torch.Generator, rounds: int = 6, apart: float = 0.12) -> int:
        """Merge rows closer than ``apart`` standard deviations of z (M, C), and place the spare ones elsewhere.

        A dense cluster, such as a plain background, attracts dozens of rows that mean the same, and the codes of equal
        cells then differ by chance. Each round is one of k-means and then merges; returns how many rows moved.
        """
        limit = apart * float(z.var(0).sum().sqrt())
        n_moved = 0
        for _ in range(rounds):
            counts, sums = _tally(_nearest(z, self.codebook)[0], z, len(self.codebook))
            rows = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], self.codebook)
            spare = _too_close(rows, counts, limit) | (counts == 0)
            n = int(spare.sum())
            if n:
                rows[spare] = z[_far_from(rows[~spare], z, n, generator, at_least=limit)]
            self.codebook.copy_(rows)
            n_moved += n
        self.counts = (counts / counts.mean()).clamp_min(0.1)
        self.sums = self.codebook * self.counts[:, None]
        return n_moved

    @torch.no_grad()
    def revive(self, z: Tensor, generator: torch.Generator) -> int:
        """Move rarely chosen rows onto vectors of z (M, C) that are far from every row; returns how many moved."""
        dead = (self.counts < self.dead_below).nonzero()[:, 0]
        n = min(len(dead), len(z) // 8)
        if n:
            dead = dead[:n]
            self.codebook[dead] = z[_far_from(self.codebook, z, n, generator)]
            self.counts[dead] = 1.0  # as if chosen once a step: the row has time to attract vectors
            self.sums[dead] = self.codebook[dead]
        return n


def _tally(codes: Tensor, z: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Number (K,) and sum (K, C) of the vectors of each code."""
    counts = torch.bincount(codes, minlength=size).to(z.dtype)
    return counts, torch.zeros(size, z.shape[1], dtype=z.dtype, device=z.device).index_add_(0, codes, z)


def _nearest(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest row and squared distance to it, both (M,), computed in pieces to save memory."""
    found = [torch.cdist(part, rows).min(1) for part in z.split(65536)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]).pow(2)


def _too_close(rows: Tensor, counts: Tensor, limit: float) -> Tensor:
    """(K,) bool: rows closer than ``limit`` to a row that is chosen more often and is kept."""
    distance = torch.cdist(rows, rows)
    spare = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for row in counts.argsort(descending=True).tolist():
        if not spare[row]:
            near = distance[row] < limit
            near[row] = False
            spare |= near
    return spare


def _far_from(rows: Tensor, z: Tensor, n: int, generator: torch.Generator, at_least: float = 0.0) -> Tensor:
    """Indices (n,) of vectors at least ``at_least`` from every row, drawn in proportion to the squared distance.

    If all vectors were equally likely, most of those drawn would show the same plain background.
    """
    distance = _nearest(z, rows)[1]
    worth = torch.where(distance > at_least**2, distance, 0) + 1e-9  # never all zero
    return torch.multinomial(worth.cpu(), n, generator=generator).to(z.device)
