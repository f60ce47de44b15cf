"""How claims write their figures, and which numbers a text states."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from ptsim.units import listed

Figures = list[str]  # texts that must stand in a claim, such as "77 %"

_NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?"  # not part of a word, as the 100 of A100s
_SIGNED = re.compile(rf"(?:(?<![\w)])[+−-])?{_NUMBER}")
# A number with the unit of something measured, or several before one unit.
_UNIT = r"points?|ms|µs|s|h|seconds?|minutes?|hours?|kWh|[KMG]i?B|GMAC/s"
_AND = r"\s*(?:,\s*|\s(?:%\s)?(?:and|or|to|against|instead\sof|→)\s)[+−]?"
_QUANTITY = re.compile(rf"[+−]?{_NUMBER}(?:{_AND}{_NUMBER})*(?:\s?%|\s(?:{_UNIT})\b|[- ]times as\b)")


def numbers(text: str) -> set[str]:
    """Every number in the text as it is written, with the sign before it; a hyphen as sign is a minus."""
    found = (match.group().rstrip(",") for match in _SIGNED.finditer(text))
    return {"−" + number[1:] if number.startswith("-") else number for number in found}


def quantities(text: str) -> set[str]:
    """The numbers of the text that have a unit of something measured, those before the last of a series included."""
    return {number for found in _QUANTITY.findall(text) for number in numbers(found)}


def missing(stated: Iterable[str], said: str) -> list[str]:
    """The numbers that `said` does not have; one without a sign may stand there with one."""
    known = numbers(said)
    known |= {number.lstrip("+−") for number in known}
    return sorted(set(stated) - known)


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
