from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptsim.units import (
    GBIT,
    KWH,
    Bytes,
    BytesPerSecond,
    Dimension,
    FlopsPerSecond,
    Hertz,
    Quantity,
    Seconds,
    UsdPerHour,
    Watts,
    counted,
    format_bandwidth,
    format_bytes,
    format_count,
    format_joules,
    format_peak,
    format_quantity,
    format_seconds,
    in_turn,
    interval,
    listed,
    parse_quantity,
    percent,
    read_quantity,
    shown_number,
    some_of,
    time_stamp,
    together,
    write_quantity,
)


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("1555 GB/s", "bytes_per_s", 1.555e12),
        ("200 Gbit/s", "bytes_per_s", 25e9),
        ("1.3us", "seconds", 1.3e-6),
        ("1.3 µs", "seconds", 1.3e-6),
        ("1.3 \N{GREEK SMALL LETTER MU}s", "seconds", 1.3e-6),
        ("1e6 B", "bytes", 1e6),
        ("10 GiB", "bytes", 10 * 2**30),
        ("2 h", "seconds", 7200.0),
        ("80 GiB", "bytes", 80 * 2**30),
        ("80 GB", "bytes", 80e9),
        ("1.5e3 TFLOP/s", "flops_per_s", 1.5e15),
        ("1.41 GHz", "hertz", 1.41e9),
        ("1 kWh", "joules", 3.6e6),
        ("400 W", "watts", 400.0),
        ("3.5 USD/h", "usd_per_hour", 3.5),
        ("2 kB", "bytes", 2000.0),
        ("2 KB", "bytes", 2000.0),
        ("3 MB", "bytes", 3e6),
        ("1_000 B", "bytes", 1000.0),
        ("2 TB", "bytes", 2e12),
        ("2 KiB", "bytes", 2048.0),
        ("3 MiB/s", "bytes_per_s", 3 * 1024.0 * 1024),
        ("2 TiB", "bytes", 2 * 1024.0**4),
        ("8 bit/s", "bytes_per_s", 1.0),
        ("1.1 PFLOP/s", "flops_per_s", 1.1e15),
        ("2 ms", "seconds", 0.002),
        ("2 ns", "seconds", 2e-9),
        ("2 min", "seconds", 120.0),
        ("2 kHz", "hertz", 2000.0),
        ("250 mW", "watts", 0.25),
        ("2 kW", "watts", 2000.0),
        ("2 J", "joules", 2.0),
        ("2 kJ", "joules", 2000.0),
        ("2 MJ", "joules", 2e6),
        ("2 Wh", "joules", 7200.0),
        ("-1.5e-3 s", "seconds", -0.0015),
        (" +2 s ", "seconds", 2.0),
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
        ("1__000 B", "bytes", "not a number"),
        ("1_ B", "bytes", "not a number"),
        ("1,5 GiB", "bytes", "not a number"),
        ("nan s", "seconds", "not a number"),
        ("inf s", "seconds", "not a number"),
        (".5 s", "seconds", "not a number"),
        ("128M", "bytes", "has the unit 'M'"),
        ("5 parsecs", "seconds", "has the unit 'parsecs'"),
        ("1 2 s", "seconds", "unit|number"),
    ],
)
def test_a_wrong_quantity_says_what_is_accepted(text: str, dimension: Dimension, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_quantity(text, dimension)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1536, "1.50 KiB"),
        (5 * 2**20, "5.00 MiB"),
        (2**30, "1.00 GiB"),
        (3 * 2**40, "3.00 TiB"),
        (2 * 2**50, "2.00 PiB"),
        (1023.9999, "1.00 KiB"),
        (-2048, "\N{MINUS SIGN}2.00 KiB"),
    ],
)
def test_bytes_are_binary(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (41_000_000, "41.0 MMAC"),
        (999, "999 MAC"),
        (1500, "1.50 kMAC"),
        (999_999.9, "1.00 MMAC"),
        (4.1e9, "4.10 GMAC"),
        (5e12, "5.00 TMAC"),
        (2e15, "2.00 PMAC"),
        (3e18, "3.00 EMAC"),
    ],
)
def test_counts_are_decimal(value: float, text: str) -> None:
    assert format_count(value, "MAC") == text
    assert format_count(value, "FLOP") == text.replace("MAC", "FLOP")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.0021, "2.10 ms"),
        (5400, "1.50 h"),
        (90, "1.50 min"),
        (59.99, "1.00 min"),
        (0.99995, "1.00 s"),
        (0.9994, "999 ms"),
        (3599.99, "1.00 h"),
        (-59.99, "\N{MINUS SIGN}1.00 min"),
        (430.02, "7.17 min"),
        (4.5e6, "1,250 h"),
        (3e-9, "3.00 ns"),
        (1e-12, "0 s"),
        (-2.5e-6, "\N{MINUS SIGN}2.50 µs"),
    ],
)
def test_seconds_take_the_unit_that_fits(value: float, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.2e6, "2.00 kWh"),
        (1500.0, "1.50 kJ"),
        (0.0, "0 J"),
        (3.38e6, "0.939 kWh"),
        (4.3e3, "4.30 kJ"),
        (3.6e5, "0.100 kWh"),
        (3.59e5, "359 kJ"),
        (7.2e9, "2.00 MWh"),
    ],
)
def test_joules_become_kilowatt_hours_when_there_are_many(value: float, text: str) -> None:
    assert format_joules(value) == text


