"""Studies that nobody drew, and raters whose true preference is known."""

from __future__ import annotations

import numpy as np

from bench.study.files import Item, Key, Model
from bench.study.votes import Sheet, Vote, checksum


def make_key(models: tuple[str, ...] = ("sdxl", "ssd-1b", "vega"), prompts: int = 60, **changes: object) -> Key:
    values = {
        "study": "5" * 12,
        "secret": "ab" * 16,
        "models": [Model(name=name, spec=f"eager:{name}", steps=30, guidance_scale=5.0) for name in models],
        "items": [
            Item(prompt=f"prompt {at}", category=("people", "style")[at % 2], seed=at, resolution="64x64")
            for at in range(prompts)
        ],
        "scheduler": "default",
        "pairs": 40,
        "repeats": 6,
        "same": 4,
    }
    return Key(**(values | changes))


def weights(strengths: np.ndarray, eta: float) -> np.ndarray:
    """Davidson's chances of (first, tie, second), up to a factor."""
    return np.exp([strengths[0], eta + strengths.mean(), strengths[1]])


def vote_as(key: Key, number: int, strengths: list[float], kind: str = "honest", bias: float = 0.0) -> list[Vote]:
    """One rater's votes. `kind`: honest; random, which looks at nothing; left, which always presses it; fast. `bias` is
    added to the strength of what stands left."""
    rng = np.random.default_rng(number)
    pairs = []
    for _ in range(key.pairs):
        item, models = int(rng.integers(len(key.items))), rng.permutation(len(key.models))[:2]
        pairs.append((item, int(models[0]), int(models[1])))
    pairs = list(dict.fromkeys(pairs))
    pairs += [(item, b, a) for item, a, b in pairs[: key.repeats]]
    pairs += [(int(item), 0, 0) for item in rng.integers(len(key.items), size=key.same)]
    answers: dict[tuple[int, frozenset[int]], int] = {}
    votes = []
    for index, (item, a, b) in enumerate(pairs):
        if kind == "left":
            choice = "first"
        elif kind == "random":
            choice = str(rng.choice(["first", "second", "tie"]))
        elif a == b:
            choice = "tie" if rng.random() < 0.95 else "first"
        else:
            chances = weights(np.array([strengths[a] + bias, strengths[b]]), -0.5)
            drawn = ("first", "tie", "second")[rng.choice(3, p=chances / chances.sum())]
            winner = {"first": a, "second": b}.get(drawn, -1)
            winner = answers.setdefault((item, frozenset((a, b))), winner) if rng.random() < 0.8 else winner
            choice = {a: "first", b: "second"}.get(winner, "tie")
        names = {"first": key.picture(item, a), "second": key.picture(item, b)}
        look_ms = int(rng.integers(100, 400) if kind == "fast" else rng.integers(1500, 6000))
        about = {"study": key.study, "rater": f"{number:016x}"}
        votes.append(Vote(index=index, choice=choice, ms=look_ms, at=1000 + index, **names, **about))
    return votes


def saved(votes: list[Vote]) -> str:
    """As the page saves one rater's votes."""
    return Sheet(votes=votes, checksum=checksum(votes)).model_dump_json()
