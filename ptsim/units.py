"""How quantities are read and written at the edges; inside the library everything is SI units and bytes.

GB and Gbit are powers of ten, GiB powers of two, as data sheets and operating systems mean them.

A field of a file's record that is typed as a `Quantity` ("900 GB/s" as `BytesPerSecond`) is read with its unit and
within physical bounds: `msgspec.convert(…, dec_hook=read_quantity)`; `enc_hook=write_quantity` writes it.
"""

from __future__ import annotations

import datetime
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

Dimension = Literal["bytes", "bytes_per_s", "flops_per_s", "seconds", "hertz", "watts", "joules", "usd_per_hour"]

MIB, GIB = 2**20, 2**30
GBIT = 1e9 / 8  # bytes: what links of networks are given in, by the second
KWH = 3.6e6  # joules

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9}

_UNITS: dict[Dimension, dict[str, float]] = {
    "bytes": {p + "B": f for p, f in (_DECIMAL | _BINARY).items()},
    "bytes_per_s": {p + "B/s": f for p, f in (_DECIMAL | _BINARY).items()}
    | {p + "bit/s": f / 8 for p, f in _DECIMAL.items()},
    "flops_per_s": {p + "FLOP/s": f for p, f in _DECIMAL.items()},
    "seconds": {p + "s": f for p, f in _SMALL.items()} | {"min": 60.0, "h": 3600.0},
    "hertz": {p + "Hz": f for p, f in _DECIMAL.items()},
    "watts": {"W": 1.0, "kW": 1e3, "mW": 1e-3},
    "joules": {"J": 1.0, "kJ": 1e3, "MJ": 1e6, "Wh": 3600.0, "kWh": KWH},
    "usd_per_hour": {"USD/h": 1.0},
}

_MU = "\N{GREEK SMALL LETTER MU}"  # looks like the micro sign
_QUANTITY = re.compile(r"\s*([-+]?\d+(?:_\d+)*(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*([^\s\d_.,].*?)?\s*")


def parse_quantity(text: str, dimension: Dimension, *, also: Mapping[str, float] | None = None) -> float:
    """The value of `text` ("1555 GB/s", "200 Gbit/s", "1.3us") in the SI unit of `dimension`.

    Args:
        text: what was given.
        dimension: what it is a quantity of.
        also: further units that are taken here, and how much one of each is.

    Raises:
        ValueError: no number, no unit, or a unit of another dimension; the message lists the accepted units.
    """
    units = _UNITS[dimension] | dict(also or {})
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number with a unit")
    number, unit = match.groups()
    if unit is None:
        raise ValueError(f"{text!r} has no unit; one of {', '.join(units)} is needed")
    unit = unit.replace(_MU, "\N{MICRO SIGN}")
    if unit not in units:
        raise ValueError(f"{text!r} has the unit {unit!r}; one of {', '.join(units)} is needed")
    return float(number) * units[unit]


class Quantity(float):
    """A number in SI units that files write with its unit; `least` and `most` are what physics allows."""

    dimension: ClassVar[Dimension]
    unit: ClassVar[str]
    least: ClassVar[float]
    most: ClassVar[float]
    zero: ClassVar[bool] = False  # may it be 0 as well

    @classmethod
    def parse(cls, text: str) -> Quantity:
        """The quantity of `text`.

        Raises:
            ValueError: no unit, a unit of another dimension, or beyond the bounds.
        """
        value = parse_quantity(text, cls.dimension)
        if cls.least <= value <= cls.most or (value == 0 and cls.zero):
            return cls(value)
        if value <= 0:
            raise ValueError(f"{text!r} is {'negative' if cls.zero else 'not positive'}")
        raise ValueError(f"{text!r} is not between {cls.least:g} and {cls.most:g} {cls.unit}")


class Bytes(Quantity):
    """A size, of memory or of a cache."""

    dimension, unit, least, most = "bytes", "B", 1.0, 1e18


class BytesPerSecond(Quantity):
    """The bandwidth of a memory or a link."""

    dimension, unit, least, most = "bytes_per_s", "B/s", 1.0, 1e15


class FlopsPerSecond(Quantity):
    """A peak."""

    dimension, unit, least, most = "flops_per_s", "FLOP/s", 1.0, 1e21


class Hertz(Quantity):
    """A clock."""

    dimension, unit, least, most = "hertz", "Hz", 1.0, 1e12


