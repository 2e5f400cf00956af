"""Frechet distance between two sets of features, each taken as a normal."""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features [N, D], in float64.

    The trace of the root is the sum of the singular values of A^T B / n, with C_a = A A^T and C_b = B B^T: no root of a
    product that is not symmetric, so it is safe with fewer samples than dimensions.
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"{len(a)} and {len(b)} feature vectors: a covariance needs at least 2")
    a, b = a.double(), b.double()
    root_a, root_b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    cross = torch.linalg.svdvals(_reduced(root_a) @ _reduced(root_b).T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def _reduced(root: Tensor) -> Tensor:
    """R with R^T R = root^T root, of at most D rows."""
    reduced: Tensor = torch.linalg.qr(root, mode="r").R
    return reduced
