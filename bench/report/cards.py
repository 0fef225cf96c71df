"""The contestants of the main run: one card each, the best of them for the headline, and what speaks against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.report.elements.formatting import count, interval, milliseconds, percent, times, title_of
from bench.report.elements.tables import Cell, Column, Table, make_table
from bench.report.method import machine_name, run_name
from bench.results import ContestantRecord, Results, Row

COLOURS = 8


@dataclass(frozen=True)
class Verdict:
    """What the quality guard said: `state` is passed, failed or unchecked."""

    state: str
    text: str

    @property
    def cell(self) -> Cell:
        return Cell("not checked" if self.state == "unchecked" else self.state, f"state {self.state}")


@dataclass(frozen=True)
class Card:
    """One contestant and its row of the main workload, None where it did not finish a single call: see `failure`."""

    title: str
    colour: int
    record: ContestantRecord
    row: Row | None
    failure: str | None
    is_baseline: bool

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def failed(self) -> bool:
        return self.record.failed_guard

    @property
    def quality(self) -> Verdict:
        return quality_verdict(self.record)

    @property
    def head(self) -> Cell:
        """It as the head of a column."""
        return Cell(self.title, failed=self.failed, colour=self.colour)


def make_cards(results: Results) -> list[Card]:
    """The baseline first; its colour is 0."""
    main = results.cells[0]
    records = sorted(results.contestants, key=lambda record: record.name != results.baseline)
    return [
        Card(
            title=title_of(record.name) + (f", {_steps(record.taught['steps'])}" if "steps" in record.taught else ""),
            colour=index % COLOURS,
            record=record,
            row=main.row(record.name),
            failure=main.failures.get(record.name),
            is_baseline=record.name == results.baseline,
        )
        for index, record in enumerate(records)
    ]


@dataclass(frozen=True)
class Headline:
    """`best` is the fastest card against the baseline, None where there is nothing to compare. One that failed the
    quality guard is among the `others`, and nothing is measured against a baseline that failed it."""

    best: Card | None
    others: list[Card]
    baseline: Card
    workload: str
    one_runtime: bool


def make_headline(results: Results, cards: list[Card]) -> Headline:
    base, *rest = cards
    compared = [card for card in rest if card.row is not None and card.row.speedup is not None]
    sound = [card for card in compared if not card.failed and base.row and not base.row.refused and not base.failed]
    best = max(sound, key=_speedup, default=None)
    runtimes = {(card.record.runtime, card.record.precision) for card in cards if card.row}
    others = [card for card in compared if card is not best]
    return Headline(best, others, base, results.cells[0].name, len(runtimes) == 1)


def _speedup(card: Card) -> float:
    return card.row.speedup.value if card.row and card.row.speedup else 0.0


def headline_table(cards: list[Card]) -> Table:
    """The whole of a summary: latency, speed-up, quality."""

    def median(card: Card) -> str:
        if card.row is None:
            return f"did not finish: {card.failure or 'left out'}"
        return milliseconds(card.row.total_ms.value) + " (refused)" * card.row.refused

    def of_row(write: Callable[[Row], str | None]) -> Callable[[Card], str | None]:
        return lambda card: write(card.row) if card.row else None

    def gain(row: Row) -> str | None:
        return f"{times(row.speedup.value)} ({interval(row.speedup, 'x')})" if row.speedup else None

    return make_table(
        cards,
        Column("model", lambda card: Cell(card.title, failed=card.failed)),
        Column("runtime", lambda card: f"{card.record.runtime}, {card.record.precision}", "left"),
        Column("median", median),
        Column("95 % interval", of_row(lambda row: interval(row.total_ms))),
        Column("speed-up", lambda card: "baseline" if card.is_baseline else of_row(gain)(card)),
        Column("MFU", of_row(lambda row: percent(row.mfu, 1))),
        Column("UNet parameters", lambda card: count(card.record.parameters)),
        Column("quality guard", lambda card: f"{card.quality.state}: {card.quality.text}".removesuffix(": "), "left"),
    )


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
    for name, value in (quality.get("fidelity") or {}).items():
        if name in ("fid", "clip") and value is not None:
            parts.append(f"{'FID' if name == 'fid' else 'CLIP score'} {value:.2f}")
    return Verdict(state, "; ".join(parts + list(quality.get("words", []))))


def contestant_cell(record: ContestantRecord, *, precise: bool = False) -> Cell:
    """A contestant with its runtime below it, and its precision where that is asked for and known."""
    precision = f", {record.precision}" if precise and record.precision != "as built" else ""
    return Cell(title_of(record.name), small=(record.runtime + precision,), failed=record.failed_guard)


def as_taught(cards: list[Card]) -> str:
    """A sentence for each model that drew in its own steps or at its own guidance scale."""
    told = []
    for card in cards:
        ways = [
            _steps(value) if name == "steps" else f"guidance {value:g}" for name, value in card.record.taught.items()
        ]
        if ways:
            told.append(f"{title_of(card.name)} draws as it was taught: {', '.join(ways)}.")
    return " ".join(told)


def _steps(number: float) -> str:
    return "1 step" if number == 1 else f"{number:g} steps"


def drawn(results: Results) -> str:
    """What one call of the main workload draws."""
    batch = results.cells[0].workload["batch"]
    return "a picture" if batch == 1 else f"{batch} pictures"


def all_notes(all_results: list[Results]) -> list[str]:
    """What each run says of itself as a whole, with the name of the run where it is not the main one."""
    main, *others = all_results
    return main.notes + [f"{run_name(other)}: {note}" for other in others for note in other.notes]


def headline_faults(results: Results) -> list[str]:
    """What speaks against the rows of the main workload; names the contestants where it is not said of all."""
    main = results.cells[0]
    said: dict[str, list[str]] = {}
    for row in main.rows:
        failure = main.failures.get(row.contestant)
        for fault in row.diagnosis + ([f"failed: {failure}"] if failure else []):
            said.setdefault(fault, []).append(title_of(row.contestant))
    return [fault if len(names) == len(main.rows) else f"{', '.join(names)} {fault}" for fault, names in said.items()]


def runtime_and_machine(record: ContestantRecord, results: Results, all_results: list[Results]) -> str:
    """A contestant's runtime, and its machine where the report has several."""
    machine, machines = machine_name(results), {machine_name(one) for one in all_results}
    return f"{record.runtime} on {machine}" if len(machines) > 1 else record.runtime


def picture_grid(results: Results, cards: list[Card]) -> list[dict[str, Any]]:
    """The same prompt and seed side by side: [{"prompt", "seed", "resolution", "pictures": [...]}]."""
    order = {card.name: index for index, card in enumerate(cards)}
    grid: dict[tuple[str, int], dict[str, Any]] = {}
    for picture in sorted(results.pictures, key=lambda one: order[one.contestant]):
        about = {"prompt": picture.prompt, "seed": picture.seed, "resolution": picture.resolution, "pictures": []}
        grid.setdefault((picture.prompt, picture.seed), about)["pictures"].append(
            {
                "title": title_of(picture.contestant),
                "png": picture.png_base64,
                "judged": picture.follows is not None,
                "wrong": [name for name, right in (picture.follows or {}).items() if not right],
            }
        )
    return list(grid.values())
