"""A map of sampled vectors: their neighbourhoods in two dimensions.

Invariant: the same vectors give the same map. Neighbours on it are mostly neighbours in the space; distances
between groups that are far apart mean little.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LEAST_FOR_TSNE = 50
"""Fewer points have no neighbourhoods to lay out; their two main directions are shown."""

PERPLEXITY = 30.0
"""About how many neighbours a point heeds; scikit-learn's default, fit for hundreds to thousands of points."""

KEPT = 50
"""Main directions that go into t-SNE, as its authors do: it saves time and drops noise."""


def project(vectors_ND: npt.NDArray[np.float32]) -> tuple[str, npt.NDArray[np.float32]]:
    """(how it was made, float32 [N, 2]) of finite vectors that are not zero, compared by their direction. N ≥ 3 that are not all alike, else ("", [0, 2])."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    units_ND = vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), np.float32(1e-12))
    if len(units_ND) < 3 or float(units_ND.std(axis=0).max()) < 1e-7:
        return "", np.zeros((0, 2), np.float32)
    # The rows may be fewer than the dimensions and lie in fewer still; the solver is told to be repeatable.
    kept = min(KEPT, *units_ND.shape)
    main_NK = PCA(n_components=kept, svd_solver="randomized" if kept < min(units_ND.shape) else "full", random_state=0).fit_transform(units_ND)
    if len(units_ND) < LEAST_FOR_TSNE or main_NK.shape[1] < 2:
        flat = main_NK[:, :2] if main_NK.shape[1] > 1 else np.pad(main_NK, ((0, 0), (0, 1)))
        return "PCA (the two directions of largest variance)", flat.astype(np.float32)
    perplexity = min(PERPLEXITY, (len(units_ND) - 1) / 3)
    tsne = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=0)
    return f"t-SNE (perplexity {perplexity:.0f}, of the first {kept} principal components)", tsne.fit_transform(main_NK).astype(np.float32)
