"""Which samples a step takes, computed from the step alone: no order of an epoch is made or kept, however many samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

ROUNDS = 6


def shuffled(positions: np.ndarray, count: int, key: Sequence[int]) -> np.ndarray:
    """Where each of `positions` (uint64, below `count`) goes under the permutation of range(count) that `key` picks.

    A Feistel network (Luby and Rackoff, 1988) permutes the next power of four; what leaves the range goes through it again
    until it is back (cycle-walking: Black and Rogaway, 2002), less than four times on average.
    """
    bits = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)
    keys = np.random.SeedSequence([*key]).generate_state(ROUNDS, np.uint64)

    def permute(values: np.ndarray) -> np.ndarray:
        left, right = values >> bits, values & mask
        for each in keys:
            left, right = right, left ^ (_mixed(right ^ each) & mask)
        return left << bits | right

    values = permute(positions)
    while (outside := values >= count).any():
        values[outside] = permute(values[outside])
    return values


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of a uint64 spread over all of them (the finaliser of SplitMix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


class BatchOrder:
    """Random batches, each of one kind of samples (one resolution); an epoch shows every sample once.

    A kind's samples seldom fill whole batches. Its last batch is then filled up with some that the epoch has shown, and
    left out of some epochs, so that over many epochs all samples are seen equally often.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        """`sizes` says how many samples there are of each kind, one at least."""
        self.sizes, self.batch_size, self.seed = np.array(sizes), batch_size, seed
        self._offsets = np.random.default_rng(seed).integers(batch_size, size=len(sizes))

    def _before(self, epoch: int) -> np.ndarray:
        """How many batches of each kind (kinds,) come before an epoch; over many epochs as many as its samples fill."""
        return (epoch * self.sizes + self._offsets) // self.batch_size

    def samples(self, step: int, rows: slice = slice(None)) -> tuple[int, np.ndarray]:
        """The kind of a step's batch, and the numbers of the samples in it, or in some `rows` of it."""
        epochs = range((step + len(self.sizes) + 1) * self.batch_size)  # enough: each has one sample at least
        epoch = bisect_right(epochs, step, key=lambda epoch: self._before(epoch).sum()) - 1
        ends = np.cumsum(self._before(epoch + 1) - self._before(epoch))
        place = np.array([step - self._before(epoch).sum()], np.uint64)
        batch = int(shuffled(place, int(ends[-1]), [self.seed, epoch, 0])[0])
        kind = int(np.searchsorted(ends, batch, side="right"))
        number = batch - int(ends[kind - 1]) if kind else batch
        size = int(self.sizes[kind])
        places = (number * self.batch_size + np.arange(self.batch_size, dtype=np.uint64)[rows]) % np.uint64(size)
        return kind, shuffled(places, size, [self.seed, epoch, kind + 1])
