"""How quantities are read and written at the edges; inside the library everything is SI units and bytes.

GB and Gbit are powers of ten, GiB powers of two, as data sheets and operating systems mean them.

A field of a file's record that is typed as a `Quantity` ("900 GB/s" as `BytesPerSecond`) is read with its unit and
within physical bounds: `msgspec.convert(…, dec_hook=read_quantity)`; `enc_hook=write_quantity` writes it.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal

Dimension = Literal["bytes", "bytes_per_s", "flops_per_s", "seconds", "hertz", "watts", "joules", "usd_per_hour"]

KIB, MIB, GIB = 2**10, 2**20, 2**30

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
    "joules": {"J": 1.0, "kJ": 1e3, "MJ": 1e6, "Wh": 3600.0, "kWh": 3.6e6},
    "usd_per_hour": {"USD/h": 1.0},
}

_QUANTITY = re.compile(r"\s*([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*([^\s\d].*?)?\s*")


def parse_quantity(text: str, dimension: Dimension) -> float:
    """The value of `text` ("1555 GB/s", "200 Gbit/s", "1.3us") in the SI unit of `dimension`.

    Raises:
        ValueError: no number, no unit, or a unit of another dimension; the message lists the accepted units.
    """
    units = _UNITS[dimension]
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number with a unit")
    number, unit = match.groups()
    if unit is None:
        raise ValueError(f"{text!r} has no unit; one of {', '.join(units)} is needed")
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
    """A price."""

    dimension, unit, least, most = "usd_per_hour", "USD/h", 1e-9, 1e9


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


def _scaled(value: float, step: float, names: tuple[str, ...]) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {names[0]}"
    power = min(max(int(math.log(abs(value), step)), 0), len(names) - 1)
    if abs(round(value / step**power, 3)) >= step and power < len(names) - 1:
        power += 1
    return f"{value / step**power:.4g} {names[power]}"


def format_bytes(value: float) -> str:
    """1536 → "1.5 KiB"."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_count(value: float, unit: str = "") -> str:
    """41_000_000, "MAC" → "41 MMAC"."""
    return _scaled(value, 1000, tuple(p + unit for p in ("", "k", "M", "G", "T", "P", "E"))).strip()


def format_seconds(value: float) -> str:
    """0.0021 → "2.1 ms"; 5400 → "1.5 h"."""
    size = abs(value)
    for unit, factor in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if size >= factor:
            return f"{value / factor:.4g} {unit}"
    return "0 s" if value == 0 else f"{value / 1e-9:.4g} ns"


def format_joules(value: float) -> str:
    """7.2e6 → "2 kWh"; small energies stay in joules."""
    if abs(value) >= 3.6e6:
        return f"{value / 3.6e6:.4g} kWh"
    return _scaled(value, 1000, ("J", "kJ", "MJ"))
