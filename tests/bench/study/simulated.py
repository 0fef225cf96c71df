"""Studies that nobody drew, and raters whose true preference is known.

    python -m tests.bench.study.simulated

counts how often the rule finds who only clicks, and how often an interval holds the truth.
"""

from __future__ import annotations

import numpy as np

from bench.study.files import Item, Key, Model
from bench.study.preferences import find_preferences
from bench.study.raters import make_rater
from bench.study.votes import Sheet, Vote, checksum

KINDS = ("honest", "random", "left", "fast")
TIES = -0.5  # Davidson's η: a third of the votes between equal models


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


def chances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of (first, tie, second) by their strengths, in the first axis."""
    odds = np.exp(np.stack([one, TIES + (one + other) / 2, other]))
    return odds / odds.sum(axis=0)


def vote_as(key: Key, number: int, strengths: object, kind: str = "honest", bias: float = 0.0) -> list[Vote]:
    """One rater's votes; `strengths` (prompts, models) or (models,). `kind`: honest; random, which looks at nothing; left,
    which always presses it; fast. `bias` is added to the strength of what stands left."""
    rng = np.random.default_rng(number)
    strength = np.broadcast_to(np.asarray(strengths, float), (len(key.items), len(key.models)))
    drawn = [
        (int(rng.integers(len(key.items))), *map(int, rng.permutation(len(key.models))[:2])) for _ in range(key.pairs)
    ]
    fresh = list({(item, frozenset((a, b))): (item, a, b) for item, a, b in drawn}.values())
    again = [(item, b, a) for item, a, b in fresh[: key.repeats]]
    same = [(int(item), 0, 0) for item in rng.integers(len(key.items), size=key.same)]
    answers: dict[tuple[int, frozenset[int]], int] = {}
    votes = []
    for index, (item, a, b) in enumerate(fresh + again + same):
        if kind == "left":
            choice = "first"
        elif kind == "random":
            choice = str(rng.choice(["first", "second", "tie"]))
        elif a == b:
            choice = "tie" if rng.random() < 0.95 else "first"
        else:
            winner = (a, -1, b)[rng.choice(3, p=chances(strength[item, a] + bias, strength[item, b]))]
            winner = answers.setdefault((item, frozenset((a, b))), winner) if rng.random() < 0.8 else winner
            choice = {a: "first", b: "second"}.get(winner, "tie")
        seen = {"first": key.picture(item, a), "second": key.picture(item, b), "choice": choice, "at": 1000 + index}
        look_ms = int(rng.integers(100, 400) if kind == "fast" else rng.integers(1500, 6000))
        votes.append(Vote(study=key.study, rater=f"{number:016x}", index=index, ms=look_ms, **seen))
    return votes


def saved(votes: list[Vote]) -> str:
    """As the page saves one rater's votes."""
    return Sheet(votes=votes, checksum=checksum(votes)).model_dump_json()


def main(raters: int = 1000, studies: int = 300, spread: float = 0.6) -> None:
    key = make_key()
    for kind in KINDS:
        apart = sum(make_rater(vote_as(key, at, [0, 0.8, -0.5], kind)).apart is not None for at in range(raters))
        print(f"{kind}: {apart} of {raters} raters set apart")
    rng, held, key = np.random.default_rng(0), 0, make_key(("a", "b"), repeats=0, same=0)
    mean = np.array([0, 0.4])
    taste = mean + rng.normal(0, spread * 2**0.5, (1_000_000, 2))
    truth = float((chances(*taste.T)[:2].T @ [1, 0.5]).mean())
    for number in range(studies):
        prompts = rng.normal(0, spread, (len(key.items), 2))
        own = [mean + prompts + rng.normal(0, spread, 2) for _ in range(30)]
        [pair] = find_preferences(
            [one for at, s in enumerate(own) for one in vote_as(key, 30 * number + at, s)], key
        ).pairs
        held += pair.preference.low <= truth <= pair.preference.high
    print(f"the interval of 30 raters and {len(key.items)} prompts holds the true share in {held} of {studies} studies")


if __name__ == "__main__":
    main()