class Watts(Quantity):
    """A power."""

    dimension, unit, least, most = "watts", "W", 1e-3, 1e9


class Seconds(Quantity):
    """A duration: nothing, or a femtosecond to a hundred years."""

    dimension, unit, least, most, zero = "seconds", "s", 1e-15, 3.2e9, True


class UsdPerHour(Quantity):
    """A price; also nothing."""

    dimension, unit, least, most, zero = "usd_per_hour", "USD/h", 0.0, 1e9, True


def read_quantity(kind: type, value: Any) -> Any:
    """The `dec_hook` of records with quantities: reads text as the `Quantity` that the field is.

    Raises:
        ValueError: see `Quantity.parse`.
    """
    if not issubclass(kind, Quantity):
        raise NotImplementedError(f"{kind} is not read from files")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"found {value!r}, expected a number with a unit, one of {', '.join(_UNITS[kind.dimension])}")
    return kind.parse(str(value))  # a bare number: the complaint is about the unit that is missing


def write_quantity(value: Any) -> str:
    """The `enc_hook` of records with quantities: the number with the SI unit, so that it is read back exactly."""
    if not isinstance(value, Quantity):
        raise NotImplementedError(f"{type(value)} is not written into files")
    return f"{float(value)!r} {value.unit}"


class Scale(NamedTuple):
    """A unit that numbers are shown in: how much one of it is, and the size from which on it is taken."""

    unit: str
    factor: float
    least: float


def _scales(*units: tuple[str, float]) -> tuple[Scale, ...]:
    return tuple(Scale(unit=unit, factor=factor, least=factor) for unit, factor in units)


@functools.cache
def _counts(unit: str) -> tuple[Scale, ...]:
    return _scales(*((prefix + unit, 1000.0**power) for power, prefix in zip(range(6, -1, -1), _COUNTING, strict=True)))


_COUNTING = ("E", "P", "T", "G", "M", "k", "")