@given(st.floats(min_value=1e-8, max_value=1e12))
def test_formatting_keeps_three_digits(value: float) -> None:
    assert parse_quantity(format_seconds(value).replace(",", ""), "seconds") == pytest.approx(value, rel=5e-3)


def test_a_part_is_shown_in_the_unit_of_the_whole() -> None:
    assert format_seconds(0.613, 3.71) == "0.613 s"
    assert format_seconds(3804.0, 3432.0) == "63.4 min"
    assert format_joules(605e3, 205e3) == "605 kJ"
    assert format_joules(44.4e3, 0.19 * 3.6e6) == "0.0123 kWh"


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (1234.5, "1,234 USD"),
        (99.996, "100 USD"),
        (99.994, "99.99 USD"),
        (-0.5, "\N{MINUS SIGN}0.50 USD"),
        (0.996, "1.00 USD"),
        (60.7, "60.70 USD"),
        (0.5, "0.50 USD"),
        (0.0123, "0.012 USD"),
        (1e-7, "0.00000010 USD"),
        (0.0, "0 USD"),
    ],
)
def test_money_has_cents_where_they_count(usd: float, text: str) -> None:
    assert format_quantity("usd", usd) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.994, "9.99"), (9.996, "10.0"), (0.09996, "0.100"), (12345.6, "12,346"), (2.0, "2"), (2.5, "2.50")],
)
def test_a_number_keeps_three_digits_and_those_before_the_point(value: float, text: str) -> None:
    assert shown_number(None, value) == text


def test_points_of_percentages_have_one_digit_after_the_point() -> None:
    assert format_quantity("points", -1.864) == "\N{MINUS SIGN}1.9 points"
    assert format_quantity("points", 12.0) == "12.0 points"


def test_no_line_ends_between_a_number_and_its_unit() -> None:
    shown = together("saves 31.4 % and 3.04 h of 8 × h100 in 90 epochs, 2 hosts")
    assert shown.replace("\N{NO-BREAK SPACE}", "_") == "saves 31.4_% and 3.04_h of 8_× h100 in 90 epochs, 2 hosts"


def test_rounding_to_nothing_has_no_sign() -> None:
    assert percent(-0.0001) == "0.0 %"
    assert percent(-0.125) == "\N{MINUS SIGN}12.5 %"


def test_a_number_is_rounded_once() -> None:
    # 36.6506 is nearest to 36.7; by way of 36.65, which binary holds as less, it would be 36.6
    assert format_bytes(36.6506 * 2**40) == "36.7 TiB"


def test_what_a_data_sheet_gives_is_shown_as_it_gives_it() -> None:
    assert [format_bandwidth(value) for value in (1.555e12, 25e9, 12.5e9)] == ["1,555 GB/s", "25 GB/s", "12.5 GB/s"]
    assert [format_peak(value) for value in (19.5e12, 989.4e12, 312e12)] == [
        "19.5 TFLOP/s",
        "989.4 TFLOP/s",
        "312 TFLOP/s",
    ]


