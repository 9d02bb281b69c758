"""The Frechet distance on the tokenizer's features agrees with numpy, and with the answer where it is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from test_figures_plot import TINY
from torch.nn import functional as F

from minicogview.errors import MiniCogViewError
from minicogview.evaluation.fid import LatentFeatures, frechet_distance
from minicogview.vqvae import VQVAE

pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def vqvae() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(TINY).eval()


def pictures(n: int, seed: int) -> torch.Tensor:
    """Coloured noise on backgrounds of random colours: (n, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, 1, 1, generator=generator) + torch.rand(n, 3, 16, 16, generator=generator)) / 2


def by_numpy(x: np.ndarray, y: np.ndarray) -> float:
    """The formula of the paper, with the root by way of a symmetric matrix: tr (A B)^(1/2) = tr (a B a)^(1/2)."""
    a, b = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross)


@pytest.mark.parametrize("level", [0, 2])
@torch.no_grad()
def test_agrees_with_the_formula(vqvae: VQVAE, level: int) -> None:
    # Ten times more pictures than features, in batches that do not divide them.
    real, fake = pictures(330, 0), pictures(300, 1) ** 1.5
    features = LatentFeatures(vqvae, level)
    assert features(real[:3]).shape == (3, features.num_features)
    expected = by_numpy(features(real).double().numpy(), features(fake).double().numpy())
    assert frechet_distance(vqvae, real, fake, level) == pytest.approx(expected, rel=1e-4)


def test_the_same_pictures_are_at_no_distance(vqvae: VQVAE) -> None:
    real = pictures(64, 0)
    far = frechet_distance(vqvae, real, pictures(64, 1) ** 2, level=0)
    assert frechet_distance(vqvae, real, real.flip(0), level=0) < 1e-5 * far


def test_grows_with_blur_and_does_not_mind_the_order(vqvae: VQVAE) -> None:
    real = pictures(64, 0)
    blurred = [F.avg_pool2d(real, k, stride=1, padding=k // 2, count_include_pad=False) for k in (1, 3, 5, 9)]
    distances = [frechet_distance(vqvae, real, picture, level=0) for picture in blurred]
    assert distances == sorted(distances) and distances[1] > 100 * distances[0]
    assert frechet_distance(vqvae, blurred[2], real, level=0) == pytest.approx(distances[2], rel=1e-3)


def test_wrong_input_is_refused(vqvae: VQVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MiniCogViewError, match="1 fake pictures"):
        frechet_distance(vqvae, pictures(2, 0), pictures(1, 0), level=0)
    with pytest.raises(MiniCogViewError, match="level 3"):
        frechet_distance(vqvae, pictures(2, 0), pictures(2, 0), level=3)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(MiniCogViewError, match="pip install torchmetrics"):
        frechet_distance(vqvae, pictures(2, 0), pictures(2, 0), level=0)
