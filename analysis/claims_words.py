"""How claims write their figures, and which numbers a text states."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from ptsim.units import listed

Figures = list[str]  # texts that must stand in a claim, such as "77 %"

_NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?"  # not part of a word, as the 100 of A100s
_SIGNED = re.compile(rf"(?:(?<![\w)])[+−-])?{_NUMBER}")
# A number with the unit of something measured, or several before one unit.
_UNIT = r"%|points?|ms|µs|s|h|seconds?|minutes?|hours?|kWh|[KMG]i?B|GMAC/s|times\sas"
_AND = r"\s*(?:,\s*|\s(?:%\s)?(?:and|or|to|against|instead\sof|→)\s)[+−]?"
_QUANTITY = re.compile(rf"[+−]?{_NUMBER}(?:{_AND}{_NUMBER})*[\s-]?(?P<unit>{_UNIT})(?!\w)")
_SAME = {"points": "point", "second": "s", "seconds": "s", "minutes": "minute", "hour": "h", "hours": "h"}


class Quantity(NamedTuple):
    """Numbers in a row with the unit of the last one, as in "62, 65 and 65 %"."""

    text: str
    numbers: tuple[str, ...]
    unit: str


def in_order(text: str) -> list[str]:
    """Every number in the text as it is written, with the sign before it; a hyphen as sign is a minus."""
    found = (match.group().rstrip(",") for match in _SIGNED.finditer(text))
    return ["−" + number[1:] if number.startswith("-") else number for number in found]


def numbers(text: str) -> set[str]:
    """The numbers of the text, each once."""
    return set(in_order(text))


def quantities(text: str) -> list[Quantity]:
    """The measured figures of the text: numbers with a unit."""
    return [
        Quantity(" ".join(m.group().split()), tuple(in_order(m.group())), _SAME.get(m["unit"], m["unit"]))
        for m in _QUANTITY.finditer(text)
    ]


def misquoted(text: str, said: str) -> list[str]:
    """The measured figures of the text that `said` does not have: with these units, a row of numbers in this order.

    A number without a sign may stand there with one.
    """
    row = in_order(said)
    units = {(number.lstrip("+−"), found.unit) for found in quantities(said) for number in found.numbers}

    def stands(found: Quantity) -> bool:
        size = len(found.numbers)
        rows = (row[start : start + size] for start in range(len(row) - size + 1))
        return all((number.lstrip("+−"), found.unit) in units for number in found.numbers) and any(
            all(ours in (theirs, theirs.lstrip("+−")) for ours, theirs in zip(found.numbers, some, strict=True))
            for some in rows
        )

    return [found.text for found in quantities(text) if not stands(found)]


def missing(text: str, said: str) -> list[str]:
    """The numbers of the text that `said` does not have; one without a sign may stand there with one."""
    known = numbers(said)
    return sorted(numbers(text) - known - {number.lstrip("+−") for number in known})


def left_over(text: str, figures: Iterable[str]) -> tuple[str, Figures]:
    """The text without the figures, each taken out once, and the figures that do not stand in it."""
    absent = []
    for figure in figures:
        # Not the end or the beginning of another number: "8 %" does not stand in "18 %", nor in "−8 %".
        whole = re.compile(rf"(?<![\w.+−±]){re.escape(figure)}(?!\w|[.,]\d)")
        text, count = whole.subn("…", text, count=1)
        if not count:
            absent.append(figure)
    return text, absent


def rounded(value: float, digits: int, sign: str = "") -> str:
    """100 times the value with so many decimals and the minus sign of the text."""
    return f"{100 * value:{sign}.{digits}f}".replace("-", "−")


def percent(value: float, digits: int = 0) -> str:
    """77 % of 0.77."""
    return f"{rounded(value, digits)} %"


def percents(values: Iterable[float], digits: int = 0) -> str:
    """Several in a row: "62, 65 and 65 %"."""
    return f"{listed([rounded(value, digits) for value in values])} %"


def signed(value: float, digits: int = 1) -> str:
    """+2.5 of 0.025, without the unit."""
    return rounded(value, digits, "+")


def span(errors: pd.Series[float], digits: int = 1) -> str:
    """From the lowest to the highest, as in "−3.6 to +1.2 %"."""
    return f"{signed(errors.min(), digits)} to {signed(errors.max(), digits)} %"