def test_names_and_counts_in_a_sentence():
    assert [listed(["a", "b", "c"][:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert [counted(n, "epoch") for n in (0, 1, 2000)] == ["0 epochs", "1 epoch", "2,000 epochs"]
    assert counted(2, "GPU is", "GPUs are") == "2 GPUs are"
    assert [some_of("abcd"[:n]) for n in (1, 3, 4)] == ["a", "a, b, c", "a, b, c and others"]
    assert (in_turn([1, 4, 1]), in_turn([2])) == ("1, then 4", "2")


@pytest.mark.parametrize(
    ("quantity", "value", "text"),
    [
        ("parameters", 25.6e6, "25.6 million"),
        ("parameters", 1e6, "1.00 million"),
        ("parameters", 1000, "1.00 thousand"),
        ("parameters", 999, "999"),
        ("grams", 1e6, "1.00 t"),
        ("grams", 1000, "1.00 kg"),
        ("grams", 15, "15.0 g"),
        ("watts", 400, "400 W"),
    ],
)
def test_other_quantities_have_the_units_that_people_use(quantity: str, value: float, text: str) -> None:
    assert format_quantity(quantity, value) == text


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Bytes, "1 B", 1),
        (Bytes, "1e18 B", 1e18),
        (BytesPerSecond, "1e15 B/s", 1e15),
        (FlopsPerSecond, "1e21 FLOP/s", 1e21),
        (Hertz, "1e12 Hz", 1e12),
        (Seconds, "0 s", 0),
        (Seconds, "1 us", 1e-6),
        (Seconds, "3.2e9 s", 3.2e9),
        (UsdPerHour, "0 USD/h", 0),
        (UsdPerHour, "1e9 USD/h", 1e9),
        (Watts, "1 mW", 1e-3),
        (Watts, "1e9 W", 1e9),
    ],
)
def test_bounds_and_nothing_are_quantities_where_physics_allows_them(
    kind: type[Quantity], text: str, value: float
) -> None:
    found = read_quantity(kind, text)
    assert isinstance(found, kind)
    assert found == value
    assert read_quantity(kind, write_quantity(found)) == found


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        (Bytes, "0 B", "'0 B' is not positive"),
        (Bytes, "-1 B", "'-1 B' is not positive"),
        (Bytes, "0.5 B", r"'0.5 B' is not between 1 and 1e\+18 B"),
        (Bytes, "1.1e18 B", "is not between"),
        (Seconds, "-1 s", "'-1 s' is negative"),
        (Seconds, "1e-16 s", "is not between 1e-15 and"),
        (Seconds, "3.3e9 s", "is not between 1e-15 and 3.2e\\+09 s"),
        (BytesPerSecond, "1.1e15 B/s", "is not between 1 and"),
        (FlopsPerSecond, "1.1e21 FLOP/s", "is not between 1 and"),
        (Hertz, "0.9 Hz", "is not between 1 and"),
        (Hertz, "1.1e12 Hz", "is not between 1 and"),
        (UsdPerHour, "-0.01 USD/h", "is negative"),
        (UsdPerHour, "1.1e9 USD/h", "is not between 0 and"),
        (Watts, "0.9 mW", "is not between 0.001 and"),
        (Watts, "0 W", "is not positive"),
        (Seconds, 5, "'5' has no unit; one of s, ms,"),
        (Seconds, True, "found True, expected a number with a unit, one of s, ms,"),
    ],
)
def test_what_physics_does_not_allow_is_refused(kind: type[Quantity], text: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_quantity(kind, text)


def test_a_time_stamp_is_now_in_utc_to_the_second() -> None:
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    stamp = time_stamp()
    assert stamp.endswith("Z")
    assert before <= datetime.datetime.fromisoformat(stamp) <= datetime.datetime.now(datetime.UTC)


def test_the_units_that_are_counted_in_are_those_that_are_read() -> None:
    assert (parse_quantity("1 Gbit/s", "bytes_per_s"), parse_quantity("1 kWh", "joules")) == (GBIT, KWH)
    assert (GBIT, KWH) == (125_000_000, 3_600_000)


def test_an_interval_has_its_unit_once_where_both_ends_have_it() -> None:
    assert [interval(low, high) for low, high in (("6.72 min", "7.43 min"), ("59.0 s", "1.10 min"), ("5%", "12%"))] == [
        "6.72 to 7.43 min",
        "59.0 s to 1.10 min",
        "5% to 12%",
    ]
