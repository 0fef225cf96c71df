from collections.abc import Collection

import pytest

from bench.search.shrink import Budget, Shrinking
from bench.search.space import student_after
from distill.models.architectures import SDXL_DEPTH
from distill.models.depth import Depth
from distill.models.module_map import ModuleMap

DEPTH = Depth.parse("-/4/4:-:4,4/4,4/-")
"""Blocks are all that may be cut."""


class KnownQuality:
    """Every module has its own change, by the sum of digits in its path; `beyond` adds what they do together."""

    def __init__(self, beyond=lambda dropped: 0.0) -> None:
        self.beyond, self.asked = beyond, set[frozenset[str]]()

    def change(self, dropped: Collection[str]) -> float:
        self.asked.add(frozenset(dropped))
        return sum(self.alone(path) for path in dropped) + self.beyond(dropped)

    @staticmethod
    def alone(path: str) -> float:
        return 1 + sum(int(part) * 2**-place for place, part in enumerate(path.split(".")) if part.isdigit())


def modules_left(modules: ModuleMap) -> float:
    return float(len(modules.paths))


def search(quality, budget: int, depth: Depth = DEPTH, exchanges: int = 100):
    shrinking = Shrinking(depth, quality, modules_left, lambda line: None)
    wanted = Budget(f"{budget} modules", lambda modules: modules_left(modules) <= budget)
    shrinking.score_alone()
    path, reached = shrinking.greedy([wanted])
    return shrinking, path, shrinking.exchanged(reached[wanted.text], wanted, exchanges), wanted


def test_the_way_down_takes_what_changes_least_for_what_it_saves() -> None:
    _, path, _, _ = search(KnownQuality(), budget=30)
    changes = [student.change for student in path]
    assert changes[0] == 0 and changes == sorted(changes)
    first = path[1].modules.dropped
    assert first == {"up_blocks.0.attentions.0.transformer_blocks.0"}


def test_where_changes_add_up_single_scores_say_the_same() -> None:
    shrinking, _, found, budget = search(KnownQuality(), budget=28)
    assert shrinking.one_shot(budget).change == pytest.approx(found.change)


def test_where_they_do_not_the_search_beats_single_scores_and_chance() -> None:
    """Two blocks of one transformer gone cost ten more; single scores cannot know."""

    def beyond(dropped: Collection[str]) -> float:
        gone = [path.rpartition(".transformer_blocks")[0] for path in dropped if "transformer_blocks" in path]
        return 10.0 * (len(gone) - len(set(gone)))

    shrinking, _, found, budget = search(KnownQuality(beyond), budget=30)
    assert found.change < shrinking.one_shot(budget).change
    assert all(found.change < shrinking.at_random(budget, seed).change for seed in range(3))


def test_an_exchange_takes_back_what_greed_should_not_have_taken() -> None:
    """The block that greed takes first makes the next one dear: without it, two others would have been cheaper."""
    trap = "up_blocks.0.attentions.0.transformer_blocks.0"

    def beyond(dropped: Collection[str]) -> float:
        return 5.0 if trap in dropped and len(dropped) > 2 else 0.0

    _, path, found, _ = search(KnownQuality(beyond), budget=int(modules_left(student_after(DEPTH, ()))) - 3)
    assert trap in path[-1].modules.dropped and trap not in found.modules.dropped
    assert found.change < path[-1].change


def test_few_cuts_are_scored_anew() -> None:
    """SDXL down to half its modules: far from the 70 scores a step that plain greed takes."""
    quality = KnownQuality()
    _, path, _, _ = search(quality, budget=80, depth=SDXL_DEPTH, exchanges=0)
    assert len(quality.asked) < 75 + 7 * len(path)
