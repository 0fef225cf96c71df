from __future__ import annotations

import numpy as np
import pytest

from distill.data.order import BatchOrder, shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64, 65, 1000])
def test_a_shuffle_is_a_permutation_and_its_key_picks_another(count: int) -> None:
    orders = {tuple(shuffled(np.arange(count, dtype=np.uint64), count, [7, key]).tolist()) for key in range(24)}
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len(orders) > min(count, 20) - 1


def test_every_sample_comes_to_every_place_as_often_as_by_chance() -> None:
    count, keys = 97, 2000
    orders = np.array([shuffled(np.arange(count, dtype=np.uint64), count, [key]) for key in range(keys)])
    for place in (0, 1, 50, 96):
        seen = np.bincount(orders[:, place].astype(int), minlength=count)
        assert ((seen - keys / count) ** 2).sum() / (keys / count) < 150  # chi-squared with 96 degrees of freedom


def test_every_sample_is_seen_once_an_epoch_and_a_process_sees_its_rows_alone() -> None:
    order = BatchOrder([8, 24], batch_size=4, seed=3)
    for epoch in range(3):
        batches = [order.samples(step) for step in range(8 * epoch, 8 * epoch + 8)]
        assert len({(kind, int(number)) for kind, numbers in batches for number in numbers}) == 32
    for step in range(20):
        parts = [order.samples(step, slice(i, i + 1))[1] for i in range(4)]
        assert np.concatenate(parts).tolist() == order.samples(step)[1].tolist()


def test_twenty_million_samples_are_no_more_work_than_twenty() -> None:
    kind, numbers = BatchOrder([20_000_000, 5], batch_size=2048, seed=0).samples(10**6, slice(2040, 2048))
    assert kind == 0 and len(set(numbers.tolist())) == 8 and numbers.max() < 20_000_000
