"""The search itself: greedy removal, scored anew as it goes, then exchanges; and three plainer ways beside it.

Scores of single cuts do not add up once several modules are gone, so after each cut the most promising ones are scored
again in the network as it then is. A score seldom falls as more is left out, so an old one serves as a lower bound and only
the few that look best are computed again ("lazy" greedy [Minoux 1978]). LAPTOP-Diff (arXiv 2404.11098) adds up single
scores in one shot; that, cuts at random and the published students are told beside what is found.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from bench.search.quality import Quality
from bench.search.space import Cut, cuts_of, first_cuts, is_student, student_after
from distill.common.progress import track
from distill.models.depth import Depth
from distill.models.module_map import ModuleMap

Way = Literal["search", "greedy", "one-shot", "random", "published"]
RESCORED = 6
"""Cuts that are scored anew before each is made, at the most."""
SHORTLIST = 5
"""Removed modules to put back, and others to take in their place, that an exchange tries."""


@dataclass(frozen=True)
class Budget:
    """`met` says whether a student is within it, `text` says it in words."""

    text: str
    met: Callable[[ModuleMap], bool]


@dataclass(frozen=True)
class Student:
    """`change` is the relative mean square change of noise_pred without it being taught anything; `budget` the one that it
    was made for."""

    way: Way
    modules: ModuleMap
    change: float
    budget: str | None = None
    name: str = ""


class Shrinking:
    """Searches the students of one teacher. `cost_ms` is what a student takes; `tell` gets a line after each cut."""

    def __init__(
        self, teacher: Depth, quality: Quality, cost_ms: Callable[[ModuleMap], float], tell: Callable[[str], None]
    ) -> None:
        self._teacher, self._quality, self._cost_ms, self._tell = teacher, quality, cost_ms, tell
        self._alone: dict[Cut, float] = {}

    def _student(self, removed: Collection[str]) -> ModuleMap:
        return student_after(self._teacher, removed)

    def change(self, modules: ModuleMap) -> float:
        return self._quality.change(modules.dropped)

    def _saved_ms(self, removed: frozenset[str], cut: Cut) -> float:
        return self._cost_ms(self._student(removed)) - self._cost_ms(self._student(removed | cut))

    def score_alone(self) -> None:
        """What each single cut changes: needed by all ways but chance."""
        for cut in track(first_cuts(self._teacher), "single cuts", unit="score"):
            self._alone[cut] = self._quality.change(cut)

    def greedy(self, budgets: Collection[Budget]) -> tuple[list[Student], dict[str, frozenset[str]]]:
        """The students on the way down to the tightest budget, and what is removed where each budget is first met."""
        removed: frozenset[str] = frozenset()
        modules, change = self._student(removed), 0.0
        path, reached = [Student("greedy", modules, change)], dict[str, frozenset[str]]()
        bounds = dict(self._alone)
        while True:
            reached |= {
                budget.text: removed for budget in budgets if budget.text not in reached and budget.met(modules)
            }
            if len(reached) == len(budgets):
                return path, reached
            saved = {cut: self._saved_ms(removed, cut) for cut in cuts_of(self._teacher, removed, self._alone)}
            fresh: dict[Cut, float] = {}
            while len(fresh) < RESCORED:
                best = min(saved, key=lambda cut: bounds.get(cut, 0.0) / max(saved[cut], 1e-9))
                if best in fresh:
                    break
                fresh[best] = self.change(self._student(removed | best))
                bounds[best] = max(fresh[best] - change, 0.0)
            best = min(fresh, key=lambda cut: bounds[cut] / max(saved[cut], 1e-9))
            removed, change = removed | best, fresh[best]
            modules = self._student(removed)
            path.append(Student("greedy", modules, change))
            self._tell(f"{self._cost_ms(modules):.4g} ms, change {change:.3g}, without {modules_in_words(best)}")

    def exchanged(self, removed: frozenset[str], budget: Budget, most: int) -> Student:
        """The greedy student improved: a module back, another out, where that changes less within the budget; at most
        `most` scores."""
        best, tried, improved = self.change(self._student(removed)), 0, True

        def by_score(cut: Cut) -> tuple[float, list[str]]:
            return self._alone_or_summed(cut), sorted(cut)

        while improved:
            improved = False
            gone = sorted((cut for path in removed if (cut := frozenset({path})) in self._alone), key=by_score)
            for back in gone[: -SHORTLIST - 1 : -1]:
                rest = removed - back
                if not is_student(self._teacher, rest):
                    continue
                others = [cut for cut in cuts_of(self._teacher, rest, self._alone) if not cut & back]
                for other in sorted(others, key=by_score)[:SHORTLIST]:
                    modules = self._student(rest | other)
                    if tried == most or not budget.met(modules):
                        continue
                    tried += 1
                    if (change := self.change(modules)) < best:
                        removed, best, improved = rest | other, change, True
                        self._tell(
                            f"{budget.text}: {modules_in_words(back)} back, {modules_in_words(other)} out: {best:.3g}"
                        )
                        break
                if improved:
                    break
        return Student("search", self._student(removed), best, budget.text)

    def _alone_or_summed(self, cut: Cut) -> float:
        return self._alone.get(cut) or sum(self._alone.get(frozenset({path}), 0.0) for path in cut)

    def _in_order(self, budget: Budget, rank: Callable[[frozenset[str], Cut], float]) -> ModuleMap:
        """Cut after cut, always the one of least rank, until the budget is met."""
        removed: frozenset[str] = frozenset()
        while not budget.met(modules := self._student(removed)):
            cuts = cuts_of(self._teacher, removed, self._alone)
            removed |= min(cuts, key=partial(rank, removed))
        return modules

    def one_shot(self, budget: Budget) -> Student:
        """What single scores alone say: in the order of change per millisecond saved, until the budget is met."""
        modules = self._in_order(
            budget, lambda removed, cut: self._alone_or_summed(cut) / max(self._saved_ms(removed, cut), 1e-9)
        )
        return Student("one-shot", modules, self.change(modules), budget.text)

    def at_random(self, budget: Budget, seed: int) -> Student:
        """Cuts in an order that is drawn from `seed`."""
        generator = random.Random(seed)
        modules = self._in_order(budget, lambda _removed, _cut: generator.random())
        return Student("random", modules, self.change(modules), budget.text)


def modules_in_words(cut: Iterable[str]) -> str:
    return " and ".join(sorted(cut))
