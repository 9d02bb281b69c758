"""Clusters of picture tokens: k-means finds them, files of the original's form are read, others refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_sampling import C, random_clusters

from minicogview import clusters
from minicogview.errors import MiniCogViewError


def test_members_list_every_token_once():
    made = random_clusters()
    for c in range(C):
        real = made.members[c][made.bias[c] == 0]
        assert torch.equal(real, (made.labels == c).nonzero()[:, 0])


def test_k_means_finds_blobs_and_repeats():
    generator = torch.Generator().manual_seed(0)
    blobs = torch.arange(5.0).repeat_interleave(20)[:, None] * 10
    points = blobs + torch.randn(100, 3, generator=generator)
    labels = clusters.cluster_codebook(points, 5)
    assert all(len(labels[i * 20 : i * 20 + 20].unique()) == 1 for i in range(5))
    assert len(labels.unique()) == 5
    assert torch.equal(labels, clusters.cluster_codebook(points, 5))


def test_k_means_survives_equal_rows_and_refuses_too_many():
    assert clusters.cluster_codebook(torch.ones(6, 2), 3).shape == (6,)
    with pytest.raises(MiniCogViewError, match="7 clusters of 6"):
        clusters.cluster_codebook(torch.ones(6, 2), 7)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.float32])
def test_label_file_of_the_original_form(tmp_path: Path, kind):
    path = tmp_path / "cluster_label.npy"
    np.save(path, np.arange(30).astype(kind) % 4)
    labels = clusters.load_labels(path, 30)
    assert labels.dtype == torch.int64 and torch.equal(labels, torch.arange(30) % 4)


def test_bad_label_files_are_refused(tmp_path: Path):
    path = tmp_path / "cluster_label.npy"
    with pytest.raises(MiniCogViewError, match="No such file"):
        clusters.load_labels(path, 30)
    path.write_bytes(b"not numpy")
    with pytest.raises(MiniCogViewError, match=r"not a plain \.npy"):
        clusters.load_labels(path, 30)
    path.write_bytes(b"")
    with pytest.raises(MiniCogViewError, match=r"not a plain \.npy"):
        clusters.load_labels(path, 30)
    np.save(path, np.array([{}] * 30), allow_pickle=True)  # a pickle could run code
    with pytest.raises(MiniCogViewError, match=r"not a plain \.npy"):
        clusters.load_labels(path, 30)
    np.save(path, np.zeros(29, dtype=int))
    with pytest.raises(MiniCogViewError, match=r"\(29,\)"):
        clusters.load_labels(path, 30)
    for wrong in (-1, 0.5, np.nan):
        np.save(path, np.full(30, wrong))
        with pytest.raises(MiniCogViewError, match="integers"):
            clusters.load_labels(path, 30)
