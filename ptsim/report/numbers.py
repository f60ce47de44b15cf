"""Numbers as people read them: three significant digits, which is what a projection can bear, and a true minus."""

from __future__ import annotations

# The units that a quantity is shown in, largest first, by the last word of its name.
SCALES: dict[str, tuple[tuple[str, float], ...]] = {
    "seconds": (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)),
    "bytes": (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)),
    "joules": (("MWh", 3.6e9), ("kWh", 3.6e6), ("kJ", 1e3), ("J", 1.0)),
    "macs": (("TMAC", 1e12), ("GMAC", 1e9), ("MMAC", 1e6), ("kMAC", 1e3), ("MAC", 1.0)),
    "parameters": (("million", 1e6), ("thousand", 1e3), ("", 1.0)),
    "grams": (("t", 1e6), ("kg", 1e3), ("g", 1.0)),
    "watts": (("W", 1.0),),
    "usd": (("USD", 1.0),),
}


def format_number(value: float) -> str:
    """Three significant digits, rounded once, with a true minus."""
    return f"{float(f'{value:.3g}'):,.10g}".replace("-", "\u2212")


def _format(quantity: str, value: float, like: float | None) -> str:
    size = abs(value if like is None else like)
    unit, factor = next((scale for scale in SCALES[quantity] if size >= scale[1]), SCALES[quantity][-1])
    return f"{format_number(value / factor)} {unit}"


def format_seconds(value: float, like: float | None = None) -> str:
    """Three significant digits, in the unit of `like`. Less than a nanosecond is rounding: 0 s."""
    return "0 s" if abs(value) < 1e-9 else _format("seconds", value, like)


def format_bytes(value: float, like: float | None = None) -> str:
    """Three significant digits, in the unit of `like`."""
    return _format("bytes", value, like)


def format_joules(value: float, like: float | None = None) -> str:
    """Three significant digits, in the unit of `like`; in kWh from a tenth of one on."""
    size = abs(value if like is None else like)
    return _format("joules", value, 3.6e6 if 3.6e5 <= size < 3.6e6 else size)


def format_grams(value: float, like: float | None = None) -> str:
    """Three significant digits, in the unit of `like`."""
    return _format("grams", value, like)


def format_macs(value: float, like: float | None = None) -> str:
    """Three significant digits, in the unit of `like`."""
    return _format("macs", value, like)


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


def format_usd(usd: float, like: float | None = None) -> str:
    """Whole dollars from 100 on, cents below, and two significant digits below one; `like` decides which."""
    size = abs(usd if like is None else like)
    if size >= 100:
        text = f"{usd:,.0f}"
    elif size >= 1 or usd == 0:
        text = f"{usd:,.2f}"
    else:
        text = f"{usd:.2g}"
    return f"{text} USD".replace("-", "\u2212")
