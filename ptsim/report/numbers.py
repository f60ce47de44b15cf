"""Numbers as people read them: three significant digits, which is what a projection can bear, and a true minus."""

from __future__ import annotations

from ptsim import units


def _three_digits(text: str) -> str:
    """A quantity as `ptsim.units` shows it, with three significant digits."""
    number, _, unit = text.partition(" ")
    return f"{float(f'{float(number):.3g}'):,.10g} {unit}".strip().replace("-", "\u2212")


def format_seconds(value: float) -> str:
    """Three significant digits. Less than a nanosecond is rounding: 0 s."""
    return _three_digits(units.format_seconds(value if abs(value) >= 1e-9 else 0.0))


def format_bytes(value: float) -> str:
    """Three significant digits."""
    return _three_digits(units.format_bytes(value))


def format_joules(value: float) -> str:
    """Three significant digits; in kWh from a tenth of one on, so that a saving has the unit of what it is part of."""
    if abs(value) >= 3.6e5:
        return _three_digits(f"{value / 3.6e6:.6g} kWh")
    return _three_digits(units.format_joules(value))


def format_grams(value: float) -> str:
    """Three significant digits, in g, kg or t."""
    for unit, factor in (("t", 1e6), ("kg", 1e3), ("g", 1.0)):
        if abs(value) >= factor or unit == "g":
            return _three_digits(f"{value / factor:.6g} {unit}")
    raise AssertionError("grams are the last unit")


def format_count(value: float, unit: str) -> str:
    """Three significant digits."""
    return _three_digits(units.format_count(value, unit))


def upper(sentence: str) -> str:
    """The sentence with a capital first letter; the rest stays."""
    return sentence[:1].upper() + sentence[1:]


def percent(fraction: float) -> str:
    """A fraction in percent: one digit after the point below 10 %, none above."""
    text = f"{100 * fraction:.1f} %" if abs(fraction) < 0.0995 else f"{100 * fraction:.0f} %"
    return text.replace("-", "\u2212")


def percent_range(low: float, high: float) -> str:
    """Both ends in percent, with one digit after the point where they are close."""
    digits = 0 if high - low >= 0.03 else 1
    return f"{100 * low:.{digits}f} % and {100 * high:.{digits}f} %".replace("-", "\u2212")


def format_usd(usd: float) -> str:
    """Whole dollars from 100 on, cents below, and two significant digits below one."""
    if abs(usd) >= 100:
        text = f"{usd:,.0f}"
    elif abs(usd) >= 1 or usd == 0:
        text = f"{usd:,.2f}"
    else:
        text = f"{usd:.2g}"
    return f"{text} USD".replace("-", "\u2212")
