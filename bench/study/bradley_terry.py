"""Bradley–Terry with ties, after Davidson (J. Am. Stat. Assoc. 65, 1970): one strength for each model from pairs alone.

P(i beats j) : P(tie) : P(j beats i) = exp(θi) : exp(η + (θi + θj) / 2) : exp(θj)
"""

from __future__ import annotations

import numpy as np

RIDGE = 0.01
"""A pull on every parameter towards 0, which keeps them finite where one model wins every time; of no weight otherwise."""
NEWTON_STEPS = 30


def fit(counts: np.ndarray, pairs: list[tuple[int, int]], models: int) -> tuple[np.ndarray, np.ndarray]:
    """Most likely (θ (batch, models) with mean 0, η (batch,)) of `counts` (batch, pairs, 3): wins of the first of a pair,
    ties, wins of its second. Newton's method on a concave likelihood, a batch at once."""
    features = np.zeros((len(pairs), 3, models + 1))
    for index, (i, j) in enumerate(pairs):
        features[index, 0, i] = features[index, 2, j] = 1
        features[index, 1, [i, j, models]] = 0.5, 0.5, 1
    parameters = np.zeros((len(counts), models + 1))
    total = counts.sum(axis=2)
    for _ in range(NEWTON_STEPS):
        logits = np.einsum("pof,bf->bpo", features, parameters)
        chance = np.exp(logits - logits.max(axis=2, keepdims=True))
        chance /= chance.sum(axis=2, keepdims=True)
        slope = np.einsum("bpo,pof->bf", counts - total[..., None] * chance, features) - RIDGE * parameters
        mean = np.einsum("bpo,pof->bpf", chance, features)
        square = np.einsum("bp,bpo,pof,pog->bfg", total, chance, features, features, optimize=True)
        bend = square - np.einsum("bp,bpf,bpg->bfg", total, mean, mean, optimize=True) + RIDGE * np.eye(models + 1)
        step = np.linalg.solve(bend, slope[..., None])[..., 0]
        parameters += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return parameters[:, :-1], parameters[:, -1]
