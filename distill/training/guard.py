"""When a run is to be stopped: a loss that is not finite, or one that stays far above what it was."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median


class DivergenceGuard:
    """Says when a loss has stayed far above its own running median.

    Single steps are noisy, each at its own timesteps, so one bad step is nothing; `patience` of them in a row, each over
    `factor` times the median of the last `window` good ones, is a run that has diverged. The good losses are all that
    the guard remembers, so a run that goes on from a checkpoint hands them over.
    """

    def __init__(
        self, good_losses: Iterable[float] = (), *, factor: float = 5.0, patience: int = 50, window: int = 500
    ) -> None:
        self.factor, self.patience, self.bad_steps = factor, patience, 0
        self.good: deque[float] = deque(good_losses, maxlen=window)

    @property
    def median(self) -> float:
        """Of the good losses; infinite while there are too few of them to judge by."""
        return median(self.good) if len(self.good) >= self.patience else math.inf

    def diverged(self, loss: float) -> bool:
        """Whether the run has diverged, now that one more step had this loss."""
        if loss > self.factor * self.median:
            self.bad_steps += 1
        else:
            self.bad_steps = 0
            self.good.append(loss)
        return self.bad_steps >= self.patience

    def fault(self, step: int, terms: Mapping[str, float], *, steady: bool, scaled: bool) -> str | None:
        """What is wrong with the terms of `step`, told as the log counts, from 1, or None. Only a `steady` loss is compared
        with those before it. With `scaled`, as in fp16, a gradient that is not finite is no fault: the scale was too large,
        and the scaler lowers it.
        """
        broken = [name for name, value in terms.items() if not math.isfinite(value)]
        if broken and not (scaled and broken == ["gradient_norm"]):
            return f"step {step + 1} is not finite ({', '.join(broken[:4])})"
        if not (steady and self.diverged(terms["total"])):
            return None
        return (
            f"the loss has diverged: over {self.factor:g} times its median {self.median:.4g} for {self.patience} steps, "
            f"now {terms['total']:.4g} at step {step + 1}"
        )
