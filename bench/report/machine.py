"""What else is known of each contestant of each run: quality guard, energy, memory, cold start, and every fault found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from bench.report.cards import Card, runtime_and_machine
from bench.report.elements.formatting import joules, milliseconds, seconds, signed_percent, size, title_of
from bench.report.elements.tables import Cell, Column, Table, make_table, measured
from bench.report.latency import varied
from bench.report.quality import Verdict, quality_verdict
from bench.results import ContestantRecord, Results


@dataclass(frozen=True)
class Entry:
    """One contestant of one run; `colour` is None outside of the main run, `where` empty where there is no other."""

    record: ContestantRecord
    results: Results
    where: str
    colour: int | None

    @property
    def name(self) -> Cell:
        small = (self.where,)
        return Cell(title_of(self.record.name), "", small, self.record.failed_guard, self.colour)

    @property
    def quality(self) -> Verdict:
        return quality_verdict(self.record)


def entries(all_results: list[Results], cards: list[Card]) -> list[Entry]:
    colours = {card.name: card.colour for card in cards}
    return [
        Entry(
            record,
            results,
            runtime_and_machine(record, results, all_results) if len(all_results) > 1 else "",
            colours[record.name] if results is all_results[0] else None,
        )
        for results in all_results
        for record in results.contestants
    ]


def quality_table(found: list[Entry]) -> Table:
    return make_table(
        found,
        Column("model", lambda one: one.name),
        Column("guard", lambda one: one.quality.cell, "left"),
        Column("what was found", lambda one: one.quality.text, "wrap"),
    )


CARDS_BYTES = {8: 8e9, 12: 12e9, 16: 16e9, 24: 24e9}
ROOM_BYTES = 1e9
"""What the driver's context and a desktop take of a card, at a guess."""


def device_peak_bytes(record: ContestantRecord) -> float | None:
    """Of GPU memory, by NVML or by torch's allocator, whichever saw more."""
    return max(filter(None, map(record.memory.get, ("device_added_bytes", "allocator_peak_bytes"))), default=None)


def fits(peak_bytes: float) -> str:
    """The smallest of the usual cards that it fits on."""
    cards = (name for name, has in CARDS_BYTES.items() if peak_bytes + ROOM_BYTES <= has)
    smallest = next(cards, None)
    return f"fits {smallest} GB" if smallest else "more than 24 GB"


def best_batch(results: Results, name: str) -> tuple[int, float] | None:
    """(batch, pictures a second) of the batch that draws most, with the main steps and size; None where none is sound."""
    rows = [(cell.workload["batch"], cell.row(name)) for cell in varied(results, "batch")]
    found = [(batch, row.images_per_s) for batch, row in rows if row is not None and not row.refused]
    return max(found, key=lambda one: one[1], default=None)


def device_table(found: list[Entry], price: float | None) -> Table:
    """`price` is what an hour of the machine costs, in dollars."""

    def rate(one: Entry) -> Cell | None:
        best = best_batch(one.results, one.record.name)
        return measured(f"{best[1]:.3g}", f"batch {best[0]}") if best else None

    def dollars(one: Entry) -> str | None:
        best = best_batch(one.results, one.record.name)
        return f"${1000 * price / 3600 / best[1]:.3g}" if best and price else None

    def device(one: Entry) -> Cell | None:
        peak = device_peak_bytes(one.record)
        return measured(size(peak), fits(peak)) if peak else None

    def sustained(one: Entry) -> Cell | None:
        trace, change = one.record.sustained, one.record.sustained_change
        if trace is None or change is None:
            return None
        return measured(signed_percent(change), f"{trace.images} in {seconds(trace.seconds)}")

    return make_table(
        found,
        Column("model", lambda one: one.name),
        Column("pictures a second", rate),
        Column("slower by the end of a sustained run", sustained),
        Column("1,000 pictures", dollars),
        Column("energy a picture", lambda one: measured(joules(one.record.energy["j_per_image"], 1))),
        Column("GPU memory", device),
        Column("host memory", lambda one: measured(size(one.record.memory["rss_added_bytes"]))),
        Column("load", lambda one: measured(seconds(one.record.cold["load_ms"] / 1e3))),
        Column("first picture", lambda one: measured(milliseconds(one.record.cold["first_image_ms"]))),
    )


@dataclass(frozen=True)
class RowFaults:
    """What speaks against one contestant at one workload."""

    cell: str
    title: str
    where: str
    faults: list[str]


def all_faults(all_results: list[Results]) -> list[RowFaults]:
    """Every fault the harness found, of all runs; a contestant that did not finish is one."""
    found = []
    for results in all_results:
        for cell in results.cells:
            said = [(row.contestant, row.diagnosis) for row in cell.rows if row.diagnosis]
            said += [(name, [f"failed: {why}"]) for name, why in cell.failures.items()]
            for name, faults in said:
                where = runtime_and_machine(results.contestant(name), results, all_results)
                found.append(RowFaults(cell.name, title_of(name), where, faults))
    return found


def fault_counts(found: list[RowFaults]) -> list[tuple[str, int]]:
    """How many rows each kind of fault was said of, the most frequent first."""
    return Counter(fault.partition(":")[0] for one in found for fault in one.faults).most_common()


def fault_table(found: list[RowFaults]) -> Table:
    return make_table(
        found,
        Column("workload", lambda one: one.cell),
        Column("model", lambda one: Cell(one.title, small=(one.where,)), "left"),
        Column("what was found", lambda one: "; ".join(one.faults), "wrap"),
    )


def random_weights(all_results: list[Results]) -> list[str]:
    """Names of those whose weights are random."""
    names = (title_of(record.name) for one in all_results for record in one.contestants if record.random_weights)
    return list(dict.fromkeys(names))


def device_ranges(device: dict[str, list[float] | None]) -> list[str]:
    """What the GPU showed while it was timed, each reading from its least to its most."""
    names = {
        "sm_clock_mhz": ("SM clock", "MHz"),
        "memory_clock_mhz": ("memory clock", "MHz"),
        "temperature_c": ("", "°C"),
        "power_w": ("", "W"),
    }
    told = []
    for key, (name, unit) in names.items():
        values = device.get(key)
        if values:
            least, _, most = values
            told.append(f"{name} {least:,.0f}{f'–{most:,.0f}' if most > least else ''} {unit}".strip())
    return told
