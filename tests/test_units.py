from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptsim.units import (
    Dimension,
    format_bytes,
    format_count,
    format_joules,
    format_seconds,
    parse_quantity,
)


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("1555 GB/s", "bytes_per_s", 1.555e12),
        ("200 Gbit/s", "bytes_per_s", 25e9),
        ("1.3us", "seconds", 1.3e-6),
        ("1.3 µs", "seconds", 1.3e-6),
        ("2 h", "seconds", 7200.0),
        ("80 GiB", "bytes", 80 * 2**30),
        ("80 GB", "bytes", 80e9),
        ("1.5e3 TFLOP/s", "flops_per_s", 1.5e15),
        ("1.41 GHz", "hertz", 1.41e9),
        ("1 kWh", "joules", 3.6e6),
        ("400 W", "watts", 400.0),
        ("3.5 USD/h", "usd_per_hour", 3.5),
    ],
)
def test_a_quantity_is_read_in_si(text: str, dimension: Dimension, value: float) -> None:
    assert parse_quantity(text, dimension) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "dimension", "problem"),
    [
        ("fast", "bytes_per_s", "not a number"),
        ("", "seconds", "not a number"),
        ("100", "bytes_per_s", "has no unit"),
        ("100 GB", "bytes_per_s", "has the unit 'GB'"),
        ("5 parsecs", "seconds", "has the unit 'parsecs'"),
        ("1 2 s", "seconds", "unit|number"),
    ],
)
def test_a_wrong_quantity_says_what_is_accepted(text: str, dimension: Dimension, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_quantity(text, dimension)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1, "1 B"), (1536, "1.5 KiB"), (2**30, "1 GiB"), (1023.9999, "1 KiB"), (-2048, "-2 KiB")],
)
def test_bytes_are_binary(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(41_000_000, "41 MMAC"), (999, "999 MAC"), (999_999.9, "1 MMAC"), (4.1e9, "4.1 GMAC")]
)
def test_counts_are_decimal(value: float, text: str) -> None:
    assert format_count(value, "MAC") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (0.0021, "2.1 ms"), (5400, "1.5 h"), (90, "1.5 min"), (3e-9, "3 ns"), (-2.5e-6, "-2.5 µs")],
)
def test_seconds_take_the_unit_that_fits(value: float, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(7.2e6, "2 kWh"), (1500.0, "1.5 kJ"), (0.0, "0 J")])
def test_joules_become_kilowatt_hours_when_there_are_many(value: float, text: str) -> None:
    assert format_joules(value) == text


@given(st.floats(min_value=1e-9, max_value=1e15))
def test_formatting_keeps_four_digits(value: float) -> None:
    text = format_seconds(value).replace("min", "min").split()
    assert parse_quantity(" ".join(text), "seconds") == pytest.approx(value, rel=1e-3)
