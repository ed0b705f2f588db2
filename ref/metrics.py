"""Diversity and quality in numbers, and the paper's two summary columns.

Features are [G, K, D]: G prompts, K samples each. Diversity is measured within a prompt and then
averaged over prompts. How the paper's columns are read (they are named, not defined, on its page):

    V.S.          feature variance: trace of the group covariance (times 100 for unit-norm features)
    DINO, CLIP    mean pairwise L2 distance
    Norm.Avg      mean over columns of the min-max normalised value, over all rows of the table
    Overall       mean of the quality and the diversity Norm.Avg

The last two reproduce table 1's printed values (tests/test_metrics.py).
"""

import torch
from torch import Tensor

from ref.perceptual import deviations


def feature_variance(phi: Tensor) -> Tensor:
    """Trace of the (unbiased) covariance of every group, [G, K, D] -> [G]."""
    return deviations(phi).square().sum((1, 2)) / (phi.shape[1] - 1)


def mean_pairwise_distance(phi: Tensor) -> Tensor:
    """Mean L2 distance over the K (K - 1) ordered pairs of a group, [G, K, D] -> [G]."""
    deviations(phi)  # checks the shape
    K = phi.shape[1]
    distance = torch.cdist(phi, phi, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.sum((1, 2)) / (K * (K - 1))


def vendi_score(phi: Tensor) -> Tensor:
    """Effective number of distinct samples, between 1 and K, [G, K, D] -> [G] (arXiv 2210.02410).

    exp of the entropy of the eigenvalues of the cosine-similarity matrix divided by K.
    """
    phi = torch.nn.functional.normalize(phi.double(), dim=-1)
    eigenvalues = torch.linalg.eigvalsh(phi @ phi.mT / phi.shape[1]).clamp_min(0)
    return torch.special.entr(eigenvalues).sum(-1).exp()


def normalized_average(values: Tensor) -> Tensor:
    """Norm.Avg of a table [rows, columns] -> [rows], higher is better in every column.

    A missing value (NaN) is left out of its column's range and of its row's mean. A column without
    spread tells rows apart by nothing and counts 0 for all.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    low = values.nan_to_num(torch.inf).amin(0)
    high = values.nan_to_num(-torch.inf).amax(0)
    span = high - low
    return torch.where(span > 0, (values - low) / span, values * 0).nanmean(1)


def overall(quality: Tensor, diversity: Tensor) -> Tensor:
    """Mean of both Norm.Avg columns; two tables [rows, columns] -> [rows]."""
    return (normalized_average(quality) + normalized_average(diversity)) / 2
