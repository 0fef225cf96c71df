"""The learning rate at the ends of each shape."""

from __future__ import annotations

import pytest

from distill.training.recipes import find_recipe
from distill.training.schedule import Schedule


@pytest.mark.parametrize(
    ("shape", "middle", "last"), [("constant", 1.0, 1.0), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)]
)
def test_a_schedule_rises_and_falls_to_its_floor(shape: str, middle: float, last: float) -> None:
    schedule = Schedule(shape=shape, warmup_steps=10, floor=0.2)
    assert [schedule.rate(2.0, step, 110) / 2 for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [schedule.rate(2.0, step, 110) / 2 for step in (10, 60, 110)] == pytest.approx([1.0, middle, last])


def test_recipes_fall_by_half_a_cosine_to_a_tenth() -> None:
    stage = find_recipe("ssd-1b").stages[0]
    assert stage.learning_rate_at(0) == pytest.approx(1e-5 / 500)
    assert stage.learning_rate_at(stage.steps) == pytest.approx(1e-6)
