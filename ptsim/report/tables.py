"""How a tidy frame becomes a table that a person reads: headings in words, one unit per column, sortable cells."""

from __future__ import annotations

import math
import numbers
from typing import Any

import msgspec
import pandas as pd

from ptsim.costs.tiers import tier_row
from ptsim.units import SCALES, Scale, scale_of, shown_number

_SHARES = ("accuracy", "sparsity", "fraction", "error", "saving")


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """A heading; `kind` decides how its cells sort; `name` is the column of the frame that it shows."""

    name: str
    heading: str
    unit: str
    kind: str
    css: str


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown, and the value that it sorts by."""

    text: str
    sort: str
    css: str
    missing: bool


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table ready for the page; `frame` is what the CSV beside it holds, `folded` shows it only when asked for."""

    name: str
    title: str
    caption: str
    folded: bool
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    frame: pd.DataFrame


class TableSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a table shows of a frame.

    Attributes:
        headings: column of the frame → what it is called, in the order in which they are shown.
        together: groups of columns that share a unit, so that they can be compared at a glance.
        folded: shown only when asked for.
    """

    name: str
    title: str
    headings: dict[str, str]
    caption: str = ""
    together: tuple[tuple[str, ...], ...] = ()
    folded: bool = False


def make_table(
    spec: TableSpec, frame: pd.DataFrame, *, caption: str | None = None, folded: bool | None = None
) -> Table:
    """The columns of `spec.headings` that hold anything, in that order, under those headings.

    A column is shown in one unit, chosen by its median so that most cells read as 1 to 9,999; its numbers are rounded
    as everywhere (`units.shown_number`). `caption` and `folded` stand in for the specification's own.
    """
    headings, together = spec.headings, spec.together
    shown = [column for column in headings if column in frame and frame[column].notna().any()]
    columns, cells = [], []
    for position, column in enumerate(shown):
        values = frame[column]
        if _is_text(values):
            columns.append(Column(name=column, heading=headings[column], unit="", kind="text", css="text"))
            if column == "tier":
                values = values.map(lambda name: tier_row(name).label, na_action="ignore")
            longest = values.astype(str).str.len().max()
            css = "text long" if longest > 60 else "text name" if longest > 20 else "text"
            cells.append([_text_cell(value, css) for value in values])
            continue
        group = next((names for names in together if column in names), [column])
        quantity = quantity_of(column)
        scale = _scale(quantity, pd.concat([frame[name].astype(float) for name in group if name in frame]))
        unit = scale.unit + ("/image" if column.endswith("_per_image") else "")
        css = "text" if position == 0 else "number"
        columns.append(Column(name=column, heading=headings[column], unit=unit, kind="number", css=css))
        cells.append([_number_cell(value, quantity, scale.factor) for value in values])
    rows = tuple(zip(*cells, strict=True)) if cells else ()
    return Table(
        name=spec.name,
        title=spec.title,
        caption=spec.caption if caption is None else caption,
        folded=spec.folded if folded is None else folded,
        columns=tuple(columns),
        rows=rows,
        frame=frame,
    )


def quantity_of(column: str) -> str | None:
    """Which of `units.SCALES` a column holds, by the words of its name; None of what has no unit."""
    words = column.removesuffix("_per_image").split("_")
    named = next((word for word in reversed(words) if word in SCALES), None)
    return "fraction" if named is None and any(word in _SHARES for word in words) else named


def _is_text(values: pd.Series) -> bool:
    return not all(isinstance(v, numbers.Number) and not isinstance(v, bool) for v in values.dropna())


def _scale(quantity: str | None, values: pd.Series) -> Scale:
    if quantity is None:
        return Scale(unit="", factor=1.0, least=0.0)
    sizes = values.dropna().abs()
    return scale_of(SCALES[quantity], float(sizes[sizes > 0].median()) if (sizes > 0).any() else 0.0)


def _number_cell(value: Any, quantity: str | None, factor: float) -> Cell:
    if value is None or pd.isna(value):
        return Cell(text="", sort="", css="number", missing=True)
    number = float(value)
    return Cell(text=shown_number(quantity, number, factor), sort=repr(number), css="number", missing=False)


def _text_cell(value: object, css: str) -> Cell:
    missing = value is None or (isinstance(value, float) and math.isnan(value)) or value == ""
    text = ("yes" if value else "no") if isinstance(value, bool) else str(value)
    return Cell(text="" if missing else text, sort="" if missing else text, css=css, missing=missing)
