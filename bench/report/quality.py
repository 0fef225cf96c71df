"""How good the pictures of each contestant are: the guard's verdict, and every measure by which models can be held against
each other, with its interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bench.measure.stats import Estimate
from bench.report.elements.formatting import percent
from bench.report.elements.tables import Cell
from bench.results import ContestantRecord, Results
from distill.data.shapes import wilson

TALLY_SCHEMA = "slimxl.bench.study.tally/1"
SCORES = {"clip": "CLIP score", "fid": "FID"}


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Model(_Record):
    name: str
    steps: int


class _Standing(_Record):
    model: str
    votes: int
    preference: Estimate | None


class _Counted(_Record):
    standings: list[_Standing]


class TallyFile(_Record):
    """What a report reads of what `bench study tally` writes."""

    schema_version: Literal["slimxl.bench.study.tally/1"]
    study: str
    models: list[_Model]
    counted: _Counted


@dataclass(frozen=True)
class Verdict:
    """What the quality guard said: `state` is passed, failed or unchecked."""

    state: str
    text: str

    @property
    def cell(self) -> Cell:
        return Cell("not checked" if self.state == "unchecked" else self.state, f"state {self.state}")


def quality_verdict(record: ContestantRecord) -> Verdict:
    quality = record.quality
    state = {True: "passed", False: "failed", None: "unchecked"}[quality.get("passed")]
    parts = []
    if quality.get("identical"):
        parts.append("identical to the fp32 reference")
    elif quality.get("psnr_db") is not None:
        parts.append(f"PSNR {quality['psnr_db']:.1f} dB")
    if quality.get("latent_cosine") is not None:
        parts.append(f"latent cosine {quality['latent_cosine']:.5f}")
    errors = [error for error in quality.get("noise_errors") or [] if error is not None]
    if errors:
        parts.append(f"noise_pred off by {100 * max(errors):.2g} % at the worst step")
    if control := quality.get("control"):
        parts.append(f"a UNet {control['what']} {'was caught' if control['caught'] else 'was NOT caught'}")
    for key, value in (quality.get("fidelity") or {}).items():
        if key in SCORES and value is not None:
            parts.append(f"{SCORES[key]} {value:.2f}")
    return Verdict(state, "; ".join(parts + list(quality.get("words", []))))


@dataclass(frozen=True)
class Measure:
    """One way to judge models, with the main steps: `values` and `texts` by contestant. Shares lie between 0 and 1."""

    name: str
    axis: str
    values: Mapping[str, Estimate]
    texts: Mapping[str, str]
    lower_is_better: bool = False
    is_share: bool = False
    is_read: bool = False
    """From the pictures themselves, with every number of steps."""

    def plotted(self, value: Estimate) -> tuple[float, ...]:
        """(y,) or (y, low, high), shares in percent."""
        scale = 100.0 if self.is_share else 1.0
        known = (value.value, value.low, value.high) if value.low is not None else (value.value,)
        return tuple(scale * one for one in known if one is not None)

    def knows(self, *contestants: str) -> bool:
        return all(name in self.values for name in contestants)

    def is_worse(self, one: str, than: str) -> bool:
        """Beyond what chance explains: the intervals do not touch. False where one has none."""
        a, b = self.values[one], self.values[than]
        if a.overlaps(b):
            return False
        return (a.value < b.value) is not self.lower_is_better


def right_counts(results: Results) -> dict[tuple[str, int], tuple[int, int]]:
    """(contestant, steps) -> pictures that show all that their caption says, of how many that could be read."""
    judged = [one for one in results.pictures if one.follows is not None]
    of = Counter((one.contestant, one.steps) for one in judged)
    right = Counter((one.contestant, one.steps) for one in judged if one.follows and all(one.follows.values()))
    return {key: (right[key], count) for key, count in of.items()}


def share_right(right: int, of: int) -> Estimate:
    low, high = wilson(right / of, of)
    return Estimate(value=right / of, low=low, high=high)


def share_text(share: Estimate) -> str:
    if share.low is None or share.high is None:
        return percent(share.value)
    return f"{100 * share.low:.0f}–{percent(share.high)}"


def measures(results: Results, tallies: Sequence[TallyFile]) -> list[Measure]:
    """Those that know a contestant, people's preference first. All are of the steps that each drew the main workload in: a
    tally of models that were drawn otherwise takes no part."""
    steps = {
        record.name: record.taught.get("steps", results.cells[0].workload["steps"]) for record in results.contestants
    }
    counts = {name: pair for (name, of), pair in right_counts(results).items() if of == steps.get(name)}
    right = {name: share_right(*pair) for name, pair in counts.items()}
    said = {name: f"{counts[name][0]} of {counts[name][1]} right ({share_text(one)})" for name, one in right.items()}
    found = [_preference(tally, steps) for tally in tallies]
    found.append(Measure("follows its captions", "right in everything, %", right, said, is_share=True, is_read=True))
    for key, name in SCORES.items():
        lower = key == "fid"
        scores = {record.name: (record.quality.get("fidelity") or {}).get(key) for record in results.contestants}
        values = {one: Estimate(value=score) for one, score in scores.items() if score is not None}
        texts = {one: f"{name} {score.value:.2f}" for one, score in values.items()}
        found.append(Measure(name, f"{name}{', lower is better' if lower else ''}", values, texts, lower))
    return [one for one in found if one.values]


def _preference(tally: TallyFile, steps: Mapping[str, float]) -> Measure:
    timed = {model.name for model in tally.models if model.steps == steps.get(model.name)}
    values = {one.model: one.preference for one in tally.counted.standings if one.preference and one.model in timed}
    texts = {name: f"preferred in {percent(one.value)} of votes ({share_text(one)})" for name, one in values.items()}
    return Measure("preferred by people", "preferred, % of votes", values, texts, is_share=True)
