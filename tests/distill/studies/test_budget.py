from __future__ import annotations

import pytest

from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES
from distill.studies.bench import step_tflop
from distill.studies.budget import count_budget, describe_budget
from distill.training.recipes import find_recipe


def test_a_budget_is_its_counted_arithmetic_shared_out() -> None:
    teacher, recipe = ARCHITECTURES["mini-sdxl"], find_recipe("mini-vega")
    budget = count_budget(recipe, teacher, 1000, text="cached", checkpointing=False)
    students = [stage.student.architecture_of(teacher) for stage in recipe.stages]
    steps = [step_tflop(teacher, student, recipe.batch_size) for student in students]
    counted = sum(stage.steps * tflop for stage, tflop in zip(recipe.stages, steps, strict=True))
    assert budget.training_tflop == pytest.approx(counted)
    assert budget.cache_bytes == 1000 * 10_380  # latents 2,048, text 8,192 + 128, six sizes
    online = count_budget(recipe, teacher, 1000, text="online", checkpointing=True)
    assert online.cache_tflop < budget.cache_tflop and online.training_tflop > budget.training_tflop
    one, two = describe_budget(budget, "title", (1, 2), peak_tflops=1.0, share_of_peak=0.5)[2:]
    hours = budget.training_tflop / 1800
    assert float(one.split()[2].replace(",", "")) == pytest.approx(hours, abs=0.06)
    assert float(two.split()[2].replace(",", "")) == pytest.approx(hours / 2, abs=0.06)
    assert one.split()[3] == two.split()[3]
    with pytest.raises(UserError, match="share-of-peak is 2"):
        describe_budget(budget, "title", (1,), peak_tflops=1.0, share_of_peak=2)
