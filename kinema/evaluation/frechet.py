"""The Fréchet distance between sets of feature vectors, both seen as Gaussians (Dowson and Landau 1982; FID, FVD)."""

import torch
from torch import Tensor

from kinema.evaluation.scores import Score, resamples


def distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of `[N, D]` and `[M, D]`, in float64.

    With fewer than 2 D samples a covariance is mostly noise off its diagonal, so there those entries are shrunk, in
    proportion to the samples missing. What remains is a bias upwards that falls with N: compare at equal N only.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = _covariance(a), _covariance(b)
    root = _root(cov_a)
    # (C_a C_b)^½ has the trace of (C_a^½ C_b C_a^½)^½, and that is symmetric
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(apart + cov_a.trace() + cov_b.trace() - 2 * cross))


def score(a: Tensor, b: Tensor, times: int = 100) -> Score:
    """The distance with a 95 % bootstrap interval; n is the size of the smaller set.

    A resample has repeats and so lies further away than the sets themselves; only the spread around the median of the
    resamples is used.
    """
    value = distance(a, b)
    rows_a, rows_b = (resamples(len(x), times, name) for x, name in ((a, "frechet a"), (b, "frechet b")))
    drawn = torch.tensor([distance(a[i.to(a.device)], b[j.to(b.device)]) for i, j in zip(rows_a, rows_b, strict=True)])
    low, middle, high = drawn.quantile(torch.tensor([0.025, 0.5, 0.975])).tolist()
    return Score(value, max(0.0, value + low - middle), value + high - middle, min(len(a), len(b)))


def _covariance(x: Tensor) -> Tensor:
    n, dim = x.shape
    if n < 2:
        raise ValueError(f"{n} samples have no covariance: give at least 2, better {2 * dim} or more")
    centred = x - x.mean(0)
    covariance = centred.T @ centred / (n - 1)
    trust = min(1.0, (n - 1) / (2 * dim))
    return trust * covariance + (1 - trust) * torch.diag(covariance.diagonal())


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