# The units of every quantity, largest first, by the last word of the names that columns have for it.
SCALES: Mapping[str, tuple[Scale, ...]] = {
    "seconds": _scales(("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)),
    "bytes": _scales(
        ("PiB", 2.0**50), ("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)
    ),
    "joules": (
        *_scales(("MWh", 1e3 * KWH)),
        Scale(unit="kWh", factor=KWH, least=KWH / 10),  # from a tenth of one on: that is what one pays for
        *_scales(("kJ", 1e3), ("J", 1.0)),
    ),
    "macs": _counts("MAC"),
    "parameters": _scales(("million", 1e6), ("thousand", 1e3), ("", 1.0)),
    "grams": _scales(("t", 1e6), ("kg", 1e3), ("g", 1.0)),
    "watts": _scales(("W", 1.0)),
    "usd": _scales(("USD", 1.0)),
    "fraction": (Scale(unit="%", factor=0.01, least=0.0),),
    "points": (Scale(unit="points", factor=1.0, least=0.0),),  # of percentages
}
_COUNTED = frozenset({"bytes", "macs", "parameters"})  # single ones are whole
_MINUS = "\N{MINUS SIGN}"


def scale_of(scales: Sequence[Scale], size: float) -> Scale:
    """The unit in which amounts of about `size` are shown; of nothing, the one whose factor is 1."""
    if size == 0:
        return next((scale for scale in scales if scale.factor == 1.0), scales[-1])
    return next((scale for scale in scales if size >= scale.least), scales[-1])


def shown_number(quantity: str | None, value: float, factor: float = 1.0) -> str:
    """The number in units of `factor`, without the unit: one rule for sentences, tables, figures and the command line.

    Three significant digits with their zeros, but no digit before the point is left out and at most four come after it.
    Shares, and points of percentages, have one digit after the point. Money has whole dollars from 100 on, cents below,
    and two significant digits below one dollar. Counts, and what has no unit (`quantity` is None), are exact where they
    are whole. The minus is a true one.
    """
    if quantity in ("fraction", "points"):
        places = 1
    elif quantity == "usd":
        small = abs(value) < 99.995
        places = max(2, _places(value, 2, most=8)) if small and value else _places(value, 3, most=0)
    elif (quantity is None or (quantity in _COUNTED and factor == 1.0)) and float(value).is_integer():
        places = 0
    else:
        places = _places(value / factor, 3, most=4)
    return f"{value / factor:z,.{places}f}".replace("-", _MINUS)


def _places(value: float, digits: int, *, most: int) -> int:
    """How many digits after the point leave so many significant ones after rounding; from 0 to `most`."""
    if value == 0 or not math.isfinite(value):
        return 0
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if 0 < places <= most and round(abs(value), places) >= 10.0 ** (digits - places):  # 9.996 is shown as 10.0
        places -= 1
    return min(max(places, 0), most)


def format_quantity(
    quantity: str, value: float, like: float | None = None, *, scales: Sequence[Scale] | None = None
) -> str:
    """The number and its unit, rounded as by `shown_number`.

    Args:
        quantity: one of `SCALES`.
        value: in seconds, bytes, joules, grams, USD, or as a plain count or fraction.
        like: an amount beside which the value is shown; the unit is that amount's.
        scales: units other than the quantity's usual ones.
    """
    scales = scales or SCALES[quantity]
    scale = scale_of(scales, abs(value if like is None else like))
    text = shown_number(quantity, value, scale.factor)
    position = scales.index(scale)
    if like is None and position > 0:
        larger = scales[position - 1]
        rounded = float(text.replace(",", "").replace(_MINUS, "-"))
        if abs(rounded) * scale.factor >= larger.least:  # 59.99 s are a minute
            scale, text = larger, shown_number(quantity, value, larger.factor)
    return f"{text} {scale.unit}".strip()


def format_seconds(value: float, like: float | None = None) -> str:
    """0.0021 → "2.10 ms"; 5400 → "1.50 h"; less than a nanosecond is rounding: "0 s"."""
    return format_quantity("seconds", 0.0 if abs(value) < 1e-9 else value, like)


def format_bytes(value: float, like: float | None = None) -> str:
    """1536 → "1.50 KiB"."""
    return format_quantity("bytes", value, like)


def format_joules(value: float, like: float | None = None) -> str:
    """7.2e6 → "2.00 kWh"."""
    return format_quantity("joules", value, like)


def format_count(value: float, unit: str = "") -> str:
    """41_000_000, "MAC" → "41.0 MMAC"."""
    return format_quantity("macs", value, scales=_counts(unit))


def time_stamp() -> str:
    """Now, as every file of ptsim says when it was made: ISO 8601, UTC, "2026-11-22T13:00:00Z"."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_shape(shape: Sequence[int]) -> str:
    """Sizes of axes, for example of an image: "3×224×224"."""
    return "×".join(map(str, shape))


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def in_turn(things: Iterable[object]) -> str:
    """One after the other, each once: "1, then 4"."""
    return ", then ".join(dict.fromkeys(map(str, things)))


def interval(low: str, high: str) -> str:
    """Both ends of an interval, the unit once where it is the same: "6.72 to 7.43 min"."""
    number, blank, unit = low.rpartition(" ")
    return f"{number if blank and high.endswith(blank + unit) else low} to {high}"


def some_of(names: Sequence[str]) -> str:
    """The first three of many names: "a, b, c and others"."""
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number with what it counts: "1 epoch", "90 epochs"; `several` where an s does not make the plural."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def percent(fraction: float) -> str:
    """0.1234 → "12.3 %"."""
    return format_quantity("fraction", fraction)


def format_bandwidth(bytes_per_s: float) -> str:
    """As data sheets give it: 1.555e12 → "1,555 GB/s"."""
    return f"{given_number(bytes_per_s / 1e9)} GB/s"


def format_peak(flops_per_s: float) -> str:
    """As data sheets give it: 19.5e12 → "19.5 TFLOP/s"."""
    return f"{given_number(flops_per_s / 1e12)} TFLOP/s"


_SHOWN_UNITS = (
    "×",
    "GPU",
    "GPUs",
    "Gbit/s",
    *(scale.unit for scales in SCALES.values() for scale in scales if scale.unit),
)
_BEFORE_UNIT = re.compile(rf"(?<=\d) (?=(?:{'|'.join(map(re.escape, _SHOWN_UNITS))})(?!\w))")


def together(text: str) -> str:
    """The text with spaces that do not break between a number and its unit."""
    return _BEFORE_UNIT.sub("\N{NO-BREAK SPACE}", text)


def given_number(value: float) -> str:
    """Four significant digits at most, none before the point left out, without zeros that nobody wrote."""
    text = f"{value:,.{_places(value, 4, most=6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
