"""One kind of table for the whole report: a column says how it writes an item, a row is one item."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from bench.report.elements.formatting import NONE

Item = TypeVar("Item")
Align = Literal["right", "left", "wrap"]


@dataclass(frozen=True)
class Cell:
    """What stands in one place. `css` says of which kind a figure is (measured, predicted, published) or how a state
    looks; `small` are lines below the text, of which empty ones are left out; `failed` adds the mark of the quality
    guard; `colour` the dot of a contestant; `hint` is shown under the pointer."""

    text: str
    css: str = ""
    small: tuple[str, ...] = ()
    failed: bool = False
    colour: int | None = None
    hint: str = ""

    @property
    def is_empty(self) -> bool:
        return self.text in ("", NONE) and not any(self.small)


def measured(text: str, *small: str, refused: bool = False) -> Cell:
    """A figure that was measured here; a dash stands for none."""
    return Cell(text, "" if text == NONE else "measured refused" if refused else "measured", small)


@dataclass(frozen=True)
class Column(Generic[Item]):
    """`write` gives the column's text for one item, None where there is nothing to say; `wrap` is a column of prose."""

    head: Cell | str
    write: Callable[[Item], Cell | str | None]
    align: Align = "right"


@dataclass(frozen=True)
class Table:
    """False where it has no rows. `dense` tables have many narrow columns."""

    heads: list[Cell]
    aligns: list[Align]
    rows: list[list[Cell]]
    dense: bool = False

    def __bool__(self) -> bool:
        return bool(self.rows)


def make_table(items: Iterable[Item], *columns: Column[Item], dense: bool = False) -> Table:
    """The first column names the item. Another column, or a row, that has nothing in it is left out."""
    rows = [[_as_cell(column.write(item)) for column in columns] for item in items]
    rows = [row for row in rows if not all(cell.is_empty for cell in row[1:])]
    kept = [index for index in range(len(columns)) if index == 0 or not all(row[index].is_empty for row in rows)]
    return Table(
        [_as_cell(columns[index].head) for index in kept],
        [columns[index].align if index else "left" for index in kept],
        [[row[index] for index in kept] for row in rows],
        dense,
    )


def _as_cell(written: Cell | str | None) -> Cell:
    if isinstance(written, Cell):
        return written
    return Cell(NONE if written is None else written)
