"""What the votes say of the models: shares and strengths, each with an interval over raters and prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from bench.measure.stats import Estimate
from bench.study.bradley_terry import fit
from bench.study.files import Key
from bench.study.votes import Vote

RESAMPLES, Z = 500, 1.96
MARGIN = 0.03
"""The half width of an interval that `needed` is told for."""
POINTS = 400 / math.log(10)
"""Strengths are told in Elo's points: 400 of them are odds of ten to one."""


@dataclass(frozen=True)
class Pair:
    """Votes between two models. `preference` is the share of the first, ties half each; `needed` the votes it would take
    until its interval is ±3 points."""

    first: str
    second: str
    wins: int
    ties: int
    losses: int
    preference: Estimate
    needed: int

    @property
    def votes(self) -> int:
        return self.wins + self.ties + self.losses


@dataclass(frozen=True)
class Standing:
    """One model against all others. `strength` is None where no chain of votes leads to the first model."""

    model: str
    votes: int
    preference: Estimate | None
    strength: Estimate | None
    categories: dict[str, Estimate | None]


@dataclass(frozen=True)
class Preferences:
    """In the order of the key."""

    pairs: list[Pair]
    standings: list[Standing]


def weigh(votes: Sequence[Vote], items: np.ndarray, codes: np.ndarray, size: int) -> np.ndarray:
    """(1 + 3 RESAMPLES, size): how often each of `codes` is among the votes; then among resamples of the raters, of the
    prompts, and of single votes. One fewer is drawn than there are, which makes the variance unbiased (Rao and Wu, J. Am.
    Stat. Assoc. 83, 1988)."""
    rng = np.random.default_rng(0)
    tables = [np.bincount(codes, minlength=size).astype(float)]
    for groups in ([vote.rater for vote in votes], items, np.arange(len(votes))):
        kinds, group = np.unique(groups, return_inverse=True)
        for _ in range(RESAMPLES):
            times = np.bincount(rng.integers(len(kinds), size=max(1, len(kinds) - 1)), minlength=len(kinds))
            tables.append(np.bincount(codes, times[group], size))
    return np.stack(tables)


def variance(values: np.ndarray) -> np.ndarray:
    """Of a figure over raters and prompts both, from its `values` (1 + 3 RESAMPLES, ...) by `weigh`: the variance over
    raters plus that over prompts, less that of single votes, which is in both; never below either (Cameron, Gelbach and
    Miller, J. Bus. Econ. Stat. 29, 2011)."""
    raters, prompts, votes = np.nanvar(values[1:].reshape(3, RESAMPLES, *values.shape[1:]), axis=1)
    return np.maximum(raters + prompts - votes, np.maximum(raters, prompts))


def share(part: np.ndarray, whole: np.ndarray) -> Estimate | None:
    """part / whole, (1 + 3 RESAMPLES,) by `weigh`, with Wilson's interval for as many independent votes as would vary like
    these: it stays within 0 and 1, and claims no certainty where all agree. None for no votes."""
    if whole[0] == 0:
        return None
    value, low, high = _share(part, whole)
    return Estimate(value=value, low=low, high=high)


def _share(part: np.ndarray, whole: np.ndarray) -> tuple[float, float, float]:
    shares = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    value, spread = float(shares[0]), float(variance(shares))
    votes = value * (1 - value) / spread if spread > 1e-12 else float(whole[0])
    middle = (value + Z**2 / (2 * votes)) / (1 + Z**2 / votes)
    half = Z * math.sqrt(value * (1 - value) / votes + (Z / (2 * votes)) ** 2) / (1 + Z**2 / votes)
    return value, max(0.0, middle - half), min(1.0, middle + half)


def find_preferences(votes: Sequence[Vote], key: Key) -> Preferences:
    """Of votes that each compare two models, one or more."""
    places, names = key.pictures(), [model.name for model in key.models]
    pairs = list(combinations(range(len(names)), 2))
    categories = list(dict.fromkeys(item.category for item in key.items))
    codes, items = [], []
    for vote in votes:
        (item, one), (_, other) = places[vote.first], places[vote.second]
        ahead = min(one, other), max(one, other)
        _, winner = places.get(vote.chosen, (item, None))
        outcome = 1 if winner is None else 0 if winner == ahead[0] else 2
        codes.append((categories.index(key.items[item].category) * len(pairs) + pairs.index(ahead)) * 3 + outcome)
        items.append(item)
    tables = weigh(votes, np.array(items), np.array(codes), len(categories) * len(pairs) * 3)
    by_category = tables.reshape(-1, len(categories), len(pairs), 3)
    counts = by_category.sum(axis=1)
    by_pair = ((pair, counts[:, index]) for index, pair in enumerate(pairs) if counts[0, index].any())
    return Preferences(
        [_pair(names[i], names[j], table) for (i, j), table in by_pair],
        [
            Standing(
                name,
                int(counts[0, [model in pair for pair in pairs]].sum()),
                _against_all(counts, pairs, model),
                strength,
                {one: _against_all(by_category[:, at], pairs, model) for at, one in enumerate(categories)},
            )
            for model, (name, strength) in enumerate(zip(names, _strengths(counts, pairs, len(names)), strict=True))
        ],
    )


def _pair(first: str, second: str, table: np.ndarray) -> Pair:
    """`table` (1 + 3 RESAMPLES, 3)."""
    wins, ties, losses = map(int, table[0])
    value, low, high = _share(table @ [1, 0.5, 0], table.sum(axis=1))
    needed = math.ceil((wins + ties + losses) * ((high - low) / 2 / MARGIN) ** 2)
    return Pair(first, second, wins, ties, losses, Estimate(value=value, low=low, high=high), needed)


def _against_all(counts: np.ndarray, pairs: list[tuple[int, int]], model: int) -> Estimate | None:
    """`counts` (1 + 3 RESAMPLES, pairs, 3)."""
    won = [[1, 0.5, 0] if i == model else [0, 0.5, 1] if j == model else [0, 0, 0] for i, j in pairs]
    taken_part = [model in pair for pair in pairs]
    return share(np.einsum("bpo,po->b", counts, won), counts[:, taken_part].sum(axis=(1, 2)))


def _strengths(counts: np.ndarray, pairs: list[tuple[int, int]], models: int) -> list[Estimate | None]:
    """Against the first model, which has 0."""
    linked, compared = {0}, [pair for index, pair in enumerate(pairs) if counts[0, index].any()]
    for _ in range(models):
        linked |= {model for pair in compared if linked & {*pair} for model in pair}
    theta = fit(counts, pairs, models)[0]
    points = POINTS * (theta - theta[:, :1])
    middle, half = points[0], Z * np.sqrt(variance(points))
    return [
        Estimate(value=middle[model], low=middle[model] - half[model], high=middle[model] + half[model])
        if model in linked
        else None
        for model in range(models)
    ]
