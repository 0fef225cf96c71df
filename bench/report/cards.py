"""The contestants of the main run: one card each, the best of them for the headline, and what speaks against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.report.elements.formatting import count, interval, milliseconds, percent, times, title_of
from bench.report.elements.tables import Cell, Column, Table, make_table
from bench.report.method import machine_name, run_name
from bench.report.quality import Measure, Verdict, quality_verdict
from bench.results import ContestantRecord, Results, Row

COLOURS = 8


@dataclass(frozen=True)
class Card:
    """One contestant and its row of the main workload, None where it did not finish a single call: see `failure`.
    `differences` are what sets it apart from the baseline beside its model."""

    title: str
    colour: int
    record: ContestantRecord
    row: Row | None
    failure: str | None
    is_baseline: bool
    differences: list[str]

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def failed(self) -> bool:
        return self.record.failed_guard

    @property
    def is_fake(self) -> bool:
        """It waits, and draws nothing: no figure of it is a measurement of a model."""
        return self.record.spec.startswith("fake:")

    @property
    def quality(self) -> Verdict:
        return quality_verdict(self.record)

    @property
    def head(self) -> Cell:
        """It as the head of a column."""
        return Cell(self.title, failed=self.failed, colour=self.colour)


def differences(record: ContestantRecord, base: ContestantRecord) -> list[str]:
    """What but the model sets the two apart."""
    return [what for what in ("runtime", "precision") if getattr(record, what) != getattr(base, what)]


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
            differences=differences(record, records[0]),
        )
        for index, record in enumerate(records)
    ]


@dataclass(frozen=True)
class Headline:
    """`best` is the fastest card whose speed-up is its model's own and whose quality is known; `quality` says how good its
    pictures are beside the baseline's, `is_worse` that they are worse by more than chance. `others` are the rest that can
    be compared, each with what speaks against it."""

    best: Card | None
    quality: str
    is_worse: bool
    others: list[tuple[Card, list[str]]]
    baseline: Card
    workload: str

    @property
    def latencies(self) -> list[Card]:
        """What there is to tell where none is best."""
        cards = [self.baseline, *(card for card, _ in self.others)]
        return [card for card in cards if card.row and not card.row.refused and not card.is_fake]


def make_headline(results: Results, cards: list[Card], judged: list[Measure]) -> Headline:
    base, *rest = cards
    compared = [card for card in rest if card.row is not None and card.row.speedup is not None]
    against = {card.name: objections(card, base, judged) for card in compared}
    sound = [card for card in compared if not against[card.name]]
    best = max(sound, key=lambda card: (not _worse(card, base, judged), _speedup(card)), default=None)
    others = [(card, against[card.name]) for card in compared if card is not best]
    quality, is_worse = "", best is not None and _worse(best, base, judged)
    if best:
        known = _known(best, base, judged)[0]
        quality = f"{known.texts[best.name]}, {base.title} {known.texts[base.name]}"
    return Headline(best, quality, is_worse, others, base, results.cells[0].name)


def objections(card: Card, base: Card, judged: list[Measure]) -> list[str]:
    """Why its speed-up may not be headed as its model's."""
    found = []
    for one in (card, base):
        if one.is_fake:
            found.append(f"{one.title} is fake")
        elif one.quality.state == "failed":
            found.append(f"{one.title} failed the quality guard")
        elif one.quality.state == "unchecked":
            found.append(f"{one.title} was not checked by the quality guard")
    if card.differences:
        found.append(f"with another {' and '.join(card.differences)} than {base.title}")
    if not _known(card, base, judged):
        found.append(f"how good its pictures are beside {base.title}'s is not known")
    gain = card.row.speedup if card.row else None
    if gain and gain.low is not None and gain.low <= 1:
        found.append("not faster beyond noise")
    return found


def _known(card: Card, base: Card, judged: list[Measure]) -> list[Measure]:
    return [measure for measure in judged if measure.knows(card.name, base.name)]


def _worse(card: Card, base: Card, judged: list[Measure]) -> bool:
    return any(measure.is_worse(card.name, base.name) for measure in _known(card, base, judged))


def _speedup(card: Card) -> float:
    return card.row.speedup.value if card.row and card.row.speedup else 0.0


def headline_table(cards: list[Card], judged: list[Measure]) -> Table:
    """The whole of a summary: latency, speed-up, quality."""

    def median(card: Card) -> str:
        if card.row is None:
            return f"did not finish: {card.failure or 'left out'}"
        return milliseconds(card.row.total_ms.value) + " (refused)" * card.row.refused

    def of_row(write: Callable[[Row], str | None]) -> Callable[[Card], str | None]:
        return lambda card: write(card.row) if card.row else None

    def gain(card: Card) -> str | None:
        if card.is_baseline or card.row is None or card.row.speedup is None:
            return "baseline" if card.is_baseline else None
        told = f", with another {' and '.join(card.differences)}" if card.differences else ""
        return f"{times(card.row.speedup.value)} ({interval(card.row.speedup, 'x')}{told})"

    def quality(measure: Measure) -> Column[Card]:
        return Column(measure.name, lambda card: measure.texts.get(card.name))

    return make_table(
        cards,
        Column("model", lambda card: Cell(card.title, failed=card.failed)),
        Column("runtime", lambda card: f"{card.record.runtime}, {card.record.precision}", "left"),
        Column("median", median),
        Column("95 % interval", of_row(lambda row: interval(row.total_ms))),
        Column("speed-up", gain),
        *map(quality, judged),
        Column("MFU", of_row(lambda row: percent(row.mfu, 1))),
        Column("UNet parameters", lambda card: count(card.record.parameters)),
        Column("quality guard", lambda card: f"{card.quality.state}: {card.quality.text}".removesuffix(": "), "left"),
    )


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
    shown = [one for one in results.pictures if one.png_base64 is not None]
    for picture in sorted(shown, key=lambda one: order[one.contestant]):
        about = {"prompt": picture.prompt, "seed": picture.seed, "resolution": picture.resolution, "pictures": []}
        about |= {"steps": picture.steps, "guidance": picture.guidance_scale}
        grid.setdefault((picture.prompt, picture.seed), about)["pictures"].append(
            {
                "title": title_of(picture.contestant),
                "png": picture.png_base64,
                "judged": picture.follows is not None,
                "wrong": [name for name, right in (picture.follows or {}).items() if not right],
            }
        )
    return list(grid.values())
